"""The state of a run: step, parameters, target, optimiser moments, guard."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from vjepa_jax.objective.objective import Objective, Params


class Guard(struct.PyTreeNode):
    """Counts of skipped updates, and recent losses.

    Attributes:
      skipped: int32 scalar, updates skipped in the run.
      skipped_in_row: int32 scalar, updates skipped since the last one taken.
      most_skipped_in_row: int32 scalar, the maximum of `skipped_in_row` so far.
      losses: float32 [W], losses of the last W updates taken, the oldest first;
        infinity if there were fewer. Without a guard against spikes W is 1 and the
        value stays infinity, because Orbax stores no empty array.
    """

    skipped: jax.Array
    skipped_in_row: jax.Array
    most_skipped_in_row: jax.Array
    losses: jax.Array


class TrainState(struct.PyTreeNode):
    """Everything that a run needs to continue.

    Attributes:
      step: int32 scalar, finished steps, including skipped ones.
      params: trained parameters by module, float32.
      target: averaged or frozen parameters, float32; None if the objective has none.
      opt_state: moments of the optimiser.
      guard: counts of skipped updates and recent losses.
    """

    step: jax.Array
    params: Params
    target: Any
    opt_state: optax.OptState
    guard: Guard


def make_init(
    objective: Objective,
    tx: optax.GradientTransformation,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    spike_window: int = 0,
) -> Callable[[jax.Array], TrainState]:
    """Make `init(key) -> TrainState`, to be jitted with `out_shardings`.

    Args:
      objective, tx: as for `step.make_train_step`.
      batch: shapes and dtypes of a global batch, the main stream first.
      spike_window: number of recent losses in the guard.

    Returns:
      The function; the leaves are boxed with their logical axes
      (`flax.linen.Partitioned`).
    """

    def init(key: jax.Array) -> TrainState:
        params, target = objective.init(key, batch)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            target=target,
            opt_state=tx.init(params),
            guard=Guard(
                skipped=jnp.zeros((), jnp.int32),
                skipped_in_row=jnp.zeros((), jnp.int32),
                most_skipped_in_row=jnp.zeros((), jnp.int32),
                losses=jnp.full(max(spike_window, 1), jnp.inf, jnp.float32),
            ),
        )

    return init


def init_shapes(init: Callable[[jax.Array], Any]) -> Any:
    """Return the shapes and dtypes of `init(key)`, without boxes."""
    return nn.unbox(jax.eval_shape(init, jax.random.key(0)))


def unbox(tree: Any) -> Any:
    """Take arrays out of their boxes without moving them.

    `nn.unbox` would also constrain their sharding by the current axis rules.
    """

    def is_box(x):
        return isinstance(x, nn.LogicallyPartitioned)

    return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)
