"""Attention in plain JAX that never stores all scores, for the caches of CPUs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

# Name of the residuals of attention, for rematerialisation policies.
OUTPUT_NAME = "attention_output"
# Queries at a time, and heads at a time where their number is even. Their scores with
# 1568 keys take 10 MB. Smaller blocks lose more in overhead per operation than they
# gain in the cache; two heads keep two cores busy without splitting a matmul.
_MAX_BLOCK = 800
_HEADS = 2


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | np.ndarray | None = None
) -> jax.Array:
    """Attend, a few heads and a block of queries at a time, see `dispatch.attention`.

    The backward pass recomputes the scores from the log of each row's normaliser
    (FlashAttention, arXiv 2205.14135), so memory is linear in the lengths.
    """
    (batch, n, heads, head_dim), m = q.shape, k.shape[1]
    together = math.gcd(heads, _HEADS)
    groups = heads // together
    blocks = -(-n // _MAX_BLOCK)
    rows = -(-n // blocks)
    padding = (0, blocks * rows - n)
    if mask is not None:
        mask = jnp.pad(jnp.asarray(mask), (padding, (0, 0)), constant_values=True)
        mask = mask.reshape(blocks, rows, m)

    def by_head(x):
        x = x.reshape(batch, -1, groups, together, head_dim)
        return x.transpose(0, 2, 3, 1, 4).reshape(-1, together, m, head_dim)

    q = jnp.pad(q, ((0, 0), padding, (0, 0), (0, 0)))
    q = q.reshape(batch, blocks, rows, groups, together, head_dim)
    q = q.transpose(0, 3, 1, 4, 2, 5).reshape(-1, blocks, together, rows, head_dim)
    out = _attend(q, by_head(k), by_head(v), mask)
    out = out.reshape(batch, groups, blocks, together, rows, head_dim)
    out = out.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, heads, head_dim)
    return out[:, :n]


@jax.custom_vjp
def _attend(q, k, v, mask):
    """Map q [groups, blocks, heads, rows, D], k and v [groups, heads, M, D] to q's."""
    return _forward(q, k, v, mask)[0]


def _dot(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _masked(scores, mask):
    return scores if mask is None else jnp.where(mask, scores, -1e30)


def _scaled(q):
    return q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)


def _forward(q, k, v, mask):
    @jax.checkpoint  # otherwise policies that store matmuls would store the scores
    def of_group(x):
        q, k, v = x

        def of_block(x):
            q, mask = x
            scores = _masked(_dot(q, k.mT), mask)
            highest = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - highest)
            total = weights.sum(-1, keepdims=True)
            out = _dot(weights.astype(v.dtype), v) / total
            return out.astype(q.dtype), (highest + jnp.log(total))[..., 0]

        return jax.lax.map(of_block, (q, mask))

    out, log_total = jax.lax.map(of_group, (_scaled(q), k, v))
    out, log_total = checkpoint_name((out, log_total), OUTPUT_NAME)
    return out, (q, k, v, mask, out, log_total)


def _backward(saved, d_out):
    q, k, v, mask, out, log_total = saved
    shift = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)

    def of_group(x):
        q, d_out, log_total, shift, k, v = x

        def of_block(total, x):
            q, d_out, log_total, shift, mask = x
            # Transposed, [keys, queries]: two of the three products below then read
            # the scores in memory order.
            scores = _masked(_dot(k, q.mT), None if mask is None else mask.T)
            weights = jnp.exp(scores - log_total[:, None])
            d_scores = weights * (_dot(v, d_out.mT) - shift[:, None])
            d_scores = d_scores.astype(q.dtype)
            d_k, d_v = total
            d_k += _dot(d_scores, q)
            d_v += _dot(weights.astype(q.dtype), d_out)
            return (d_k, d_v), _dot(d_scores.mT, k).astype(q.dtype)

        zeros = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
        parts = (q, d_out, log_total, shift, mask)
        (d_k, d_v), d_q = jax.lax.scan(of_block, zeros, parts)
        return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)

    d_q, d_k, d_v = jax.lax.map(of_group, (_scaled(q), d_out, log_total, shift, k, v))
    return _scaled(d_q), d_k, d_v, None


_attend.defvjp(_forward, _backward)
