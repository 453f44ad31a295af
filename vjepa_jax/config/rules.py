"""Which values a pretraining run's config may hold."""

import math
from typing import Any

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import MAIN_STREAM, ConfigDict, flatten


def _require(is_met: bool, key: str, value: Any, mend: str) -> None:
    if not is_met:
        raise UserError(f"config.{key}={value!r} is out of range: {mend}")


def validate(config: ConfigDict) -> None:
    """Check values against each other and their ranges.

    Raises:
      UserError: names the key, its value and what it may be.
    """
    flat = flatten(config.to_dict())
    positive = (
        "total_steps batch_size accumulate_steps "
        "data.prefetch_megabytes data.worker_timeout_secs data.num_clips "
        "data.max_pixels data.time_limit_secs "
        "model.encoder.patch_size model.encoder.tubelet_size "
        "model.predictor.depth model.predictor.width model.predictor.num_heads "
        "checkpoint.every_steps checkpoint.keep log.every_steps optim.learning_rate "
        "optim.schedule_scale optim.eps optim.max_skipped_in_row "
        "optim.spike_deviations objective.exponent weight profile.num_steps"
    )
    for key in positive.split():
        _require(flat[key] > 0, key, flat[key], "give a positive number")
    not_negative = (
        "seed data.num_workers optim.warmup_steps optim.start_learning_rate "
        "optim.final_learning_rate optim.weight_decay optim.final_weight_decay "
        "optim.clip_norm optim.clip_start_step optim.anneal_steps optim.spike_window "
        "objective.variance_weight objective.covariance_weight "
        "objective.context_weight objective.prediction_variance_weight "
        "model.predictor.num_mask_tokens "
        "model.predictor.out_dim model.encoder.output_levels teacher.output_levels "
        "log.watchdog_secs log.image_clips profile.start_step"
    )
    for key in not_negative.split():
        _require(flat[key] >= 0, key, flat[key], "give zero or a positive number")
    fractions = (
        "ema.start ema.end optim.b1 optim.b2 data.flip_probability "
        "data.grayscale_probability data.erase_probability"
    )
    for key in (*fractions.split(), "data.max_bad_fraction"):
        _require(0 <= flat[key] <= 1, key, flat[key], "give a number from 0 to 1")
    _require_pair("data.crop_scale", flat["data.crop_scale"], 1)
    _require_pair("data.crop_aspect_ratio", flat["data.crop_aspect_ratio"])
    choices = {
        "model.pos_embed": ("sincos", "rope", "rope_tiled"),
        "model.mlp": ("gelu", "swiglu", "swiglu_wide"),
        "model.predictor.mlp": ("", "gelu", "swiglu", "swiglu_wide"),
        "objective.target": ("features", "pixels"),
        "model.predictor.mask_token_per": ("mask", "stream", "run"),
        "optim.schedule": ("cosine", "linear", "wsd"),
        "model.dtype": ("float32", "bfloat16"),
        "model.target_dtype": ("", "int8", "float8_e4m3fn"),
        "data.sampling": ("exact", "official"),
        "data.resize": ("antialias", "official"),
        "data.erase_mode": ("pixel", "const"),
        "model.attention": ("auto", "xla", "blockwise", "cudnn", "splash"),
        "model.remat": ("none", "full", "dots", "dots_no_batch", "attention"),
    }
    for key, known in choices.items():
        _require(flat[key] in known, key, flat[key], f"known: {', '.join(known)}")
    heads, width = (flat[f"model.predictor.{k}"] for k in ("num_heads", "width"))
    mend = f"take a divisor of model.predictor.width={width}"
    _require(width % heads == 0, "model.predictor.num_heads", heads, mend)
    _validate_model(config.model)
    warmup = config.objective.context_warmup
    mend = "give (start, end) with 0 <= start <= end"
    is_span = len(warmup) == 2 and 0 <= warmup[0] <= warmup[1]
    _require(is_span, "objective.context_warmup", warmup, mend)
    o = config.optim
    mend = "give 0, or 2 or more losses to compare with"
    _require(o.spike_window != 1, "optim.spike_window", 1, mend)
    room = config.total_steps - o.warmup_steps if o.schedule == "wsd" else math.inf
    mend = "warm-up and anneal must fit into total_steps"
    _require(o.anneal_steps <= room, "optim.anneal_steps", o.anneal_steps, mend)
    _validate_stream("data", config.data, config.masks, "masks", config.model)
    for name, fields in config.streams.items():
        key = f"streams.{name}"
        mend = f"`{MAIN_STREAM}` is the main stream: rename it"
        _require(name != MAIN_STREAM, key, name, mend)
        _require(bool(fields.path), f"{key}.path", "", "a folder of videos or a list")
        _require(fields.weight > 0, f"{key}.weight", fields.weight, "give more than 0")
        size = fields.batch_size
        _require(size >= 0, f"{key}.batch_size", size, "give 0 or a positive number")
        _validate_stream(key, fields, fields.masks, f"{key}.masks", config.model)
    for key, mend in (
        ("init", "the workdir of the run to continue from"),
        ("teacher", "the workdir or converted checkpoint of the teacher"),
    ):
        is_given = bool(config[key].path) or not config[key].is_required
        _require(is_given, f"{key}.path", "", mend)
    predictor, weight = config.model.predictor, config.objective.context_weight
    mend = "set model.predictor.predict_context=True, or the weight to 0"
    can_weigh = predictor.predict_context or not weight
    _require(can_weigh, "objective.context_weight", weight, mend)
    mend = "set it to 0 without teacher.path"
    has_teacher = bool(config.teacher.path) or not predictor.out_dim
    _require(has_teacher, "model.predictor.out_dim", predictor.out_dim, mend)
    if config.objective.target == "pixels":
        _validate_pixels(config)
    for name, entry in config.evals.items():
        steps, mend = entry.every_steps, "give 0 or a positive number"
        _require(steps >= 0, f"evals.{name}.every_steps", steps, mend)
    if config.world.path:
        _validate_world(config.world)
    _require(bool(config.data.path), "data.path", "", "a folder of videos or a list")


