"""Defaults of the evaluations of frozen features, with meaning, unit and range.

`DEFAULTS` has them by the name of the evaluation: `--config=NAME` of `vjepa_jax.probe`
and `config.evals.X.file=NAME` of a run take them from here. The files
`configs/probe_*.py` take one of these and change what differs in a published recipe.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from vjepa_jax.base.choices import DTYPES, REMATS, RESIZES, SAMPLINGS
from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict, flatten
from vjepa_jax.config.ranges import (
    COUNTS,
    INNER_SHARE,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    Range,
    Settings,
    check_ranges,
    one_of,
    pair,
    require,
)


def _settings(evaluation: str) -> Settings:
    s = Settings()
    s.add("evaluation", evaluation)  # a key of `registry.EVALUATIONS`
    s.add("seed", 0, SEED)  # of all draws and of untrained models
    s.add("step", -1)  # checkpoint to evaluate; -1: the latest
    return s


# Defaults by the name of the evaluation. `physics` takes its data set as an argument.
DEFAULTS: dict[str, Callable[..., ConfigDict]] = {}
_RANGES: dict[str, dict[str, Range]] = {}


def _evaluation(build: Callable[..., Settings]) -> Callable[..., ConfigDict]:
    """Register an evaluation's settings under the function's name."""

    @functools.wraps(build)
    def default_config(*args: str) -> ConfigDict:
        return build(*args).config

    DEFAULTS[build.__name__] = default_config
    _RANGES[build.__name__] = build().ranges
    return default_config


def _of_features(evaluation: str) -> Settings:
    s = _settings(evaluation)
    s.add("name", evaluation)  # of the results: results_NAME.json
    s.add("random_init", True)  # evaluate an untrained encoder beside it
    s.add("out_layers", ())  # blocks whose tokens are used, from 0; (): the features
    s.add("clips_per_call", 64, POSITIVE)  # clips decoded and encoded at once
    return s


def _of_videos(evaluation: str) -> Settings:
    """Add the keys of videos; those that a run's `data` has too mean the same."""
    s = _of_features(evaluation)
    s.add("data.train_path", "")  # labelled videos to learn from, as data.path of a run
    s.add("data.test_path", "")  # labelled videos to evaluate on
    s.add("data.num_frames", 16, NOT_NEGATIVE)  # per clip; 0: as in training
    # Distance of a clip's frames: exactly one of these three is positive.
    s.add("data.frame_step", 4)  # in frames of the video
    s.add("data.fps", 0.0)  # frames per second
    s.add("data.duration_secs", 0.0)  # of the clip
    s.add("data.num_clips", 1, POSITIVE)  # clips ("segments") per video, seen together
    s.add("data.num_views", 1, POSITIVE)  # crops of a clip in tests, seen separately
    s.add("data.sampling", "exact", one_of(SAMPLINGS))  # `official`: whole-frame steps
    s.add("data.allow_clip_overlap", False)  # of `official`, in videos too short
    s.add("data.resolution", 224, NOT_NEGATIVE)  # side, pixels; 0: as in training
    s.add("data.resize", "antialias", one_of(RESIZES))  # `official`: without a filter
    s.add("data.max_pixels", 1 << 25, POSITIVE)  # larger frames are refused
    s.add("data.time_limit_secs", 60.0, POSITIVE)  # of CPU time for one video
    s.add("data.num_workers", 8, NOT_NEGATIVE)  # decoding processes; 0: in this one
    s.add("data.worker_timeout_secs", 300.0, POSITIVE)  # longest time for one video
    return s


