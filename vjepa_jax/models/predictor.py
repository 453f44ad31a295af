"""The predictor: a narrow transformer from visible tokens to hidden ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vjepa_jax.models import layers, positions


class Predictor(nn.Module):
    """Predict the target's features at hidden positions (V-JEPA §3).

    Attributes:
      depth, width, num_heads, mlp_dim: size of the transformer.
      out_dim: channels of the features to predict.
      num_mask_tokens: learned tokens that stand for hidden ones; V-JEPA learns one per
        mask type.
      pos_embed: `sincos` or `rope`, as in the encoder.
      scan_layers, remat, attention, dtype: how it is computed, see `layers.Stack`.
    """

    depth: int
    width: int
    num_heads: int
    mlp_dim: int
    out_dim: int
    num_mask_tokens: int = 2
    pos_embed: str = "rope"
    scan_layers: bool = False
    remat: str = "none"
    attention: str = "xla"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        context: jax.Array,
        ctx_idx: jax.Array,
        tgt_idx: jax.Array,
        grid: positions.Grid,
        mask_index: int = 0,
    ) -> jax.Array:
        """Predict features.

        Args:
          context: [B, K, D], the encoder's output for the visible tokens.
          ctx_idx: int [B, K], where they are.
          tgt_idx: int [B, M], where to predict.
          grid: (T, H, W) of the clip.
          mask_index: which mask token stands for the hidden ones.

        Returns:
          [B, M, out_dim] in `dtype`.
        """
        mask_tokens = self.param(
            "mask_tokens",
            nn.with_logical_partitioning(nn.initializers.zeros, (None, "embed")),
            (self.num_mask_tokens, self.width),
        )
        num_context, num_target = ctx_idx.shape[1], tgt_idx.shape[1]
        x = layers.linear(self.width, ("embed", "mlp"), self.dtype, "embed")(context)
        hidden = jnp.broadcast_to(
            mask_tokens[mask_index].astype(self.dtype),
            (x.shape[0], num_target, self.width),
        )
        x = jnp.concatenate([x, hidden], axis=1)
        idx = jnp.concatenate([ctx_idx, tgt_idx], axis=1)
        tables = None
        if self.pos_embed == "rope":
            tables = positions.rope_tables(idx, grid, self.width // self.num_heads)
        else:
            table = jnp.asarray(positions.sincos_table(grid, self.width), self.dtype)
            x = x + table[idx]
        x = layers.Stack(
            self.depth,
            self.width,
            self.num_heads,
            self.mlp_dim,
            self.scan_layers,
            self.remat,
            self.attention,
            self.dtype,
            name="stack",
        )(x, tables)
        x = layers.layer_norm(self.dtype, "norm")(x[:, num_context:])
        return layers.linear(self.out_dim, ("mlp", "embed"), self.dtype, "proj")(x)
