"""Token masks, sampled on the device: which tokens are visible, which are predicted.

A mask type hides boxes of a (T, H, W) token grid. Token counts are static, because XLA
compiles for fixed shapes: every sample keeps exactly `num_context` visible and
`num_target` hidden tokens; the other tokens are not used. A hidden token is never in
the context.

The official code (V-JEPA `src/masks/multiblock3d.py`) trims each sample to the smallest
counts of its batch per device instead. There the counts vary, and the batch size per
device changes the task. `default_budget` returns the mean counts after that trimming.
"""

import dataclasses
import functools
from types import ModuleType

import chex
import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.base.choices import MASK_KINDS, MASK_MODES

Grid = tuple[int, int, int]

# Mean (context, target) counts after the official trimming in batches of 24 per device,
# by grid, num_blocks and spatial_scale.
_OFFICIAL_BUDGETS = {
    ((8, 14, 14), 8, 0.15): (368, 752),
    ((8, 14, 14), 2, 0.7): (96, 1104),
    ((8, 16, 16), 8, 0.15): (496, 968),
    ((8, 16, 16), 2, 0.7): (128, 1440),
    ((8, 24, 24), 8, 0.15): (1152, 2168),
    ((8, 24, 24), 2, 0.7): (312, 3264),
}
_OFFICIAL_ASPECT = (0.75, 1.5)

_CANDIDATES = 8  # masks drawn per sample
_MAX_REDRAWS = 200  # draws to fill a group with samples that have a visible token


@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """One mask type.

    Attributes:
      num_context: visible tokens kept per sample.
      num_target: hidden tokens predicted per sample.
      kind: `multiblock` hides `num_blocks` boxes of one shape; `tube` hides a random
        share `spatial_scale` of the (h, w) positions in all frames.
      num_blocks: boxes per sample, which may overlap; 0: only `max_temporal_keep` hides
        tokens.
      spatial_scale: (low, high) share of H * W that a box covers or a tube mask hides.
      temporal_scale: (low, high) share of T that a box lasts.
      aspect_ratio: (low, high) height over width of a box, drawn uniformly.
      max_temporal_keep: tokens after this share of T are always hidden ("causal").
      mode: `official`: one box shape per batch, and the first tokens in raster order
        are kept; `unbiased`: one shape per sample, and a random subset is kept.
      full_complement: predict every token that is not in the context.
      pred_full_complement: see every token that is not predicted.
      inv_block: finally swap the two sides: see what is inside the boxes, predict what
        is outside. `num_context` then counts tokens inside.

    Raises:
      ValueError: `kind` or `mode` is unknown.
    """

    num_context: int
    num_target: int
    kind: str = "multiblock"
    num_blocks: int = 8
    spatial_scale: tuple[float, float] = (0.15, 0.15)
    temporal_scale: tuple[float, float] = (1.0, 1.0)
    aspect_ratio: tuple[float, float] = _OFFICIAL_ASPECT
    max_temporal_keep: float = 1.0
    mode: str = "official"
    full_complement: bool = False
    pred_full_complement: bool = False
    inv_block: bool = False

    def __post_init__(self):
        for name, value, known in (
            ("kind", self.kind, MASK_KINDS),
            ("mode", self.mode, MASK_MODES),
        ):
            if value not in known:
                raise ValueError(
                    f"mask {name} '{value}' is unknown; known: {', '.join(known)}"
                )


def box_shape(
    uniforms: jax.Array | np.ndarray, grid: Grid, spec: MaskSpec
) -> tuple[jax.Array, ...] | tuple[np.ndarray, ...]:
    """Return the extents of boxes by the official formula.

    Args:
      uniforms: [..., 3], numbers in [0, 1) that set duration, area and aspect ratio.
      grid: (T, H, W).
      spec: the mask type.

    Returns:
      t, h and w, int32 [...], each from 1 to the size of the grid. They are of the same
      library as `uniforms`, NumPy or jax.
    """
    xp = jnp if isinstance(uniforms, jax.Array) else np
    frames, height, width = grid

    def between(bounds, u):
        return bounds[0] + u * (bounds[1] - bounds[0])

    t = xp.floor(frames * between(spec.temporal_scale, uniforms[..., 0]))
    area = xp.floor(height * width * between(spec.spatial_scale, uniforms[..., 1]))
    aspect = between(spec.aspect_ratio, uniforms[..., 2])
    h, w = xp.round(xp.sqrt(area * aspect)), xp.round(xp.sqrt(area / aspect))
    clipped = (xp.clip(extent, 1, n) for extent, n in zip((t, h, w), grid, strict=True))
    return tuple(extent.astype(xp.int32) for extent in clipped)


