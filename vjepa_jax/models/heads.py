"""Heads on frozen features."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vjepa_jax.models.attention import attention


class AttentiveClassifier(nn.Module):
    """Pool tokens with one learned query, then classify (V-JEPA's attentive probe).

    One cross-attention block: query from a learned token, layer norm and MLP after it,
    each with a residual connection; then a linear layer.

    Attributes:
      num_classes: classes.
      num_heads: of the cross-attention; divides the tokens' channels.
    """

    num_classes: int
    num_heads: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens [B, N, D] to logits [B, num_classes]."""
        b, n, width = tokens.shape
        normal = nn.initializers.normal(0.02)
        query = self.param("query", normal, (1, 1, width))
        y = nn.LayerNorm(name="norm1")(tokens)
        kv = nn.Dense(2 * width, kernel_init=normal, name="kv")(y)
        k, v = jnp.split(kv.reshape(b, n, self.num_heads, -1), 2, axis=-1)
        q = nn.Dense(width, kernel_init=normal, name="q")(query)
        q = jnp.broadcast_to(q.reshape(1, 1, self.num_heads, -1), (b, 1, *k.shape[2:]))
        x = query + attention(q, k, v).reshape(b, 1, width)
        y = nn.LayerNorm(name="norm2")(x)
        y = nn.Dense(4 * width, kernel_init=normal, name="fc1")(y)
        y = nn.Dense(width, kernel_init=normal, name="fc2")(
            nn.gelu(y, approximate=False)
        )
        return nn.Dense(self.num_classes, kernel_init=normal, name="linear")(
            (x + y)[:, 0]
        )
