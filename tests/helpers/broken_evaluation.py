"""A config file of an evaluation that fails; the argument names the cause."""

import numpy as np
from ml_collections import ConfigDict

from vjepa_jax.base.errors import UserError
from vjepa_jax.evals import registry


def evaluate(model, config):
    """Fail after some work."""
    model.encode(np.zeros((3, *model.video_shape), np.uint8))
    if config.cause == "user":
        raise UserError("the list is empty:\ngive another")
    raise RuntimeError("no such luck")


registry.EVALUATIONS["broken"] = evaluate


def get_config(cause="program"):
    """Return the config."""
    return ConfigDict({"evaluation": "broken", "cause": cause}).lock()
