"""Re-encoding: pixels and times survive; unreadable files give a reason."""

import errno
import io
import itertools
import os
import subprocess
import sys
from fractions import Fraction

import av
import bad_files
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from video_files import (
    decode_content,
    decode_plainly,
    moving_frames,
    psnr,
    used_memory,
    write_rotated_video,
    write_video,
)

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips import media
from vjepa_jax.data.clips.media import DecodeError
from vjepa_jax.data.jobs import reencode


def encode(path, **settings):
    return reencode.reencode(str(path), reencode.Encoding(**settings))


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9", "mpeg4"])
def test_videos_of_the_same_size_stay_close(tmp_path, codec):
    path = write_video(tmp_path / "a.mkv", moving_frames(30, 96, 128), codec=codec)
    video = encode(path)
    assert (video.num_frames, video.width, video.height) == (30, 128, 96)
    assert video.fps == pytest.approx(12, rel=1e-3)
    original = decode_plainly(path)
    # A frame off by one would cost 15 dB.
    assert psnr(decode_content(video.content), original) > 36


@pytest.mark.parametrize(
    "pix_fmt, colours",
    [("yuv444p", 5), ("yuv420p", 1), ("yuvj420p", 5), ("yuv420p10le", 1)],
)
def test_colours_survive(tmp_path, pix_fmt, colours):
    options = {"colorspace": str(colours)}
    path = write_video(
        tmp_path / "a.mkv", moving_frames(5), pix_fmt=pix_fmt, codec_options=options
    )
    original = decode_plainly(path)
    assert psnr(decode_content(encode(path, crf=5).content), original) > 30


def test_the_same_video_makes_the_same_bytes(videos):
    """Uninitialised memory does not reach the encoder."""
    path = min(videos.rglob("*.mp4"))
    assert len({encode(path).content for _ in used_memory(150)}) == 1


def test_key_frames_keep_the_pace_and_nothing_is_reordered(tmp_path):
    frames = moving_frames(40)
    frames[17:] = 255 - frames[17:]  # a cut, which makes no key frame
    path = write_video(tmp_path / "a.mp4", frames)
    with av.open(io.BytesIO(encode(path, gop=8).content)) as container:
        packets = [packet for packet in container.demux() if packet.size]
        assert len(container.streams) == 1
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    assert keys == [0, 8, 16, 24, 32]
    assert all(packet.pts == packet.dts for packet in packets)


def test_times_survive(tmp_path):
    stamps = [500, 520, 600, 601, 900, 1700]
    path = write_video(tmp_path / "a.mkv", moving_frames(6), stamps=stamps)
    video = encode(path)
    with av.open(io.BytesIO(video.content)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, (np.array(stamps) - 500) / 1000, atol=1e-4)
    assert video.fps == pytest.approx(5 / 1.2)


def test_rotation_is_applied(tmp_path):
    path = write_rotated_video(tmp_path / "a.mp4", moving_frames(6, 48, 80))
    video = encode(path)
    assert (video.width, video.height) == (48, 80)
    with av.open(path) as container:
        turns = round(next(container.decode(video=0)).rotation / 90)
    upright = np.rot90(decode_plainly(path), turns, axes=(1, 2))
    assert psnr(decode_content(video.content), upright) > 36


@pytest.mark.parametrize(
    "size, short_side, expected",
    [
        ((64, 96), 32, (32, 48)),
        ((96, 64), 32, (48, 32)),
        ((64, 96), 64, (64, 96)),
        ((63, 97), 320, (62, 96)),  # cut, not scaled
        ((90, 130), 35, (34, 50)),
    ],
)
def test_sizes(tmp_path, size, short_side, expected):
    frames = moving_frames(3, *size)
    path = write_video(tmp_path / "a.mkv", frames, pix_fmt="yuv444p")
    video = encode(path, short_side=short_side)
    assert (video.height, video.width) == expected
    if short_side == 320:
        original = decode_plainly(path)[:, : expected[0], : expected[1]]
        assert psnr(decode_content(video.content), original) > 30


@given(
    height=st.integers(1, 9000),
    width=st.integers(1, 9000),
    short_side=st.integers(2, 1000),
)
def test_sizes_are_even_and_never_larger(height, width, short_side):
    new_height, new_width = reencode.output_size(height, width, short_side)
    assert new_height % 2 == new_width % 2 == 0
    assert 2 <= new_height <= max(2, height) and 2 <= new_width <= max(2, width)
    assert min(new_height, new_width) <= short_side


@pytest.mark.parametrize("fps, kept", [(6, range(0, 24, 2)), (4, range(0, 24, 3))])
def test_frames_are_left_out_evenly(tmp_path, fps, kept):
    path = write_video(tmp_path / "a.mp4", moving_frames(24))
    video = encode(path, fps=fps)
    assert video.fps == pytest.approx(fps, rel=1e-3)
    original = decode_plainly(path)[list(kept)]
    assert psnr(decode_content(video.content), original) > 36


