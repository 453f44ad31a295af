"""Every default of a pretraining run, with its meaning, unit and range.

A leaf file in `configs/` takes `get_config()` and changes what differs; the command
line changes the rest (`--config.optim.learning_rate=1e-3`). The config is locked, so
that a misspelt key fails with a suggestion.
"""

from typing import Any

from ml_collections import ConfigDict

# The main stream's name in a batch.
MAIN_STREAM = "video"


def mask(**fields: Any) -> ConfigDict:
    """Return the config of one mask type: V-JEPA's short-range mask, changed."""
    config = ConfigDict()
    config.kind = "multiblock"  # or `tube`
    config.num_blocks = 8  # boxes hidden per clip
    config.spatial_scale = (0.15, 0.15)  # (low, high) share of a frame per box
    config.temporal_scale = (1.0, 1.0)  # (low, high) share of the clip's length
    config.aspect_ratio = (0.75, 1.5)  # (low, high) height over width
    config.max_temporal_keep = 1.0  # tokens after this share of the clip are hidden
    config.mode = "official"  # or `unbiased`, see masking.py
    config.group_size = 24  # batch whose trimming the default budgets imitate
    config.full_complement = False  # predict all that is not seen
    config.pred_full_complement = False  # see all that is not predicted
    config.inv_block = False  # see the boxes, predict the rest
    config.token = 0  # which mask token stands for what it hides, see mask_token_per
    config.num_context = 0  # visible tokens kept per clip; 0: from group_size
    config.num_target = 0  # hidden tokens predicted per clip; 0: from group_size
    config.update(fields)
    return config


def stream(**fields: Any) -> ConfigDict:
    """Return the config of a further stream: clips of another shape in every batch.

    Crops and flips are those of `config.data`.
    """
    config = ConfigDict()
    config.path = ""  # as data.path
    config.mix_weights = ()  # as data.mix_weights
    config.batch_size = 0  # clips per update over all devices; 0: as the main stream
    config.weight = 1.0  # of its loss; weights are normalised over streams
    config.num_frames = 16  # frames per clip
    config.frame_step = 0  # as in data: one of these three
    config.fps = 0.0
    config.duration_secs = 0.0
    config.resolution = 224  # side of the clip in pixels
    config.masks = ConfigDict()  # mask types by name
    config.update(fields)
    return config


def evaluation(file: str, **fields: Any) -> ConfigDict:
    """Return the config of an evaluation during training, which is off."""
    config = ConfigDict()
    # As --config of vjepa_jax.probe: the name of an evaluation (health, physics, ...)
    # or FILE.py, with :ARGUMENT after either.
    config.file = file
    config.overrides = ""  # of its keys, with blanks between: num_videos=256 k=(10,)
    config.every_steps = 0  # updates from one to the next, and after the last; 0: off
    config.update(fields)
    return config


