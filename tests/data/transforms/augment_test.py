import colorsys
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vjepa_jax.base.choices import ERASE_MODES
from vjepa_jax.base.errors import UserError
from vjepa_jax.data.transforms import augment

OFFICIAL = "rand-m7-n4-mstd0.5-inc1"
levels = st.floats(-1, 1)
seeds = st.integers(0, 2**32)


def random_clip(seed, num_frames=2, height=20, width=24):
    """Coarse noise, so that neighbouring pixels have to do with each other."""
    rng = np.random.default_rng(seed)
    size = (num_frames, -(-height // 4), -(-width // 4), 3)
    clip = rng.integers(0, 256, size, np.uint8).repeat(4, 1).repeat(4, 2)
    return clip[:, :height, :width] // 2 + rng.integers(
        0, 128, (num_frames, height, width, 3), np.uint8
    )


def changed(name, frame, level):
    image = augment.OPERATIONS[name](Image.fromarray(frame), level)
    assert image.mode == "RGB"
    return np.asarray(image)


def luma(frame):
    return np.rint(frame @ np.array([0.299, 0.587, 0.114]))[..., None]


def blend(dull, frame, factor):
    """Return the point at `factor` of the line from `dull` (0) to `frame` (1)."""
    return np.clip(dull + factor * (frame.astype(float) - dull), 0, 255)


def contrast(frame, factor):
    return blend(np.floor(luma(frame).mean() + 0.5), frame, factor)


def auto_contrast(frame):
    low, high = frame.min((0, 1)).astype(float), frame.max((0, 1))
    return (frame - low) * 255 / np.maximum(high - low, 1)


# Plain re-implementations of the operations that look at one pixel at a time.
PLAIN = {
    "AutoContrast": lambda frame, level: auto_contrast(frame),
    "Invert": lambda frame, level: 255 - frame,
    "PosterizeIncreasing": lambda frame, level: (
        frame.astype(int) // 2 ** (4 + int(4 * level)) * 2 ** (4 + int(4 * level))
    ),
    "SolarizeIncreasing": lambda frame, level: np.where(
        frame < 256 - int(256 * level), frame, 255 - frame
    ),
    "SolarizeAdd": lambda frame, level: np.where(
        frame < 128, frame + int(110 * level), frame
    ),
    "ColorIncreasing": lambda frame, level: blend(luma(frame), frame, 1 + 0.9 * level),
    "ContrastIncreasing": lambda frame, level: contrast(frame, 1 + 0.9 * level),
    "BrightnessIncreasing": lambda frame, level: blend(0, frame, 1 + 0.9 * level),
}
# Operations with a direction, and the axis on whose mirroring it turns round.
MIRROR_AXES = {
    "Rotate": 1,
    "ShearX": 1,
    "ShearY": 0,
    "TranslateXRel": 1,
    "TranslateYRel": 0,
}


@pytest.mark.parametrize("name", PLAIN)
@settings(max_examples=20)
@given(level=st.floats(0, 1), seed=seeds)
def test_operations_equal_their_plain_form(name, level, seed):
    frame = random_clip(seed)[0]
    expected = PLAIN[name](frame, level)
    actual = changed(name, frame, level)
    # Pillow rounds luma and blends of its own accord.
    np.testing.assert_allclose(actual.astype(float), expected, atol=2.01)


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_level_zero_changes_little(name):
    frame = random_clip(0)[0]
    frame[0, 0], frame[0, 1] = 0, 255  # the contrast is at its most
    result = changed(name, frame, 0.0)
    if name == "PosterizeIncreasing":
        assert np.array_equal(result, frame // 16 * 16)
    elif name not in ("Invert", "Equalize"):
        np.testing.assert_array_equal(result, frame)


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_signs_are_opposite_directions(name):
    frame = random_clip(1, height=40, width=40)[0]
    positive, negative = (changed(name, frame, level) for level in (0.7, -0.7))
    if name in MIRROR_AXES:
        axis = MIRROR_AXES[name]
        mirrored = np.flip(changed(name, np.flip(frame, axis), -0.7), axis)
        # Bicubic weights are rounded, and not alike on both sides.
        assert np.mean(np.abs(mirrored.astype(int) - positive)) < 2
        assert np.mean(np.abs(negative.astype(int) - positive)) > 10
    enhances = name in [
        f"{quality}Increasing"
        for quality in ("Color", "Contrast", "Brightness", "Sharpness")
    ]
    has_direction = name in MIRROR_AXES or enhances
    assert has_direction != np.array_equal(positive, negative)


@given(st.integers(-9, 9), seeds)
def test_translations_are_shares_of_the_frame(pixels, seed):
    frame = random_clip(seed, height=40, width=20)[0]
    fill = np.full_like(frame, 128)
    both_ways = np.concatenate([fill, frame, fill], 1)
    expected = both_ways[:, 20 + pixels : 40 + pixels]
    actual = changed("TranslateXRel", frame, pixels / 9)
    np.testing.assert_allclose(actual.astype(int), expected, atol=1)
    both_ways = np.concatenate([fill, frame, fill])
    expected = both_ways[40 + 2 * pixels : 80 + 2 * pixels]
    actual = changed("TranslateYRel", frame, pixels / 9)
    np.testing.assert_allclose(actual.astype(int), expected, atol=1)


def test_shears_and_rotations_have_their_size():
    frame = np.zeros((101, 101, 3), np.uint8)
    frame[:, 50] = 255
    for name, expected in [("ShearX", -0.3), ("Rotate", math.tan(math.radians(30)))]:
        places = changed(name, frame, 1.0)[..., 0]
        places = np.where(places == 128, 0, places)[35:65].argmax(1)
        slope = np.polyfit(np.arange(30), places, 1)[0]
        assert abs(slope - expected) < 0.02, name
    places = changed("ShearY", frame.swapaxes(0, 1), 1.0)[..., 0]
    places = np.where(places == 128, 0, places)[:, 35:65].argmax(0)
    assert abs(np.polyfit(np.arange(30), places, 1)[0] + 0.3) < 0.02


def test_rand_augment_draws_what_it_says():
    rand_augment = augment.RandAugment.parse(OFFICIAL)
    assert rand_augment == augment.RandAugment(7.0, 4, 0.5)
    rng = np.random.default_rng(0)
    clips = [rand_augment.draw(rng) for _ in range(4000)]
    operations = [operation for clip in clips for operation in clip]
    # Standard errors: 0.016 of the mean number, 0.0056 of the sign, 0.0006 of the
    # level's mean.
    assert abs(np.mean([len(clip) for clip in clips]) - 2) < 0.08
    assert max(len(clip) for clip in clips) == 4
    drawn = np.array([operation.keywords["level"] for operation in operations])
    assert abs(np.mean(drawn > 0) - 0.5) < 0.03
    assert abs(np.abs(drawn).mean() - 0.7) < 0.003
    assert abs(np.abs(drawn).std() - 0.05) < 0.003
    for function in augment.OPERATIONS.values():
        share = np.mean([operation.func is function for operation in operations])
        assert abs(share - 1 / 15) < 0.015


def test_levels_stay_on_their_scale():
    rng = np.random.default_rng(0)
    operations = augment.RandAugment.parse("rand-m9-n99-mstd3.5-inc1").draw(rng)
    levels = [abs(operation.keywords["level"]) for operation in operations]
    assert max(levels) == 1.0 and min(levels) < 0.9
    augment.apply(random_clip(0), operations)


@pytest.mark.parametrize(
    "text",
    [
        "rand",
        "rand-m7-n4-mstd0.5-inc0",
        "rand-m7-n4-mstd0.5",
        "rand-m11-n4-mstd0.5-inc1",
        "rand-m7-n0-mstd0.5-inc1",
        "rand-m7-n4-w0-mstd0.5-inc1",
        "original",
    ],
)
def test_other_policies_are_refused(text):
    with pytest.raises(UserError, match=r"data\.rand_augment .*rand-m7-n4"):
        augment.RandAugment.parse(text)


@settings(max_examples=30)
@given(seeds)
def test_every_frame_gets_the_same(seed):
    still = random_clip(seed, num_frames=1).repeat(3, 0)
    before = still.copy()
    results = []
    for _ in range(2):
        rng = np.random.default_rng(seed)
        operations = augment.draw_color_jitter((0.4, 0.4, 0.4, 0.1), rng)
        operations += augment.RandAugment.parse(OFFICIAL).draw(rng)
        results.append(augment.apply(still, [*operations, augment.grayscale]))
    assert results[0].dtype == np.uint8 and results[0].shape == still.shape
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[0][:1].repeat(3, 0))
    np.testing.assert_array_equal(still, before)


def test_color_jitter_draws_factors_and_order():
    rng = np.random.default_rng(0)
    strengths = (0.4, 1.5, 0.2, 0.1)
    ranges = {
        augment._brightness: (0.6, 1.4),
        augment._contrast: (0.0, 2.5),
        augment._color: (0.8, 1.2),
        augment._turn_hue: (-0.1, 0.1),
    }
    clips = [augment.draw_color_jitter(strengths, rng) for _ in range(500)]
    for function, (low, high) in ranges.items():
        places = [
            [operation.func for operation in clip].index(function) for clip in clips
        ]
        assert np.all(np.abs(np.bincount(places, minlength=4) - 125) < 60)
        amounts = [
            operation.keywords["amount"]
            for clip in clips
            for operation in clip
            if operation.func is function
        ]
        assert len(amounts) == 500
        assert low <= min(amounts) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(amounts) <= high


def test_color_jitter_leaves_out_what_has_no_strength():
    rng = np.random.default_rng(0)
    state = rng.bit_generator.state
    assert augment.draw_color_jitter((0, 0, 0, 0), rng) == []
    assert rng.bit_generator.state == state
    (operation,) = augment.draw_color_jitter((0, 0.4, 0, 0), rng)
    assert operation.func is augment._contrast


@pytest.mark.parametrize(
    "strengths", [(0.4,), (0, 0, 0, 0.6), (-0.1, 0, 0, 0), (math.inf, 0, 0, 0)]
)
def test_color_jitter_refuses_other_strengths(strengths):
    with pytest.raises(UserError, match=r"data\.color_jitter"):
        augment.check_color_jitter(strengths)


@settings(max_examples=20)
@given(st.floats(-0.5, 0.5), seeds)
def test_hues_turn_and_nothing_else(turn, seed):
    frame = random_clip(seed)[0]
    actual = np.asarray(augment._turn_hue(Image.fromarray(frame), turn))
    for before, after in zip(frame[0] / 255, actual[0] / 255, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        expected = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
        # One step of hue is 6/256 of the way from one colour to the next.
        np.testing.assert_allclose(after, expected, atol=0.06)


@given(seeds)
def test_grayscale_is_the_luma(seed):
    frame = random_clip(seed)[0]
    actual = np.asarray(augment.grayscale(Image.fromarray(frame)))
    assert np.abs(actual - luma(frame)).max() <= 1


@given(st.integers(1, 400), st.integers(1, 400), seeds)
def test_erased_boxes_lie_inside_the_frame(height, width, seed):
    box = augment.erase_box(height, width, np.random.default_rng(seed))
    if box is None:
        assert min(height, width) < 20
        return
    top, left, erased_height, erased_width = box
    assert 0 <= top <= top + erased_height <= height
    assert 0 <= left <= left + erased_width <= width
    assert 0 < erased_height < height and 0 < erased_width < width


def test_erased_boxes_have_the_asked_area_and_aspect():
    rng = np.random.default_rng(0)
    boxes = np.array([augment.erase_box(1000, 1000, rng) for _ in range(4000)])
    area = boxes[:, 2] * boxes[:, 3] / 1e6
    log_aspect = np.log(boxes[:, 2] / boxes[:, 3]) / math.log(1 / 0.3)
    assert 0.0195 < area.min() < 0.022 and 0.325 < area.max() < 0.335
    # Uniform: standard errors 0.0014 and 0.009. Large areas fit at every aspect but the
    # very longest.
    assert abs(area.mean() - 0.176) < 0.007
    assert abs(log_aspect.mean()) < 0.05 and abs(np.abs(log_aspect).mean() - 0.5) < 0.03


@settings(max_examples=30)
@given(st.sampled_from(ERASE_MODES), seeds)
def test_erasing_changes_one_box_of_every_frame(mode, seed):
    clip = np.zeros((3, 40, 50, 3), np.uint8)
    erased = augment.erase(clip, mode, np.random.default_rng(seed))
    again = augment.erase(clip, mode, np.random.default_rng(seed))
    np.testing.assert_array_equal(erased, again)
    assert not clip.any() and erased.dtype == np.uint8
    top, left, height, width = augment.erase_box(40, 50, np.random.default_rng(seed))
    inside = erased[:, top : top + height, left : left + width]
    assert inside.any((1, 2, 3)).all()
    assert np.count_nonzero(inside) == np.count_nonzero(erased)
    if mode == "const":
        assert (inside == [124, 116, 104]).all()
    else:
        assert not np.array_equal(inside[0], inside[1])


def test_erased_pixels_are_normal_noise():
    rng = np.random.default_rng(0)
    clip = np.full((16, 224, 224, 3), 7, np.uint8)
    noise = augment.erase(clip, "pixel", rng)
    noise = noise[(noise != 7).all(-1)].astype(float)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    # The cut at 0 and 255 moves these by less than 1.5.
    np.testing.assert_allclose(np.median(noise, 0), 255 * mean, atol=1.5)
    quarters = np.quantile(noise, [0.25, 0.75], axis=0)
    np.testing.assert_allclose(
        (quarters[1] - quarters[0]) / 1.349, 255 * std, rtol=0.03
    )
