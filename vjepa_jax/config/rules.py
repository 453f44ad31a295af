"""Validate configs of pretraining runs: ranges, and rules between keys."""

from typing import Any

from vjepa_jax.config.defaults import (
    EVALUATION_RANGES,
    MAIN_STREAM,
    MASK_RANGES,
    RUN_RANGES,
    STREAM_RANGES,
    ConfigDict,
    flatten,
)
from vjepa_jax.config.ranges import check_ranges, require


def validate(config: ConfigDict) -> None:
    """Check values against their ranges and against each other.

    Raises:
      UserError: names the key, its value and the allowed values.
    """
    flat = flatten(config.to_dict())
    # Without a path there is no world, and its other settings are not used.
    unused = () if config.world.path else ("world.",)
    check_ranges(
        {key: value for key, value in flat.items() if not key.startswith(unused)},
        RUN_RANGES,
    )
    _validate_stream("data", config.data, config.masks, "masks", config.model)
    for name, fields in config.streams.items():
        key = f"streams.{name}"
        fix = f"`{MAIN_STREAM}` is the main stream: rename it"
        require(name != MAIN_STREAM, key, name, fix)
        check_ranges(fields, STREAM_RANGES, f"{key}.")
        _validate_stream(key, fields, fields.masks, f"{key}.masks", config.model)
    for name, entry in config.evals.items():
        check_ranges(entry, EVALUATION_RANGES, f"evals.{name}.")
    for key, fix in (
        ("init", "give the workdir of the run to continue from"),
        ("teacher", "give the workdir or converted checkpoint of the teacher"),
    ):
        is_given = bool(config[key].path) or not config[key].is_required
        require(is_given, f"{key}.path", "", fix)
    _validate_model(config)
    optim = config.optim
    if optim.schedule == "wsd":
        fits = optim.warmup_steps + optim.anneal_steps <= config.total_steps
        fix = "warm-up and anneal must fit into total_steps"
        require(fits, "optim.anneal_steps", optim.anneal_steps, fix)
    if config.objective.target == "pixels":
        _validate_pixels(config, flat)


def _validate_stream(
    key: str, clip: ConfigDict, masks: ConfigDict, masks_key: str, model: ConfigDict
) -> None:
    distances = clip.frame_step, clip.fps, clip.duration_secs
    fix = (
        f"set exactly one of {key}.frame_step, {key}.fps and {key}.duration_secs to a "
        "positive number"
    )
    is_one = min(distances) >= 0 and sum(x > 0 for x in distances) == 1
    require(is_one, f"{key}.fps", clip.fps, fix)
    is_image = model.image_embed and clip.num_frames == 1
    for name, part, unit in (
        ("resolution", "patch_size", model.encoder.patch_size),
        ("num_frames", "tubelet_size", 1 if is_image else model.encoder.tubelet_size),
    ):
        value, fix = clip[name], f"give a multiple of model.encoder.{part}={unit}"
        require(value > 0 and value % unit == 0, f"{key}.{name}", value, fix)
    require(len(masks) > 0, masks_key, {}, "name at least one mask type")
    for name, fields in masks.items():
        _validate_mask(f"{masks_key}.{name}", fields)


def _validate_mask(key: str, mask: ConfigDict) -> None:
    check_ranges(mask, MASK_RANGES, f"{key}.")
    keep, is_tube = mask.max_temporal_keep, mask.kind == "tube"
    if is_tube:
        require(keep == 1, f"{key}.max_temporal_keep", keep, "tubes need 1")
        low, high = mask.spatial_scale
        fix = "tubes hide one share: give it twice, below 1"
        require(low == high < 1, f"{key}.spatial_scale", mask.spatial_scale, fix)
    both = mask.full_complement and mask.pred_full_complement
    fix = "a mask has one complement: set one of the two to False"
    require(not both, f"{key}.full_complement", True, fix)
    blocks = mask.num_blocks
    fix = "give a positive number, or 0 with max_temporal_keep < 1"
    hides = blocks > 0 or (blocks == 0 and keep < 1) or is_tube
    require(hides, f"{key}.num_blocks", blocks, fix)


def _validate_model(config: ConfigDict) -> None:
    encoder, predictor = config.model.encoder, config.model.predictor
    heads, width = predictor.num_heads, predictor.width
    fix = f"give a divisor of model.predictor.width={width}"
    require(width % heads == 0, "model.predictor.num_heads", heads, fix)
    levels = encoder.levels
    ascending = list(levels) == sorted(set(levels)) and min(levels, default=0) >= 0
    fix = "give block numbers from 0, ascending"
    require(ascending, "model.encoder.levels", levels, fix)
    outputs, fix = encoder.output_levels, f"there are {len(levels)} levels"
    require(outputs <= len(levels), "model.encoder.output_levels", outputs, fix)
    weight = config.objective.context_weight
    fix = "set model.predictor.predict_context=True, or the weight to 0"
    has_context = predictor.predict_context or not weight
    require(has_context, "objective.context_weight", weight, fix)
    has_teacher = bool(config.teacher.path) or not predictor.out_dim
    fix = "set it to 0 without teacher.path"
    require(has_teacher, "model.predictor.out_dim", predictor.out_dim, fix)


def _validate_pixels(config: ConfigDict, flat: dict[str, Any]) -> None:
    fix = "pixels have no encoder: leave it empty, or set objective.target=features"
    for key in ("teacher.path", "model.target_dtype"):
        require(not flat[key], key, flat[key], fix)
    clips = config.data, *config.streams.values()
    has_images = config.model.image_embed and any(c.num_frames == 1 for c in clips)
    fix = "a token of an image has fewer pixels than one of a video: set it to False"
    require(not has_images, "model.image_embed", True, fix)
