"""Complements and swapped roles of masks, and the budgets that they get by default."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vjepa_jax.base import choices
from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import get_config, mask
from vjepa_jax.objective import masking
from vjepa_jax.objective.masking import MaskSpec
from vjepa_jax.program import build

GRID = (2, 3, 4)
NUM_TOKENS = 24
OPTIONS = ({}, {"full_complement": True}, {"pred_full_complement": True})


def plain_mask(hidden, num_visible, num_hidden, spec):
    """Trim one drawn mask by the official rules; the numbers count drawn tokens."""
    context = [i for i in range(len(hidden)) if not hidden[i]][:num_visible]
    target = [i for i in range(len(hidden)) if hidden[i]][:num_hidden]
    if spec.full_complement:
        target = [i for i in range(len(hidden)) if i not in context]
    if spec.pred_full_complement:
        context = [i for i in range(len(hidden)) if i not in target]
    return (target, context) if spec.inv_block else (context, target)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(OPTIONS),
    st.booleans(),
    st.sampled_from(choices.MASK_MODES),
    # Few budgets, because slices of every size are compiled.
    st.sampled_from([1, 5, 12, 17, 23]),
    st.sampled_from([1, 4, 12]),
)
def test_samples_follow_the_official_rules(
    seed, options, inv_block, mode, num_visible, num_hidden
):
    """Masks are injected, so that what was drawn is known whatever drew it."""
    batch, candidates = 6, 4
    num_hidden = min(num_hidden, NUM_TOKENS - num_visible)
    if options:
        num_hidden = NUM_TOKENS - num_visible
    rng = np.random.default_rng(seed)
    share = rng.uniform(0, 1, (candidates, batch, 1))
    hidden = rng.uniform(size=(candidates, batch, NUM_TOKENS)) < share
    counts = (num_hidden, num_visible) if inv_block else (num_visible, num_hidden)
    spec = MaskSpec(*counts, mode=mode, inv_block=inv_block, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking, "_draw_hidden", lambda *_: jnp.asarray(hidden))
        context, target = map(
            np.asarray,
            masking.sample.__wrapped__(
                jax.random.key(seed % 2**31), jax.random.key(1), batch, GRID, spec
            ),
        )
    assert context.shape == (batch, counts[0]) and target.shape == (batch, counts[1])
    for b in range(batch):
        seen, wanted = set(context[b].tolist()), set(target[b].tolist())
        assert len(seen) == counts[0] and len(wanted) == counts[1]
        assert not seen & wanted
        if options:
            assert seen | wanted == set(range(NUM_TOKENS))
        # What complements the other side need not be there.
        needed = (
            0 if spec.pred_full_complement else num_visible,
            0 if spec.full_complement else num_hidden,
        )
        drawn = hidden[:, b].sum(-1)
        fits = (NUM_TOKENS - drawn >= needed[0]) & (drawn >= needed[1])
        if not fits.any():
            continue
        chosen = hidden[fits.argmax(), b]
        if mode == "official":
            expected = plain_mask(chosen, num_visible, num_hidden, spec)
            np.testing.assert_array_equal(context[b], expected[0])
            np.testing.assert_array_equal(target[b], expected[1])
        of_visible, of_hidden = (target, context) if inv_block else (context, target)
        if not spec.pred_full_complement:
            assert not chosen[of_visible[b]].any()
        if not spec.full_complement:
            assert chosen[of_hidden[b]].all()


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 2**31 - 1),
    st.sampled_from(OPTIONS[1:]),
    st.booleans(),
    st.sampled_from(choices.MASK_MODES),
)
def test_drawn_complements_are_exact_at_default_budgets(seed, options, inv_block, mode):
    fields = {"num_blocks": 3, "spatial_scale": (0.25, 0.25), "mode": mode}
    spec = MaskSpec(0, 0, inv_block=inv_block, **fields, **options)
    counts = masking.default_budget(spec, GRID, 6)
    spec = MaskSpec(*counts, inv_block=inv_block, **fields, **options)
    keys = jax.random.split(jax.random.key(seed))
    # Not compiled as a whole: that would take a second for every example.
    drawn = masking.sample.__wrapped__(*keys, 4, GRID, spec)
    context, target = map(np.asarray, drawn)
    assert (context.shape[1], target.shape[1]) == counts
    both = np.sort(np.concatenate([context, target], 1), 1)
    np.testing.assert_array_equal(both, np.tile(np.arange(NUM_TOKENS), (4, 1)))


@pytest.mark.parametrize("inv_block", [False, True])
def test_default_budgets_complement_what_the_trimming_leaves(inv_block):
    """Values of V-JEPA's masks, whose plain budgets the other tests know."""
    for scale, blocks, context, target in ((0.15, 8, 496, 968), (0.7, 2, 128, 1440)):
        fields = {"num_blocks": blocks, "spatial_scale": (scale, scale)}
        for options, expected in zip(
            OPTIONS,
            ((context, target), (context, 2048 - context), (2048 - target, target)),
            strict=True,
        ):
            spec = MaskSpec(0, 0, inv_block=inv_block, **fields, **options)
            swapped = expected[::-1] if inv_block else expected
            assert masking.default_budget(spec, (8, 16, 16)) == swapped


def test_an_inverted_block_is_what_the_context_sees():
    grid = (2, 6, 7)
    # floor(42 * 0.3) = 12 tokens at aspect 12 / 9: 4 high and 3 wide.
    spec = MaskSpec(
        24,
        84 - 24,
        num_blocks=1,
        spatial_scale=(0.3, 0.3),
        aspect_ratio=(4 / 3, 4 / 3),
        inv_block=True,
    )
    keys = jax.random.key(0), jax.random.key(1)
    context, _ = masking.sample(*keys, 20, grid, spec)
    places = np.stack(np.unravel_index(np.asarray(context), grid), -1)
    sizes = places.max(1) - places.min(1) + 1
    np.testing.assert_array_equal(sizes, np.tile([2, 4, 3], (20, 1)))


@pytest.mark.parametrize("option", ["full_complement", "pred_full_complement"])
@pytest.mark.parametrize("given_side", ["num_context", "num_target"])
def test_a_complement_has_what_a_given_budget_leaves(option, given_side):
    masks = get_config().masks
    masks.short = mask(group_size=6, **{option: True, given_side: 30})
    spec = build.make_masks(masks, (4, 4, 4))["short"]
    assert getattr(spec, given_side) == 30
    assert spec.num_context + spec.num_target == 64


def test_budgets_that_are_no_complement_are_refused():
    masks = get_config().masks
    masks.short = mask(full_complement=True, num_context=20, num_target=30)
    with pytest.raises(UserError, match=r"config\.masks\.short.*64 tokens") as error:
        build.make_masks(masks, (4, 4, 4))
    assert "\n" not in str(error.value)


def test_budgets_of_a_stream_are_those_of_its_grid():
    masks = get_config().masks
    for grid in ((4, 6, 6), (1, 6, 6)):
        specs = build.make_masks(masks, grid, "streams.x.masks")
        for name, spec in specs.items():
            bare = MaskSpec(
                0, 0, spec.kind, spec.num_blocks, tuple(masks[name].spatial_scale)
            )
            counts = masking.default_budget(bare, grid, 24)
            assert (spec.num_context, spec.num_target) == counts
            assert sum(counts) <= math.prod(grid)
