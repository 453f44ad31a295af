r"""A small V-JEPA on the synthetic world: the whole path in minutes on two CPU cores.

Command:

    python -m vjepa_jax.train --config=configs/world_tiny.py --workdir=runs/tiny
"""

from ml_collections import ConfigDict

from vjepa_jax.config.defaults import get_config as get_default
from vjepa_jax.config.defaults import mask


def get_config():
    """Return the demo's config."""
    config = get_default()
    config.total_steps = 4000
    config.batch_size = 32

    config.world.path = "runs/world_tiny"
    # A quarter is play, in which objects meet and obey the world's laws.
    config.world.pretrain_videos = 5500
    config.world.play_fraction = 0.25
    config.world.physics_pairs = 40  # for configs/probe_physics.py
    config.data.path = "runs/world_tiny/pretrain.csv"
    config.data.num_workers = 1
    config.data.num_frames = 16
    config.data.frame_step = 1
    config.data.resolution = 32
    config.data.crop_scale = (1.0, 1.0)
    config.data.crop_aspect_ratio = (1.0, 1.0)

    config.model.pos_embed = "rope"
    config.model.scale_init = True
    config.model.scan_layers = False
    config.model.dtype = "float32"
    config.model.encoder.size = "nano"
    config.model.encoder.patch_size = 8
    config.model.encoder.tubelet_size = 4
    config.model.predictor.depth = 1
    config.model.predictor.width = 64
    config.model.predictor.num_heads = 2
    # The second half of the clip is predicted from the first, because where objects
    # will be depends on how they move. Boxes in space teach more about the background.
    with config.unlocked():
        config.masks = ConfigDict()
        config.masks.future = mask(num_blocks=0, max_temporal_keep=0.5, mode="unbiased")

    config.optim.start_learning_rate = 1e-4
    config.optim.learning_rate = 1e-3
    config.optim.final_learning_rate = 0.0
    config.optim.warmup_steps = 100
    config.optim.weight_decay = 0.04
    config.optim.final_weight_decay = 0.04
    config.optim.schedule_scale = 1.0
    config.optim.clip_norm = 0.0
    config.ema.start = 0.98
    config.ema.end = 1.0

    config.checkpoint.every_steps = 500
    config.log.every_steps = 20
    return config.lock()
