"""A small random model, and its surprise computed plainly."""

import flax.linen as nn
import jax
import numpy as np
from physics_files import SIZE
from step_setup import one_device

from vjepa_jax.config.defaults import get_config
from vjepa_jax.evals import frozen
from vjepa_jax.evals.frozen import FrozenModel
from vjepa_jax.program import build
from vjepa_jax.run import checkpoint

TUBELET = 2
BATCH = 16
FAMILIES = ("vjepa", "vjepa2", "vjepa2_1")


def make_config(family="vjepa2"):
    """Return the config of a very small model with a family's kind of features."""
    config = get_config()
    config.data.num_frames, config.data.resolution = 8, SIZE
    config.model.update(dtype="float32", pos_embed="rope", scan_layers=False)
    config.model.encoder.update(size="1x16x2x32", patch_size=8, tubelet_size=TUBELET)
    config.model.predictor.update(depth=1, width=8, num_heads=2)
    if family == "vjepa":
        config.model.pos_embed = "sincos"
    if family == "vjepa2_1":  # features of two levels, images with an embedding
        config.model.image_embed = True
        config.model.encoder.update(size="2x16x2x32", levels=(0, 1))
        config.model.predictor.update(deep_input=True, predict_context=True)
    return config


def make_model(family="vjepa2"):
    """Return a random model: its online encoder is not its target encoder."""
    config = make_config(family)
    encoder, predictor = build.make_models(config)
    shape = (8, SIZE, SIZE, 3)
    init = frozen._make_init(encoder, predictor, shape)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32),
        nn.unbox(jax.eval_shape(init, jax.random.key(0))),
    )
    return FrozenModel(encoder, predictor, params, config, shape, one_device())


def write_checkpoint(workdir, model, parts=("encoder", "predictor")):
    """Write a model as a checkpoint; without `parts` it has no predictor."""
    params = {name: model.params[name] for name in parts} or None
    meta = {"config": model.config.to_dict(), "video_shape": model.video_shape}
    checkpoint.save_converted(str(workdir), model.params["target"], params, meta)


def random_videos(rng, *lengths):
    return [rng.integers(0, 256, (n, SIZE, SIZE, 3), np.uint8) for n in lengths]


def plain_surprise(model, video, protocol):
    """Cut the windows and take the error of each context, with NumPy.

    Args:
      model: with a predictor.
      video: uint8 [..., n, S, S, 3].
      protocol: of the measure.

    Returns:
      [..., windows, contexts].
    """
    columns = []
    last = video.shape[-4] - protocol.num_frames
    starts = range(0, last + 1, protocol.stride)
    windows = np.stack(
        [video[..., i : i + protocol.num_frames, :, :, :] for i in starts], axis=-5
    )
    batch = windows.reshape(-1, *windows.shape[-4:])
    missing = -len(batch) % BATCH  # one shape, one compilation
    batch = np.concatenate([batch, batch[:1].repeat(missing, 0)])
    num_tokens = protocol.num_frames // TUBELET * 4
    for context in protocol.context_frames:
        seen = range(context // TUBELET * 4)
        errors = []
        for part in np.split(batch, len(batch) // BATCH):
            rest = range(len(seen), num_tokens)
            found = model.predict(part, seen, rest, protocol.mask_index)
            errors.append(np.abs(found[0] - found[1]).mean((1, 2)))
        errors = np.concatenate(errors)[: len(batch) - missing]
        columns.append(errors.reshape(windows.shape[:-4]))
    return np.stack(columns, axis=-1)