@pytest.mark.parametrize("fps", [12, 30, 0])
def test_no_frame_is_made_up(tmp_path, fps):
    path = write_video(tmp_path / "a.mp4", moving_frames(9))
    assert encode(path, fps=fps).num_frames == 9


def write_image(path):
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = 40, 60, "rgb24"
        frame = moving_frames(1, 40, 60)[0]
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))


def test_images_become_videos_of_one_frame(tmp_path):
    path = tmp_path / "a.png"
    write_image(path)
    video = encode(path)
    assert (video.num_frames, video.width, video.height) == (1, 60, 40)
    assert psnr(decode_content(video.content), decode_plainly(str(path))) > 30


def test_why_a_video_fails(tmp_path):
    (tmp_path / "playlist.mp4").write_text("ffconcat version 1.0\nfile plain.mp4\n")
    (tmp_path / "f%d.png").write_bytes(b"no picture")
    write_image(tmp_path / "f1.png")
    cases = bad_files.make_all(tmp_path)
    for name in ("playlist.mp4", "f%d.png"):
        path = str(tmp_path / name)
        cases[path] = bad_files.Case(name, {"not_a_video", "undecodable"})
    for path, case in cases.items():
        try:
            video = encode(path)
        except DecodeError as error:
            outcome = error.reason
        else:
            outcome = bad_files.GOOD
            # All last 3.3 seconds at most, except one with an uneven rate.
            assert video.num_frames == 1 or video.fps > 5
            assert len(decode_content(video.content)) == video.num_frames
        assert outcome in case.outcomes, path


def test_hostile_sizes_take_no_memory(tmp_path):
    path = tmp_path / "as_huge_as_accepted.mp4"
    bad_files.make_all(tmp_path)
    program = (
        "import resource, sys\n"
        "from vjepa_jax.data.clips.media import DecodeError\n"
        "from vjepa_jax.data.jobs.reencode import Encoding, reencode\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    reencode(sys.argv[1], Encoding())\n"
        "except DecodeError:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    kilobytes = subprocess.check_output([sys.executable, "-c", program, str(path)])
    assert int(kilobytes) < 200_000


def test_a_file_system_that_fails_temporarily_is_retried(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", moving_frames(4))
    monkeypatch.setattr(media, "_RETRY_WAITS_SECS", (0.0,))
    answers = [OSError(errno.ESTALE, "stale"), path]

    def flaky(path, *flags):
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return os_open(answer, *flags)

    os_open = os.open
    monkeypatch.setattr(os, "open", flaky)
    assert encode(path).num_frames == 4 and not answers


def times_of(stamps):
    """Return times in twelfths of a second of frames with such stamps, or None."""
    stated = [None if stamp is None else Fraction(stamp, 12) for stamp in stamps]
    timed = reencode._timed(zip(stated, stamps, strict=True), Fraction(1, 12))
    times, frames = zip(*timed, strict=True)
    assert list(frames) == stamps  # none is lost
    return [at * 12 for at in times]


LATE = Fraction(1, 16)


@pytest.mark.parametrize(
    "stamps, expected",
    [
        ([5, 6, 9, 10], [0, 1, 4, 5]),
        # Out of order after a gap, as where a damaged stream can be decoded again.
        ([0, 1, 30, 2, 31, 32, 33], [0, 1, 30, 30 + LATE, 31, 32, 33]),
        ([0, 1, 1, 2], [0, 1, 1 + LATE, 2]),
        ([None, None, None], [0, 1, 2]),
        ([None, 7, None, 9], [0, 1, 2, 3]),
    ],
)
def test_times_increase_and_keep_their_gaps(stamps, expected):
    assert times_of(stamps) == expected


@given(
    st.lists(st.one_of(st.none(), st.integers(-50, 50)), min_size=1, max_size=60),
)
def test_times_start_at_zero_and_increase(stamps):
    times = times_of(stamps)
    assert times[0] == 0 and all(a < b for a, b in itertools.pairwise(times))
    assert times[-1] <= 100 + len(stamps)


def test_damage_does_not_stretch_a_video(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving_frames(40), codec_options={"g": "6"})
    with open(path, "r+b") as file:
        content = file.read()
        start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
        third = (end - start) // 3
        file.seek(start + third)
        file.write(bytes(end - start - 2 * third))
    video = encode(path)
    assert (video.num_frames - 1) / video.fps < 3.4


def test_limits(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", moving_frames(9))
    monkeypatch.setattr(reencode, "TIME_LIMIT_SECS", -1.0)
    with pytest.raises(DecodeError) as caught:
        encode(path)
    assert caught.value.reason == "too_slow"
    monkeypatch.undo()
    monkeypatch.setattr(reencode, "_MAX_PIXELS", 100)
    with pytest.raises(DecodeError) as caught:
        encode(path)
    assert caught.value.reason == "too_large"


@pytest.mark.parametrize(
    "settings",
    [{"short_side": 1}, {"gop": 0}, {"crf": 52}, {"fps": -1}, {"fps": float("nan")}],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match=f"--{next(iter(settings))} must"):
        reencode.Encoding(**settings)
