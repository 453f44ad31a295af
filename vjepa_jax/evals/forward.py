"""What frozen models compute: from weights and raw clips to features, jitted.

The functions that `frozen.Frozen.call` takes: compiled once for all models of one
architecture.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vjepa_jax.models.encoder import VideoEncoder, normalise
from vjepa_jax.models.layers import take_tokens
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.objective import losses


@functools.partial(jax.jit, static_argnames=("encoder", "out_layers", "params_of"))
def encode(params, video, *, encoder, out_layers, params_of):
    """See `Frozen.encode`; here tokens are float32 [B, N, D]."""
    tokens = encoder.apply(
        {"params": params[params_of]}, normalise(video), out_layers=out_layers
    )
    if out_layers:
        tokens = jnp.concatenate([*tokens], axis=-1)
    return tokens.astype(jnp.float32)


def target_features(params: Any, video: jax.Array, encoder: VideoEncoder) -> jax.Array:
    """Return what the predictor was trained to predict: float32 [B, N, D].

    Args:
      params: see `frozen.Frozen`.
      video: normalised, float [B, T, H, W, 3].
      encoder: module.
    """
    features = encoder.apply({"params": params["target"]}, video)
    return losses.normalise_target(features, encoder.num_levels)


def predicted_features(
    params: Any,
    video: jax.Array,
    encoder: VideoEncoder,
    predictor: Predictor,
    ctx_idx: Sequence[int],
    tgt_idx: Sequence[int],
    mask_index: int,
) -> jax.Array:
    """Return the prediction of `tgt_idx` [M] from `ctx_idx` [K]: float32 [B, M, D]."""
    ctx_idx, tgt_idx = (
        jnp.broadcast_to(jnp.asarray(idx, jnp.int32), (len(video), len(idx)))
        for idx in (ctx_idx, tgt_idx)
    )
    context = encoder.apply({"params": params["encoder"]}, video, ctx_idx)
    prediction, _ = predictor.apply(
        {"params": params["predictor"]},
        context,
        ctx_idx,
        tgt_idx,
        encoder.grid(video.shape),
        mask_index=mask_index,
        is_image=encoder.is_image(video.shape),
    )
    return prediction.astype(jnp.float32)


@functools.partial(
    jax.jit,
    static_argnames=("encoder", "predictor", "ctx_idx", "tgt_idx", "mask_index"),
)
def predict(params, video, *, encoder, predictor, ctx_idx, tgt_idx, mask_index):
    """See `Frozen.predict`."""
    video = normalise(video)
    prediction = predicted_features(
        params, video, encoder, predictor, ctx_idx, tgt_idx, mask_index
    )
    features = target_features(params, video, encoder)
    wanted = jnp.broadcast_to(jnp.asarray(tgt_idx), (len(video), len(tgt_idx)))
    return prediction, take_tokens(features, wanted)


@functools.partial(
    jax.jit,
    static_argnames=("encoder", "predictor", "grid", "num_steps", "mask_index"),
)
def anticipate(
    params, video, steps_ahead, *, encoder, predictor, grid, num_steps, mask_index
):
    """See `Frozen.anticipate`; `grid` is that of the positions."""
    video = normalise(video)
    features = encoder.apply({"params": params["target"]}, video)
    batch, count, _ = features.shape
    places = grid[1] * grid[2]
    first = count + steps_ahead[:, None] * places
    prediction, _ = predictor.apply(
        {"params": params["predictor"]},
        features,
        jnp.broadcast_to(jnp.arange(count), (batch, count)),
        first + jnp.arange(num_steps * places),
        grid,
        mask_index=mask_index,
    )
    tokens = jnp.concatenate([features, prediction], axis=1)
    return tokens.astype(jnp.float32)
