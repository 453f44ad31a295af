"""A config file of an evaluation that fails; its argument is whose fault it is."""

import numpy as np
from ml_collections import ConfigDict

from vjepa_jax.base.errors import UserError
from vjepa_jax.evals import registry


def evaluate(frozen, config):
    """Fail when some work has been done."""
    frozen.encode(np.zeros((3, *frozen.video_shape), np.uint8))
    if config.whose == "user":
        raise UserError("the list is empty:\ngive another")
    raise RuntimeError("no such luck")


registry.EVALUATIONS["broken"] = evaluate


def get_config(whose="nobody"):
    """Return the config."""
    return ConfigDict({"evaluation": "broken", "whose": whose}).lock()
