r"""A small V-JEPA on camera footage: the robot arms of DROID, for two CPU cores.

The recipe is not chosen yet: masks, rate of frames, size and updates are to be found by
experiment. See docs/real_video.md, which has the commands that make the videos' list
and shards.

Command:

    python -m vjepa_jax.train --config=configs/droid_small.py --workdir=runs/droid
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import mask

# Config files are not a package: the demo's file is loaded by its path.
_TINY = runpy.run_path(str(pathlib.Path(__file__).with_name("world_tiny.py")))
_MASKS = ("multiblock", "future", "both")


def get_config(masks: str = "multiblock"):
    """Return the config.

    Args:
      masks: `multiblock` (V-JEPA's short and long blocks), `future` (the second half of
        the clip, as in the synthetic world), or `both` (short blocks and the future).
    """
    if masks not in _MASKS:
        raise UserError(f"'{masks}' is no variant; known: {', '.join(_MASKS)}")
    config = _TINY["get_config"]()
    with config.unlocked():
        config.world.path = ""
        config.data.path = "runs/real_video/shards"
        config.data.fps, config.data.frame_step = 8.0, 0
        config.data.resolution = 64
        config.data.crop_scale = (0.4, 1.0)
        config.data.crop_aspect_ratio = (0.75, 1.35)
        config.ema.start = 0.996
        future = config.masks.future
        config.masks = ConfigDict()
        if masks != "future":
            config.masks.short = mask()
        if masks == "multiblock":
            config.masks.long = mask(num_blocks=2, spatial_scale=(0.7, 0.7), token=1)
        else:
            config.masks.future = future
            config.masks.future.token = len(config.masks) - 1
    return config.lock()