def _add_training(s: Settings) -> None:
    """Add the training of grids of attentive heads."""
    s.add("random_init", False)  # costs as much as the evaluation itself
    s.add("epochs", 20, POSITIVE)
    s.add("batch_size", 256, POSITIVE)  # videos per update, over all devices
    s.add("test_batch_size", 64, POSITIVE)  # videos classified at once
    s.add("clip_norm", 0.0, NOT_NEGATIVE)  # largest gradient norm of a head; 0: none
    # Heads whose activations are in memory together; 0: all.
    s.add("heads_at_once", 0, NOT_NEGATIVE)

    s.add("data.val_path", "")  # labelled videos to choose the head; "": held out
    s.add("data.held_out_share", 0.1, INNER_SHARE)  # of train_path without val_path
    s.add("data.augment", True)  # random windows, crops and colours in every epoch
    s.add("data.prefetch_megabytes", 2048.0, POSITIVE)  # of decoded batches
    s.add("data.max_bad_fraction", 0.05, SHARE)  # unreadable; more end the evaluation
    s.add("data.crop_scale", (0.08, 1.0), pair(1))  # share of the frame's area
    s.add("data.crop_aspect_ratio", (0.75, 4 / 3), pair())  # width over height
    s.add("data.flip_probability", 0.0, SHARE)  # of mirroring a clip
    s.add("data.rand_augment", "rand-m7-n4-mstd0.5-inc1")  # "": off
    s.add("data.erase_probability", 0.25, SHARE)  # of erasing a rectangle

    # Tokens on disk; every epoch then sees the same clips.
    s.add("cache.path", "")  # local folder; "": encode in every epoch
    s.add("cache.dtype", "float32", one_of(DTYPES))

    s.add("head.depth", 4, POSITIVE)  # blocks, the last of them with cross-attention
    s.add("head.num_heads", 16, NOT_NEGATIVE)  # of every attention; 0: the encoder's
    s.add("head.remat", "none", one_of(REMATS))  # what backward recomputes
    s.add("head.dtype", "float32", one_of(DTYPES))  # of the computation

    s.add("grids", ConfigDict())  # heads trained side by side, by name
    s.add("grids.main", grid())


def grid() -> ConfigDict:
    """Return the config of heads with every combination of rate and decay."""
    config = ConfigDict()
    config.learning_rates = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4)  # peaks, cosine to 0
    config.weight_decays = (0.01, 0.1, 0.4, 0.8)  # of every parameter
    config.start_learning_rate = 0.0  # at the start of the warm-up
    config.warmup_epochs = 0
    config.final_weight_decay_share = 1.0  # of the decay, at the end of a cosine
    return config


@_evaluation
def classification() -> Settings:
    """Return the defaults of `evals/classification.py`: V-JEPA 2's probe."""
    s = _of_videos("classification")
    # 0: one more than the largest training label.
    s.add("num_classes", 0, NOT_NEGATIVE)
    _add_training(s)
    # `linear`: on the mean token.
    s.add("head.kind", "attentive", one_of(("attentive", "linear")))
    return s


@_evaluation
def anticipation() -> Settings:
    """Return the defaults of `evals/anticipation`: V-JEPA 2's on EPIC-KITCHENS."""
    s = _of_videos("anticipation")
    _add_training(s)
    s.add("batch_size", 128, POSITIVE)
    s.add("grids.main.weight_decays", (1e-4, 1e-3, 1e-2, 1e-1))
    s.add("use_predictor", True)  # False: heads see the encoder's tokens alone
    s.add("num_output_frames", 2, POSITIVE)  # to predict; one tubelet at least
    # Mask token of the predictor, as in the released code.
    s.add("mask_index", 1, NOT_NEGATIVE)
    # A context is one clip, defined by its time, and is seen once.
    s.remove("out_layers", "data.frame_step", "data.duration_secs")
    s.remove("data.allow_clip_overlap", "data.num_clips", "data.num_views")
    s.add("data.videos_path", "")  # folder of the videos; the lists are annotations
    s.add("data.num_frames", 32, NOT_NEGATIVE)
    s.add("data.fps", 8.0)
    s.add("data.flip_probability", 0.5, SHARE)
    s.add("data.anchors", ("paper", "released"))  # see docs/anticipation.md
    # From the end of a context to the moment anticipated.
    s.add("data.anticipation_secs", 1.0, NOT_NEGATIVE)
    # In training with `augment`: (low, high), drawn uniformly. The point is a share of
    # the action; in tests it is 0.
    low_high = Range(lambda v: 0 <= v[0] <= v[1], "give 0 <= low <= high")
    s.add("data.train_anticipation_secs", (0.25, 1.75), low_high)
    shares = Range(lambda v: 0 <= v[0] <= v[1] <= 1, "give 0 <= low <= high <= 1")
    s.add("data.train_anticipation_point", (0.0, 0.25), shares)
    return s


@_evaluation
def neighbours() -> Settings:
    """Return the defaults of `evals/neighbours.py`."""
    s = _of_videos("neighbours")
    s.config.data.num_frames = s.config.data.resolution = 0
    # Nearest neighbours that vote; values above the number of videos are left out.
    s.add("k", (10, 20, 100, 200), COUNTS)
    s.add("temperature", 0.07, POSITIVE)  # of the votes: exp(cosine / temperature)
    s.add("shots", (1, 5, 10), COUNTS)  # labelled videos per class
    s.add("draws", 10, POSITIVE)  # training sets of each size
    return s


