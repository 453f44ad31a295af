"""The evaluations by the name that the key `evaluation` of a config holds."""

import importlib
from collections.abc import Callable
from typing import Any

from vjepa_jax.base.errors import UserError
from vjepa_jax.base.extras import imports_of
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.evals.frozen import FrozenModel

# (model, config) -> {measure: number, or {column: number}}; opens its own data. The key
# `CONFUSION` is optional: {column: confusion matrix, a list of rows}, and, if classes
# have names, {"class_names": those of the rows}.
Evaluation = Callable[[FrozenModel, ConfigDict], dict[str, Any]]

CONFUSION = "confusion"

# A function, or a module with the function `evaluate`. Modules are imported on use,
# since they need the extra `report`, and a run without evaluations does not.
EVALUATIONS: dict[str, Evaluation | str] = {
    "anticipation": "vjepa_jax.evals.anticipation.anticipation",
    "classification": "vjepa_jax.evals.classification",
    "health": "vjepa_jax.evals.health",
    "neighbours": "vjepa_jax.evals.neighbours",
    "physics": "vjepa_jax.evals.physics.physics",
    "real_video": "vjepa_jax.evals.real_video",
    "segmentation": "vjepa_jax.evals.segmentation.segmentation",
    "video_objects": "vjepa_jax.evals.video_objects.video_objects",
    "world": "vjepa_jax.evals.world_state",
}


def find(config: ConfigDict) -> Evaluation:
    """Return the evaluation that a config names.

    Raises:
      UserError: there is none of this name, or the extra `report` is not installed.
    """
    if config.evaluation not in EVALUATIONS:
        known = ", ".join(EVALUATIONS)
        raise UserError(f"config.evaluation={config.evaluation!r}: known: {known}")
    found = EVALUATIONS[config.evaluation]
    if isinstance(found, str):
        with imports_of("report"):
            return importlib.import_module(found).evaluate
    return found


def evaluate(model: FrozenModel, config: ConfigDict) -> dict[str, Any]:
    """Run the evaluation that a config names."""
    return find(config)(model, config)
