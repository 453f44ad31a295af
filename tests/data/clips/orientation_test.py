"""Turned and mirrored videos and images are read as they are shown."""

import io
import itertools
import pathlib

import av
import numpy as np
import pytest
import video_files
from clip_files import Record, read, whole_frame
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips import label_images
from vjepa_jax.data.clips.orientation import Orientation
from vjepa_jax.data.clips.reader import inspect
from vjepa_jax.data.jobs import reencode

SIGNS = list(itertools.product((1, -1), repeat=2))
MATRICES = [((a, 0), (0, d)) for a, d in SIGNS] + [((0, b), (c, 0)) for b, c in SIGNS]
EXIF_NUMBERS = range(1, 9)


def transform(frames, matrix):
    """Move every pixel of [..., H, W, 3] to where the matrix shows it, one by one."""
    height, width = frames.shape[-3:-1]
    rows, columns = np.mgrid[:height, :width]
    (a, b), (c, d) = matrix
    x, y = a * columns + c * rows, b * columns + d * rows
    x, y = x - x.min(), y - y.min()
    shown = np.zeros_like(
        frames, shape=(*frames.shape[:-3], y.max() + 1, x.max() + 1, 3)
    )
    shown[..., y, x, :] = frames
    return shown


def oriented_image(suffix, number, height=32, width=48, seed=0):
    """Return the bytes of an image with EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = number
    options = {
        ".jpg": {"quality": 95, "subsampling": 0},
        ".webp": {"lossless": True},
    }.get(suffix, {})
    file = io.BytesIO()
    pixels = video_files.moving_frames(1, height, width, seed)[0]
    kind = {".jpg": "JPEG"}.get(suffix, suffix[1:].upper())
    Image.fromarray(pixels).save(file, kind, exif=exif, **options)
    return file.getvalue()


def pillow(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def assert_read_as(record, shown, tolerance=0):
    """Compare a clip with frames [T, H, W, 3], in a box that is not in the middle."""
    height, width = shown.shape[1:3]
    assert (inspect(record).height, inspect(record).width) == (height, width)
    asked = []

    def crop(*shape):
        asked.append(shape)
        return 5, 2, 24, 24

    box = shown[:, 5:29, 2:26].astype(float)
    for resize in ("antialias", "official"):
        clip = read(record, num_frames=len(shown), size=24, crop=crop, resize=resize)
        assert np.abs(clip - box).max() <= tolerance
    assert asked == [(height, width)] * 2
    # Resizing takes another way through the memory of a turned frame.
    halved = read(record, num_frames=len(shown), size=12, crop=crop)
    means = box.reshape(-1, 12, 2, 12, 2, 3).mean((2, 4))
    assert np.abs(halved - means).mean() < 6


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_every_matrix_of_a_video_is_applied(tmp_path, suffix, matrix):
    frames = video_files.moving_frames(8, height=32, width=48)
    path = video_files.write_rotated_video(tmp_path / f"a{suffix}", frames, matrix)
    shown = transform(video_files.decode_plainly(path), matrix)
    assert_read_as(path, shown)
    assert_read_as(Record("a", pathlib.Path(path).read_bytes()), shown)


@pytest.mark.parametrize("matrix", MATRICES)
def test_matroska_states_the_same_otherwise(tmp_path, matrix):
    path = str(tmp_path / "a.mkv")
    frames = video_files.moving_frames(3, height=32, width=48)
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        one = 1 << 16
        (a, b), (c, d) = matrix
        stream.set_display_matrix(
            [a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30]
        )
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    assert_read_as(path, transform(video_files.decode_plainly(path), matrix))


@pytest.mark.parametrize(
    "matrix, nearest",
    [
        (((0, 0), (0, 0)), ((1, 0), (0, 1))),
        (((0.5, 0), (0, -0.25)), ((1, 0), (0, -1))),
        (((0.995, 0.0998), (-0.0998, 0.995)), ((1, 0), (0, 1))),
        (((-0.0998, 0.995), (0.995, 0.0998)), ((0, 1), (1, 0))),
    ],
)
def test_other_matrices_are_rounded(tmp_path, matrix, nearest):
    frames = video_files.moving_frames(2, height=32, width=48)
    path = video_files.write_rotated_video(tmp_path / "a.mp4", frames, matrix)
    assert_read_as(path, transform(video_files.decode_plainly(path), nearest))


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("short_side", [320, 24])
def test_prepare_applies_a_matrix_once(tmp_path, matrix, short_side):
    frames = video_files.moving_frames(4, height=32, width=48)
    path = video_files.write_rotated_video(tmp_path / "a.mp4", frames, matrix)
    video = reencode.reencode(path, reencode.Encoding(short_side, crf=5))
    shown = transform(video_files.decode_plainly(path), matrix)
    size = (
        shown.shape[1:3] if short_side == 320 else np.array(shown.shape[1:3]) * 3 // 4
    )
    assert (video.height, video.width) == tuple(size)
    prepared = read(Record("a", video.content), num_frames=4, size=24)
    original = read(path, num_frames=4, size=24)
    assert video_files.psnr(prepared, original) > 26


@pytest.mark.parametrize("number", EXIF_NUMBERS)
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_images_are_read_as_their_exif_data_state(tmp_path, suffix, number):
    content = oriented_image(suffix, number)
    shown = pillow(content)
    # JPEG decoders and conversions differ by rounding.
    tolerance = {".jpg": 6}.get(suffix, 0)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    assert_read_as(str(path), shown[None], tolerance)
    assert_read_as(Record(f"a{suffix}", content), shown[None], tolerance)
    video = reencode.reencode(str(path), reencode.Encoding(crf=5))
    assert video_files.psnr(video_files.decode_content(video.content)[0], shown) > 28
    read_image = label_images.read_image(path, shown.shape[:2], shape=shown.shape[:2])
    np.testing.assert_array_equal(read_image, shown)


def test_frames_of_a_stream_may_differ(tmp_path):
    contents = [
        oriented_image(".jpg", number, 32, 32, number) for number in EXIF_NUMBERS
    ]
    path = tmp_path / "a.mjpeg"
    path.write_bytes(b"".join(contents))
    shown = np.stack([pillow(content) for content in contents])
    clip = read(str(path), size=32, crop=whole_frame)
    assert np.abs(clip.astype(float) - shown).max() <= 6
    video = reencode.reencode(str(path), reencode.Encoding(crf=5))
    assert video_files.psnr(video_files.decode_content(video.content), shown) > 28


@pytest.mark.parametrize("number", EXIF_NUMBERS)
def test_label_images_are_upright(tmp_path, number):
    exif = Image.Exif()
    exif[0x0112] = number
    labels = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    labels.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(label_images.read_labels(tmp_path / "a.png"), upright)


def test_a_label_image_has_the_size_of_the_upright_image(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(oriented_image(".jpg", 6))
    with pytest.raises(UserError, match="turned as its EXIF data state, has 48x32"):
        label_images.read_image(path, (8, 8), shape=(32, 48))


def test_damaged_exif_data_state_nothing(tmp_path):
    pixels = video_files.moving_frames(1, 32, 48)[0]
    path = tmp_path / "a.jpg"
    Image.fromarray(pixels).save(path, exif=b"Exif\0\0no such data", subsampling=0)
    plain = video_files.decode_plainly(str(path))
    assert_read_as(str(path), plain, tolerance=6)
    found = label_images.read_image(path, (32, 48)).astype(float)
    assert np.abs(found - plain[0]).max() <= 6


@given(data=st.data())
def test_a_box_of_the_shown_frame_lies_in_the_stored_one(data):
    orientation = Orientation(*(data.draw(st.booleans()) for _ in range(3)))
    stored = np.arange(7 * 5).reshape(7, 5)
    shown = orientation.apply(stored)
    assert shown.shape == orientation.swap(7, 5)
    height, width = (data.draw(st.integers(1, side)) for side in shown.shape)
    top = data.draw(st.integers(0, shown.shape[0] - height))
    left = data.draw(st.integers(0, shown.shape[1] - width))
    box = orientation.stored_box((top, left, height, width), shown.shape)
    np.testing.assert_array_equal(
        orientation.apply(stored[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]),
        shown[top : top + height, left : left + width],
    )