@_evaluation
def health() -> Settings:
    """Return the defaults of `evals/health.py`, which needs no labels."""
    s = _of_videos("health")
    s.config.data.num_frames = s.config.data.resolution = 0
    s.add("data.num_clips", 2, POSITIVE)  # two clips of a video should look alike
    s.add("num_videos", 2048, POSITIVE)  # of test_path, at most
    s.add("tokens_per_clip", 16, POSITIVE)  # that enter the statistics
    return s


@_evaluation
def segmentation() -> Settings:
    """Return the defaults of `evals/segmentation`, a linear probe of every patch."""
    s = _of_features("segmentation")
    s.add("num_classes", 0, NOT_NEGATIVE)  # labels are below it; at most 254
    s.add("epochs", 10, POSITIVE)
    s.add("batch_size", 16, POSITIVE)  # images per update, over all devices
    s.add("test_batch_size", 16, POSITIVE)  # images evaluated at once
    s.add("heads_at_once", 0, NOT_NEGATIVE)  # heads updated together; 0: all

    # Lists of `IMAGE LABELS` lines or folders with images/ and masks/, see
    # docs/segmentation.md. "": those of the run's world.
    s.add("data.train_path", "")  # images to learn from
    s.add("data.val_path", "")  # images to choose the head; "": held out of train
    s.add("data.test_path", "")  # images to evaluate on
    s.add("data.held_out_share", 0.1, INNER_SHARE)  # of train_path without val_path
    s.add("data.max_images", 0, NOT_NEGATIVE)  # per list, evenly spread; 0: all
    # Number of the first class in the label images; pixels below it are ignored.
    s.add("data.first_class", 0, NOT_NEGATIVE)
    # Frames seen for one image. 1: the image itself; more: the frames around it, of its
    # folder; 0: as in training.
    s.add("data.num_frames", 1, NOT_NEGATIVE)
    size = Range(
        lambda v: len(v) in (0, 2) and all(n > 0 for n in v),
        "give (height, width), or () for that of training",
    )
    s.add("data.size", (512, 512), size)  # (height, width) of images in pixels
    s.add("data.crop_scale", (0.5, 1.0), pair(1))  # of the area, in training
    s.add("data.flip_probability", 0.5, SHARE)  # of mirroring an image, in training
    s.add("data.num_workers", 8, NOT_NEGATIVE)  # reading threads

    s.add("grids", ConfigDict())  # heads trained side by side, by name
    s.add("grids.main", grid())
    s.add("grids.main.learning_rates", (1e-2, 3e-3, 1e-3, 3e-4))
    s.add("grids.main.weight_decays", (1e-3, 1e-2))
    return s


@_evaluation
def video_objects() -> Settings:
    """Return the defaults of `evals/video_objects`: V-JEPA 2.1's protocol."""
    s = _of_features("video_objects")
    s.add("clips_per_call", 16, POSITIVE)
    s.add("path", "")  # folder with the layout of DAVIS 2017; "": the run's world
    s.add("split", "2017/val")  # list in the folder ImageSets
    s.add("quality", "480p")  # folder of frames and label images
    s.add("max_videos", 0, NOT_NEGATIVE)  # of the list, evenly spread; 0: all
    s.add("resolution", 480, NOT_NEGATIVE)  # short side, pixels; 0: as in training
    # Frames seen for one frame. 1: itself; more: those around it; 0: as in training.
    s.add("num_frames", 1, NOT_NEGATIVE)
    s.add("last_frames", 15, NOT_NEGATIVE)  # sources of labels, besides the first
    s.add("radius", 12.0, NOT_NEGATIVE)  # how far labels move within a frame, tokens
    s.add("top_k", 5, POSITIVE)  # patches that a patch takes its labels from
    s.add("temperature", 0.2, POSITIVE)  # of the weights: exp(cosine / temperature)
    # Patches computed at once on each device; bounds the memory.
    s.add("places_at_once", 256, POSITIVE)
    s.add("num_workers", 8, NOT_NEGATIVE)  # reading threads
    return s


