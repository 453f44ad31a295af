r"""The synthetic world, longer: three times the updates and videos of the demo.

Cost: 16 minutes on two CPU cores beside other work. Result of two seeds: linear probe
77.0 and 69.2 % with 16 labels per class (random init 15.3 and 16.5 %), attentive
velocity R² 0.90 (0.83), 73.3 % of the pairs of intuitive physics. More:
docs/world.md.

Command:

    python -m vjepa_jax.train --config=configs/world_small.py --workdir=runs/small
    python -m vjepa_jax.probe --config=configs/probe_world.py --workdir=runs/small
"""

import pathlib
import runpy

# Config files are not a package: the demo's file is loaded by its path.
_TINY = runpy.run_path(str(pathlib.Path(__file__).with_name("world_tiny.py")))


def get_config():
    """Return the demo's config, longer."""
    config = _TINY["get_config"]()
    config.total_steps = 12000
    config.world.path = "runs/world_small"
    config.world.pretrain_videos = 16500
    config.data.path = "runs/world_small/pretrain.csv"
    config.checkpoint.every_steps = 1000
    config.log.every_steps = 50
    return config
