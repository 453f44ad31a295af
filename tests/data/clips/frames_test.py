"""Conversion of single frames, beside a plain one in floating point."""

import av
import numpy as np
import pytest

from vjepa_jax.base.choices import RESIZES
from vjepa_jax.data.clips import frames


def smooth_pixels(height, width, seed=0):
    """Colours that vary over a few pixels: uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = sum(
        rng.uniform(10, 25, 3)
        * np.sin(
            rows[..., None] * rng.uniform(0.05, 0.3, 3)
            + columns[..., None] * rng.uniform(0.05, 0.3, 3)
            + rng.uniform(0, 6, 3)
        )
        for _ in range(3)
    )
    return np.clip(128 + waves, 0, 255).astype(np.uint8)


def triangle_filter(num, start, length, size):
    """Weights [size, num] of an antialiased bilinear resize of a part of an axis."""
    scale = length / size
    support = max(1, scale)
    centres = (np.arange(size) + 0.5) * scale
    places = np.arange(num) - start + 0.5
    weights = np.maximum(0, 1 - np.abs(places - centres[:, None]) / support)
    weights[:, (places < 0) | (places > length)] = 0
    return weights / weights.sum(1, keepdims=True)


def plain_clip(pixels, box, size):
    top, left, height, width = box
    rows = triangle_filter(pixels.shape[0], top, height, size)
    columns = triangle_filter(pixels.shape[1], left, width, size)
    shrunk = np.tensordot(rows, pixels.astype(float), 1)
    return np.moveaxis(np.tensordot(columns, shrunk, (1, 1)), 0, 1)


def clip(num_frames, size):
    return np.empty((num_frames, size, size, 3), np.uint8)


def put(frame, box, size, resize="antialias"):
    writer = frames.ClipWriter(clip(2, size), lambda height, width: box, resize)
    writer.start(frame)
    writer.put(frame, [0, 1])
    assert (writer.frames[0] == writer.frames[1]).all()
    return writer.frames[0]


BOXES = [(0, 0, 90, 120), (10, 20, 60, 64), (11, 21, 60, 64), (7, 4, 33, 101)]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize(
    "pixel_format, tolerance",
    [
        ("rgb24", 0.6),
        ("gbrp", 0.6),
        ("yuv444p", 0.6),
        ("yuvj444p", 1.0),
        ("yuv422p", 1.5),
        ("yuv420p", 1.6),
        ("yuvj420p", 1.8),
        ("yuv420p10le", 1.6),
        ("yuv422p10le", 1.6),
        ("nv12", 1.6),
    ],
)
def test_crop_and_resize_are_those_of_a_plain_filter(pixel_format, tolerance, box):
    pixels = smooth_pixels(90, 120)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    frame = frame.reformat(format=pixel_format, threads=1)
    for size in (24, 56, 112):
        expected = plain_clip(pixels, box, size)
        errors = put(frame, box, size) - expected
        assert np.abs(errors).mean() < tolerance
        assert abs(errors.mean()) < 0.5


@pytest.mark.parametrize("size", [16, 37, 50, 120])
def test_official_resize_is_bilinear_without_antialiasing(size):
    rng = np.random.default_rng(size)
    pixels = rng.integers(0, 256, (50, 70, 3), np.uint8)
    box = (5, 9, 41, 58)
    out = put(av.VideoFrame.from_ndarray(pixels, format="rgb24"), box, size, "official")
    crop = pixels[5:46, 9:67].astype(float)
    for i, j in rng.integers(0, size, (40, 2)):
        y = min(max((i + 0.5) * 41 / size - 0.5, 0), 40)
        x = min(max((j + 0.5) * 58 / size - 0.5, 0), 57)
        around = [
            (1 - abs(y - r)) * (1 - abs(x - c)) * crop[r, c]
            for r in range(41)
            for c in range(58)
            if abs(y - r) < 1 and abs(x - c) < 1
        ]
        assert np.abs(out[i, j] - sum(around)).max() <= 0.501


@pytest.mark.torch
def test_official_resize_is_that_of_pytorch():
    torch = pytest.importorskip("torch")
    pixels = smooth_pixels(41, 58)
    for size in (20, 41, 58, 97):
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
        expected = torch.nn.functional.interpolate(
            images, size=(size, size), mode="bilinear", align_corners=False
        )[0].permute(1, 2, 0)
        out = frames.resize_bilinear(pixels, size)
        assert np.abs(out - expected.numpy()).max() <= 0.501


@pytest.mark.parametrize("resize", RESIZES)
def test_frames_of_another_size_keep_to_the_first(resize):
    first, second = (
        av.VideoFrame.from_ndarray(smooth_pixels(*shape), format="rgb24")
        for shape in ((60, 80), (90, 120))
    )
    second = second.reformat(format="yuv420p", threads=1)
    writer = frames.ClipWriter(clip(2, 20), lambda *_: (0, 0, 60, 80), resize)
    writer.start(first)
    writer.put(first, [0])
    writer.put(second, [1])
    expected = plain_clip(smooth_pixels(90, 120), (0, 0, 90, 120), 20)
    assert np.abs(writer.frames[1] - expected).mean() < 6
