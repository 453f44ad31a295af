"""The evaluations by name, as the key `evaluation` of a config chooses them."""

from collections.abc import Callable
from typing import Any

from vjepa_jax.default_config import ConfigDict, UserError
from vjepa_jax.evals import classification, health, neighbours, physics, world
from vjepa_jax.evals.frozen import Frozen

# (frozen, config) -> {measure: number, or {column: number}}; opens its own data. Under
# `CONFUSION`, where there is one, {column: confusion matrix, a list of rows}.
Evaluation = Callable[[Frozen, ConfigDict], dict[str, Any]]

CONFUSION = "confusion"

EVALUATIONS: dict[str, Evaluation] = {
    "classification": classification.evaluate,
    "health": health.evaluate,
    "neighbours": neighbours.evaluate,
    "physics": physics.evaluate,
    "world": world.evaluate,
}


def evaluate(frozen: Frozen, config: ConfigDict) -> dict[str, Any]:
    """Run the evaluation that a config names.

    Raises:
      UserError: there is none of this name.
    """
    if config.evaluation not in EVALUATIONS:
        known = ", ".join(EVALUATIONS)
        raise UserError(f"config.evaluation={config.evaluation!r}: known: {known}")
    return EVALUATIONS[config.evaluation](frozen, config)