@_evaluation
def physics(dataset: str = "world") -> Settings:
    """Return the defaults of `evals/physics`: its protocol for each data set.

    Args:
      dataset: `world`, `intphys`, `intphys2`, `grasp` or `inflevel`.
    """
    s = _settings("physics")
    s.add("name", f"physics_{dataset}")  # of the results: results_NAME.json
    s.add("dataset", dataset)
    s.add("path", "")  # folder of the videos; "": the run's world
    s.add("lists", "")  # folder of InfLevel's PROPERTY.csv; "": that of the videos
    # Column of IntPhys 2's metadata.csv whose values are the rows of the table.
    s.add("rows", "condition")
    s.add("null_seeds", 10, NOT_NEGATIVE)  # untrained networks
    s.add("batch_size", 32, POSITIVE)  # windows per call
    s.add("groups_at_once", 32, POSITIVE)  # pairs or quadruplets in memory
    s.add("num_workers", 4, NOT_NEGATIVE)  # decoding threads
    s.add("resolution", 0, NOT_NEGATIVE)  # side, pixels; 0: as in training
    s.add("num_frames", 16, NOT_NEGATIVE)  # of a window; 0: as in training
    s.add("stride", 2)  # frames from one window to the next
    s.add("frame_step", 2, POSITIVE)  # every such frame of the video is kept
    s.add("max_frames", 0, NOT_NEGATIVE)  # of the video; 0: all
    # First frames of a window, from which the rest is predicted.
    s.add("context_frames", (2, 4, 6, 8, 10))
    # The context whose results are reported; 0: the smallest surprise of all.
    s.add("reported_context", 8)
    s.add("early_contexts", False)  # the first window also from all shorter contexts
    s.add("mask_index", 0, NOT_NEGATIVE)  # of the predictor's mask tokens
    config = s.config
    if dataset == "world":
        config.num_frames, config.frame_step, config.context_frames = 12, 1, (8,)
        config.batch_size, config.groups_at_once = 64, 512
    elif dataset == "intphys":
        config.max_frames = 99
        config.reported_context = 0
    elif dataset == "intphys2":
        config.frame_step, config.context_frames = 10, (4, 6, 8, 10, 12, 14)
        config.reported_context, config.early_contexts = 0, True
    elif dataset == "grasp":
        config.frame_step = 10
    elif dataset == "inflevel":
        config.num_frames, config.frame_step = 32, 5
        config.context_frames, config.reported_context = (4, 8, 12, 16, 20), 16
    return s


@_evaluation
def world() -> Settings:
    """Return the defaults of `evals/world_state.py`, for the synthetic world."""
    s = _settings("world")
    s.add("random_init", True)  # probe an untrained encoder and raw pixels beside it
    s.add("batch_size", 100, POSITIVE)  # clips per call of the encoder
    s.add("num_workers", 2, NOT_NEGATIVE)  # decoding processes
    s.add("labels_per_class", 16, POSITIVE)  # of the few-label probe
    s.add("draws", 10, POSITIVE)  # training sets of the few-label probe
    # An object is occluded where at most this share of it is visible.
    s.add("hidden_visibility", 0.2, SHARE)
    s.add("num_heads", 3, POSITIVE)  # of the attentive probes
    for probe, epochs, batch_size, rates in (
        ("attentive", 12, 64, (1e-3, 3e-3)),
        ("regression", 6, 128, (3e-3, 1e-2)),  # of state, on single time steps
    ):
        s.add(f"{probe}.epochs", epochs, POSITIVE)
        s.add(f"{probe}.batch_size", batch_size, POSITIVE)  # samples per update
        s.add(f"{probe}.learning_rates", rates)  # peaks, a probe each
        s.add(f"{probe}.weight_decay", 0.01, NOT_NEGATIVE)
    return s


@_evaluation
def real_video() -> Settings:
    """Return the defaults of `evals/real_video.py`; it needs `tasks`, see `task`."""
    s = _of_videos("real_video")
    s.config.data.num_frames = s.config.data.resolution = 0
    s.add("data.num_workers", 2, NOT_NEGATIVE)
    # A task has its own lists and distance of frames, and every video gives one clip.
    s.remove("data.train_path", "data.test_path", "data.num_clips", "data.num_views")
    s.remove("data.frame_step", "data.fps", "data.duration_secs", "out_layers")
    s.remove("data.allow_clip_overlap", "data.worker_timeout_secs")
    s.add("tasks", ConfigDict())  # by name, see `task`
    s.add("other.path", "")  # a further run or conversion to compare with; "": none
    s.add("other.name", "other")  # of its column
    s.add("k", 10, POSITIVE)  # nearest neighbours that vote, weighted by distance
    s.add("labels_per_class", 8, POSITIVE)  # of the few-label probe
    s.add("draws", 20, POSITIVE)  # training sets of the few-label probe
    s.add("num_heads", 3, POSITIVE)  # of the attentive probes, at most
    s.add("attentive.updates", 300, POSITIVE)
    s.add("attentive.batch_size", 64, POSITIVE)  # samples per update
    s.add("attentive.learning_rates", (1e-3, 3e-3))  # peaks, a probe each
    s.add("attentive.weight_decay", 0.01, NOT_NEGATIVE)
    return s


