"""Defaults of the evaluations of frozen features, with meaning, unit and range.

The leaf files `configs/probe_*.py` take one of these and change what differs.
"""

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict, flatten


def _of_features(name: str) -> ConfigDict:
    config = ConfigDict()
    config.evaluation = name  # a key of evals/registry.py
    config.name = name  # of the results: results_NAME.json
    config.seed = 0  # of all that is drawn, and of the random-init encoder
    config.step = -1  # checkpoint to evaluate; -1: the latest
    config.random_init = True  # evaluate an untrained encoder beside it
    config.out_layers = ()  # blocks whose tokens are taken, from 0; (): the features
    config.clips_per_call = 64  # clips decoded and encoded at once
    return config


def _evaluation(name: str) -> ConfigDict:
    config = _of_features(name)
    config.data = ConfigDict()  # as data of a run, where keys are the same
    config.data.train_path = ""  # labelled videos to learn from, as data.path of a run
    config.data.test_path = ""  # labelled videos to judge by
    config.data.num_frames = 16  # frames per clip; 0: as the model was trained
    # One of these three is positive: how far a clip's frames are apart.
    config.data.frame_step = 4  # in frames of the video
    config.data.fps = 0.0  # so many a second
    config.data.duration_secs = 0.0  # all of them together
    config.data.num_clips = 1  # clips ("segments") per video, seen together
    config.data.num_views = 1  # crops of a clip in tests, seen apart
    config.data.sampling = "exact"  # or `official`, whose steps are whole frames
    config.data.allow_clip_overlap = False  # of `official`, in too short videos
    config.data.resolution = 224  # side in pixels; 0: as the model was trained
    config.data.resize = "antialias"  # or `official`, bilinear without a filter
    config.data.max_pixels = 1 << 25  # of a frame; larger ones are refused
    config.data.time_limit_secs = 60.0  # of a processor, for one video
    config.data.num_workers = 8  # decoding processes; 0: in this process
    config.data.worker_timeout_secs = 300.0  # longest time at one video
    return config


def classification() -> ConfigDict:
    """Return the defaults of `evals/classification.py`: V-JEPA 2's probe."""
    config = _evaluation("classification")
    config.num_classes = 0  # 0: one more than the largest label to learn from
    _add_training(config)
    config.head.kind = "attentive"  # or `linear`, on the mean token
    return config


def anticipation() -> ConfigDict:
    """Return the defaults of `evals/anticipation.py`: V-JEPA 2's on EPIC-KITCHENS."""
    config = _evaluation("anticipation")
    _add_training(config)
    config.batch_size = 128
    config.grids.main.weight_decays = (1e-4, 1e-3, 1e-2, 1e-1)
    config.use_predictor = True  # False: heads see the encoder's tokens alone
    config.num_output_frames = 2  # to predict; one tubelet at least
    config.mask_index = 1  # mask token of the predictor, as in the released code
    # A context is one clip, placed by the clock and seen once.
    del config.out_layers
    data = config.data
    del data.frame_step, data.duration_secs, data.allow_clip_overlap
    del data.num_clips, data.num_views
    data.videos_path = ""  # folder of the videos; the lists are annotations
    data.num_frames = 32
    data.fps = 8.0
    data.flip_probability = 0.5
    data.anchors = ("paper", "released")  # see docs/anticipation.md
    data.anticipation_secs = 1.0  # from the end of a context to the moment anticipated
    # In training with `augment`: (low, high), drawn uniformly.
    data.train_anticipation_secs = (0.25, 1.75)
    data.train_anticipation_point = (0.0, 0.25)  # share of the action; 0 in tests
    return config


