"""Attention in plain JAX that never holds all scores: a block of queries at a time."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

# Name of what a forward pass of attention gives to its backward pass.
OUTPUT_NAME = "attention_output"
_MAX_BLOCK = 196


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | np.ndarray | None = None
) -> jax.Array:
    """Attend with blocks of queries, see `attention.attention`.

    The backward pass computes the scores again, from the log of each softmax's
    normaliser, so that memory is linear in the lengths.
    """
    n = q.shape[1]
    blocks = -(-n // _MAX_BLOCK)
    size = -(-n // blocks)
    padding = ((0, 0), (0, blocks * size - n), (0, 0), (0, 0))
    scale = q.shape[-1] ** -0.5
    q = jnp.pad(q * jnp.asarray(scale, q.dtype), padding)
    q = q.reshape(q.shape[0], blocks, size, *q.shape[2:]).transpose(1, 0, 3, 2, 4)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    @jax.checkpoint
    def of_block(q, mask):
        scores = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32)
        if mask is not None:
            scores = jnp.where(mask, scores, -1e30)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bhnm,bhmd->bhnd", weights, v)

    if mask is not None:
        rows = ((0, blocks * size - n), (0, 0))
        mask = jnp.pad(jnp.asarray(mask), rows, constant_values=True)
        mask = mask.reshape(blocks, size, -1)
    out = jax.lax.map(lambda x: of_block(*x), (q, mask))
    out = out.transpose(1, 0, 3, 2, 4)
    out = out.reshape(len(k), blocks * size, *out.shape[3:])
    return checkpoint_name(out[:, :n], OUTPUT_NAME)
