"""Shrink a recipe to two updates that take seconds on a laptop.

A config file with variants passes its argument (`configs/vjepa2.py:vitg16,smoke`) to
`split_argument` and then, for the small form, its config to `shrink`.
"""

import re
from collections.abc import Collection

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict

WORD = "smoke"
STEPS = 2
_BATCH_SIZE = 8
_RESOLUTION = 64
_WORLD = "runs/smoke_world"


def split_argument(argument: str, variants: Collection[str]) -> tuple[str, bool]:
    """Split a config file's argument: "variant", "variant,smoke", "smoke" or "".

    Args:
      argument: what follows the file's name and a colon.
      variants: known names; the first is the default.

    Returns:
      (variant, is_smoke).

    Raises:
      UserError: an unknown word.
    """
    words = [word for word in re.split("[,:]", argument) if word]
    names = [word for word in words if word != WORD] or [next(iter(variants))]
    if len(names) > 1 or names[0] not in variants:
        raise UserError(
            f"'{argument}' is not a variant of this config; known: "
            f"{', '.join(variants)}, each also with ,{WORD}"
        )
    return names[0], WORD in words


def shrink(config: ConfigDict) -> ConfigDict:
    """Return the config at the size of a smoke test.

    It keeps streams, mask types, positions, levels, the predictor's parts, the
    objective, the forms of schedules and rematerialisation. Model, clips and batch
    become small. The run to start from and the teacher are removed. The data is a small
    synthetic world, rendered at the start.
    """
    with config.unlocked():
        config.total_steps = STEPS
        config.batch_size = _BATCH_SIZE
        config.mesh.fsdp = 1
        config.world.path = _WORLD
        for key in config.world:
            if key.endswith("_videos"):
                config.world[key] = 16
        config.data.path = f"{_WORLD}/pretrain.csv"
        config.data.mix_weights = ()
        config.data.num_workers = 0
        clips = [config.data, *config.streams.values()]
        masks = [config.masks, *(fields.masks for fields in config.streams.values())]
        for clip in clips:
            clip.resolution = _RESOLUTION
            # 1, 16 and 64 frames become 1, 4 and 8.
            clip.num_frames = {1: 1, 16: 4}.get(clip.num_frames, 8)
        for fields in config.streams.values():
            fields.path, fields.batch_size = config.data.path, _BATCH_SIZE
            fields.mix_weights = ()
        for of_stream in masks:
            for mask in of_stream.values():
                mask.group_size = 2
        config.init.is_required = config.teacher.is_required = False
        config.init.path = config.teacher.path = ""
        _shrink_model(config.model)
        optim, objective = config.optim, config.objective
        optim.warmup_steps = min(optim.warmup_steps, 1)
        optim.clip_start_step = min(optim.clip_start_step, 1)
        objective.context_warmup = tuple(min(s, 1) for s in objective.context_warmup)
        config.checkpoint.every_steps = STEPS
        config.log.every_steps = 1
    return config


def _shrink_model(model: ConfigDict) -> None:
    model.dtype = "float32"  # the fastest on a CPU
    model.encoder.size = "nano"
    model.encoder.levels = tuple(range(len(model.encoder.levels)))
    model.predictor.depth = 2
    model.predictor.width = 32
    model.predictor.num_heads = 2
    model.predictor.out_dim = 0
