"""The video encoder: tubelets, positions, the visible tokens only, transformer."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vjepa_jax.models import layers, positions

# ImageNet statistics, as every official recipe normalises.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalise(video: jax.Array) -> jax.Array:
    """Turn uint8 [..., 3] into float32 of zero mean and unit variance (ImageNet)."""
    mean, std = jnp.asarray(_MEAN), jnp.asarray(_STD)
    return (video.astype(jnp.float32) / 255 - mean) / std


def take_tokens(x: jax.Array, idx: jax.Array) -> jax.Array:
    """Gather tokens: x [B, N, D], idx int [B, K] -> [B, K, D]."""
    return jnp.take_along_axis(x, idx[..., None], axis=1, mode="promise_in_bounds")


def token_grid(
    video_shape: tuple[int, ...], patch_size: int, tubelet_size: int
) -> positions.Grid:
    """Return the (T, H, W) token grid of clips of shape [..., T, H, W, C].

    Raises:
      ValueError: the clip cannot be cut into whole tubelets.
    """
    t, h, w = video_shape[-4:-1]
    if t % tubelet_size or h % patch_size or w % patch_size:
        raise ValueError(
            f"a clip of {t} frames of {h}x{w} cannot be cut into tubelets of "
            f"{tubelet_size}x{patch_size}x{patch_size}"
        )
    return t // tubelet_size, h // patch_size, w // patch_size


class VideoEncoder(nn.Module):
    """Vision transformer on tubelets (V-JEPA §3; no class token, no dropout).

    Attributes:
      depth, width, num_heads, mlp_dim: size of the transformer (see `registry`).
      patch_size: side of a tubelet in pixels.
      tubelet_size: length of a tubelet in frames.
      pos_embed: `sincos` adds a fixed table (V-JEPA), `rope` rotates queries and keys
        (V-JEPA 2 and 2.1).
      scan_layers, remat, attention, dtype: how it is computed, see `layers.Stack`.
    """

    depth: int
    width: int
    num_heads: int
    mlp_dim: int
    patch_size: int = 16
    tubelet_size: int = 2
    pos_embed: str = "rope"
    scan_layers: bool = False
    remat: str = "none"
    attention: str = "xla"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, video: jax.Array, ctx_idx: jax.Array | None = None):
        """Encode a normalised clip.

        Args:
          video: float [B, T, H, W, 3].
          ctx_idx: int [B, K], the tokens to see; None sees all N of them.

        Returns:
          Layer-normalised tokens [B, K or N, width] in `dtype`.
        """
        grid = token_grid(video.shape, self.patch_size, self.tubelet_size)
        x = layers.TubeletEmbed(
            self.width, self.patch_size, self.tubelet_size, self.dtype, name="embed"
        )(video)
        idx = jnp.arange(x.shape[1])[None]
        if self.pos_embed == "sincos":
            x = x + positions.sincos_table(grid, self.width).astype(self.dtype)
        if ctx_idx is not None:
            # Gathered before any mixing: hidden tokens cannot leak into the context.
            x, idx = take_tokens(x, ctx_idx), ctx_idx
        tables = None
        if self.pos_embed == "rope":
            tables = positions.rope_tables(idx, grid, self.width // self.num_heads)
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
        return layers.layer_norm(self.dtype, "norm")(x)
