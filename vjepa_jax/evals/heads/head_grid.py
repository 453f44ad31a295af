"""Many heads at once on the same features: one for each rate and decay of a grid.

All heads see the same batches and differ in initialisation, learning rate and weight
decay. They are one array with a leading axis, and one compiled update trains them all.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from vjepa_jax.base.errors import UserError
from vjepa_jax.objective import optim
from vjepa_jax.parallel import sharding

# (outputs, labels [B, ...]) -> float32 [B]; outputs are a head's, but float32.
Loss = Callable[[Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Schedules:
    """The rates and decays of heads: every combination of both.

    Attributes:
      learning_rates: peaks; from there along a cosine to 0.
      weight_decays: at the start, of every parameter, biases and norms too.
      start_learning_rate: at the start of the warm-up.
      warmup_steps: updates of the warm-up.
      final_weight_decay_share: of the decay that is left at the end of a cosine; 1 for
        a constant one.
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


class HeadGrid:
    """Trains heads with AdamW and classifies, or predicts values, with them.

    Attributes:
      head: module of each.
      heads: (learning rate, weight decay) of every head, H of them.
      state: parameters and moments, every leaf with a leading axis of H.
      mesh: batches are split over its devices, heads are whole on each.
    """

    def __init__(
        self,
        head: nn.Module,
        schedules: Sequence[Schedules],
        *,
        total_steps: int,
        token_shape: tuple[int, int],
        seed: int,
        mesh: Mesh,
        clip_norm: float = 0.0,
        heads_at_once: int = 0,
        loss_fn: Loss = optax.softmax_cross_entropy_with_integer_labels,
    ):
        """Initialises the heads, each with a key of its own.

        Args:
          head: module from tokens [B, N, D] to outputs [B, K], logits or values, or to
            several by name.
          schedules: of groups of heads.
          total_steps: length of the schedules.
          token_shape: (N, D).
          seed: of the initialisation.
          mesh: see there.
          clip_norm: largest norm of a head's gradient; 0: no clip.
          heads_at_once: heads whose activations are in memory together; 0: all.
          loss_fn: of each row.
        """
        self.head = head
        self.heads = [pair for group in schedules for pair in group.heads()]
        self.mesh = mesh
        tx = optax.chain(
            optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
            optax.scale_by_adam(),
        )
        count = len(self.heads)
        over_heads = jax.vmap
        if 0 < heads_at_once < count:

            def over_heads(one):
                return lambda each: jax.lax.map(one, each, batch_size=heads_at_once)

        def init(key):
            keys = jax.random.split(key, count)
            tokens = jnp.zeros((1, *token_shape))
            params = jax.vmap(lambda k: nn.unbox(head.init(k, tokens)["params"]))(keys)
            return params, jax.vmap(tx.init)(params), jnp.zeros((), jnp.int32)

        def scheduled(step):
            values = [group.at(step, total_steps) for group in schedules]
            return (jnp.concatenate(part) for part in zip(*values, strict=True))

        def outputs_of(params, tokens):
            outputs = head.apply({"params": params}, tokens)
            return jax.tree.map(lambda x: x.astype(jnp.float32), outputs)

        def update_one(head_state, tokens, labels, weights):
            params, moments, rate, decay = head_state

            def mean_loss(params):
                losses = loss_fn(outputs_of(params, tokens), labels)
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

        whole = sharding.replicated(mesh)
        self._init = jax.jit(init, out_shardings=whole)
        self.reset(seed)
        self._update = jax.jit(update, donate_argnums=0, out_shardings=whole)
        self._classify = jax.jit(
            classify, static_argnames="num_best", out_shardings=whole
        )
        self._predict = jax.jit(predict, out_shardings=whole)

    def reset(self, seed: int) -> None:
        """Initialises the heads anew; what is compiled stays."""
        with sharding.use(self.mesh):
            self.state = self._init(jax.random.key(seed))

    def update(
        self, tokens: np.ndarray, labels: np.ndarray, weights: np.ndarray
    ) -> jax.Array:
        """Update every head once.

        Args:
          tokens: float [B, N, D].
          labels: int [B], or whatever the loss takes, B rows of it.
          weights: float [B]; 0 leaves a row out of the mean.

        Returns:
          The losses before the update, [H]; the host need not wait for them.
        """
        weights = np.asarray(weights, np.float32)
        placed = self._placed(tokens, labels, weights)
        with sharding.use(self.mesh):
            self.state, losses = self._update(self.state, *placed)
        return losses

    def classify(
        self, tokens: np.ndarray, num_best: int = 1
    ) -> np.ndarray | dict[str, np.ndarray]:
        """Return the most probable classes by every head, the best first.

        Args:
          tokens: float [B, views, N, D]; softmax is averaged over views.
          num_best: classes to return, as far as there are so many.

        Returns:
          int32 [H, B, num_best], or several by name where the head gives several.
        """
        (placed,) = self._placed(tokens)
        with sharding.use(self.mesh):
            best = self._classify(self.state[0], placed, num_best=num_best)
        return jax.tree.map(lambda x: np.asarray(x)[:, : len(tokens)], best)

    def predict(self, tokens: np.ndarray) -> np.ndarray:
        """Return the outputs of every head: tokens [B, N, D] to float [H, B, K]."""
        (placed,) = self._placed(tokens)
        with sharding.use(self.mesh):
            outputs = self._predict(self.state[0], placed)
        return np.asarray(outputs)[:, : len(tokens)]

    def _placed(self, *arrays: np.ndarray) -> list[jax.Array]:
        """Split arrays over the devices, filled up with zeros to a multiple of them."""
        missing = -len(arrays[0]) % self.mesh.size
        filled = [np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for x in arrays]
        return jax.device_put(filled, sharding.batch_sharding(self.mesh))


def describe(head: tuple[float, float]) -> str:
    """Name a head by its learning rate and weight decay."""
    return f"rate {head[0]:g}, decay {head[1]:g}"


def lowest(losses: jax.Array) -> float:
    """Return the lowest of the heads' losses, or raise UserError if none is finite."""
    finite = np.asarray(losses)[np.isfinite(losses)]
    if not len(finite):
        raise UserError(
            "no head has a finite loss: lower config.grids.*.learning_rates"
        )
    return float(finite.min())