def _add_training(config: ConfigDict) -> None:
    """Add what is common to evaluations that train grids of attentive heads."""
    config.random_init = False  # as costly as the evaluation itself
    config.epochs = 20
    config.batch_size = 256  # videos per update, over all devices
    config.test_batch_size = 64  # videos classified at once
    config.clip_norm = 0.0  # largest norm of a head's gradient; 0: no clip
    config.heads_at_once = 0  # heads whose activations are in memory together; 0: all

    data = config.data
    data.val_path = ""  # labelled videos to choose the head by; "": held out of train
    data.held_out_share = 0.1  # of the videos in train_path, where val_path is empty
    data.augment = True  # random windows, crops and colours, anew in every epoch
    data.prefetch_megabytes = 2048.0  # batches decoded ahead
    data.max_bad_fraction = 0.05  # unreadable share that ends the evaluation
    data.crop_scale = (0.08, 1.0)  # (low, high) share of the frame's area
    data.crop_aspect_ratio = (0.75, 4 / 3)  # (low, high) width over height
    data.flip_probability = 0.0  # of mirroring a clip, 0..1
    data.rand_augment = "rand-m7-n4-mstd0.5-inc1"  # "": off
    data.erase_probability = 0.25  # of erasing a rectangle, 0..1

    config.cache = ConfigDict()  # tokens on disk; training then sees the same clips
    config.cache.path = ""  # local folder; "": encode in every epoch
    config.cache.dtype = "float32"  # or `bfloat16`, at half the size

    config.head = ConfigDict()
    config.head.depth = 4  # blocks, the last of them with cross-attention
    config.head.num_heads = 16  # of all attentions; 0: the encoder's
    config.head.remat = "none"  # what backward recomputes: `none`, `full`, `dots`, ...
    config.head.dtype = "float32"  # of the computation

    config.grids = ConfigDict()  # heads trained side by side, by name
    config.grids.main = grid()


def grid() -> ConfigDict:
    """Return the config of heads with every combination of rate and decay."""
    config = ConfigDict()
    config.learning_rates = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4)  # peaks, cosine to 0
    config.weight_decays = (0.01, 0.1, 0.4, 0.8)  # of every parameter
    config.start_learning_rate = 0.0  # at the start of the warm-up
    config.warmup_epochs = 0
    config.final_weight_decay_share = 1.0  # of the decay, at the end of a cosine
    return config


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
    if variant not in VARIANTS:
        raise UserError(
            f"'{variant}' is no variant of this config; known: {', '.join(VARIANTS)}"
        )
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
    config.final_weight_decay_share = 1e-6 / weight_decay  # as the official code falls
    return config


def neighbours() -> ConfigDict:
    """Return the defaults of `evals/neighbours.py`."""
    config = _evaluation("neighbours")
    config.data.num_frames = config.data.resolution = 0
    config.k = (10, 20, 100, 200)  # nearest neighbours that vote; larger ones than
    # there are videos are left out
    config.temperature = 0.07  # of the votes: exp(cosine / temperature)
    config.shots = (1, 5, 10)  # labelled videos per class
    config.draws = 10  # training sets of each size
    return config


def health() -> ConfigDict:
    """Return the defaults of `evals/health.py`, which needs no labels."""
    config = _evaluation("health")
    config.data.num_frames = config.data.resolution = 0
    config.data.num_clips = 2  # two clips of a video should look alike
    config.num_videos = 2048  # of test_path, at most
    config.tokens_per_clip = 16  # that enter the statistics
    return config


def segmentation() -> ConfigDict:
    """Return the defaults of `evals/segmentation.py`, a linear probe of every patch."""
    config = _of_features("segmentation")
    config.num_classes = 0  # pixels have the classes below it; at most 254
    config.epochs = 10
    config.batch_size = 16  # images per update, over all devices
    config.test_batch_size = 16  # images judged at once
    config.heads_at_once = 0  # heads that are updated together; 0: all

    data = config.data = ConfigDict()
    # Lists of `image mask` lines or folders with images/ and masks/, see
    # docs/segmentation.md. "": those of the run's world.
    data.train_path = ""  # images to learn from
    data.val_path = ""  # images to choose the head by; "": held out of train
    data.test_path = ""  # images to judge by
    data.held_out_share = 0.1  # of the folders or images of train_path
    data.max_images = 0  # of each list, evenly spread; 0: all
    data.first_class = 0  # number in masks of the first class; below it: ignored
    data.num_frames = 1  # seen for one image: 1: itself; more: the frames around it,
    # of its folder; 0: so many as the model was trained on
    data.size = (512, 512)  # (height, width) of images in pixels; (): as trained
    data.crop_scale = (0.5, 1.0)  # (low, high) share of an image's area, in training
    data.flip_probability = 0.5  # of mirroring an image, in training, 0..1
    data.num_workers = 8  # reading threads

    config.grids = ConfigDict()  # heads trained side by side, by name
    config.grids.main = grid()
    config.grids.main.learning_rates = (1e-2, 3e-3, 1e-3, 3e-4)
    config.grids.main.weight_decays = (1e-3, 1e-2)
    return config


