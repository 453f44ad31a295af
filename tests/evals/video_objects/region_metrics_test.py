"""J and F equal the definitions of DAVIS by brute force, statistics those of a loop."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import jaccard_score

from vjepa_jax.evals.video_objects import region_metrics


def plain_boundary(region):
    """Return pixels that differ from a neighbour to the right, below, or both."""
    height, width = region.shape
    found = []
    for y in range(height):
        for x in range(width):
            beside = (
                region[min(y + dy, height - 1), min(x + dx, width - 1)]
                for dy, dx in ((0, 1), (1, 0), (1, 1))
            )
            if any(other != region[y, x] for other in beside):
                found.append((y, x))
    return found


def plain_f(truth, found):
    """Match every boundary pixel with every other one: O(n²)."""
    radius = math.ceil(0.008 * math.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2))
    true_pixels, pixels = plain_boundary(truth), plain_boundary(found)
    if not true_pixels and not pixels:
        return 1.0
    if not true_pixels or not pixels:
        return 0.0

    def share(ones, others):
        near = [
            any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in others)
            for y, x in ones
        ]
        return sum(near) / len(near)

    precision, recall = share(pixels, true_pixels), share(true_pixels, pixels)
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


def blob(rng, shape):
    """Draw an ellipse with a ragged edge, sometimes cut by the frame."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    centre = rng.uniform(0, shape)
    radius = rng.uniform(0.05, 0.5, 2) * shape
    distance = np.hypot((y - centre[0]) / radius[0], (x - centre[1]) / radius[1])
    return distance + rng.normal(0, 0.05, shape) < 1


@pytest.mark.parametrize("shape", [(20, 31), (60, 107), (90, 120)])
def test_measures_agree_with_brute_force(rng, shape):
    for shift in (0, 1, 3, 9):
        truth = blob(rng, shape)
        found = np.roll(truth, shift, axis=int(rng.integers(2)))
        found ^= rng.random(shape) < 0.002
        wanted = plain_f(truth, found)
        assert region_metrics.boundary_accuracy(truth, found) == pytest.approx(wanted)
        found_j = region_metrics.region_similarity(truth, found)
        if truth.any():
            assert found_j == pytest.approx(jaccard_score(truth.ravel(), found.ravel()))


@given(arrays.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))), st.data())
def test_boundaries_of_any_region_agree_with_brute_force(region, data):
    other = data.draw(arrays.arrays(bool, region.shape))
    wanted = np.zeros(region.shape, bool)
    for place in plain_boundary(region):
        wanted[place] = True
    np.testing.assert_array_equal(region_metrics.boundary(region), wanted)
    found = region_metrics.boundary_accuracy(region, other)
    assert found == pytest.approx(plain_f(region, other))
    assert region_metrics.boundary_accuracy(other, region) == pytest.approx(found)
    assert region_metrics.boundary_accuracy(region, region) == 1
    assert region_metrics.region_similarity(region, region) == 1


def test_tolerance_is_rounded_up_and_inclusive():
    """A diagonal of 500 pixels: 4 of them are near, 5 are not."""
    truth = np.zeros((300, 400), bool)
    truth[:, 200:] = True
    for shift, wanted in ((4, 1.0), (5, 0.0)):
        found = np.roll(truth, shift, axis=1)
        found[:, :shift] = False
        assert region_metrics.boundary_accuracy(truth, found) == wanted


def test_empty_regions():
    empty, whole = np.zeros((30, 40), bool), np.zeros((30, 40), bool)
    whole[5:9, 5:9] = True
    for one, other, j, f in (
        (empty, empty, 1, 1),
        (empty, whole, 0, 0),
        (whole, empty, 0, 0),
    ):
        assert region_metrics.region_similarity(one, other) == j
        assert region_metrics.boundary_accuracy(one, other) == f


def plain_statistics(values):
    """Follow the benchmark's text: quarters by rounded positions, ends in common."""
    ends = [1 + (len(values) - 1) * k / 4 for k in range(5)]
    ends = [math.floor(end + 0.5) - 1 for end in ends]
    quarters = [values[a : b + 1] for a, b in itertools.pairwise(ends)]
    return (
        sum(values) / len(values),
        sum(value > 0.5 for value in values) / len(values),
        sum(quarters[0]) / len(quarters[0]) - sum(quarters[3]) / len(quarters[3]),
    )


@pytest.mark.parametrize("length", [1, 2, 3, 5, 14, 66])
def test_statistics_are_those_of_a_loop(rng, length):
    values = rng.random(length)
    found = region_metrics.statistics(values)
    assert found == pytest.approx(plain_statistics([*values]))


def test_decay_is_what_is_lost():
    mean, recall, decay = region_metrics.statistics(np.linspace(1, 0, 9))
    assert (mean, recall) == pytest.approx((0.5, 4 / 9))
    assert decay == pytest.approx(0.75)
