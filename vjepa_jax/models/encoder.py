"""The video encoder: a vision transformer on the visible tubelets of a clip."""

from typing import cast

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from vjepa_jax.base.pixels import IMAGENET_MEAN, IMAGENET_STD
from vjepa_jax.models import layers, positions


def normalise(video: jax.Array) -> jax.Array:
    """Normalise uint8 pixels [..., 3] to float32 by ImageNet's mean and std."""
    mean, std = jnp.asarray(IMAGENET_MEAN), jnp.asarray(IMAGENET_STD)
    return (video.astype(jnp.float32) / 255 - mean) / std


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

    The fields that are not listed here are those of `layers.TransformerConfig`.

    Attributes:
      patch_size: side of a tubelet in pixels.
      tubelet_size: length of a tubelet in frames.
      pos_embed, base_grid: see `layers.position_code`.
      levels: blocks, counted from 0, whose outputs are the features: each with its own
        layer norm, concatenated over channels (V-JEPA 2.1). (): the last block.
      output_levels: number of levels, counted from the last, that are the features; 0:
        all. The norms of the others remain parameters (V-JEPA 2.1's distilled models).
      image_embed: clips of one frame have their own patch embedding, and each modality
        has a learned embedding that is added to every token (V-JEPA 2.1).
    """

    depth: int
    width: int
    num_heads: int
    mlp_dim: int
    mlp: str = "gelu"
    scale_init: bool = True
    patch_size: int = 16
    tubelet_size: int = 2
    pos_embed: str = "rope"
    base_grid: positions.Grid | None = None
    levels: tuple[int, ...] = ()
    output_levels: int = 0
    image_embed: bool = False
    norm_eps: float = layers.NORM_EPS
    scan_layers: bool = False
    remat: str = "none"
    attention: str = "xla"
    dtype: jnp.dtype = jnp.float32
    matmul_dtype: str = ""

    @property
    def num_levels(self) -> int:
        """Number of levels that are concatenated in the output's channels."""
        return self.output_levels or max(len(self.levels), 1)

    @property
    def out_dim(self) -> int:
        """Channels of the output, all levels together."""
        return self.width * self.num_levels

    def is_image(self, video_shape: tuple[int, ...]) -> bool:
        """Return whether clips of shape [..., T, H, W, C] are embedded as images."""
        return self.image_embed and video_shape[-4] == 1

    def grid(self, video_shape: tuple[int, ...]) -> positions.Grid:
        """Return the token grid of clips of shape [..., T, H, W, C]."""
        tubelet_size = 1 if self.is_image(video_shape) else self.tubelet_size
        return token_grid(video_shape, self.patch_size, tubelet_size)

    def _embed(self, video: jax.Array, idx: jax.Array | None) -> jax.Array:
        def embed(name, tubelet_size):
            return layers.TubeletEmbed(
                self.width, self.patch_size, tubelet_size, self.dtype, name=name
            )

        video_embed = embed("embed", self.tubelet_size)
        if not self.image_embed:
            return video_embed(video, idx)
        image_embed = embed("image_embed", 1)
        if self.is_initializing():  # both get parameters, for any first clip
            tubelet = (1, self.tubelet_size, self.patch_size, self.patch_size, 3)
            video_embed(jnp.zeros(tubelet))
            image_embed(jnp.zeros(tubelet)[:, :1])
        is_image = self.is_image(video.shape)
        x = (image_embed if is_image else video_embed)(video, idx)
        return x + layers.modality(self, self.width, is_image).astype(self.dtype)

    @nn.compact
    def __call__(
        self,
        video: jax.Array,
        ctx_idx: jax.Array | None = None,
        out_layers: tuple[int, ...] = (),
    ) -> jax.Array:
        """Encode a normalised clip.

        Args:
          video: float [B, T, H, W, 3].
          ctx_idx: int [B, K], indices of the visible tokens; None: all N tokens.
          out_layers: blocks, counted from 0, whose outputs are returned instead of the
            features, each through the last layer norm.

        Returns:
          Layer-normalised tokens [B, K or N, out_dim] in `dtype`; with `out_layers`,
          [len(out_layers), B, K or N, width].

        Raises:
          ValueError: the clip cannot be cut into whole tubelets.
        """
        chex.assert_shape(video, (None, None, None, None, 3))
        chex.assert_type(video, float)
        if ctx_idx is not None:
            chex.assert_shape(ctx_idx, (len(video), None))
            chex.assert_type(ctx_idx, int)
        grid = self.grid(video.shape)
        # Gathered before tokens are mixed: hidden ones cannot leak into the context.
        x = self._embed(video, ctx_idx)
        idx = jnp.arange(x.shape[1])[None] if ctx_idx is None else ctx_idx
        added, tables = layers.position_code(
            self.pos_embed, idx, grid, self.width, self.num_heads, self.base_grid
        )
        if added is not None:
            x = x + added.astype(self.dtype)
        stack = layers.Stack(layers.TransformerConfig.of(self), name="stack")
        kept_layers = out_layers or self.levels[-self.num_levels :]
        x, kept = stack(x, tables, out_layers=kept_layers)
        names = [f"norm_{i}" for i in range(len(self.levels))] or ["norm"]
        norms = [
            layers.LayerNorm(self.dtype, self.norm_eps, name=name) for name in names
        ]
        unused, norms = norms[: -self.num_levels], norms[-self.num_levels :]
        if self.is_initializing():
            for norm in unused:
                norm(x)
        if not out_layers and not self.levels:
            return norms[0](x)
        kept = cast(jax.Array, kept)
        if out_layers:
            return norms[-1](kept)
        normed = [norm(y) for norm, y in zip(norms, kept, strict=True)]
        return jnp.concatenate(normed, axis=-1)
