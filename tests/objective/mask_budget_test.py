"""Token counts that masks leave: against the official trimming, and the budgets."""

import numpy as np
import pytest
from masking_test import LONG, SHORT, coordinates, draw

from vjepa_jax.objective import masking
from vjepa_jax.objective.masking import MaskSpec

# Shares in per cent of visible and hidden tokens that the official trimming keeps in
# batches of 24 per device, rounded.
KEPT = {
    (14, "short"): (23, 48),
    (14, "long"): (6.5, 70),
    (16, "short"): (24, 47),
    (16, "long"): (6.4, 71),
    (24, "short"): (25, 47),
    (24, "long"): (6.9, 71),
}
# The same in batches of 12 and of 6.
KEPT_OF_FEW = {
    (14, "short"): ((26, 50), (28, 53)),
    (14, "long"): ((7.8, 71), (9.8, 73)),
    (16, "short"): ((26, 49), (29, 52)),
    (16, "long"): ((7.8, 71), (10.3, 73)),
    (24, "short"): ((27, 49), (30, 52)),
    (24, "long"): ((8.4, 72), (11.0, 73)),
}
# The design's budgets (decision 2).
BUDGETS = {
    (14, "short"): (368, 752),
    (14, "long"): (96, 1104),
    (16, "short"): (496, 968),
    (16, "long"): (128, 1440),
    (24, "short"): (1152, 2168),
    (24, "long"): (312, 3264),
}
FIELDS = {"short": SHORT, "long": LONG}


@pytest.mark.parametrize(("side", "name"), KEPT)
def test_simulated_counts_agree_with_the_reference(side, name):
    # One frame is enough, since boxes last the whole clip; a thousand groups have a
    # standard error of 0.15 points.
    counts = masking.simulate_counts(
        MaskSpec(0, 0, **FIELDS[name]), (1, side, side), group_size=24, groups=1000
    )
    shares = [100 * c.mean() / side**2 for c in counts]
    np.testing.assert_allclose(shares, KEPT[side, name], atol=1.0)
    np.testing.assert_allclose(
        shares,
        [100 * b / (8 * side**2) for b in BUDGETS[side, name]],
        atol=1.0,
    )


@pytest.mark.parametrize(("side", "name"), KEPT_OF_FEW)
def test_smaller_groups_keep_more_as_the_reference_says(side, name):
    for group_size, kept in zip((12, 6), KEPT_OF_FEW[side, name], strict=True):
        spec = MaskSpec(0, 0, **FIELDS[name])
        counts = masking.simulate_counts(spec, (1, side, side), group_size, groups=4000)
        shares = [100 * c.mean() / side**2 for c in counts]
        np.testing.assert_allclose(shares, kept, atol=1.0, err_msg=str(group_size))


def test_counts_of_a_whole_clip_are_those_of_a_frame_times_its_length():
    spec = MaskSpec(0, 0, **SHORT)
    frame = masking.simulate_counts(spec, (1, 14, 14), group_size=6, groups=5)
    clip = masking.simulate_counts(spec, (8, 14, 14), group_size=6, groups=5)
    np.testing.assert_array_equal(np.multiply(frame, 8), clip)


def test_simulated_groups_keep_their_smallest_counts():
    spec = MaskSpec(0, 0, **SHORT)
    means = [
        np.mean(masking.simulate_counts(spec, (1, 16, 16), group, groups=300), axis=1)
        for group in (1, 6, 24)
    ]
    # Larger groups leave less, on both sides; alone, a sample keeps every token.
    assert (np.diff(means, axis=0) < 0).all()
    assert means[0].sum() == 256


@pytest.mark.parametrize(("side", "name"), BUDGETS)
def test_default_budgets_of_official_grids(side, name):
    spec = MaskSpec(0, 0, **FIELDS[name])
    assert masking.default_budget(spec, (8, side, side)) == BUDGETS[side, name]


def test_default_budgets_of_other_settings_are_simulated():
    spec = MaskSpec(0, 0, **SHORT)
    context, target = masking.default_budget(spec, (4, 10, 10), 24)
    visible, hidden = masking.simulate_counts(spec, (4, 10, 10), 24, 400)
    assert context % 4 == target % 4 == 0
    assert abs(context - visible.mean()) <= 2 and abs(target - hidden.mean()) <= 2
    # The table of official budgets holds for groups of 24 only.
    larger = masking.default_budget(spec, (8, 14, 14), 6)
    assert larger[0] > 368 and larger[1] > 752


@pytest.mark.parametrize("name", FIELDS)
def test_default_budgets_are_met_by_drawn_masks(name):
    """A fallback hides random tokens, which is another task: it must stay rare."""
    grid, batch = (8, 14, 14), 128
    context, target = masking.default_budget(MaskSpec(0, 0, **FIELDS[name]), grid)
    spec = MaskSpec(context, target, **FIELDS[name])
    fallbacks = 0
    for seed in range(8):
        visible, _ = draw(spec, grid, seed=seed, batch=batch, shape_seed=seed)
        # Boxes last the whole clip: a place seen at time 1 is seen at time 0 too. The
        # spare order knows nothing of it.
        at = coordinates(visible, grid)
        for sample in at:
            later = {(h, w) for t, h, w in sample.tolist() if t == 1}
            first = {(h, w) for t, h, w in sample.tolist() if t == 0}
            fallbacks += not later <= first
    assert fallbacks / (8 * batch) < 0.01
