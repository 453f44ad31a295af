"""Contexts: which frames they have, and that only their part of a video is read."""

import numpy as np
import pytest
import video_files
from clip_files import FILES, read_clips, whole_frame, write_files
from hypothesis import given, settings
from hypothesis import strategies as st

from vjepa_jax.data.clips import packet_index, packets
from vjepa_jax.data.clips.media import DecodeError
from vjepa_jax.data.clips.sampling import LowFrameRateError
from vjepa_jax.evals.anticipation.context_sampling import ContextSampling

videos = st.fixed_dictionaries(
    {"num": st.integers(1, 120), "fps": st.sampled_from([6, 10, 12, 25, 30, 29.97, 60])}
)


@pytest.fixture(autouse=True)
def no_index_is_kept(monkeypatch):
    monkeypatch.setattr(packet_index, "_long_files", packet_index.IndexCache())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("videos"))


def variable_times(num, fps, seed):
    """Return time stamps in whole milliseconds, at a mean rate of roughly `fps`."""
    steps = np.random.default_rng(seed).exponential(1000 / fps, num)
    return np.cumsum(np.maximum(1, steps.astype(int))) / 1000


def plain_context(times, fps, average_fps, official, moment, ahead_secs, num_frames):
    """Choose the frames of a context one by one; `moment` is (secs, frame)."""
    wanted = []
    if official:
        step = int(average_fps / fps)
        stop = int(moment[1] - int(ahead_secs * average_fps))
        wanted = [
            max(0, stop - i * step) / average_fps for i in range(1, 1 + num_frames)
        ]
    else:
        wanted = [moment[0] - ahead_secs - i / fps for i in range(1, 1 + num_frames)]
    numbers = []
    for instant in reversed(wanted):
        distances = [abs(t - instant) for t in times]
        numbers.append(
            max(n for n, d in enumerate(distances) if d <= min(distances) + 2e-6)
        )
    return numbers


@settings(max_examples=60, deadline=None)
@given(
    videos,
    st.sampled_from([1, 2, 4, 6]),
    st.integers(1, 8),
    st.floats(-0.5, 9),
    st.floats(0, 2),
    st.booleans(),
    st.booleans(),
)
def test_contexts_end_before_their_moment(
    video, fps, num_frames, moment_secs, ahead_secs, official, varies
):
    num, average_fps = video["num"], video["fps"]
    times = np.arange(num) / average_fps
    if varies and not official:
        times = variable_times(num, average_fps, num)
        times -= times[0]
    moment = moment_secs, moment_secs * average_fps
    sampling = ContextSampling(
        num_frames,
        fps=fps,
        rule="official" if official else "exact",
        moment_secs=moment[0],
        moment_frame=moment[1],
        ahead_secs=ahead_secs,
    )
    clip = sampling.frames(times, average_fps)
    assert clip.shape == (1, num_frames)
    assert clip[0].tolist() == plain_context(
        times.tolist(), fps, average_fps, official, moment, ahead_secs, num_frames
    )
    first, last = sampling.window(average_fps)
    inside = (times[clip[0]] > first - 1) & (times[clip[0]] < last + 1)
    assert inside[(times[clip[0]] > times[0]) & (times[clip[0]] < times[-1])].all()
    if not varies and moment_secs > ahead_secs:
        # Nothing is seen of what is to be anticipated, half a frame apart.
        assert times[clip[0, -1]] < moment_secs - ahead_secs + 0.5 / average_fps


def test_known_contexts():
    """By hand: 8 a second of 50 are steps of 6 (official) or 6.25 frames."""
    times = np.arange(1000) / 50
    fields = {"fps": 8, "moment_secs": 10.0, "moment_frame": 500.7, "ahead_secs": 1.01}
    exact = ContextSampling(4, **fields).frames(times, 50.0)[0]
    # 449.5 - 25, 18.75, 12.5 and 6.25; half-way counts as the later one.
    assert exact.tolist() == [425, 431, 437, 443]
    official = ContextSampling(4, rule="official", **fields).frames(times, 50.0)[0]
    assert official.tolist() == [426, 432, 438, 444]  # int(500.7 - 50) - 24, ...
    early = ContextSampling(4, fps=8, moment_secs=1.2, ahead_secs=1.0)
    assert early.frames(times, 50.0)[0].tolist() == [0, 0, 0, 4]  # 0.2 - 0.125
    with pytest.raises(LowFrameRateError):
        ContextSampling(4, fps=8, rule="official").window(7.9)


