"""Masks hide what they draw, keep exact budgets, and cost what the official ones do."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vjepa_jax.base import choices
from vjepa_jax.objective import masking
from vjepa_jax.objective.masking import MaskSpec

SHORT = {"num_blocks": 8, "spatial_scale": (0.15, 0.15)}
LONG = {"num_blocks": 2, "spatial_scale": (0.7, 0.7)}


def draw(spec, grid, seed=0, batch=5, shape_seed=100):
    """Sample with keys from integers; NumPy arrays."""
    keys = jax.random.key(seed), jax.random.key(shape_seed)
    return [np.asarray(a) for a in masking.sample(*keys, batch, grid, spec)]


def coordinates(idx, grid):
    return np.stack(np.unravel_index(idx, grid), axis=-1)


def extents(hidden, grid):
    """Return extents of the box around marked tokens: bool [..., N] -> int [..., 3]."""
    hidden = hidden.reshape(*hidden.shape[:-1], *grid)
    sizes = []
    for axis in range(3):
        others = tuple(-3 + a for a in range(3) if a != axis)
        marked = hidden.any(others)
        last = marked.shape[-1] - marked[..., ::-1].argmax(-1)
        sizes.append(last - marked.argmax(-1))
    return np.stack(sizes, -1)


# ---------------------------------------------------------------- properties of samples


@st.composite
def cases(draw_value):
    """Return (grid, spec) where budgets may be met by all, some or no drawn masks."""
    # Two grids, because every operation is compiled for each.
    grid = draw_value(st.sampled_from([(2, 3, 5), (4, 6, 6)]))
    num_tokens = math.prod(grid)
    num_context = draw_value(st.integers(1, num_tokens - 1))
    num_target = draw_value(st.integers(1, num_tokens - num_context))
    low = draw_value(st.sampled_from([0.1, 0.4, 0.8]))
    return grid, MaskSpec(
        num_context=num_context,
        num_target=num_target,
        kind=draw_value(st.sampled_from(choices.MASK_KINDS)),
        num_blocks=draw_value(st.integers(0, 3)),
        spatial_scale=(low, draw_value(st.sampled_from([low, 1.0]))),
        temporal_scale=draw_value(st.sampled_from([(1.0, 1.0), (0.3, 0.9)])),
        max_temporal_keep=draw_value(st.sampled_from([1.0, 0.5])),
        mode=draw_value(st.sampled_from(choices.MASK_MODES)),
    )


@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(0, 2**31 - 1))
def test_samples_are_ascending_disjoint_and_of_static_size(case, seed):
    grid, spec = case
    # Not compiled as a whole: that would take a second for every example.
    keys = jax.random.split(jax.random.key(seed))
    context, target = map(np.asarray, masking.sample.__wrapped__(*keys, 5, grid, spec))
    assert context.shape == (5, spec.num_context) and context.dtype == np.int32
    assert target.shape == (5, spec.num_target) and target.dtype == np.int32
    for row in (*context, *target):
        assert (np.diff(row) > 0).all()
        assert row.min() >= 0 and row.max() < math.prod(grid)
    for visible, hidden in zip(context, target, strict=True):
        assert not set(visible) & set(hidden)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 23),
    st.integers(1, 23),
    st.sampled_from(choices.MASK_MODES),
)
def test_samples_keep_to_the_first_drawn_mask_that_fits(
    seed, num_context, num_target, mode
):
    """Masks are injected, so that what was drawn is known whatever drew it."""
    grid, batch, candidates = (2, 3, 4), 6, 4
    num_target = min(num_target, 24 - num_context)
    rng = np.random.default_rng(seed)
    share = rng.uniform(0, 1, (candidates, batch, 1))
    hidden = rng.uniform(size=(candidates, batch, 24)) < share
    spec = MaskSpec(num_context, num_target, mode=mode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking, "_draw_hidden", lambda *_: jnp.asarray(hidden))
        context, target = masking.sample.__wrapped__(
            jax.random.key(seed % 2**31), jax.random.key(1), batch, grid, spec
        )
    for b, (visible, wanted) in enumerate(
        zip(np.asarray(context), np.asarray(target), strict=True)
    ):
        counts = hidden[:, b].sum(-1)
        fits = (counts >= num_target) & (24 - counts >= num_context)
        assert not set(visible) & set(wanted)
        if not fits.any():
            continue
        mask = hidden[fits.argmax(), b]
        assert not mask[visible].any(), "a hidden token is in the context"
        assert mask[wanted].all(), "a visible token is a target"
        if mode == "official":
            np.testing.assert_array_equal(visible, np.flatnonzero(~mask)[:num_context])
            np.testing.assert_array_equal(wanted, np.flatnonzero(mask)[:num_target])


@pytest.mark.parametrize("mode", choices.MASK_MODES)
def test_impossible_budgets_fall_back_to_random_tokens_of_exact_budgets(mode):
    grid = (2, 4, 4)
    # Boxes cover the whole frame and clip: no drawn mask leaves a visible token.
    whole = {"spatial_scale": (1.0, 1.0), "aspect_ratio": (1.0, 1.0)}
    spec = MaskSpec(20, 12, num_blocks=1, mode=mode, **whole)
    context, target = draw(spec, grid, batch=64)
    # 20 + 12 tokens are all there are: what is not in the context is a target.
    both = np.sort(np.concatenate([context, target], axis=1), axis=1)
    np.testing.assert_array_equal(both, np.tile(np.arange(32), (64, 1)))
    share = np.bincount(context.ravel(), minlength=32) / 64
    # Each token is visible with probability 20/32; five sigma of 64 draws.
    assert np.abs(share - 20 / 32).max() < 5 * math.sqrt(0.625 * 0.375 / 64)


def test_masks_depend_on_the_key_and_differ_within_a_batch():
    grid, spec = (4, 8, 8), MaskSpec(64, 96, **SHORT)
    first, again = draw(spec, grid, seed=3), draw(spec, grid, seed=3)
    other = draw(spec, grid, seed=4)
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()
        assert len({row.tobytes() for row in a}) == len(a)


@pytest.mark.parametrize("mode", choices.MASK_MODES)
def test_a_sharded_batch_gets_the_masks_of_one_device(mode):
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    spread = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    grid, spec = (2, 6, 6), MaskSpec(20, 30, mode=mode, **SHORT)

    def sample(seed):
        keys = jax.random.split(jax.random.key(seed))
        return masking.sample(keys[0], keys[1], 16, grid, spec)

    sharded = jax.jit(sample, out_shardings=spread)(7)
    assert len(sharded[0].sharding.device_set) == 8
    for a, b in zip(sharded, jax.jit(sample)(7), strict=True):
        np.testing.assert_array_equal(a, b)


# ----------------------------------------------------------------------- shape of masks


def test_box_shapes_are_those_of_the_official_generator():
    """The official draws are torch.rand of a generator seeded with the step.

    Its 24-bit numbers come from the same Mersenne twister as NumPy's; shapes at 16 x 16
    are quoted from the reference's inventory, `vjepa.md` 2.1.
    """
    shapes = {"short": [(6, 7), (6, 6), (7, 6)], "long": [(12, 15), (14, 13), (15, 12)]}
    for step in range(3):
        raw = np.random.RandomState(step)._bit_generator.random_raw(3)
        uniforms = (raw & 0xFFFFFF) / 2**24
        for name, fields in (("short", SHORT), ("long", LONG)):
            spec = MaskSpec(1, 1, **fields)
            t, h, w = masking.box_shape(uniforms, (8, 16, 16), spec)
            assert (t, h, w) == (8, *shapes[name][step])


@pytest.mark.parametrize(
    ("side", "fields", "count"),
    [(16, SHORT, 6), (16, LONG, 9), (24, SHORT, 7), (24, LONG, 15)],
)
def test_number_of_distinct_boxes_equals_the_reference(side, fields, count):
    uniforms = np.zeros((20_000, 3))
    uniforms[:, 2] = np.linspace(0, 1, 20_000, endpoint=False)
    _, h, w = masking.box_shape(uniforms, (8, side, side), MaskSpec(1, 1, **fields))
    assert len(set(zip(h.tolist(), w.tolist(), strict=True))) == count


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(*[st.floats(0, 1, exclude_max=True)] * 3),
    st.tuples(st.integers(1, 16), st.integers(1, 24), st.integers(1, 24)),
    st.lists(st.floats(0.05, 1), min_size=4, max_size=4),
    st.lists(st.floats(0.2, 4), min_size=2, max_size=2),
)
def test_box_shape_follows_the_plain_formula(uniforms, grid, scales, aspects):
    spatial, temporal = tuple(sorted(scales[:2])), tuple(sorted(scales[2:]))
    low, high = sorted(aspects)
    spec = MaskSpec(
        1,
        1,
        spatial_scale=spatial,
        temporal_scale=temporal,
        aspect_ratio=(low, high),
    )
    t, h, w = masking.box_shape(np.array(uniforms), grid, spec)
    r1, r2, r3 = uniforms
    frames = max(1, int(grid[0] * (temporal[0] + r1 * (temporal[1] - temporal[0]))))
    area = int(grid[1] * grid[2] * (spatial[0] + r2 * (spatial[1] - spatial[0])))
    aspect = low + r3 * (high - low)
    height = max(1, min(round(math.sqrt(area * aspect)), grid[1]))
    width = max(1, min(round(math.sqrt(area / aspect)), grid[2]))
    assert (t, h, w) == (frames, height, width)


def test_box_shape_is_the_same_on_the_device():
    uniforms = np.random.default_rng().random((5000, 3)).astype(np.float32)
    spec = MaskSpec(1, 1, spatial_scale=(0.1, 0.8), temporal_scale=(0.3, 1.0))
    on_host = masking.box_shape(uniforms.astype(float), (8, 14, 14), spec)
    on_device = masking.box_shape(jnp.asarray(uniforms), (8, 14, 14), spec)
    for a, b in zip(on_host, on_device, strict=True):
        # Single precision may round a value on the very border the other way.
        assert (a != np.asarray(b)).mean() < 1e-3


def test_one_block_hides_exactly_a_box_at_any_place_alike():
    grid, batch = (2, 6, 7), 2000
    # floor(42 * 0.3) = 12 tokens at aspect 12 / 9: 4 high and 3 wide.
    spec = MaskSpec(
        84 - 24,
        24,
        num_blocks=1,
        spatial_scale=(0.3, 0.3),
        aspect_ratio=(4 / 3, 4 / 3),
    )
    context, target = draw(spec, grid, batch=batch)
    places = coordinates(target, grid)
    top, left = places[..., 1].min(-1), places[..., 2].min(-1)
    for row, y, x in zip(target[:50], top, left, strict=False):
        box = itertools.product(range(2), range(y, y + 4), range(x, x + 3))
        np.testing.assert_array_equal(
            row, [np.ravel_multi_index(place, grid) for place in box]
        )
    both = np.sort(np.concatenate([context, target], 1), 1)
    np.testing.assert_array_equal(both, np.tile(np.arange(84), (batch, 1)))
    # 3 x 5 corners with equal chances; five sigma.
    chance = 1 / 15
    counts = np.bincount(top * 5 + left, minlength=15) / batch
    assert len(counts) == 15
    sigma = math.sqrt(chance * (1 - chance) / batch)
    assert np.abs(counts - chance).max() < 5 * sigma


def hidden_boxes(fields, mode, grid, shape_seed, batch=16):
    """Draw single boxes and return their extents [batch, 3]."""
    spec = MaskSpec(1, 1, mode=mode, **{**fields, "num_blocks": 1})
    keys = jax.random.key(shape_seed + 999), jax.random.key(shape_seed)
    hidden = np.asarray(masking._draw_hidden(*keys, batch, grid, spec, 2))
    return extents(hidden, grid)


def test_official_mode_shares_one_shape_over_batch_and_candidates():
    for seed in range(5):
        sizes = hidden_boxes(SHORT, "official", (2, 16, 16), seed)
        assert (sizes == sizes[0, 0]).all()
    unbiased = hidden_boxes(SHORT, "unbiased", (2, 16, 16), 0)
    assert len(np.unique(unbiased.reshape(-1, 3), axis=0)) > 2


def test_official_mask_types_of_one_step_share_the_aspect_ratio():
    grid = (1, 16, 16)
    aspect = np.zeros((20_000, 3))
    aspect[:, 2] = np.linspace(0, 1, 20_000, endpoint=False)
    shapes = [
        np.stack(masking.box_shape(aspect, grid, MaskSpec(1, 1, **fields)), -1)
        for fields in (SHORT, LONG)
    ]
    possible = {(*a, *b) for a, b in zip(*(s.tolist() for s in shapes), strict=True)}
    seen = {
        (
            *hidden_boxes(SHORT, "official", grid, seed, batch=1)[0, 0].tolist(),
            *hidden_boxes(LONG, "official", grid, seed, batch=1)[0, 0].tolist(),
        )
        for seed in range(40)
    }
    # Independent draws would be outside of these pairs three times out of four.
    assert len(possible) < 6 * 9 / 3
    assert seen <= possible and len(seen) > 4


def test_official_mode_keeps_the_earliest_tokens_and_unbiased_any():
    grid, batch = (4, 8, 8), 400
    fields = {"num_blocks": 1, "spatial_scale": (0.15, 0.15)}
    official, _ = draw(MaskSpec(32, 8, mode="official", **fields), grid, batch=batch)
    unbiased, _ = draw(MaskSpec(32, 8, mode="unbiased", **fields), grid, batch=batch)
    assert coordinates(official, grid)[..., 0].max() == 0
    times = np.bincount(coordinates(unbiased, grid)[..., 0].ravel(), minlength=4)
    # Boxes last the whole clip, so times are equally likely; five sigma of the
    # binomial, an upper bound, since tokens are drawn without replacement.
    sigma = math.sqrt(times.sum() * 0.25 * 0.75)
    assert np.abs(times - times.sum() / 4).max() < 5 * sigma


def test_unbiased_mode_keeps_any_target_alike():
    grid, batch = (4, 4, 4), 1000
    spec = MaskSpec(16, 8, num_blocks=1, spatial_scale=(0.5, 0.5), mode="unbiased")
    _, target = draw(spec, grid, batch=batch)
    times = np.bincount(coordinates(target, grid)[..., 0].ravel(), minlength=4)
    sigma = math.sqrt(times.sum() * 0.25 * 0.75)
    assert np.abs(times - times.sum() / 4).max() < 5 * sigma


@pytest.mark.parametrize("mode", choices.MASK_MODES)
def test_causal_masks_never_show_late_tokens(mode):
    grid = (8, 4, 4)
    # int(8 * 0.4) = 3 time steps may be seen.
    fields = {"num_blocks": 1, "spatial_scale": (0.3, 0.3), "max_temporal_keep": 0.4}
    context, target = draw(MaskSpec(16, 90, mode=mode, **fields), grid, batch=200)
    assert coordinates(context, grid)[..., 0].max() <= 2
    assert coordinates(target, grid)[..., 0].max() >= 6
    # The least that may be seen is one time step.
    first = {**fields, "max_temporal_keep": 0.01}
    context, _ = draw(MaskSpec(8, 100, mode=mode, **first), grid, batch=50)
    assert coordinates(context, grid)[..., 0].max() == 0


def test_a_causal_mask_without_blocks_hides_the_future_alone():
    grid, fields = (6, 3, 4), {"num_blocks": 0, "max_temporal_keep": 0.5}
    budgets = masking.default_budget(MaskSpec(0, 0, **fields), grid)
    assert budgets == (36, 36)
    context, target = draw(MaskSpec(*budgets, **fields), grid)
    np.testing.assert_array_equal(context, np.tile(np.arange(36), (5, 1)))
    np.testing.assert_array_equal(target, np.tile(np.arange(36, 72), (5, 1)))


@pytest.mark.parametrize("mode", choices.MASK_MODES)
def test_tubes_hide_random_places_through_all_of_time(mode):
    grid, batch = (3, 4, 5), 500
    spec = MaskSpec(0, 0, kind="tube", spatial_scale=(0.6, 0.6), mode=mode)
    context, target = masking.default_budget(spec, grid)
    assert (context, target) == (3 * 8, 3 * 12)
    spec = MaskSpec(context, target, kind="tube", spatial_scale=(0.6, 0.6), mode=mode)
    _, hidden = draw(spec, grid, batch=batch)
    places = hidden.reshape(batch, 3, 12)
    np.testing.assert_array_equal(places, places[:, :1] + 20 * np.arange(3)[:, None])
    share = np.bincount(places[:, 0].ravel(), minlength=20) / batch
    assert np.abs(share - 0.6).max() < 5 * math.sqrt(0.6 * 0.4 / batch)
