"""A config file of runs in several processes: a smaller model than any with a name.

Its argument is the folder with the videos. A process can be made to wait in a step, so
that what happens to it does not depend on the speed of the machine.
"""

import os
import pathlib
import time

from vjepa_jax.config.defaults import get_config as get_default
from vjepa_jax.config.defaults import mask
from vjepa_jax.models import registry
from vjepa_jax.parallel import distributed

_HOLD = "PROCESS_CONFIG_HOLD"  # environment variable: step and file

registry.SIZES["process_test"] = registry.Size(1, 16, 2, 32)


def make_small(folder, size, predictor_width):
    """Return the config of a run that computes next to nothing.

    It reads the videos of `list.csv` in the folder; eight devices get a clip each.
    """
    config = get_default()
    with config.unlocked():
        del config.masks.short, config.masks.long
        config.masks.future = mask(num_blocks=0, max_temporal_keep=0.5)
    config.batch_size = 8
    config.data.path = f"{folder}/list.csv"
    config.data.num_workers = 0
    config.data.num_frames, config.data.frame_step = 4, 1
    config.data.resolution = 16
    config.model.pos_embed, config.model.dtype = "rope", "float32"
    config.model.encoder.size, config.model.encoder.patch_size = size, 8
    config.model.predictor.depth = 1
    config.model.predictor.width = predictor_width
    config.model.predictor.num_heads = 2
    config.optim.clip_norm = 0.0
    config.log.every_steps = 1
    return config


def get_config(folder):
    config = make_small(folder, "process_test", predictor_width=16)
    config.total_steps = 80  # more than are taken before the signals come
    config.data.max_bad_fraction = 1.0
    config.optim.learning_rate, config.optim.warmup_steps = 1e-3, 2
    config.optim.start_learning_rate = 1e-3
    config.checkpoint.every_steps, config.checkpoint.keep = 5, 2
    return config


def hold(step: int, file: pathlib.Path) -> dict[str, str]:
    """Return the environment of a process that waits in a step for a file.

    It has started to compute this step, and has logged the steps up to two before.
    """
    return {_HOLD: f"{step} {file}"}


def _hold(step: int, file: str) -> None:
    is_agreed = distributed.StopRequest.is_agreed

    def wait_and_ask(self, current):
        while current == step and not os.path.exists(file):
            time.sleep(0.01)
        return is_agreed(self, current)

    distributed.StopRequest.is_agreed = wait_and_ask


if _HOLD in os.environ:
    _step, _file = os.environ[_HOLD].split(" ", 1)
    _hold(int(_step), _file)
