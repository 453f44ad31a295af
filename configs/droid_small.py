r"""A small V-JEPA on camera footage: robot arms of the DROID data set.

WIP
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from vjepa_jax.config.defaults import mask

_TINY = runpy.run_path(str(pathlib.Path(__file__).with_name("world_tiny.py")))


def get_config(masks: str = "future"):
    """Return the config."""
    config = _TINY["get_config"]()
    with config.unlocked():
        config.world.path = ""
        config.data.path = "runs/droid/train"
        config.data.fps = 8.0
        config.data.frame_step = 0
        config.data.resolution = 64
        config.data.crop_scale = (0.4, 1.0)
        config.data.crop_aspect_ratio = (0.75, 1.35)
        if masks in ("multiblock", "both"):
            future = config.masks.future
            config.masks = ConfigDict()
            config.masks.short = mask()
            if masks == "both":
                config.masks.future = future
                config.masks.future.token = 1
            else:
                config.masks.long = mask(
                    num_blocks=2, spatial_scale=(0.7, 0.7), token=1
                )
    return config.lock()
