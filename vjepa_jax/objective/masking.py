"""What the encoder sees and what the predictor must predict: 3-D masks on the device.

A mask type hides boxes of a (T, H, W) token grid. Token counts are static, since XLA
compiles for fixed shapes: every sample keeps exactly `num_context` visible and
`num_target` hidden tokens, and the rest is used by neither side. What is hidden never
enters a context.

The official code (V-JEPA `src/masks/multiblock3d.py`) trims each sample to the smallest
counts of its batch per device instead, so that its counts vary and its batch per device
sets the task. `default_budget` gives the mean of what that trimming leaves.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.base.choices import MASK_KINDS, MASK_MODES

Grid = tuple[int, int, int]

# Mean counts that the official trimming leaves in batches of 24 per device, by grid and
# by (num_blocks, spatial_scale): (context, target).
_OFFICIAL_BUDGETS = {
    ((8, 14, 14), 8, 0.15): (368, 752),
    ((8, 14, 14), 2, 0.7): (96, 1104),
    ((8, 16, 16), 8, 0.15): (496, 968),
    ((8, 16, 16), 2, 0.7): (128, 1440),
    ((8, 24, 24), 8, 0.15): (1152, 2168),
    ((8, 24, 24), 2, 0.7): (312, 3264),
}
_OFFICIAL_ASPECT = (0.75, 1.5)

_MAX_REDRAWS = 200  # batches drawn to fill a group with samples that see something


@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """One mask type.

    Attributes:
      kind: `multiblock` hides `num_blocks` boxes of one shape; `tube` hides a random
        `spatial_scale` of the positions through all of time.
      num_blocks: boxes per sample, overlapping allowed; 0 leaves `max_temporal_keep`
        alone to hide tokens.
      spatial_scale: (low, high) share of H * W that a box covers, or a tube hides.
      temporal_scale: (low, high) share of T that a box lasts.
      aspect_ratio: (low, high) height over width of a box, drawn linearly.
      max_temporal_keep: tokens after this share of T are always hidden ("causal").
      num_context: visible tokens kept per sample.
      num_target: hidden tokens predicted per sample.
      mode: `official`: one box shape per batch and the first tokens in raster order are
        kept; `unbiased`: a shape per sample, and a random subset is kept.
      full_complement: predict every token that is not in the context.
      pred_full_complement: see every token that is not predicted.
      inv_block: see what is inside the boxes and predict what is outside, after all of
        the above; `num_context` then counts what is inside.
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


def box_shape(uniforms, grid: Grid, spec: MaskSpec):
    """Turn three uniform numbers [..., 3] into box extents, by the official formula.

    Returns:
      int t, h, w of shape [...]; each at least 1 and at most the grid's.
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


def _hidden_boxes(xp, corners, shape, grid: Grid):
    """Mark the union of boxes; corners: uniforms [..., num_blocks, 3] -> [..., N]."""
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
    """Mark the tokens that a causal mask always hides: bool [N]."""
    frames, height, width = grid
    kept = max(1, int(frames * spec.max_temporal_keep))
    return np.repeat(np.arange(frames) >= kept, height * width)


def _draw_hidden(place_key, shape_key, batch, grid: Grid, spec: MaskSpec, candidates):
    """Draw which tokens are hidden: bool [candidates, B, N]."""
    frames, height, width = grid
    lead = (candidates, batch)
    if spec.kind == "tube":
        keep = int(height * width * (1 - spec.spatial_scale[0]))
        rank = jax.random.uniform(place_key, (*lead, height * width)).argsort(-1)
        hidden = jnp.tile(rank.argsort(-1) >= keep, (1, 1, frames))
    else:
        shared = (1, 1) if spec.mode == "official" else lead
        shape = box_shape(jax.random.uniform(shape_key, (*shared, 3)), grid, spec)
        corners = jax.random.uniform(place_key, (*lead, spec.num_blocks, 3))
        hidden = _hidden_boxes(jnp, corners, shape, grid)
    return hidden | _late(grid, spec)


def _first(marked: jax.Array, order: jax.Array, count: int) -> jax.Array:
    """Return the `count` marked tokens of lowest order, ascending: int32 [B, count]."""
    rank = jnp.where(marked, order, jnp.inf)
    return jnp.sort(jnp.argsort(rank, axis=-1)[:, :count], axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def sample(
    key: jax.Array,
    shape_key: jax.Array,
    batch: int,
    grid: Grid,
    spec: MaskSpec,
    candidates: int = 8,
) -> tuple[jax.Array, jax.Array]:
    """Sample context and target tokens for a batch.

    Several candidate masks are drawn per sample and the first that holds both budgets
    is used; a sample where none does hides random tokens instead (rare: the budgets
    are below what most masks leave).

    Args:
      key: random key of this mask type and step.
      shape_key: random key of the box shapes; the official generators of one step share
        their draw, so give all mask types of a step the same.
      batch: samples B.
      grid: (T, H, W) tokens.
      spec: the mask type.
      candidates: masks drawn per sample.

    Returns:
      ctx_idx int32 [B, num_context], tgt_idx int32 [B, num_target]: token numbers,
      ascending, disjoint.
    """
    num_tokens = int(np.prod(grid))
    num_visible, num_hidden = spec.num_context, spec.num_target
    if spec.inv_block:
        num_visible, num_hidden = num_hidden, num_visible
    # What complements the other side is not drawn: it is there in any case.
    least_visible = 0 if spec.pred_full_complement else num_visible
    least_hidden = 0 if spec.full_complement else num_hidden
    place_key, spare_key, order_key = jax.random.split(key, 3)
    hidden = _draw_hidden(place_key, shape_key, batch, grid, spec, candidates)
    count = hidden.sum(-1)
    fits = (count >= least_hidden) & (num_tokens - count >= least_visible)
    choice = jnp.argmax(fits, axis=0)
    chosen = jnp.take_along_axis(hidden, choice[None, :, None], axis=0)[0]
    # Causal masks keep their meaning in the spare: early tokens are seen first.
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
    spec: MaskSpec, grid: Grid, group_size: int, groups: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Count tokens as the official generator trims them, in NumPy.

    Each group of `group_size` samples shares a box shape, redraws samples without a
    visible token, and keeps the smallest counts of the group.

    Returns:
      visible, hidden: int [groups], tokens kept by every sample of the group.

    Raises:
      ValueError: samples without a visible token are the rule.
    """
    rng = np.random.RandomState(seed)
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
            raise ValueError("nearly all masks hide every token: hide less")
        counts = counts[:group_size]
        visible[g], hidden[g] = num_tokens - max(counts), min(counts)
    return visible, hidden


@functools.lru_cache
def default_budget(spec: MaskSpec, grid: Grid, group_size: int = 24) -> tuple[int, int]:
    """Return (num_context, num_target): the mean that official trimming leaves.

    The counts are rounded to whole multiples of T (boxes that last the whole clip leave
    nothing else). `spec`'s own budgets are ignored.
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
        # Where all masks leave the same count, rounding must not ask for more.
        min(max(frames, frames * round(float(c.mean()) / frames)), int(c.max()))
        for c in (visible, hidden)
    )
    return context, target
