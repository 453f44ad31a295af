"""Heads on frozen features."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from vjepa_jax.models import layers
from vjepa_jax.models.attention.dispatch import attention

# Heads use Flax's own Dense and LayerNorm: they are small and replicated, so that they
# need neither logical axes nor the memory-saving backward passes of `layers`.

# PyTorch's default, which the official probes keep, unlike their encoders.
_NORM_EPS = 1e-5


class AttentiveClassifier(nn.Module):
    """Pool tokens with one learned query, then classify (V-JEPA's attentive probe).

    One cross-attention block with a learned query, followed by layer norm and MLP, each
    with a residual connection; then a linear layer.

    Attributes:
      num_classes: number of classes.
      num_heads: heads of every attention; divides the tokens' channels.
      depth: number of blocks, including the cross-attention.
      blocks_on_query: the other blocks follow the cross-attention and see only its
        output (V-JEPA 1); otherwise they come first and see all tokens (V-JEPA 2).
        V-JEPA 1's cross-attention also has the parameters of an output projection that
        is not used, as in the official files.
      outputs: (name, classes) of several linear layers, each with its own learned
        query, instead of the one of `num_classes` (V-JEPA 2's action anticipation).
      complete_block: False removes norms, residuals and MLP from the cross-attention
        block.
      remat, dtype: see `layers.TransformerConfig`; the final linear layers compute in
        float32.
    """

    num_classes: int
    num_heads: int
    depth: int = 1
    blocks_on_query: bool = False
    complete_block: bool = True
    outputs: tuple[tuple[str, int], ...] = ()
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array | dict[str, jax.Array]:
        """Map tokens [B, N, D] to logits [B, num_classes], or {name: logits}."""
        chex.assert_rank(tokens, 3)
        width = tokens.shape[-1]

        def blocks(x):
            if self.depth == 1:
                return x
            config = layers.TransformerConfig(
                self.depth - 1,
                width,
                self.num_heads,
                mlp_dim=4 * width,
                norm_eps=_NORM_EPS,
                remat=self.remat,
                attention="auto",  # several clips have many tokens
                dtype=self.dtype,
            )
            return layers.Stack(config, name="stack")(x)[0]

        tokens = tokens.astype(self.dtype)
        x = tokens if self.blocks_on_query else blocks(tokens)
        x = self._cross_attend(x)
        x = blocks(x) if self.blocks_on_query else x
        if not self.outputs:
            return _dense(self.num_classes, "linear")(x[:, 0])
        return {
            name: _dense(num_classes, f"{name}_linear")(x[:, i])
            for i, (name, num_classes) in enumerate(self.outputs)
        }

    def _cross_attend(self, tokens: jax.Array) -> jax.Array:
        batch, count, width = tokens.shape
        num = len(self.outputs) or 1
        query = self.param("query", nn.initializers.normal(0.02), (1, num, width))
        y = self._norm("norm1")(tokens) if self.complete_block else tokens
        kv = self._dense(2 * width, "kv")(y)
        k, v = jnp.split(kv.reshape(batch, count, 2 * self.num_heads, -1), 2, axis=2)
        q = self._dense(width, "q")(query).reshape(1, num, self.num_heads, -1)
        q = jnp.broadcast_to(q, (batch, *q.shape[1:]))
        y = attention(q, k, v).reshape(batch, num, width)
        if self.blocks_on_query and self.is_initializing():
            self._dense(width, "proj")(y)
        if not self.complete_block:
            return y
        x = query + y
        y = self._dense(4 * width, "fc1")(self._norm("norm2")(x))
        return x + self._dense(width, "fc2")(nn.gelu(y, approximate=False))

    def _dense(self, features: int, name: str) -> nn.Dense:
        return _dense(features, name, self.dtype)

    def _norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=_NORM_EPS, dtype=self.dtype, name=name)


class AttentiveRegressor(nn.Module):
    """Pool tokens with a learned query per quantity, then map each to its values.

    All queries share the attentive probe's cross-attention block.

    Attributes:
      quantities: (name, number of values) of each quantity.
      num_heads: heads of the attention; divides the tokens' channels.
    """

    quantities: tuple[tuple[str, int], ...]
    num_heads: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens [B, N, D] to the concatenated values of all quantities [B, K]."""
        pool = AttentiveClassifier(
            0, self.num_heads, outputs=self.quantities, name="pool"
        )
        values = pool(tokens)
        return jnp.concatenate([values[name] for name, _ in self.quantities], axis=-1)


class LinearClassifier(nn.Module):
    """Classify the mean token with a linear layer."""

    num_classes: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens [B, N, D] to logits [B, num_classes]."""
        return _dense(self.num_classes, "linear")(tokens.mean(1))


def _dense(features: int, name: str, dtype: jnp.dtype = jnp.float32) -> nn.Dense:
    init = nn.initializers.normal(0.02)
    return nn.Dense(features, kernel_init=init, dtype=dtype, name=name)