def read_context(path, side, moment_secs, **fields):
    sampling = ContextSampling(
        4, fps=6, moment_secs=moment_secs, ahead_secs=0.2, **fields
    )
    return read_clips(path, sampling=sampling, size=side, crop=whole_frame)[0]


@pytest.mark.parametrize("moment_secs", [-1.0, 0.4, 1.9, 3.0, 99.0])
@pytest.mark.parametrize("name", FILES)
def test_contexts_are_those_of_a_plain_decode(files, name, moment_secs):
    plain = video_files.decode_plainly(files[name])
    times = np.arange(len(plain)) / FILES[name].get("fps", 12)
    if "stamps" in FILES[name]:
        times = np.array(FILES[name]["stamps"]) / 1000
        times -= times[0]
    sampling = ContextSampling(4, fps=6, moment_secs=moment_secs, ahead_secs=0.2)
    wanted = plain[sampling.frames(times)[0]]
    found = read_context(files[name], plain.shape[1], moment_secs)
    np.testing.assert_array_equal(found, wanted)


@pytest.fixture(scope="module")
def long_files(tmp_path_factory):
    """Write videos of 25 s with a key frame in every second."""
    folder, frames = tmp_path_factory.mktemp("long"), video_files.moving_frames(300)
    names = ("h264.mp4", "b_frames.mp4", "open_gop.mkv", "stream.ts", "vp9.webm")
    return {
        name: video_files.write_video(folder / name, frames, **FILES[name])
        for name in names
    }


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("name", ["b_frames.mp4", "open_gop.mkv", "vp9.webm"])
def test_of_a_long_video_a_window_is_read(long_files, name, held, monkeypatch):
    """Its packets alone, whether they are kept in memory or read twice."""
    if not held:
        monkeypatch.setattr(packet_index, "_MAX_HELD_BYTES", 0)
    read_index, sizes = packet_index.read_index, []

    def recorded(*args):
        index = read_index(*args)
        sizes.append(index.num_frames)
        return index

    monkeypatch.setattr(packet_index, "read_index", recorded)
    monkeypatch.setattr(packets, "decode_counted", None)
    plain = video_files.decode_plainly(long_files[name])
    for moment_secs in (0.3, 7.13, 16.9, 24.9):
        sampling = ContextSampling(4, fps=6, moment_secs=moment_secs, ahead_secs=0.2)
        wanted = plain[sampling.frames(np.arange(300) / 12)[0]]
        np.testing.assert_array_equal(
            read_context(long_files[name], 48, moment_secs), wanted
        )
    assert len(sizes) == 4 and max(sizes) < 80


@pytest.mark.parametrize("name", ["h264.mp4", "stream.ts"])
def test_where_seeking_fails_a_context_is_counted(long_files, name, monkeypatch):
    """Sought too far, or decoding from a key frame in vain."""
    plain = video_files.decode_plainly(long_files[name])
    wanted = read_context(long_files[name], 48, 16.9)
    sampling = ContextSampling(4, fps=6, moment_secs=16.9, ahead_secs=0.2)
    chosen = sampling.frames(np.arange(300) / 12)[0]
    np.testing.assert_array_equal(wanted, plain[chosen])
    monkeypatch.setattr(packets, "decode_indexed", lambda *args: iter(()))
    np.testing.assert_array_equal(read_context(long_files[name], 48, 16.9), wanted)
    monkeypatch.undo()
    read_index = packet_index.read_index

    def sought_too_far(video, window=None):
        window = window and tuple(secs + 3 for secs in window)
        return read_index(video, window)

    monkeypatch.setattr(packet_index, "read_index", sought_too_far)
    np.testing.assert_array_equal(read_context(long_files[name], 48, 16.9), wanted)


def test_a_context_at_too_low_a_rate_is_named(files):
    with pytest.raises(DecodeError, match="low_frame_rate"):
        read_clips(
            files["h264.mp4"],
            sampling=ContextSampling(4, fps=13, rule="official"),
            size=48,
            crop=whole_frame,
        )