def _hidden_boxes(xp: ModuleType, corners, shape, grid: Grid):
    """Mark the union of boxes, bool [..., N].

    Args:
      xp: NumPy or jax.numpy.
      corners: [..., num_blocks, 3], numbers in [0, 1) that set the boxes' positions.
      shape: extents of the boxes, see `box_shape`.
      grid: (T, H, W).
    """
    inside = []
    for axis, n in enumerate(grid):
        extent = shape[axis][..., None]
        start = xp.floor(corners[..., axis] * (n - extent + 1))[..., None]
        cell = xp.arange(n)
        inside.append((cell >= start) & (cell < start + extent[..., None]))
    t, h, w = inside
    boxes = t[..., :, None, None] & h[..., None, :, None] & w[..., None, None, :]
    return boxes.any(axis=-4).reshape(*corners.shape[:-2], -1)


def _late(grid: Grid, spec: MaskSpec) -> np.ndarray:
    """Mark the tokens that `max_temporal_keep` hides: bool [N]."""
    frames, height, width = grid
    kept = max(1, int(frames * spec.max_temporal_keep))
    return np.repeat(np.arange(frames) >= kept, height * width)


def _draw_hidden(
    position_key: jax.Array,
    shape_key: jax.Array,
    batch: int,
    grid: Grid,
    spec: MaskSpec,
    candidates: int,
) -> jax.Array:
    """Draw which tokens are hidden: bool [candidates, B, N]."""
    frames, height, width = grid
    lead = (candidates, batch)
    if spec.kind == "tube":
        keep = int(height * width * (1 - spec.spatial_scale[0]))
        rank = jax.random.uniform(position_key, (*lead, height * width)).argsort(-1)
        hidden = jnp.tile(rank.argsort(-1) >= keep, (1, 1, frames))
    else:
        shared = (1, 1) if spec.mode == "official" else lead
        shape = box_shape(jax.random.uniform(shape_key, (*shared, 3)), grid, spec)
        corners = jax.random.uniform(position_key, (*lead, spec.num_blocks, 3))
        hidden = _hidden_boxes(jnp, corners, shape, grid)
    return hidden | _late(grid, spec)


