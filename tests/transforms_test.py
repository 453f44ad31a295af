import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vjepa_jax.data import transforms
from vjepa_jax.default_config import UserError

sides = st.integers(1, 2000)


def ordered_pair(low, high):
    return st.tuples(st.floats(low, high), st.floats(low, high)).map(
        lambda pair: tuple(sorted(pair))
    )


@given(sides, sides, ordered_pair(0.01, 1), ordered_pair(0.1, 10), st.integers(0, 999))
def test_boxes_lie_inside_the_frame(height, width, scale, aspect_ratio, seed):
    rng = np.random.default_rng(seed)
    box = transforms.random_resized_crop_box(height, width, scale, aspect_ratio, rng)
    top, left, crop_height, crop_width = box
    assert all(isinstance(number, int) for number in box)
    assert top >= 0 and left >= 0 and crop_height >= 1 and crop_width >= 1
    assert top + crop_height <= height and left + crop_width <= width


def test_boxes_have_the_asked_area_and_aspect():
    rng = np.random.default_rng(0)
    boxes = np.array(
        [
            transforms.random_resized_crop_box(256, 340, (0.3, 1.0), (0.75, 1.35), rng)
            for _ in range(2000)
        ]
    )
    area = boxes[:, 2] * boxes[:, 3] / (256 * 340)
    aspect = boxes[:, 3] / boxes[:, 2]
    # Rounding a side to whole pixels moves these by at most one part in 140.
    assert area.min() > 0.295 and area.max() <= 1.0
    assert aspect.min() > 0.74 and aspect.max() < 1.36
    # Large areas seldom fit at a drawn aspect, so that they are rarer than small ones;
    # the middle of the drawn range stays within reach.
    assert 0.5 < area.mean() < 0.65
    assert len({tuple(box) for box in boxes}) > 1900


def test_logarithm_of_the_aspect_is_uniform():
    rng = np.random.default_rng(0)
    aspects = [
        box[3] / box[2]
        for box in (
            transforms.random_resized_crop_box(4000, 4000, (0.1, 0.2), (0.5, 2.0), rng)
            for _ in range(4000)
        )
    ]
    # Standard error of the mean: 0.4 / sqrt(4000) = 0.006.
    assert abs(np.log(aspects).mean()) < 0.025
    assert abs(np.mean(np.array(aspects) < 2**-0.5) - 0.25) < 0.03


@pytest.mark.parametrize(
    "height, width, expected",
    [
        (100, 1000, (0, 432, 100, 135)),
        (1000, 100, (433, 0, 133, 100)),
        (100, 110, (0, 0, 100, 110)),
    ],
)
def test_crops_that_never_fit_are_central(height, width, expected, monkeypatch):
    monkeypatch.setattr(transforms, "_ATTEMPTS", 0)
    box = transforms.random_resized_crop_box(
        height, width, (0.3, 1.0), (0.75, 1.35), np.random.default_rng(0)
    )
    assert box == expected


@given(sides, sides)
def test_central_box_is_the_largest_centred_square(height, width):
    top, left, crop_height, crop_width = transforms.central_box(height, width)
    assert crop_height == crop_width == min(height, width)
    assert abs(2 * top + crop_height - height) <= 1
    assert abs(2 * left + crop_width - width) <= 1


def test_flip_mirrors_left_and_right():
    video = np.arange(2 * 2 * 3 * 3, dtype=np.uint8).reshape(2, 2, 3, 3)
    np.testing.assert_array_equal(transforms.flip(video)[:, :, 0], video[:, :, 2])


@pytest.mark.parametrize(
    "probability, low, high", [(0, 0, 0), (1, 50, 50), (0.5, 10, 40)]
)
def test_flips_come_with_their_probability(probability, low, high):
    transform = transforms.ClipTransform(8, flip_probability=probability)
    video = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    rng = np.random.default_rng(0)
    flips = sum(
        not np.array_equal(transform.maybe_flip(video, rng), video) for _ in range(50)
    )
    assert low <= flips <= high


@pytest.mark.parametrize(
    "field, value",
    [
        ("resolution", 0),
        ("crop_scale", (0.5, 0.3)),
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.5, 1.5)),
        ("crop_aspect_ratio", (0.0, 1.0)),
        ("crop_aspect_ratio", (2.0, 1.0)),
        ("flip_probability", 1.5),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(UserError, match=rf"data\.{field}"):
        transforms.ClipTransform(**{"resolution": 8, field: value})


def test_transform_survives_pickling():
    transform = transforms.ClipTransform(8, crop_scale=(0.4, 0.9))
    again = pickle.loads(pickle.dumps(transform))
    assert again == transform
    boxes = [
        each.crop_box(50, 60, np.random.default_rng(0)) for each in (transform, again)
    ]
    assert boxes[0] == boxes[1]
