"""The state of a run: step, online parameters, their EMA target, optimiser moments."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from vjepa_jax.models.encoder import VideoEncoder, token_grid
from vjepa_jax.models.predictor import Predictor


class TrainState(struct.PyTreeNode):
    """Everything that a run must not lose.

    Attributes:
      step: int32 scalar, finished updates.
      params: `{"encoder": ..., "predictor": ...}`, float32.
      target: EMA copy of `params["encoder"]`, float32.
      opt_state: moments of the optimiser.
    """

    step: jax.Array
    params: dict[str, Any]
    target: Any
    opt_state: optax.OptState


def make_init(
    encoder: VideoEncoder,
    predictor: Predictor,
    tx: optax.GradientTransformation,
    video_shape: tuple[int, int, int, int],
):
    """Make `init(key) -> TrainState`, to be jitted with `out_shardings`.

    The leaves are boxed with their logical axes (`flax.linen.Partitioned`); the target
    is built inside, so that it never shares a buffer with the encoder, which donation
    would forbid.

    Args:
      encoder, predictor, tx: what the state is for.
      video_shape: (T, H, W, C) of a clip; parameters do not depend on it.
    """

    def init(key: jax.Array) -> TrainState:
        encoder_key, predictor_key = jax.random.split(key)
        video = jnp.zeros((1, *video_shape))
        one = jnp.zeros((1, 1), jnp.int32)
        encoder_params = encoder.init(encoder_key, video)["params"]
        predictor_params = predictor.init(
            predictor_key,
            jnp.zeros((1, 1, encoder.width)),
            one,
            one,
            token_grid(video_shape, encoder.patch_size, encoder.tubelet_size),
        )["params"]
        params = {"encoder": encoder_params, "predictor": predictor_params}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            target=jax.tree.map(jnp.copy, encoder_params),
            opt_state=tx.init(params),
        )

    return init


def abstract_state(init) -> TrainState:
    """Return the state's shapes and dtypes without boxes and without computing it."""
    return nn.unbox(jax.eval_shape(init, jax.random.key(0)))
