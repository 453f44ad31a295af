"""Many heads trained at once on the same features: one per rate and decay of a grid.

All heads see the same batches and differ in initialisation, learning rate and weight
decay. They are one array with a leading axis, and one compiled update trains them all.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.evals.frozen import fill_up
from vjepa_jax.objective import optim
from vjepa_jax.parallel import sharding

_LOG_SECS = 10  # between two lines about the progress of training

# (a head's outputs in float32, labels [B, ...]) -> float32 [B]
Loss = Callable[[Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Schedules:
    """Rates and decays of heads: every combination of both.

    Attributes:
      learning_rates: peaks, followed by a cosine to 0.
      weight_decays: at the start, of every parameter, biases and norms too.
      start_learning_rate: at the start of the warm-up.
      warmup_steps: updates of the warm-up.
      final_weight_decay_share: share of the decay at the end of a cosine; 1: constant.
    """

    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]
    start_learning_rate: float = 0.0
    warmup_steps: int = 0
    final_weight_decay_share: float = 1.0

    def heads(self) -> list[tuple[float, float]]:
        """Return (learning rate, weight decay) of every head."""
        return [(r, d) for r in self.learning_rates for d in self.weight_decays]

    def at(self, step: jax.Array, total_steps: int) -> tuple[jax.Array, jax.Array]:
        """Return all heads' rates and decays at a step, each float32 [heads]."""
        rates, decays = jnp.asarray(self.heads(), jnp.float32).T
        rate = optim.warmup_cosine(
            self.start_learning_rate, rates, 0.0, self.warmup_steps, total_steps
        )
        share = optim.cosine(1.0, self.final_weight_decay_share, total_steps)
        return rate(step), decays * share(step)


@dataclasses.dataclass(frozen=True)
class GridTraining:
    """How the heads of a grid are trained.

    Attributes:
      schedules: of groups of heads.
      total_steps: length of the schedules.
      clip_norm: largest norm of a head's gradient; 0: no clipping.
      heads_at_once: heads whose activations are in memory together; 0: all.
      loss_fn: of each row.
    """

    schedules: tuple[Schedules, ...]
    total_steps: int
    clip_norm: float = 0.0
    heads_at_once: int = 0
    loss_fn: Loss = optax.softmax_cross_entropy_with_integer_labels

    def heads(self) -> list[tuple[float, float]]:
        """Return (learning rate, weight decay) of every head."""
        return [pair for group in self.schedules for pair in group.heads()]


def make_training(
    config: ConfigDict,
    steps_per_epoch: int,
    loss_fn: Loss = optax.softmax_cross_entropy_with_integer_labels,
) -> GridTraining:
    """Make the training that an evaluation's config describes, see `settings`."""
    schedules = tuple(
        Schedules(
            tuple(fields.learning_rates),
            tuple(fields.weight_decays),
            fields.start_learning_rate,
            fields.warmup_epochs * steps_per_epoch,
            fields.final_weight_decay_share,
        )
        for fields in config.grids.values()
    )
    return GridTraining(
        schedules,
        config.epochs * steps_per_epoch,
        config.get("clip_norm", 0.0),
        config.heads_at_once,
        loss_fn,
    )