def _first(marked: jax.Array, order: jax.Array, count: int) -> jax.Array:
    """Return the `count` marked tokens of lowest order, ascending: int32 [B, count]."""
    rank = jnp.where(marked, order, jnp.inf)
    return jnp.sort(jnp.argsort(rank, axis=-1)[:, :count], axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def sample(
    key: jax.Array, shape_key: jax.Array, batch: int, grid: Grid, spec: MaskSpec
) -> tuple[jax.Array, jax.Array]:
    """Sample context and target tokens for a batch.

    Several candidate masks are drawn per sample, and the first with enough visible and
    enough hidden tokens is used. If none has, random tokens are hidden instead; this is
    rare, because the budgets are below what most masks leave.

    Args:
      key: random key of this mask type and step.
      shape_key: random key of the box shapes. Give all mask types of a step the same
        key, because the official generators of one step share their draw.
      batch: number of samples B.
      grid: (T, H, W) tokens.
      spec: the mask type.

    Returns:
      ctx_idx int32 [B, num_context] and tgt_idx int32 [B, num_target]: token indices,
      ascending and disjoint.
    """
    chex.assert_rank([key, shape_key], 0)
    num_tokens = int(np.prod(grid))
    num_visible, num_hidden = spec.num_context, spec.num_target
    if spec.inv_block:
        num_visible, num_hidden = num_hidden, num_visible
    # A side that complements the other needs no drawn tokens of its own.
    least_visible = 0 if spec.pred_full_complement else num_visible
    least_hidden = 0 if spec.full_complement else num_hidden
    position_key, spare_key, order_key = jax.random.split(key, 3)
    hidden = _draw_hidden(position_key, shape_key, batch, grid, spec, _CANDIDATES)
    count = hidden.sum(-1)
    fits = (count >= least_hidden) & (num_tokens - count >= least_visible)
    choice = jnp.argmax(fits, axis=0)
    chosen = jnp.take_along_axis(hidden, choice[None, :, None], axis=0)[0]
    # The spare mask of a causal mask type is causal too: late tokens come last.
    spare_order = jax.random.uniform(spare_key, (batch, num_tokens))
    spare_order += _late(grid, spec)
    spare = spare_order.argsort(-1).argsort(-1) >= num_visible
    chosen = jnp.where(fits.any(0)[:, None], chosen, spare)
    if spec.mode == "official":
        order = jnp.broadcast_to(jnp.arange(num_tokens, dtype=float), chosen.shape)
    else:
        order = jax.random.uniform(order_key, chosen.shape)

    def others(idx, count):
        taken = jnp.zeros((batch, num_tokens), bool)
        taken = jnp.put_along_axis(taken, idx, True, axis=1, inplace=False)
        return _first(~taken, order, count)

    if spec.pred_full_complement:
        tgt_idx = _first(chosen, order, num_hidden)
        ctx_idx = others(tgt_idx, num_visible)
    else:
        ctx_idx = _first(~chosen, order, num_visible)
        if spec.full_complement:
            tgt_idx = others(ctx_idx, num_hidden)
        else:
            tgt_idx = _first(chosen, order, num_hidden)
    return (tgt_idx, ctx_idx) if spec.inv_block else (ctx_idx, tgt_idx)


def simulate_counts(
    spec: MaskSpec, grid: Grid, group_size: int, groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Simulate the token counts of the official generator, in NumPy.

    Each group of samples shares a box shape, redraws samples without a visible token,
    and is trimmed to the smallest counts of the group.

    Args:
      spec: the mask type; its own budgets are ignored.
      grid: (T, H, W).
      group_size: samples per group, which is a device's batch in the official code.
      groups: number of groups.

    Returns:
      Visible and hidden tokens that every sample of a group keeps, int [groups] each.

    Raises:
      ValueError: nearly all masks hide every token.
    """
    rng = np.random.RandomState(0)
    num_tokens = int(np.prod(grid))
    visible = np.empty(groups, int)
    hidden = np.empty(groups, int)
    for g in range(groups):
        shape = tuple(np.asarray(e)[None] for e in box_shape(rng.rand(3), grid, spec))
        counts: list[int] = []
        for _ in range(_MAX_REDRAWS):
            if len(counts) >= group_size:
                break
            corners = rng.rand(group_size, spec.num_blocks, 3)
            marked = _hidden_boxes(np, corners, shape, grid) | _late(grid, spec)
            counts.extend(c for c in marked.sum(-1) if c < num_tokens)
        if len(counts) < group_size:
            raise ValueError(
                "nearly all masks hide every token: lower num_blocks or spatial_scale"
            )
        counts = counts[:group_size]
        visible[g], hidden[g] = num_tokens - max(counts), min(counts)
    return visible, hidden


@functools.lru_cache
def default_budget(spec: MaskSpec, grid: Grid, group_size: int = 24) -> tuple[int, int]:
    """Return (num_context, num_target): mean counts after the official trimming.

    They are rounded to multiples of T, because boxes that last the whole clip hide all
    T time steps of a position. The arguments are those of `simulate_counts`.
    """
    context, target = _trimmed_budget(spec, grid, group_size)
    num_tokens = int(np.prod(grid))
    if spec.full_complement:
        target = num_tokens - context
    elif spec.pred_full_complement:
        context = num_tokens - target
    return (target, context) if spec.inv_block else (context, target)


def _trimmed_budget(spec: MaskSpec, grid: Grid, group_size: int) -> tuple[int, int]:
    frames, height, width = grid
    if spec.kind == "tube":
        keep = int(height * width * (1 - spec.spatial_scale[0]))
        return frames * keep, frames * (height * width - keep)
    known = (grid, spec.num_blocks, spec.spatial_scale[0])
    official = (
        spec.spatial_scale[0] == spec.spatial_scale[1]
        and spec.temporal_scale == (1.0, 1.0)
        and spec.aspect_ratio == _OFFICIAL_ASPECT
        and spec.max_temporal_keep == 1.0
        and group_size == 24
    )
    if official and known in _OFFICIAL_BUDGETS:
        return _OFFICIAL_BUDGETS[known]
    visible, hidden = simulate_counts(spec, grid, group_size, groups=400)
    context, target = (
        # Rounding must not exceed the largest count, e.g. if all counts are equal.
        min(max(frames, frames * round(float(c.mean()) / frames)), int(c.max()))
        for c in (visible, hidden)
    )
    return context, target
