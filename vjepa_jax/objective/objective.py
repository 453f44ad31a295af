"""The interface between an objective and the train step."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
Params = dict[str, Any]


class Objective(Protocol):
    """What a run minimises: modules, loss and target.

    The step, the state, the checkpoint and the training loop use nothing else of it.

    Attributes:
      probe_item: what evaluations read of a checkpoint: `target`, or the name of a
        module in `params`.
      modules: its transformers, with frozen ones; reports read their sizes.
    """

    @property
    def probe_item(self) -> str: ...

    @property
    def modules(self) -> Sequence[Any]: ...

    def init(
        self, key: jax.Array, batch: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[Params, Any]:
        """Initialise the parameters.

        Args:
          key: random key.
          batch: shapes and dtypes of a global batch, the main stream first.

        Returns:
          (params, target): {module: trained parameters}, and averaged or frozen
          parameters, None without any. Leaves may be boxed with logical axes.
        """
        ...

    def sample(self, key: jax.Array, batch: Batch) -> Any:
        """Draw the random inputs of each clip, such as token masks.

        Args:
          key: of the step.
          batch: the global batch, each array with the clips on its first axis.

        Returns:
          A tree of arrays with the clips on their first axes. The step splits it into
          microbatches together with the batch, so that accumulation changes nothing.
        """
        ...

    def loss(
        self,
        params: Params,
        target: Any,
        batch: Batch,
        sampled: Any,
        key: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, Metrics]:
        """Compute the loss of a microbatch.

        Args:
          params: the trained parameters.
          target: the state's target, or frozen parameters in its place (a teacher).
          batch, sampled: a microbatch and its part of what `sample` returned.
          key: of the step, the same for all microbatches.
          step: finished steps, int32 scalar.

        Returns:
          (loss, metrics): float32 scalars, means over the clips. The metrics contain
          `train/total_loss`, the loss.
        """
        ...

    def update_target(self, params: Params, target: Any, step: jax.Array) -> Any:
        """Return the target after an update, given the new parameters."""
        ...
