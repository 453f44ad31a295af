"""Positions of tokens in a (time, height, width) grid: sin-cos tables and rotations.

The token at (t, h, w) has the index `t * H * W + h * W + w`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.models.functional import platform

Grid = tuple[int, int, int]


def grid_coordinates(idx: jax.Array, grid: Grid) -> tuple[jax.Array, ...]:
    """Split token indices [...] into their t, h and w coordinates [...]."""
    _, height, width = grid
    return idx // (height * width), (idx // width) % height, idx % width


def _sincos_1d(position: np.ndarray, dim: int) -> np.ndarray:
    """Return [sin(p w) | cos(p w)] with w_i = 10000^(-i / (dim / 2)): [N, dim]."""
    frequency = 10000.0 ** (-np.arange(dim // 2) / (dim / 2))
    angle = position[:, None] * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def _resize_matrix(size: int, base: int) -> np.ndarray:
    """Return the [size, base] matrix of linear interpolation between cell centres."""
    place = np.clip((np.arange(size) + 0.5) * base / size - 0.5, 0, base - 1)
    low = np.floor(place).astype(int)
    high = np.minimum(low + 1, base - 1)
    rows, matrix = np.arange(size), np.zeros((size, base))
    np.add.at(matrix, (rows, low), 1 - (place - low))
    np.add.at(matrix, (rows, high), place - low)
    return matrix


def sincos_table(grid: Grid, dim: int, base_grid: Grid | None = None) -> np.ndarray:
    """Return the fixed 3-D sin-cos table of V-JEPA 1 with `uniform_power`.

    Each axis gets `2 * ceil(dim / 6)` channels in the order time, height, width; the
    concatenation is cut to `dim` (official `src/models/utils/pos_embs.py`).

    Args:
      grid: (T, H, W) of the clip.
      dim: number of channels.
      base_grid: grid on which the model was trained. As in the official code, a grid
        that only has fewer frames takes the first rows of its table; any other grid
        takes the table interpolated trilinearly. None: compute the table of `grid`.

    Returns:
      float32 [T * H * W, dim].
    """
    base = base_grid or grid
    axis_dim = 2 * -(-dim // 6)
    coordinates = np.meshgrid(*(np.arange(n) for n in base), indexing="ij")
    parts = [_sincos_1d(c.reshape(-1).astype(float), axis_dim) for c in coordinates]
    table = np.concatenate(parts, axis=1)[:, :dim].astype(np.float32)
    if grid[1:] == base[1:] and grid[0] <= base[0]:
        return table[: grid[0] * grid[1] * grid[2]]
    resize = (_resize_matrix(n, m) for n, m in zip(grid, base, strict=True))
    table = np.einsum("at,bh,cw,thwd->abcd", *resize, table.reshape(*base, dim))
    return table.reshape(-1, dim).astype(np.float32)


def rope_at(
    coordinates: tuple[jax.Array, jax.Array, jax.Array],
    head_dim: int,
    tiled: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin of the 3-D rotary embedding at given coordinates.

    Each of (t, h, w) rotates m = `2 * (head_dim // 3 // 2)` channels, in this order;
    the remaining channels are not rotated. An axis's channels (2i, 2i + 1) are a pair,
    which is rotated by the coordinate times 10000^(-i / (m / 2)).

    Args:
      coordinates: t, h and w, each [B, N] or [N]; coordinate 0 is no rotation.
      head_dim: channels per head.
      tiled: V-JEPA 2's released form, in which channel j takes frequency j mod (m / 2),
        so that the two channels of a pair are rotated by different angles. Its weights
        need it; V-JEPA 2.1 corrected it.

    Returns:
      cos, sin: float32 [B, N, 1, head_dim] (the head axis broadcasts).
    """
    axis_dim = 2 * (head_dim // 3 // 2)
    bands = 10000.0 ** (-np.arange(axis_dim // 2) / (axis_dim / 2))
    paired = np.tile(bands, 2) if tiled else np.repeat(bands, 2)
    frequency = jnp.asarray(paired, jnp.float32)
    angles = [c[..., None] * frequency for c in coordinates]
    rest = jnp.zeros((*coordinates[0].shape, head_dim - 3 * axis_dim), jnp.float32)
    angle = jnp.concatenate([*angles, rest], axis=-1)[..., None, :]
    return jnp.cos(angle), jnp.sin(angle)


def rope_tables(
    idx: jax.Array,
    grid: Grid,
    head_dim: int,
    tiled: bool = False,
    base_grid: Grid | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin of the 3-D rotary embedding of tokens, see `rope_at`.

    Args:
      idx: int [B, N] or [N], token indices.
      grid: (T, H, W) of the clip.
      head_dim, tiled: see `rope_at`.
      base_grid: stretch rows and columns, but not time, to span its height and width
        (V-JEPA 2.1's `interpolate_rope`). None: no stretching.
    """
    t, h, w = grid_coordinates(idx, grid)
    if base_grid is not None:
        h = h * ((base_grid[1] - 1) / max(grid[1] - 1, 1))
        w = w * ((base_grid[2] - 1) / max(grid[2] - 1, 1))
    return rope_at((t, h, w), head_dim, tiled)


def rotate(x: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate channel pairs of x [B, N, heads, head_dim] by `rope_tables`, in fp32."""
    cos, sin = tables
    if platform() == "tpu":
        # Pairs in the innermost axis would fill 2 of 128 lanes. A matmul with a
        # constant of 0 and +-1 swaps them instead, exactly in any precision.
        signs = np.kron(np.eye(x.shape[-1] // 2), np.array([[0, 1], [-1, 0]]))
        swap = jnp.asarray(signs, x.dtype)
        turned = jnp.matmul(
            x, swap, precision="highest", preferred_element_type=jnp.float32
        )
    else:
        pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
        turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)
