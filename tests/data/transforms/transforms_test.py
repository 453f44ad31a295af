import fractions
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.transforms import transforms

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


@given(sides, sides, st.integers(1, 70), st.integers(0, 999))
def test_shifting_boxes_go_straight_from_one_to_another(height, width, frames, seed):
    transform = transforms.ClipTransform(8, motion_shift=True)
    boxes = transform.crop_boxes(height, width, frames, np.random.default_rng(seed))
    assert boxes.shape == (frames, 4) and boxes.dtype == np.int64
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= [height, width]).all()
    rng = np.random.default_rng(seed)
    first, last = (transform.crop_box(height, width, rng) for _ in range(2))
    assert tuple(boxes[0]) == first
    if frames > 1:
        assert tuple(boxes[-1]) == last
        for number, box in enumerate(boxes):
            share = fractions.Fraction(number, frames - 1)
            expected = [
                math.floor(a + share * (b - a))
                for a, b in zip(first, last, strict=True)
            ]
            assert box.tolist() == expected


def test_boxes_stand_still_without_motion_shift():
    transform = transforms.ClipTransform(8)
    boxes = transform.crop_boxes(100, 120, 5, np.random.default_rng(3))
    box = transform.crop_box(100, 120, np.random.default_rng(3))
    np.testing.assert_array_equal(boxes, [box] * 5)


@given(sides, sides, st.integers(2, 9))
def test_views_are_equally_spaced_along_the_longer_side(height, width, num_views):
    boxes = np.array(transforms.spatial_views(height, width, num_views))
    assert boxes.shape == (num_views, 4)
    side = min(height, width)
    assert (boxes[:, 2:] == side).all() and (boxes[0, :2] == 0).all()
    assert (boxes[:, :2] + side <= [height, width]).all()
    along, across = (0, 1) if height > width else (1, 0)
    assert (boxes[:, across] == 0).all()
    assert len({*np.diff(boxes[:, along])}) == 1
    assert max(height, width) - side - boxes[-1, along] < num_views - 1


@pytest.mark.parametrize(
    "height, width, num_views, expected",
    [
        (256, 340, 1, [(16, 58, 224, 224)]),
        (480, 270, 1, [(122, 17, 236, 236)]),
        (1, 1, 1, [(0, 0, 1, 1)]),
        (256, 340, 3, [(0, 0, 256, 256), (0, 42, 256, 256), (0, 84, 256, 256)]),
        (341, 256, 3, [(0, 0, 256, 256), (42, 0, 256, 256), (84, 0, 256, 256)]),
        (256, 256, 3, [(0, 0, 256, 256)] * 3),
    ],
)
def test_views_of_known_frames(height, width, num_views, expected):
    assert transforms.spatial_views(height, width, num_views) == expected


def test_one_view_is_smaller_than_the_central_square():
    (view,) = transforms.make_views(1)
    assert view(256, 340) == (16, 58, 224, 224)
    assert transforms.central_box(256, 340) == (0, 42, 256, 256)


@given(sides, sides)
def test_the_single_view_is_central(height, width):
    ((top, left, side, width_of_box),) = transforms.spatial_views(height, width, 1)
    assert side == width_of_box
    assert abs(side - 0.875 * min(height, width)) <= 0.5
    assert abs(2 * top + side - height) <= 1 and abs(2 * left + side - width) <= 1


def test_flip_mirrors_left_and_right():
    video = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    np.testing.assert_array_equal(transforms.flip(video), video[:, :, ::-1])


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
        ("crop_aspect_ratio", (1.0, float("inf"))),
        ("flip_probability", 1.5),
        ("color_jitter", (0.4, 0.4, 0.4, 0.6)),
        ("grayscale_probability", -0.1),
        ("rand_augment", "rand-m7"),
        ("erase_probability", float("nan")),
        ("erase_mode", "noise"),
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


def test_what_is_off_draws_nothing():
    video = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    transform = transforms.ClipTransform(2, flip_probability=0)
    rng, plain = np.random.default_rng(5), np.random.default_rng(5)
    assert transform.augment(video, rng) is video
    plain.random()  # of the flip, as ever
    assert rng.bit_generator.state == plain.bit_generator.state


@pytest.mark.parametrize(
    "field, value",
    [
        ("color_jitter", (0.8, 0.8, 0.8, 0.2)),
        ("grayscale_probability", 0.5),
        ("rand_augment", "rand-m7-n4-mstd0.5-inc1"),
        ("flip_probability", 0.5),
        ("erase_probability", 0.5),
    ],
)
def test_augmentations_follow_from_the_generator_alone(field, value):
    source = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    video = source.copy()
    fields = {"resolution": 16, "flip_probability": 0, field: value}
    transform = transforms.ClipTransform(**fields)
    results = [
        [transform.augment(video, np.random.default_rng(seed)) for seed in range(20)]
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*results)
    np.testing.assert_array_equal(video, source)
    assert all(result.dtype == np.uint8 for result in results[0])
    # On for some clips, and not the same for all.
    assert len({result.tobytes() for result in results[0]}) > 1


def test_official_settings_of_probe_training_are_accepted():
    transform = transforms.ClipTransform(
        16,
        crop_scale=(0.08, 1.0),
        crop_aspect_ratio=(3 / 4, 4 / 3),
        flip_probability=0.0,
        rand_augment="rand-m7-n4-mstd0.5-inc1",
        erase_probability=0.25,
    )
    video = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    assert transform.augment(video, np.random.default_rng(0)).shape == video.shape