def video_objects() -> ConfigDict:
    """Return the defaults of `evals/video_objects.py`: V-JEPA 2.1's protocol."""
    config = _of_features("video_objects")
    config.clips_per_call = 16
    config.path = ""  # folder laid out as DAVIS 2017; "": that of the run's world
    config.split = "2017/val"  # list of the folder ImageSets
    config.quality = "480p"  # folder of frames and masks
    config.max_videos = 0  # of the list, evenly spread; 0: all
    config.resolution = 480  # short side of frames in pixels; 0: as trained
    config.num_frames = 1  # seen for one frame: 1: itself; more: those around it; 0: so
    # many as the model was trained on
    config.last_frames = 15  # those whose labels are carried on, and the first
    config.radius = 12.0  # how far labels are carried in a frame, in tokens
    config.top_k = 5  # places that a place takes its labels from
    config.temperature = 0.2  # of their weights: exp(cosine / temperature)
    config.places_at_once = 256  # of a frame, on each device; bounds the memory
    config.num_workers = 8  # reading threads
    return config


_CHOICES = {
    "data.sampling": ("exact", "official"),
    "data.resize": ("antialias", "official"),
    "head.kind": ("attentive", "linear"),
    "head.dtype": ("float32", "bfloat16"),
    "head.remat": ("none", "full", "dots", "dots_no_batch"),
    "cache.dtype": ("float32", "bfloat16"),
}
_POSITIVE = (
    "clips_per_call",
    "epochs",
    "batch_size",
    "test_batch_size",
    "temperature",
    "top_k",
    "places_at_once",
    "draws",
    "frame_step",
    "groups_at_once",
    "num_videos",
    "tokens_per_clip",
    "head.depth",
    "num_output_frames",
    "data.num_clips",
    "data.num_views",
    "data.worker_timeout_secs",
    "data.max_pixels",
    "data.time_limit_secs",
    "data.prefetch_megabytes",
)
_NOT_NEGATIVE = (
    "seed",
    "null_seeds",
    "num_classes",
    "num_workers",
    "clip_norm",
    "heads_at_once",
    "mask_index",
    "max_frames",
    "num_frames",
    "resolution",
    "head.num_heads",
    "last_frames",
    "radius",
    "max_videos",
    "data.anticipation_secs",
    "data.num_frames",
    "data.max_images",
    "data.first_class",
    "data.num_workers",
    "data.resolution",
)


def validate(config: ConfigDict) -> None:
    """Check an evaluation's values against each other and their ranges.

    Raises:
      UserError: names the key, its value and what it may be.
    """
    flat = flatten(config.to_dict())
    ranges = {
        **{key: (lambda v: v > 0, "give a positive number") for key in _POSITIVE},
        **{key: (lambda v: v >= 0, "give zero or more") for key in _NOT_NEGATIVE},
        "data.held_out_share": (lambda v: 0 < v < 1, "give a share between 0 and 1"),
        "data.max_bad_fraction": (lambda v: 0 <= v <= 1, "give a share from 0 to 1"),
        "data.flip_probability": (lambda v: 0 <= v <= 1, "give a share from 0 to 1"),
        "data.size": (
            lambda v: len(v) in (0, 2) and all(n > 0 for n in v),
            "give (height, width), or () for that of training",
        ),
        "data.crop_scale": (
            lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1,
            "give (low, high) with 0 < low <= high <= 1",
        ),
    }
    ranges["data.train_anticipation_secs"] = (
        lambda v: 0 <= v[0] <= v[1],
        "give 0 <= low <= high",
    )
    ranges["data.train_anticipation_point"] = (
        lambda v: 0 <= v[0] <= v[1] <= 1,
        "give 0 <= low <= high <= 1",
    )
    for key in ("k", "shots"):
        is_met = lambda v: len(v) > 0 and all(n >= 1 for n in v)  # noqa: E731
        ranges[key] = is_met, "give positive numbers"
    for key, known in _CHOICES.items():
        ranges[key] = known.__contains__, f"known: {', '.join(known)}"
    for key, (is_met, mend) in ranges.items():
        if key in flat and not is_met(flat[key]):
            raise UserError(f"config.{key}={flat[key]!r} is out of range: {mend}")
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
