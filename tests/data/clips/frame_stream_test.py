"""Whole videos frame by frame: which frames, at which times, and what is refused."""

import errno
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from video_files import decode_plainly, moving_frames, write_video

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips import media
from vjepa_jax.data.clips.frame_stream import FrameStream, _Clock
from vjepa_jax.data.clips.media import DecodeError
from vjepa_jax.data.sources.records import Record

SIZE = 16


def read(stream, record):
    times, frames = zip(*stream.read(record), strict=True)
    return np.array(times), np.stack(frames)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos") / "v.mp4"
    return write_video(path, moving_frames(25, SIZE, SIZE), fps=12)


@pytest.mark.parametrize("step", [1, 3])
def test_every_so_many_frames_are_those_of_a_plain_decode(video, step):
    times, frames = read(FrameStream(SIZE, frame_step=step), Record(video, 0))
    np.testing.assert_array_equal(frames, decode_plainly(video)[::step])
    np.testing.assert_allclose(times, np.arange(0, 25, step) / 12, atol=1e-3)


@given(
    gaps=st.lists(st.integers(5, 400), min_size=3, max_size=12),
    fps=st.floats(1.5, 40.0),
)
@settings(max_examples=10, deadline=None)
def test_frames_by_time_are_the_nearest(tmp_path_factory, gaps, fps):
    """By the video's own time stamps; the later one of two."""
    stamps = np.cumsum([0, *gaps])
    path = tmp_path_factory.mktemp("vfr") / "v.mkv"
    write_video(path, moving_frames(len(stamps), SIZE, SIZE), stamps=stamps.tolist())
    times, frames = read(FrameStream(SIZE, fps=fps), Record(str(path), 0))
    wanted = np.arange(len(frames)) / fps + 1e-6
    nearest = np.abs(wanted[:, None] - stamps / 1000).argmin(1)
    np.testing.assert_array_equal(frames, decode_plainly(str(path))[nearest])
    np.testing.assert_allclose(times, stamps[nearest] / 1000, atol=1e-6)
    # The last frame is shown as long as the others are on average.
    end = stamps[-1] / 1000 * (1 + 0.5 / (len(stamps) - 1))
    assert (len(frames) - 1) / fps < end <= len(frames) / fps + 1e-5


def test_bytes_and_frames_in_memory_are_read_as_files_are(video):
    stream = FrameStream(SIZE, frame_step=2)
    wanted = read(stream, Record(video, 0))
    with open(video, "rb") as file:
        of_bytes = read(stream, Record("x", 0, file.read()))
    of_array = read(stream, Record("x", 0, decode_plainly(video), 12.0))
    for found in (of_bytes, of_array):
        np.testing.assert_allclose(found[0], wanted[0], atol=1e-3)
        np.testing.assert_array_equal(found[1], wanted[1])


def test_a_wide_frame_is_squeezed_or_cropped(tmp_path):
    pixels = np.zeros((4, SIZE, 2 * SIZE, 3), np.uint8)
    pixels[:, :, : SIZE // 2] = 255  # the left quarter
    path = write_video(tmp_path / "v.mp4", pixels)
    _, whole = read(FrameStream(SIZE, frame_step=1), Record(path, 0))
    np.testing.assert_array_equal(
        (whole > 128).mean((0, 1, 3)), np.arange(SIZE) < SIZE // 4
    )
    right = FrameStream(SIZE, frame_step=1, crop=lambda h, w: (0, w - h, h, h))
    assert read(right, Record(path, 0))[1].max() < 10


def test_joined_recordings_have_one_clock(tmp_path):
    """The second one's time stamps begin anew; its frames come after the first's."""
    content = b""
    for number in range(2):
        path = tmp_path / f"{number}.ts"
        write_video(path, moving_frames(20, SIZE, SIZE, seed=number), fps=10)
        content += path.read_bytes()
    (tmp_path / "joined.ts").write_bytes(content)
    times, frames = read(
        FrameStream(SIZE, frame_step=1), Record(str(tmp_path / "joined.ts"), 0)
    )
    np.testing.assert_array_equal(frames, decode_plainly(io.BytesIO(content)))
    np.testing.assert_allclose(times, np.arange(40) / 10, atol=1e-3)


@given(
    st.lists(
        st.one_of(st.none(), st.floats(-1e9, 1e9), st.sampled_from([0.0, 0.1, 0.2])),
        min_size=1,
        max_size=30,
    )
)
@settings(max_examples=100, deadline=None)
def test_time_never_stands_still_nor_leaps(stamps):
    clock = _Clock(0.1)
    times = [clock.advance(stamp) for stamp in stamps]
    assert times[0] == 0
    assert (np.diff(times) > 0).all() and (np.diff(times) <= 60.1).all()


def test_stamps_that_rise_are_kept():
    clock = _Clock(0.1)
    assert [clock.advance(s) for s in (5.0, 5.25, 9.0)] == [0.0, 0.25, 4.0]


def test_a_read_that_fails_once_is_repeated(video, monkeypatch):
    """No frame is lost or comes twice; the storage fails in the middle of the file."""
    waits = []
    monkeypatch.setattr(media.time, "sleep", waits.append)
    frames = decode_plainly(video)
    stream = FrameStream(SIZE, frame_step=1)
    opened = []

    class Flaky(io.BytesIO):
        def read(self, size=-1):
            if len(opened) == 1 and self.tell() > 0:
                raise OSError(errno.EIO, "lost")
            return super().read(min(size, 512))

    with open(video, "rb") as file:
        content = file.read()

    def open_flaky(path, of_record):
        opened.append(path)
        return Flaky(content)

    monkeypatch.setattr(media, "_open_file", open_flaky)
    np.testing.assert_array_equal(read(stream, Record("v.mp4", 0))[1], frames)
    assert len(opened) == 2 and len(waits) == 1


def test_what_is_no_video_is_named(tmp_path):
    stream = FrameStream(SIZE, fps=4.0)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    for name, reason in (
        ("gone.mp4", "missing"),
        ("empty.mp4", "empty"),
        ("text.mp4", "not_a_video"),
    ):
        with pytest.raises(DecodeError, match=f"{name}: {reason}"):
            next(stream.read(Record(str(tmp_path / name), 0)))


@pytest.mark.parametrize(
    "fields", [{}, {"fps": 2.0, "frame_step": 1}, {"fps": -1.0}, {"fps": float("nan")}]
)
def test_one_distance_between_frames_is_given(fields):
    with pytest.raises(UserError, match="give one of them, a positive number"):
        FrameStream(SIZE, **fields)