def _validate_stream(
    key: str, clip: ConfigDict, masks: ConfigDict, masks_key: str, model: ConfigDict
) -> None:
    apart = clip.frame_step, clip.fps, clip.duration_secs
    mend = (
        f"set exactly one of {key}.frame_step, {key}.fps and {key}.duration_secs to a "
        "positive number"
    )
    is_one = min(apart) >= 0 and sum(x > 0 for x in apart) == 1
    _require(is_one, f"{key}.fps", clip.fps, mend)
    image = model.image_embed and clip.num_frames == 1
    for name, part, unit in (
        ("resolution", "patch_size", model.encoder.patch_size),
        ("num_frames", "tubelet_size", 1 if image else model.encoder.tubelet_size),
    ):
        value, mend = clip[name], f"take a multiple of model.encoder.{part}={unit}"
        _require(value > 0 and value % unit == 0, f"{key}.{name}", value, mend)
    _require(len(masks) > 0, masks_key, {}, "name at least one mask type")
    for name, spec in masks.items():
        _validate_mask(f"{masks_key}.{name}", spec)


def _validate_model(model: ConfigDict) -> None:
    grid, levels = model.base_grid, model.encoder.levels
    is_grid = len(grid) == 0 or (len(grid) == 3 and min(grid) > 0)
    _require(is_grid, "model.base_grid", grid, "give () or three positive numbers")
    ascending = list(levels) == sorted(set(levels)) and min(levels, default=0) >= 0
    mend = "give block numbers from 0, ascending"
    _require(ascending, "model.encoder.levels", levels, mend)
    outputs, mend = model.encoder.output_levels, f"there are {len(levels)} levels"
    _require(outputs <= len(levels), "model.encoder.output_levels", outputs, mend)


