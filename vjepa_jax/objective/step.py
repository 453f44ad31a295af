"""Make one update of any objective a pure function: gradient, AdamW, target, guard."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vjepa_jax.objective.objective import Batch, Metrics, Objective
from vjepa_jax.objective.optim import Schedule
from vjepa_jax.objective.state import Guard, TrainState


@dataclasses.dataclass(frozen=True)
class SpikeGuard:
    """Skips updates whose loss is far above the recent ones.

    The loss is that of the global batch, so that all devices decide equally.

    Attributes:
      window: number of recent losses to compare with.
      deviations: standard deviations above their mean from which a loss is a spike.
    """

    window: int
    deviations: float

    def is_spike(self, loss: jax.Array, recent: jax.Array) -> jax.Array:
        """Compare a loss with the last `window`; False until there are that many."""
        # Infinity stands for a missing loss: the deviation is then NaN, and comparing
        # with it is false. NaN itself would end every run under jax_debug_nans.
        return loss > recent.mean() + self.deviations * recent.std()


def _microbatches(tree: Any, count: int) -> Any:
    """Split the batch axis of every leaf: [B, ...] -> [count, B / count, ...].

    Strided, so that each microbatch is sharded over all devices that hold the batch.
    """
    return jax.tree.map(
        lambda x: x.reshape(len(x) // count, count, *x.shape[1:]).swapaxes(0, 1), tree
    )


def _guarded(
    spike_guard: SpikeGuard | None,
    guard: Guard,
    loss: jax.Array,
    norms: Iterable[jax.Array],
) -> tuple[jax.Array, Guard]:
    """Return whether to take an update, and the guard after it."""
    taken = jnp.isfinite(loss)
    for norm in norms:
        taken &= jnp.isfinite(norm)
    recent = guard.losses
    if spike_guard is not None:
        taken &= ~spike_guard.is_spike(loss, recent)
        moved = jnp.append(recent[1:], loss)
        recent = jnp.where(taken, moved, recent)
    skipped = 1 - taken.astype(jnp.int32)
    in_row = (guard.skipped_in_row + 1) * skipped
    return taken, Guard(
        skipped=guard.skipped + skipped,
        skipped_in_row=in_row,
        most_skipped_in_row=jnp.maximum(guard.most_skipped_in_row, in_row),
        losses=recent,
    )


def make_train_step(
    objective: Objective,
    tx: optax.GradientTransformationExtraArgs,
    schedules: Mapping[str, Schedule],
    seed: int,
    accumulate_steps: int = 1,
    spike_guard: SpikeGuard | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Make the pure `train_step(state, batch[, frozen]) -> (state, metrics)`.

    An update whose loss or gradient is not finite, or whose loss is a spike, is
    skipped: parameters, moments and target stay as they are. The step still counts, and
    with it the schedules, the data and what the objective samples.

    Args:
      objective: what is minimised.
      tx: optimiser.
      schedules: functions of the finished steps, logged as `optim/NAME`; `tx` and
        the objective use the same ones.
      seed: the objective samples with `fold_in(key(seed), step)` alone, so neither the
        mesh nor accumulation matters.
      accumulate_steps: microbatches per update, computed one after the other.
      spike_guard: skips updates whose loss is a spike; None: off. The state holds its
        recent losses.

    Returns:
      The step. The batch is {stream: array [B, ...]}; `frozen`, if given, replaces
      `state.target` in the loss (a teacher's parameters). Metrics are float32 scalars,
      averaged over the batch.
    """
    grad_fn = jax.grad(objective.loss, has_aux=True)

    def accumulate(params, target, batch, sampled, key, step):
        if accumulate_steps == 1:
            return grad_fn(params, target, batch, sampled, key, step)
        parts = _microbatches((batch, sampled), accumulate_steps)

        def add(total, part):
            part = grad_fn(params, target, *part, key, step)
            return jax.tree.map(jnp.add, total, part), None

        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(grad_fn, params, target, *first, key, step)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda x: x / accumulate_steps, total)

    def train_step(state: TrainState, batch: Batch, frozen: Any = None):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        sampled = objective.sample(key, batch)
        target = state.target if frozen is None else frozen
        grads, metrics = accumulate(
            state.params, target, batch, sampled, key, state.step
        )
        norms = {name: optax.tree.norm(tree) for name, tree in grads.items()}
        loss = metrics["train/total_loss"]
        taken, guard = _guarded(spike_guard, state.guard, loss, norms.values())
        with jax.named_scope("optimiser"):
            updates, opt_state = tx.update(
                grads, state.opt_state, state.params, step=state.step
            )
            params = optax.apply_updates(state.params, updates)
        target = objective.update_target(params, state.target, state.step)
        params, target, opt_state = jax.tree.map(
            lambda new, old: jnp.where(taken, new, old),
            (params, target, opt_state),
            (state.params, state.target, state.opt_state),
        )
        metrics |= {f"optim/grad_norm_{name}": norm for name, norm in norms.items()}
        metrics |= {f"optim/{name}": f(state.step) for name, f in schedules.items()}
        metrics |= {
            "optim/skipped": guard.skipped.astype(jnp.float32),
            "optim/skipped_in_row": guard.skipped_in_row.astype(jnp.float32),
            "optim/most_skipped_in_row": guard.most_skipped_in_row.astype(jnp.float32),
        }
        return TrainState(state.step + 1, params, target, opt_state, guard), metrics

    return train_step
