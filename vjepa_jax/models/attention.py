"""Multi-head attention. V-JEPA gathers visible tokens and never pads: no mask there."""

import jax


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    impl: str = "xla",
    mask: jax.Array | None = None,
) -> jax.Array:
    """Attend from every query to every key with scale `head_dim ** -0.5`.

    Args:
      q: [B, N, heads, head_dim].
      k: [B, M, heads, head_dim].
      v: [B, M, heads, head_dim].
      impl: `xla`, which lets the compiler do it: fp32 softmax, scores in memory.
      mask: bool [N, M], where a query may attend; None: everywhere.

    Returns:
      [B, N, heads, head_dim] in the dtype of `q`.
    """
    if impl != "xla":
        raise ValueError(f"attention '{impl}' is unknown; known: xla")
    if mask is not None:
        mask = mask[None, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")