def epochs_order(count: int, batch_size: int, steps: int, seed: int) -> np.ndarray:
    """Return the samples of `steps` batches: epochs in random order, complete batches.

    Args:
      count: samples.
      batch_size: samples per batch, at most `count`; the last samples of an epoch that
        do not fill a batch are left out.
      steps: batches.
      seed: of the orders.

    Returns:
      int64 [steps * batch_size].
    """
    rng = np.random.default_rng(seed)
    per_epoch = count // batch_size
    epochs = [
        rng.permutation(count)[: per_epoch * batch_size]
        for _ in range(-(-steps // per_epoch))
    ]
    return np.concatenate(epochs)[: steps * batch_size]


class HeadGrid:
    """Trains heads with AdamW and classifies, or predicts values, with them.

    Attributes:
      head: module of each.
      training: how they are trained.
      heads: (learning rate, weight decay) of every head, H of them.
      state: parameters, moments and step; leaves of the first two have a leading axis
        of H.
      mesh: batches are sharded over its devices, heads are replicated.
    """

    def __init__(
        self,
        head: nn.Module,
        training: GridTraining,
        token_shape: tuple[int, int],
        *,
        seed: int,
        mesh: Mesh,
    ):
        """Initialise the heads, each with a key of its own.

        Args:
          head: module from tokens [B, N, D] to outputs [B, K], logits or values, or to
            several outputs by name.
          training: how the heads are trained.
          token_shape: (N, D).
          seed: of the initialisation.
          mesh: devices that share every batch.
        """
        self.head, self.training, self.mesh = head, training, mesh
        self.heads = training.heads()
        self._compiled = _make_functions(head, training, tuple(token_shape), mesh)
        with sharding.use(mesh):
            self.state = self._compiled.init(jax.random.key(seed))

    def fit(
        self,
        batches: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
        steps_per_epoch: int,
    ) -> None:
        """Update every head once per batch, and log the loss after every epoch.

        Args:
          batches: of all epochs, see `update`.
          steps_per_epoch: batches of an epoch.

        Raises:
          UserError: no head has a finite loss.
        """
        began, losses = time.perf_counter(), None
        for step, batch in enumerate(batches, start=1):
            if losses is not None:
                # One update at a time: on CPU, devices are threads of one process. With
                # many queued updates they starve each other until the process aborts.
                losses.block_until_ready()
            losses = self.update(*batch)
            if step % steps_per_epoch == 0:
                logging.log_every_n_seconds(
                    logging.INFO,
                    "epoch %d of %d: lowest loss of %d heads %.4f after %.0f s",
                    _LOG_SECS,
                    step // steps_per_epoch,
                    self.training.total_steps // steps_per_epoch,
                    len(self.heads),
                    _lowest(losses),
                    time.perf_counter() - began,
                )

    def update(
        self, tokens: np.ndarray, labels: np.ndarray, weights: np.ndarray
    ) -> jax.Array:
        """Update every head once.

        Args:
          tokens: float [B, N, D].
          labels: int [B], or what the loss takes, with B rows.
          weights: float [B], of the rows in the mean loss.

        Returns:
          The losses before the update, [H]; computed asynchronously.
        """
        weights = np.asarray(weights, np.float32)
        placed = self._place(tokens, labels, weights)
        with sharding.use(self.mesh):
            self.state, losses = self._compiled.update(self.state, *placed)
        return losses

    def classify(
        self, tokens: np.ndarray, num_best: int = 1
    ) -> np.ndarray | dict[str, np.ndarray]:
        """Return the most probable classes by every head, the best first.

        Args:
          tokens: float [B, views, N, D]; softmax is averaged over views.
          num_best: classes to return, or all if there are fewer.

        Returns:
          int32 [H, B, num_best], or several by name where the head gives several.
        """
        (placed,) = self._place(tokens)
        with sharding.use(self.mesh):
            best = self._compiled.classify(self.state[0], placed, num_best)
        return jax.tree.map(lambda x: np.asarray(x)[:, : len(tokens)], best)

    def predict(self, tokens: np.ndarray) -> np.ndarray:
        """Return the outputs of every head: tokens [B, N, D] to float [H, B, K]."""
        (placed,) = self._place(tokens)
        with sharding.use(self.mesh):
            outputs = self._compiled.predict(self.state[0], placed)
        return np.asarray(outputs)[:, : len(tokens)]

    def _place(self, *arrays: np.ndarray) -> list[jax.Array]:
        """Shard arrays over the devices, with rows of zeros to fill the last ones."""
        filled = fill_up(arrays, self.mesh.size)
        return jax.device_put(filled, sharding.batch_sharding(self.mesh))


class _Functions(NamedTuple):
    """Jitted functions of a grid; `state` is that of `HeadGrid`."""

    init: Callable[..., Any]  # key -> state
    update: Callable[..., Any]  # state, tokens, labels, weights -> state, losses
    classify: Callable[..., Any]  # params, tokens, num_best -> classes
    predict: Callable[..., Any]  # params, tokens -> outputs


@functools.lru_cache(maxsize=8)  # grids of equal heads share compilations
def _make_functions(
    head: nn.Module, training: GridTraining, token_shape: tuple[int, int], mesh: Mesh
) -> _Functions:
    count, at_once = len(training.heads()), training.heads_at_once
    clip_norm = training.clip_norm
    tx = optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.scale_by_adam(),
    )

    def over_heads(one):
        if 0 < at_once < count:
            return lambda each: jax.lax.map(one, each, batch_size=at_once)
        return jax.vmap(one)

    def init(key):
        keys = jax.random.split(key, count)
        tokens = jnp.zeros((1, *token_shape))
        params = jax.vmap(lambda k: nn.unbox(head.init(k, tokens)["params"]))(keys)
        return params, jax.vmap(tx.init)(params), jnp.zeros((), jnp.int32)

    def scheduled(step):
        values = [group.at(step, training.total_steps) for group in training.schedules]
        return (jnp.concatenate(part) for part in zip(*values, strict=True))

    def outputs_of(params, tokens):
        outputs = head.apply({"params": params}, tokens)
        return jax.tree.map(lambda x: x.astype(jnp.float32), outputs)

    def update_one(head_state, tokens, labels, weights):
        params, moments, rate, decay = head_state

        def mean_loss(params):
            losses = training.loss_fn(outputs_of(params, tokens), labels)
            return (losses * weights).sum() / jnp.maximum(weights.sum(), 1)

        value, gradient = jax.value_and_grad(mean_loss)(params)
        step, moments = tx.update(gradient, moments, params)
        params = jax.tree.map(lambda p, u: p - rate * (u + decay * p), params, step)
        return params, moments, value

    def update(state, tokens, labels, weights):
        params, moments, step = state
        one = functools.partial(
            update_one, tokens=tokens, labels=labels, weights=weights
        )
        each = (params, moments, *scheduled(step))
        params, moments, losses = over_heads(one)(each)
        return (params, moments, step + 1), losses

    def classify(params, tokens, num_best):
        videos, views = tokens.shape[:2]
        flat = tokens.reshape(videos * views, *tokens.shape[2:])

        def best_of(logits):
            shares = jax.nn.softmax(logits).reshape(videos, views, -1).mean(1)
            return jax.lax.top_k(shares, min(num_best, shares.shape[-1]))[1]

        def one(params):
            return jax.tree.map(best_of, outputs_of(params, flat))

        return over_heads(one)(params)

    def predict(params, tokens):
        return over_heads(lambda p: head.apply({"params": p}, tokens))(params)

    replicated = sharding.replicated(mesh)
    return _Functions(
        jax.jit(init, out_shardings=replicated),
        jax.jit(update, donate_argnums=0, out_shardings=replicated),
        jax.jit(classify, static_argnums=2, out_shardings=replicated),
        jax.jit(predict, out_shardings=replicated),
    )


def name_of(head: tuple[float, float]) -> str:
    """Return a head's name: its learning rate and weight decay."""
    return f"rate {head[0]:g}, decay {head[1]:g}"


def _lowest(losses: jax.Array) -> float:
    """Return the lowest of the heads' finite losses."""
    finite = np.asarray(losses)[np.isfinite(losses)]
    if not len(finite):
        raise UserError(
            "no head has a finite loss: lower the learning rates of the heads, "
            "config.grids.*.learning_rates"
        )
    return float(finite.min())
