"""The state of a run: step, online parameters, their EMA target, optimiser moments."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.models.predictor import Predictor


class Guard(struct.PyTreeNode):
    """What decides whether an update is taken.

    Attributes:
      skipped: int32 scalar, updates refused in the whole run.
      skipped_in_row: int32 scalar, updates refused since the last one taken.
      most_skipped_in_row: int32 scalar, the largest that this has been.
      losses: float32 [W], losses of the last W updates taken, the oldest first; NaN
        where there were not so many. W is 1, and nothing is remembered, without a guard
        against spikes: Orbax stores no empty array.
    """

    skipped: jax.Array
    skipped_in_row: jax.Array
    most_skipped_in_row: jax.Array
    losses: jax.Array


class TrainState(struct.PyTreeNode):
    """Everything that a run must not lose.

    Attributes:
      step: int32 scalar, finished steps, those that were skipped included.
      params: `{"encoder": ..., "predictor": ...}`, float32.
      target: EMA copy of `params["encoder"]`, float32.
      opt_state: moments of the optimiser.
      guard: counts of skipped updates and recent losses.
    """

    step: jax.Array
    params: dict[str, Any]
    target: Any
    opt_state: optax.OptState
    guard: Guard


def make_init(
    encoder: VideoEncoder,
    predictor: Predictor,
    tx: optax.GradientTransformation,
    video_shape: tuple[int, int, int, int],
    spike_window: int = 0,
):
    """Make `init(key) -> TrainState`, to be jitted with `out_shardings`.

    The leaves are boxed with their logical axes (`flax.linen.Partitioned`); the target
    is built inside, so that it never shares a buffer with the encoder, which donation
    would forbid.

    Args:
      encoder, predictor, tx: what the state is for.
      video_shape: (T, H, W, C) of a clip; parameters do not depend on it.
      spike_window: losses remembered by the guard against spikes.
    """

    def init(key: jax.Array) -> TrainState:
        encoder_key, predictor_key = jax.random.split(key)
        video = jnp.zeros((1, *video_shape))
        one = jnp.zeros((1, 1), jnp.int32)
        encoder_params = encoder.init(encoder_key, video)["params"]
        predictor_params = predictor.init(
            predictor_key,
            jnp.zeros((1, 1, encoder.out_dim)),
            one,
            one,
            encoder.grid(video_shape),
        )["params"]
        params = {"encoder": encoder_params, "predictor": predictor_params}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            target=jax.tree.map(jnp.copy, encoder_params),
            opt_state=tx.init(params),
            guard=Guard(
                skipped=jnp.zeros((), jnp.int32),
                skipped_in_row=jnp.zeros((), jnp.int32),
                most_skipped_in_row=jnp.zeros((), jnp.int32),
                losses=jnp.full(max(spike_window, 1), jnp.nan, jnp.float32),
            ),
        )

    return init


def abstract_state(init) -> TrainState:
    """Return the state's shapes and dtypes without boxes and without computing it."""
    return nn.unbox(jax.eval_shape(init, jax.random.key(0)))


def unbox(tree: Any) -> Any:
    """Take arrays out of their boxes, and leave them where they are.

    `nn.unbox` would lay them out by the axis rules that are set, each axis by itself.
    """

    def is_box(x):
        return isinstance(x, nn.LogicallyPartitioned)

    return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)
