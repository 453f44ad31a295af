"""Positions of tokens in a (time, height, width) grid: sin-cos tables and rotations.

Tokens are numbered `t * H * W + h * W + w`. Every function takes the grid as an
argument, so that any size and length works.
"""

import jax
import jax.numpy as jnp
import numpy as np

Grid = tuple[int, int, int]


def grid_coordinates(idx: jax.Array, grid: Grid) -> tuple[jax.Array, ...]:
    """Split flat token numbers [...] into their t, h and w coordinates [...]."""
    _, height, width = grid
    return idx // (height * width), (idx // width) % height, idx % width


def _sincos_1d(position: np.ndarray, dim: int) -> np.ndarray:
    """Return [sin(p w) | cos(p w)] with w_i = 10000^(-i / (dim / 2)): [N, dim]."""
    frequency = 10000.0 ** (-np.arange(dim // 2) / (dim / 2))
    angle = position[:, None] * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def sincos_table(grid: Grid, dim: int) -> np.ndarray:
    """Return the fixed 3-D sin-cos table of V-JEPA 1 with `uniform_power`.

    Each axis gets `2 * ceil(dim / 6)` channels in the order time, height, width; the
    concatenation is cut to `dim` (official `src/models/utils/pos_embs.py`).

    Returns:
      float32 [T * H * W, dim].
    """
    axis_dim = 2 * -(-dim // 6)
    coordinates = np.meshgrid(*(np.arange(n) for n in grid), indexing="ij")
    parts = [_sincos_1d(c.reshape(-1).astype(float), axis_dim) for c in coordinates]
    return np.concatenate(parts, axis=1)[:, :dim].astype(np.float32)


def rope_tables(
    idx: jax.Array, grid: Grid, head_dim: int
) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin of the 3-D rotary code, V-JEPA 2.1's form.

    Each of (t, h, w) rotates `2 * (head_dim // 3 // 2)` channels, in this order; the
    rest of the head is not rotated. Channel pairs (2i, 2i + 1) share frequency
    10000^(-i / (m / 2)), which is the corrected expansion of V-JEPA 2.1 (V-JEPA 2's
    released code tiles the frequencies instead).

    Args:
      idx: int [B, N] or [N], token numbers.
      grid: (T, H, W) of the clip.
      head_dim: channels per head.

    Returns:
      cos, sin: float32 [B, N, 1, head_dim] (the head axis broadcasts).
    """
    axis_dim = 2 * (head_dim // 3 // 2)
    frequency = 10000.0 ** (-np.arange(axis_dim // 2) / (axis_dim / 2))
    frequency = jnp.asarray(np.repeat(frequency, 2), jnp.float32)
    angles = [c[..., None] * frequency for c in grid_coordinates(idx, grid)]
    rest = jnp.zeros((*idx.shape, head_dim - 3 * axis_dim), jnp.float32)
    angle = jnp.concatenate([*angles, rest], axis=-1)[..., None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate channel pairs of x [B, N, heads, head_dim] by `rope_tables`, in fp32."""
    cos, sin = tables
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    return (x * cos + turned * sin).astype(x.dtype)