def _validate_pixels(config: ConfigDict) -> None:
    mend = "pixels have no encoder: leave it empty, or set objective.target=features"
    flat = flatten(config.to_dict())
    for key in ("teacher.path", "model.target_dtype"):
        _require(not flat[key], key, flat[key], mend)
    clips = config.data, *config.streams.values()
    has_images = config.model.image_embed and any(c.num_frames == 1 for c in clips)
    mend = "a token of an image has fewer pixels than one of a video: set it to False"
    _require(not has_images, "model.image_embed", True, mend)


def _require_pair(key: str, value: Any, highest: float = math.inf) -> None:
    bound = f" <= {highest}" if highest < math.inf else ""
    is_pair = len(value) == 2 and 0 < value[0] <= value[1] <= highest
    _require(is_pair, key, value, f"give (low, high) with 0 < low <= high{bound}")


def _validate_world(world: ConfigDict) -> None:
    size = world.size
    _require(size > 0 and size % 2 == 0, "world.size", size, "give an even number")
    _require(
        world.num_frames > 1, "world.num_frames", world.num_frames, "give 2 or more"
    )
    masked = world.segmentation_videos
    mend = "give 0, or 4 or more, half of them to learn from"
    is_some = masked == 0 or masked >= 4
    _require(is_some, "world.segmentation_videos", masked, mend)
    for key in world:
        if key.endswith("_videos") and key != "segmentation_videos":
            _require(world[key] > 0, f"world.{key}", world[key], "give 1 or more")
    share, pairs = world.play_fraction, world.physics_pairs
    mend = "give a number from 0 to 1"
    _require(0 <= share <= 1, "world.play_fraction", share, mend)
    mend = "give 0 or an even number, since pairs come as twins"
    _require(pairs >= 0 and pairs % 2 == 0, "world.physics_pairs", pairs, mend)
    count, mend = world.action_clips, "give 0, or 2 or more"
    _require(count == 0 or count >= 2, "world.action_clips", count, mend)


def _validate_mask(prefix: str, spec: ConfigDict) -> None:
    _require(
        spec.kind in ("multiblock", "tube"),
        f"{prefix}.kind",
        spec.kind,
        "known: multiblock, tube",
    )
    _require(
        spec.mode in ("official", "unbiased"),
        f"{prefix}.mode",
        spec.mode,
        "known: official, unbiased",
    )
    for key in ("spatial_scale", "temporal_scale"):
        _require_pair(f"{prefix}.{key}", spec[key], 1)
    _require_pair(f"{prefix}.aspect_ratio", spec.aspect_ratio)
    keep = spec.max_temporal_keep
    _require(0 < keep <= 1, f"{prefix}.max_temporal_keep", keep, "give 0 < x <= 1")
    if spec.kind == "tube":
        _require(keep == 1, f"{prefix}.max_temporal_keep", keep, "tubes need 1")
        low, high = spec.spatial_scale
        mend = "tubes hide one share: give it twice, below 1"
        _require(low == high < 1, f"{prefix}.spatial_scale", spec.spatial_scale, mend)
    mend = "a mask has one complement: set one of the two to False"
    both = spec.full_complement and spec.pred_full_complement
    _require(not both, f"{prefix}.full_complement", True, mend)
    for key in ("num_context", "num_target", "token"):
        _require(spec[key] >= 0, f"{prefix}.{key}", spec[key], "give 0 or more")
    group, blocks = spec.group_size, spec.num_blocks
    _require(group > 0, f"{prefix}.group_size", group, "give a positive number")
    mend = "give a positive number, or 0 with max_temporal_keep < 1"
    hides = blocks > 0 or (blocks == 0 and keep < 1) or spec.kind == "tube"
    _require(hides, f"{prefix}.num_blocks", blocks, mend)
