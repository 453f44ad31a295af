"""Define every default of a pretraining run, with its meaning, unit and range.

A file in `configs/` changes the result of `get_config()`, and the command line changes
single keys (`--config.optim.learning_rate=1e-3`). The config is locked, so that a
misspelt key raises an error with a suggestion. Rules between keys are in `rules.py`.
"""

from typing import Any

from ml_collections import ConfigDict

from vjepa_jax.base import choices
from vjepa_jax.config.ranges import (
    EVEN,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    Range,
    Settings,
    one_of,
    pair,
)

# The main stream's name in a batch.
MAIN_STREAM = "video"


def _mask() -> Settings:
    s = Settings()
    s.add("kind", "multiblock", one_of(choices.MASK_KINDS))
    s.add("num_blocks", 8)  # boxes hidden per clip
    s.add("spatial_scale", (0.15, 0.15), pair(1))  # (low, high) share of a frame
    s.add("temporal_scale", (1.0, 1.0), pair(1))  # share of the clip's length
    s.add("aspect_ratio", (0.75, 1.5), pair())  # (low, high) height over width of a box
    # Share of the clip's length whose tokens may be visible; later ones are hidden.
    s.add("max_temporal_keep", 1.0, Range(lambda v: 0 < v <= 1, "give 0 < x <= 1"))
    s.add("mode", "official", one_of(choices.MASK_MODES))  # which tokens are kept
    s.add("group_size", 24, POSITIVE)  # clips per device of the official code's budgets
    s.add("full_complement", False)  # predict all tokens that are not visible
    s.add("pred_full_complement", False)  # see all tokens that are not predicted
    s.add("inv_block", False)  # see the boxes, predict the rest
    s.add("token", 0, NOT_NEGATIVE)  # index of the mask token, see mask_token_per
    s.add("num_context", 0, NOT_NEGATIVE)  # visible tokens per clip; 0: from group_size
    s.add("num_target", 0, NOT_NEGATIVE)  # predicted tokens per clip; 0: also from it
    return s


def _stream() -> Settings:
    s = Settings()
    s.add("path", "", Range(bool, "give a folder of videos or a list"))  # as data.path
    s.add("mix_weights", ())  # as data.mix_weights
    s.add("batch_size", 0, NOT_NEGATIVE)  # clips per update; 0: as the main stream
    s.add("weight", 1.0, POSITIVE)  # of its loss, relative to those of other streams
    s.add("num_frames", 16)  # frames per clip
    s.add("frame_step", 0)  # as in data: one of these three is positive
    s.add("fps", 0.0)
    s.add("duration_secs", 0.0)
    s.add("resolution", 224)  # side of the clip, pixels
    s.add("masks", ConfigDict())  # mask types by name
    return s


def _evaluation() -> Settings:
    s = Settings()
    # As --config of vjepa_jax.probe: the name of an evaluation (health, physics, ...)
    # or FILE.py, with :ARGUMENT after either.
    s.add("file", "")
    s.add("overrides", "")  # of its keys, separated by blanks: num_videos=256 k=(10,)
    s.add("every_steps", 0, NOT_NEGATIVE)  # updates between two; 0: off
    return s


