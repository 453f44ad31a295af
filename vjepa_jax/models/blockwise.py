"""Attention in plain JAX that never holds all scores, made for the caches of CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

# Name of what a forward pass of attention gives to its backward pass.
OUTPUT_NAME = "attention_output"
# Queries at a time, of one head: their scores with 1568 keys are 2.5 MB.
_MAX_BLOCK = 400


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | np.ndarray | None = None
) -> jax.Array:
    """Attend head by head with blocks of queries, see `attention.attention`.

    The backward pass computes the scores again from the log of each row's normaliser
    (FlashAttention, arXiv 2205.14135), so that memory is linear in the lengths.
    """
    (batch, n, heads, head_dim), m = q.shape, k.shape[1]
    blocks = -(-n // _MAX_BLOCK)
    padding = -n % blocks
    if mask is not None:
        rows = ((0, padding), (0, 0))
        mask = jnp.pad(jnp.asarray(mask), rows, constant_values=True)
        mask = mask.reshape(blocks, -1, m)

    def by_head(x):
        return x.swapaxes(1, 2).reshape(batch * heads, -1, head_dim)

    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    q = by_head(q).reshape(batch * heads, blocks, -1, head_dim)
    out = _attend(q, by_head(k), by_head(v), mask)
    return out.reshape(batch, heads, -1, head_dim)[:, :, :n].swapaxes(1, 2)


@jax.custom_vjp
def _attend(q, k, v, mask):
    """Map q [heads, blocks, rows, D], k and v [heads, M, D] to the shape of q."""
    return _forward(q, k, v, mask)[0]


def _dot(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _masked(scores, mask):
    return scores if mask is None else jnp.where(mask, scores, -1e30)


def _scaled(q):
    return q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)


def _forward(q, k, v, mask):
    @jax.checkpoint  # else policies that store matmuls would store the scores
    def of_head(x):
        q, k, v = x

        def of_block(x):
            q, mask = x
            scores = _masked(_dot(q, k.T), mask)
            highest = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - highest)
            total = weights.sum(-1, keepdims=True)
            out = _dot(weights.astype(v.dtype), v) / total
            return out.astype(q.dtype), (highest + jnp.log(total))[:, 0]

        return jax.lax.map(of_block, (q, mask))

    out, log_total = jax.lax.map(of_head, (_scaled(q), k, v))
    out, log_total = checkpoint_name((out, log_total), OUTPUT_NAME)
    return out, (q, k, v, mask, out, log_total)


def _backward(saved, d_out):
    q, k, v, mask, out, log_total = saved
    shift = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)

    def of_head(x):
        q, d_out, log_total, shift, k, v = x

        def of_block(total, x):
            q, d_out, log_total, shift, mask = x
            # Transposed, [keys, queries]: two of the three products that follow read
            # the scores as they lie in memory.
            scores = _masked(_dot(k, q.T), None if mask is None else mask.T)
            weights = jnp.exp(scores - log_total)
            d_scores = (weights * (_dot(v, d_out.T) - shift)).astype(q.dtype)
            d_k, d_v = total
            d_k += _dot(d_scores, q)
            d_v += _dot(weights.astype(q.dtype), d_out)
            return (d_k, d_v), _dot(d_scores.T, k).astype(q.dtype)

        zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
        parts = (q, d_out, log_total, shift, mask)
        (d_k, d_v), d_q = jax.lax.scan(of_block, zeros, parts)
        return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)

    d_q, d_k, d_v = jax.lax.map(of_head, (_scaled(q), d_out, log_total, shift, k, v))
    return _scaled(d_q), d_k, d_v, None


_attend.defvjp(_forward, _backward)
