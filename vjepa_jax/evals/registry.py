"""The evaluations by the name that the key `evaluation` of a config holds."""

from collections.abc import Callable
from typing import Any

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.evals import classification, health, neighbours, world_state
from vjepa_jax.evals.anticipation import anticipation
from vjepa_jax.evals.frozen import FrozenModel
from vjepa_jax.evals.physics import physics
from vjepa_jax.evals.segmentation import segmentation
from vjepa_jax.evals.video_objects import video_objects

# (model, config) -> {measure: number, or {column: number}}; opens its own data. The key
# `CONFUSION` is optional: {column: confusion matrix, a list of rows}.
Evaluation = Callable[[FrozenModel, ConfigDict], dict[str, Any]]

CONFUSION = "confusion"

EVALUATIONS: dict[str, Evaluation] = {
    "anticipation": anticipation.evaluate,
    "classification": classification.evaluate,
    "health": health.evaluate,
    "neighbours": neighbours.evaluate,
    "physics": physics.evaluate,
    "segmentation": segmentation.evaluate,
    "video_objects": video_objects.evaluate,
    "world": world_state.evaluate,
}


def find(config: ConfigDict) -> Evaluation:
    """Return the evaluation that a config names, or raise UserError."""
    if config.evaluation not in EVALUATIONS:
        known = ", ".join(EVALUATIONS)
        raise UserError(f"config.evaluation={config.evaluation!r}: known: {known}")
    return EVALUATIONS[config.evaluation]


def evaluate(model: FrozenModel, config: ConfigDict) -> dict[str, Any]:
    """Run the evaluation that a config names."""
    return find(config)(model, config)