def _run() -> Settings:
    s = Settings()
    s.add("seed", 0, SEED)  # of initialisation, data order, augmentation, masks
    s.add("total_steps", 90_000, POSITIVE)  # updates of the whole run
    s.add("batch_size", 3072, POSITIVE)  # clips per update, summed over all devices
    s.add("accumulate_steps", 1, POSITIVE)  # microbatches; divides batch_size

    s.add("mesh.data", -1)  # devices that split the batch only; -1: all that are left
    # Devices that split batch and parameters; -1: all that are left; 0: the largest
    # divisor of the number of devices up to 8.
    s.add("mesh.fsdp", 1)
    # Folder, also gs://, where compiled programs are kept for later starts; "": none.
    s.add("compilation_cache", "")

    # A folder of videos or images, a list of `path label` lines, a folder of prepared
    # shards, or tfds:NAME:SPLIT; several are separated by commas. See docs/data.md.
    s.add("data.path", "", Range(bool, "give a folder of videos or a list"))
    s.add("data.mix_weights", ())  # share of clips of each path; (): by video counts
    s.add("data.num_workers", 8, NOT_NEGATIVE)  # decoding processes per stream; 0: none
    s.add("data.prefetch_megabytes", 2048.0, POSITIVE)  # decoded batches, per stream
    s.add("data.worker_timeout_secs", 300.0, POSITIVE)  # longest time for one video
    s.add("data.max_bad_fraction", 0.05, SHARE)  # share of bad videos that ends a run
    s.add("data.accept_change", False)  # continue a run with other videos than before
    s.add("data.num_frames", 16)  # frames per clip
    # Distance of a clip's frames: exactly one of these three is positive.
    s.add("data.frame_step", 4)  # in frames of the video
    s.add("data.fps", 0.0)  # frames per second
    s.add("data.duration_secs", 0.0)  # of the clip
    s.add("data.num_clips", 1, POSITIVE)  # clips per video, side by side in the batch
    s.add("data.sampling", "exact", one_of(choices.SAMPLINGS))  # of frames
    s.add("data.allow_clip_overlap", False)  # `official`: clips of short videos overlap
    s.add("data.resolution", 224)  # side of the clip, pixels
    s.add("data.resize", "antialias", one_of(choices.RESIZES))  # `official`: no filter
    s.add("data.max_pixels", 1 << 25, POSITIVE)  # per frame (8K); larger is refused
    s.add("data.time_limit_secs", 60.0, POSITIVE)  # of CPU time for one video
    s.add("data.crop_scale", (0.3, 1.0), pair(1))  # share of the frame's area
    s.add("data.crop_aspect_ratio", (0.75, 1.35), pair())  # width over height
    s.add("data.flip_probability", 0.5, SHARE)  # of mirroring a clip
    s.add("data.motion_shift", False)  # the crop moves during the clip
    s.add("data.color_jitter", (0.0, 0.0, 0.0, 0.0))  # brightness, contrast, ..., hue
    s.add("data.grayscale_probability", 0.0, SHARE)  # of a clip without colour
    s.add("data.rand_augment", "")  # such as rand-m7-n4-mstd0.5-inc1; "": off
    s.add("data.erase_probability", 0.0, SHARE)  # of erasing a rectangle
    s.add("data.erase_mode", "pixel", one_of(choices.ERASE_MODES))  # noise or the mean

    s.add("weight", 1.0, POSITIVE)  # of the main stream's loss, relative to the others
    s.add("streams", ConfigDict())  # further streams by name, see `stream`

    s.add("init.path", "")  # workdir from whose checkpoint a new run starts
    s.add("init.step", -1)  # its saved step; -1: the latest
    s.add("init.is_required", False)  # the recipe needs such a run
    s.add("init.keep_moments", True)  # take over the optimiser's moments, or zero them
    s.add("teacher.path", "")  # workdir or checkpoint of an encoder; "": none
    s.add("teacher.step", -1)  # its saved step; -1: the latest
    s.add("teacher.is_required", False)  # the recipe needs a teacher
    s.add("teacher.output_levels", 0, NOT_NEGATIVE)  # last levels predicted; 0: its own

    s.add("world.path", "")  # folder of the synthetic world; "": other data
    s.add("world.seed", 0, SEED)  # of the clips
    s.add("world.pretrain_videos", 4096, POSITIVE)  # videos to pretrain on
    s.add("world.probe_train_videos", 1650, POSITIVE)  # labelled videos to fit probes
    s.add("world.probe_test_videos", 880, POSITIVE)  # labelled videos to test probes
    s.add("world.hidden_train_videos", 1000, POSITIVE)  # videos of occlusions, to fit
    s.add("world.hidden_test_videos", 500, POSITIVE)  # videos of occlusions, to test
    s.add("world.play_fraction", 0.0, SHARE)  # of pretrain_videos: several objects meet
    even = Range(lambda v: v >= 0 and v % 2 == 0, "give zero or a positive even number")
    # Pairs of a possible and an impossible clip per property, for intuitive physics; an
    # even number, since pairs 2k and 2k + 1 are twins.
    s.add("world.physics_pairs", 0, even)
    # Videos with a class for each pixel, half of them to fit heads; 0: none.
    some = Range(lambda v: v == 0 or v >= 4, "give 0, or 4 or more")
    s.add("world.segmentation_videos", 0, some)
    # Clips of play with labels of the next events, to fit heads; half as many more are
    # rendered to test them; 0: none.
    pairs = Range(lambda v: v == 0 or v >= 2, "give 0, or 2 or more")
    s.add("world.action_clips", 0, pairs)
    s.add("world.size", 32, EVEN)  # side, pixels
    s.add("world.num_frames", 16, Range(lambda v: v > 1, "give 2 or more"))  # per video

    s.add("model.pos_embed", "sincos", one_of(choices.POS_EMBEDS))
    # Token grid (T, H, W) on which positions are defined; others interpolate. (): the
    # main stream's for sincos, none for rotations.
    grid = Range(
        lambda v: len(v) == 0 or (len(v) == 3 and min(v) > 0),
        "give () or three positive numbers",
    )
    s.add("model.base_grid", (), grid)
    s.add("model.mlp", "gelu", one_of(choices.MLPS))
    s.add("model.scale_init", False)  # start output projections smaller with depth
    s.add("model.image_embed", False)  # clips of one frame have their own embedding
    s.add("model.scan_layers", True)  # compile one block and loop; False: unroll
    # What the backward pass recomputes, from nothing to everything: none, dots,
    # dots_no_batch, attention (all but attention's outputs), full.
    s.add("model.remat", "none", one_of(choices.REMATS))
    s.add("model.attention", "auto", one_of(choices.ATTENTIONS))  # implementation
    # Of the computation; CPUs compute in float32 whatever it is.
    s.add("model.dtype", "bfloat16", one_of(choices.DTYPES))
    # 8-bit dtype of the target encoder's matmuls: int8 (TPUs) or float8_e4m3fn (GPUs
    # from Hopper on); "": model.dtype.
    s.add("model.target_dtype", "", one_of(("", *choices.QUANTISED_DTYPES)))
    s.add("model.encoder.size", "large")  # see models/registry.py
    s.add("model.encoder.patch_size", 16, POSITIVE)  # pixels
    s.add("model.encoder.tubelet_size", 2, POSITIVE)  # frames
    s.add("model.encoder.levels", ())  # blocks whose outputs are the features; (): last
    s.add("model.encoder.output_levels", 0, NOT_NEGATIVE)  # last levels used; 0: all
    s.add("model.predictor.depth", 12, POSITIVE)  # blocks
    s.add("model.predictor.width", 384, POSITIVE)  # channels
    s.add("model.predictor.num_heads", 16, POSITIVE)
    s.add("model.predictor.mlp", "", one_of(("", *choices.MLPS)))  # "": model.mlp
    s.add("model.predictor.num_mask_tokens", 0, NOT_NEGATIVE)  # 0: as many as are used
    # Mask token of a hidden place. `mask`: that of the index `token` of its mask type
    # (V-JEPA); `stream`: one per stream (V-JEPA 2); `run`: the first (V-JEPA 2.1).
    s.add("model.predictor.mask_token_per", "mask", one_of(choices.MASK_TOKENS_PER))
    s.add("model.predictor.out_dim", 0, NOT_NEGATIVE)  # of a teacher; 0: encoder's
    s.add("model.predictor.deep_input", False)  # two input layers, for several levels
    s.add("model.predictor.predict_context", False)  # predict visible tokens, too

    s.add("masks.short", mask())  # mask types by name: each one context, one prediction
    s.add("masks.long", mask(num_blocks=2, spatial_scale=(0.7, 0.7), token=1))

    # What is predicted: `features` of the target encoder, or the tokens' `pixels`.
    s.add("objective.target", "features", one_of(choices.TARGETS))
    s.add("objective.exponent", 1.0, POSITIVE)  # p of the regression |error|^p / p
    s.add("objective.context_weight", 0.0, NOT_NEGATIVE)  # of the visible tokens' loss
    # (start, end) steps between which that weight rises from 0.
    warmup = Range(
        lambda v: len(v) == 2 and 0 <= v[0] <= v[1],
        "give (start, end) with 0 <= start <= end",
    )
    s.add("objective.context_warmup", (0, 0), warmup)
    s.add("objective.context_distance", True)  # divide it by sqrt(distance to a hole)
    # Weight of V-JEPA 1's variance term on predictions, its `reg_coeff`.
    s.add("objective.prediction_variance_weight", 0.0, NOT_NEGATIVE)
    # Weights of VICReg's terms on the context encoder's tokens; 0 in all of V-JEPA.
    s.add("objective.variance_weight", 0.0, NOT_NEGATIVE)
    s.add("objective.covariance_weight", 0.0, NOT_NEGATIVE)

    s.add("optim.schedule", "cosine", one_of(choices.SCHEDULES))  # of the learning rate
    s.add("optim.start_learning_rate", 2e-4, NOT_NEGATIVE)  # at step 0 of the warm-up
    s.add("optim.learning_rate", 6.25e-4, POSITIVE)  # maximum
    s.add("optim.final_learning_rate", 1e-6, NOT_NEGATIVE)  # at the schedule's end
    s.add("optim.warmup_steps", 12_000, NOT_NEGATIVE)
    s.add("optim.anneal_steps", 0, NOT_NEGATIVE)  # length of the final decay of `wsd`
    s.add("optim.weight_decay", 0.04, NOT_NEGATIVE)  # at the start
    s.add("optim.final_weight_decay", 0.4, NOT_NEGATIVE)  # at the schedule's end
    s.add("optim.schedule_scale", 1.25, POSITIVE)  # schedules' length over total_steps
    s.add("optim.b1", 0.9, SHARE)
    s.add("optim.b2", 0.999, SHARE)
    s.add("optim.eps", 1e-8, POSITIVE)
    s.add("optim.clip_norm", 10.0, NOT_NEGATIVE)  # of a module's gradient; 0: none
    s.add("optim.clip_start_step", 12_300, NOT_NEGATIVE)  # first step that is clipped
    s.add("optim.max_skipped_in_row", 10, POSITIVE)  # skipped updates that end the run
    # Recent losses that a new one is compared with; 0: no guard against spikes.
    window = Range(lambda v: v >= 0 and v != 1, "give 0, or 2 or more losses")
    s.add("optim.spike_window", 0, window)
    s.add("optim.spike_deviations", 5.0, POSITIVE)  # above their mean: update skipped

    s.add("ema.start", 0.998, SHARE)  # momentum of the target encoder
    s.add("ema.end", 1.0, SHARE)  # at the schedule's end

    s.add("checkpoint.every_steps", 1000, POSITIVE)
    s.add("checkpoint.keep", 2, POSITIVE)  # number of checkpoints kept, the latest ones
    # Continue from the latest step that can be read; False: stop if it is not the last.
    s.add("checkpoint.skip_damaged", False)

    s.add("log.every_steps", 50, POSITIVE)
    s.add("log.watchdog_secs", 600.0, NOT_NEGATIVE)  # without a step; 0: off
    s.add("log.image_clips", 1, NOT_NEGATIVE)  # drawn at every evaluation; 0: none

    for name in ("health", "neighbours", "physics", "world"):
        s.add(f"evals.{name}", evaluation(name))  # during training, by name

    s.add("profile.start_step", 0, NOT_NEGATIVE)  # first traced step; 0: none
    s.add("profile.num_steps", 3, POSITIVE)  # number of traced steps
    return s


def mask(**fields: Any) -> ConfigDict:
    """Return the config of a mask type: V-JEPA's short-range mask with `fields`."""
    return _changed(_mask(), fields)


def stream(**fields: Any) -> ConfigDict:
    """Return the config of a further stream: clips of another shape in every batch.

    Crops and flips are as in `config.data`.
    """
    return _changed(_stream(), fields)


def evaluation(file: str, **fields: Any) -> ConfigDict:
    """Return the config of an evaluation during training, by default off."""
    return _changed(_evaluation(), {"file": file} | fields)


def _changed(settings: Settings, fields: dict[str, Any]) -> ConfigDict:
    settings.config.update(fields)
    return settings.config


def get_config() -> ConfigDict:
    """Return the defaults: V-JEPA's recipe with a ViT-L/16 at 16x224."""
    return _run().config.lock()


RUN_RANGES = _run().ranges
MASK_RANGES = _mask().ranges
STREAM_RANGES = _stream().ranges
EVALUATION_RANGES = _evaluation().ranges


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"a.b.c": value} for a nested dict; lists become tuples."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = tuple(value) if isinstance(value, list) else value
    return flat