def get_config() -> ConfigDict:
    """Return the defaults: V-JEPA's recipe with a ViT-L/16 at 16x224."""
    config = ConfigDict()
    config.seed = 0  # of initialisation, data order, augmentation and masks
    config.total_steps = 90_000  # updates of the whole run
    config.batch_size = 3072  # clips per update over all devices
    config.accumulate_steps = 1  # microbatches per update; divides batch_size

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices that split the batch only; -1 fills
    # Devices that split the parameters too; -1 fills; 0: the most up to 8 that divide.
    config.mesh.fsdp = 1
    # Folder, also gs://, where compiled programs are kept for later starts; "": none.
    config.compilation_cache = ""

    config.data = ConfigDict()
    # A folder of videos or images, a list of `path label` lines, a folder of prepared
    # shards, or tfds:NAME:SPLIT; several with commas between. See docs/data.md.
    config.data.path = ""
    config.data.mix_weights = ()  # each one's share of the clips; (): by their lengths
    config.data.num_workers = 8  # decoding processes per stream; 0: in this process
    config.data.prefetch_megabytes = 2048.0  # batches decoded ahead, per stream
    config.data.worker_timeout_secs = 300.0  # longest time at one video
    config.data.max_bad_fraction = 0.05  # unreadable share that ends the run
    config.data.accept_change = (
        False  # continue though the videos are others than before
    )
    config.data.num_frames = 16  # frames per clip
    # One of these three is positive: how far a clip's frames are apart.
    config.data.frame_step = 4  # in frames of the video
    config.data.fps = 0.0  # so many a second
    config.data.duration_secs = 0.0  # all of them together
    config.data.num_clips = 1  # clips per video, side by side in the batch
    config.data.sampling = "exact"  # or `official`, whose steps are whole frames
    config.data.allow_clip_overlap = (
        False  # of `official`, in videos that are too short
    )
    config.data.resolution = 224  # side of the clip in pixels
    config.data.resize = "antialias"  # or `official`, bilinear without a filter
    config.data.max_pixels = 1 << 25  # of a frame (8K video); larger ones are refused
    config.data.time_limit_secs = 60.0  # of a processor, for one video
    config.data.crop_scale = (0.3, 1.0)  # (low, high) share of the frame's area
    config.data.crop_aspect_ratio = (0.75, 1.35)  # (low, high) width over height
    config.data.flip_probability = 0.5  # of mirroring a clip, 0..1
    config.data.motion_shift = False  # the crop moves during the clip
    config.data.color_jitter = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, ..., hue
    config.data.grayscale_probability = 0.0  # of a clip without colour, 0..1
    config.data.rand_augment = ""  # such as rand-m7-n4-mstd0.5-inc1; "": off
    config.data.erase_probability = 0.0  # of erasing a rectangle, 0..1
    config.data.erase_mode = "pixel"  # filled with noise, or `const` (the mean)

    config.weight = 1.0  # of the main stream's loss among those of all streams
    config.streams = ConfigDict()  # further streams by name, see `stream`

    config.init = ConfigDict()  # where a new run starts
    config.init.path = ""  # workdir whose latest checkpoint it continues from; "": none
    config.init.is_required = False  # the recipe makes no sense without such a run
    config.init.keep_moments = True  # take the optimiser's moments along, or zero them
    config.teacher = ConfigDict()  # a frozen encoder to predict instead of the target
    config.teacher.path = ""  # workdir or converted checkpoint; "": none
    config.teacher.step = -1  # a saved step of it; -1: its latest
    config.teacher.is_required = False  # the recipe makes no sense without a teacher
    config.teacher.output_levels = 0  # predict so many of its last levels; 0: its own

    config.world = ConfigDict()  # the synthetic world, rendered where path is set
    config.world.path = ""  # its folder; "": the data is not the world
    config.world.seed = 0  # of the clips
    config.world.pretrain_videos = 4096  # videos to pretrain on
    config.world.probe_train_videos = 1650  # labelled videos to fit probes
    config.world.probe_test_videos = 880  # labelled videos to judge probes
    config.world.hidden_train_videos = 1000  # videos of occlusions, to fit
    config.world.hidden_test_videos = 500  # videos of occlusions, to judge
    config.world.play_fraction = 0.0  # of pretrain_videos: several objects, 0..1
    # Possible and impossible clips per property, for intuitive physics; even.
    config.world.physics_pairs = 0
    # With masks, to judge segmentation by, half of them to learn from; 0: none.
    config.world.segmentation_videos = 0
    # Clips of play with a list of what happens next, and half as many for the test.
    config.world.action_clips = 0
    config.world.size = 32  # side in pixels, even
    config.world.num_frames = 16  # frames per video

    config.model = ConfigDict()
    config.model.pos_embed = "sincos"  # or `rope`, `rope_tiled` (V-JEPA 2)
    # Token grid (T, H, W) on which positions are defined; others interpolate. (): the
    # main stream's for sincos, none for rotations.
    config.model.base_grid = ()
    config.model.mlp = "gelu"  # or `swiglu`, `swiglu_wide`
    config.model.scale_init = False  # start output projections smaller with depth
    config.model.image_embed = False  # clips of one frame have their own embedding
    config.model.scan_layers = True  # compile one block and loop, or unroll
    # What the backward pass recomputes, least first: none, dots, dots_no_batch,
    # attention (all but attention's outputs), full.
    config.model.remat = "none"
    # auto, or one of xla, blockwise, cudnn and splash, see models/attention.py
    config.model.attention = "auto"
    config.model.dtype = "bfloat16"  # of the computation; parameters are float32
    # Of the target encoder's matmuls, scaled token by token: int8 (TPUs) or
    # float8_e4m3fn (GPUs from Hopper on); "": model.dtype.
    config.model.target_dtype = ""
    config.model.encoder = ConfigDict()
    config.model.encoder.size = "large"  # see models/registry.py
    config.model.encoder.patch_size = 16  # pixels
    config.model.encoder.tubelet_size = 2  # frames
    config.model.encoder.levels = ()  # blocks whose outputs are the features; (): last
    config.model.encoder.output_levels = 0  # only so many of the last levels; 0: all
    config.model.predictor = ConfigDict()
    config.model.predictor.depth = 12
    config.model.predictor.width = 384
    config.model.predictor.num_heads = 16
    config.model.predictor.mlp = ""  # as model.mlp's kinds; "": the encoder's
    config.model.predictor.num_mask_tokens = 0  # 0: as many as are used
    # The token of hidden places: `mask` as each mask's `token` says (V-JEPA), `stream`
    # one per stream (V-JEPA 2's clip lengths), `run` the first for all (V-JEPA 2.1).
    config.model.predictor.mask_token_per = "mask"
    config.model.predictor.out_dim = 0  # a teacher's channels; 0: the encoder's
    config.model.predictor.deep_input = False  # two input layers, for several levels
    config.model.predictor.predict_context = False  # visible tokens too

    config.masks = ConfigDict()  # mask types by name, each one context and prediction
    config.masks.short = mask()
    config.masks.long = mask(num_blocks=2, spatial_scale=(0.7, 0.7), token=1)

    config.objective = ConfigDict()
    # What is predicted: `features` of the target encoder, or the tokens' `pixels`.
    config.objective.target = "features"
    config.objective.exponent = 1.0  # p of the regression |error|^p / p
    config.objective.context_weight = 0.0  # of the visible tokens' loss (V-JEPA 2.1)
    config.objective.context_warmup = (0, 0)  # steps where it leaves 0, and is reached
    config.objective.context_distance = True  # divide it by sqrt(distance to a hole)
    config.objective.prediction_variance_weight = 0.0  # V-JEPA 1's `reg_coeff`
    config.objective.variance_weight = 0.0  # of VICReg's terms on the context
    config.objective.covariance_weight = 0.0  # encoder's tokens; 0 is V-JEPA

    config.optim = ConfigDict()
    config.optim.schedule = "cosine"  # of the rate; or `linear`, `wsd`
    config.optim.start_learning_rate = 2e-4  # at step 0 of the warm-up
    config.optim.learning_rate = 6.25e-4  # peak
    config.optim.final_learning_rate = 1e-6  # at schedule_scale * total_steps
    config.optim.warmup_steps = 12_000
    config.optim.anneal_steps = 0  # length of the final fall of `wsd`
    config.optim.weight_decay = 0.04  # at the start
    config.optim.final_weight_decay = 0.4  # at schedule_scale * total_steps
    config.optim.schedule_scale = 1.25  # schedules' length over the run's
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.clip_norm = 10.0  # largest gradient norm per module; 0: no clip
    config.optim.clip_start_step = 12_300  # the first step that is clipped
    config.optim.max_skipped_in_row = 10  # updates refused in a row that end the run
    config.optim.spike_window = 0  # losses a new one is compared to; 0: no guard
    config.optim.spike_deviations = 5.0  # above their mean: the update is refused

    config.ema = ConfigDict()  # momentum of the target encoder
    config.ema.start = 0.998
    config.ema.end = 1.0  # at schedule_scale * total_steps

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep = 2  # the latest ones

    config.log = ConfigDict()
    config.log.every_steps = 50
    config.log.watchdog_secs = 600.0  # without a step: threads' stacks are told; 0: not
    config.log.image_clips = 1  # drawn into TensorBoard at every evaluation; 0: none

    config.evals = ConfigDict()  # evaluations during training by name, see `evaluation`
    for name in ("health", "neighbours", "physics", "world"):
        config.evals[name] = evaluation(name)

    config.profile = ConfigDict()  # a trace of some steps, in `profile/` of the workdir
    config.profile.start_step = 0  # the first step traced, from 1; 0: none
    config.profile.num_steps = 3  # how many
    return config.lock()


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"a.b.c": value} for a nested dict; lists become tuples."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = tuple(value) if isinstance(value, list) else value
    return flat
