"""Multi-head attention without masks: V-JEPA gathers visible tokens, it never pads."""

import jax


def attention(q: jax.Array, k: jax.Array, v: jax.Array, impl: str = "xla") -> jax.Array:
    """Attend from every query to every key with scale `head_dim ** -0.5`.

    Args:
      q: [B, N, heads, head_dim].
      k: [B, M, heads, head_dim].
      v: [B, M, heads, head_dim].
      impl: `xla`, which lets the compiler do it: fp32 softmax, scores in memory.

    Returns:
      [B, N, heads, head_dim] in the dtype of `q`.
    """
    if impl != "xla":
        raise ValueError(f"attention '{impl}' is unknown; known: xla")
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")