def task(**fields: Any) -> ConfigDict:
    """Return the config of a task of `real_video` with `fields`."""
    config = ConfigDict()
    config.train_path = ""  # videos to learn from, as data.path of a run
    config.test_path = ""  # videos to evaluate on
    # Distance of a clip's frames: exactly one of these two is positive.
    config.frame_step = 0  # in frames of the video
    config.fps = 0.0  # frames per second
    # "": the classes of the lists. Or class 1 is the clip with a change, class 0 the
    # clip itself: `arrow` runs it backwards, `halves` exchanges its halves.
    config.change = ""
    # Arrays in VIDEO.npz with a number per frame, to be predicted instead of classes.
    config.sensors = ()
    config.update(fields)
    return config


# ----------------------------------------------------------------- published recipes

# Encoders of the papers; side of their clips in pixels. V-JEPA 1's have names with it.
VARIANTS = {
    "vitl16": 256,
    "vith16": 256,
    "vitg16": 256,
    "vitg16_384": 384,
    "vjepa_vitl16": 224,
    "vjepa_vith16": 224,
    "vjepa_vith16_384": 384,
}


def require_variant(variant: str, known: Iterable[str]) -> None:
    """Raise UserError unless the variant of a config file is known."""
    if variant not in known:
        raise UserError(
            f"'{variant}' is no variant of this config; known: {', '.join(known)}"
        )


def of_paper(name: str, variant: str) -> tuple[ConfigDict, str]:
    """Return the settings that V-JEPA's and V-JEPA 2's data sets have in common.

    V-JEPA 1 has one head with one block of cross-attention, 2 a grid of heads with four
    blocks, computed in bfloat16 for their many tokens.

    Args:
      name: of the results.
      variant: one of `VARIANTS`; "": the first.

    Returns:
      (config, variant).

    Raises:
      UserError: the variant is unknown.
    """
    variant = variant or next(iter(VARIANTS))
    require_variant(variant, VARIANTS)
    config = classification()
    config.name = name
    config.data.resolution = VARIANTS[variant]
    config.head.update(remat="full", dtype="bfloat16")
    if variant.startswith("vjepa_"):
        config.clip_norm = 1.0
        config.head.update(depth=1, num_heads=0)
        config.grids.main = one_head(0.01)
    return config, variant


def one_head(weight_decay: float) -> ConfigDict:
    """Return the grid of V-JEPA 1's only head."""
    config = grid()
    config.update(learning_rates=(1e-3,), weight_decays=(weight_decay,))
    config.final_weight_decay_share = 1e-6 / weight_decay  # the official final value
    return config


# -------------------------------------------------------------------------- validation


def validate(config: ConfigDict) -> None:
    """Check an evaluation's values against their ranges and against each other.

    Raises:
      UserError: names the key, its value and the allowed values.
    """
    check_ranges(flatten(config.to_dict()), _RANGES[config.evaluation])
    if config.evaluation == "real_video":
        _validate_tasks(config.tasks)
    if "grids" not in config:
        return
    if "cache" in config and config.cache.path and config.data.augment:
        raise UserError(
            "config.cache.path keeps tokens of clips that do not change: set "
            "config.data.augment=False, or leave it empty"
        )
    if not config.grids:
        raise UserError("config.grids is empty: give at least one grid of heads")
    for name, fields in config.grids.items():
        for key in ("learning_rates", "weight_decays"):
            if not fields[key] or min(fields[key]) < 0:
                raise UserError(
                    f"config.grids.{name}.{key}={fields[key]!r} is out of range: give "
                    "numbers from 0 on"
                )
        if not 0 <= fields.warmup_epochs < config.epochs:
            raise UserError(
                f"config.grids.{name}.warmup_epochs={fields.warmup_epochs} is out of "
                f"range: give a number below config.epochs={config.epochs}"
            )


CHANGES = ("", "arrow", "halves")  # of a clip, see `task`


def _validate_tasks(tasks: ConfigDict) -> None:
    for name, fields in tasks.items():
        key = f"tasks.{name}"
        change, is_one = fields.change, (fields.frame_step > 0) != (fields.fps > 0)
        require(change in CHANGES, f"{key}.change", change, f"known: {CHANGES}")
        require(
            is_one, f"{key}.fps", fields.fps, "give either frame_step or fps, positive"
        )
        if fields.sensors:
            require(
                not change, f"{key}.change", change, "values have classes, not both"
            )
            require(
                fields.frame_step > 0,
                f"{key}.frame_step",
                fields.frame_step,
                "values of frames need a distance in frames",
            )
