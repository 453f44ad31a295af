import math
import pickle

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips.sampling import LowFrameRateError, Sampling

spacings = st.one_of(
    st.fixed_dictionaries({"frame_step": st.integers(1, 8)}),
    st.fixed_dictionaries({"fps": st.sampled_from([1, 2, 4, 5, 12.5, 29.97, 60])}),
    st.fixed_dictionaries({"duration_secs": st.floats(0.1, 20)}),
)
seeds = st.none() | st.integers(0, 2**32)
videos = st.fixed_dictionaries(
    {"num": st.integers(1, 120), "fps": st.sampled_from([6, 10, 12, 25, 30, 29.97, 60])}
)


def rng_of(seed):
    return None if seed is None else np.random.default_rng(seed)


def variable_times(num, fps, seed):
    """Time stamps in whole milliseconds, at a mean rate of roughly `fps`."""
    steps = np.random.default_rng(seed).exponential(1000 / fps, num)
    return np.cumsum(np.maximum(1, steps.astype(int))) / 1000


def plain_exact_clip(times, num_frames, spacing, start):
    """Nearest frame to each instant, the later of two; one by one."""
    numbers, times = [], times.tolist()
    for i in range(num_frames):
        instant = times[start] + i * spacing
        distances = [abs(t - instant) for t in times]
        numbers.append(
            max(n for n, d in enumerate(distances) if d <= min(distances) + 2e-6)
        )
    return numbers


@settings(max_examples=60, deadline=None)
@given(videos, spacings, st.integers(1, 8), st.integers(1, 3), seeds, st.booleans())
def test_exact_clips_are_nearest_in_time(video, spacing, num_frames, k, seed, varies):
    num, fps = video["num"], video["fps"]
    times = variable_times(num, fps, num) if varies else np.arange(num) / fps
    sampling = Sampling(num_frames, num_clips=k, **spacing)
    clips = sampling.frames(times, fps, rng_of(seed))
    assert clips.shape == (k, num_frames) and clips.dtype == np.int64
    assert clips.min() >= 0 and clips.max() < num
    assert (np.diff(clips) >= 0).all() and (np.diff(clips[:, 0]) >= 0).all()
    if "frame_step" in spacing:
        times = np.arange(num)
    span = (num_frames - 1) * (spacing.get("frame_step") or sampling.spacing_secs)
    for clip in clips:
        expected = plain_exact_clip(
            times,
            num_frames,
            spacing.get("frame_step") or sampling.spacing_secs,
            clip[0],
        )
        assert clip.tolist() == expected
    # Padding is for videos that are shorter than a clip alone.
    if num > 1:
        frame_secs = (times[-1] - times[0]) / (num - 1)
        if times[0] + span < times[-1] + frame_secs / 2 - 1e-5:
            assert (times[clips[:, 0]] + span < times[-1] + frame_secs / 2).all()
        else:
            assert (clips[:, 0] == 0).all()


@given(st.integers(1, 400), st.integers(1, 64), st.integers(1, 8), seeds)
def test_frames_are_a_step_apart_until_the_video_ends(num, num_frames, step, seed):
    sampling = Sampling(num_frames, frame_step=step)
    clip = sampling.frames(np.arange(num), None, rng_of(seed))[0]
    if num >= (num_frames - 1) * step + 1:
        assert (np.diff(clip) == step).all()
        if seed is None:
            assert abs(clip[0] - (num - 1 - clip[-1])) <= 1
    else:
        assert clip.tolist() == [min(i * step, num - 1) for i in range(num_frames)]


@pytest.mark.parametrize(
    "video_fps, fps, steps",
    [(30, 4, [8, 7, 8]), (25, 4, [6, 7, 6]), (30, 30, [1, 1, 1]), (4, 8, [1, 0, 1])],
)
def test_mean_steps_are_exact(video_fps, fps, steps):
    times = np.arange(500) / video_fps
    clip = Sampling(64, fps=fps).frames(times)[0]
    assert np.diff(clip)[:3].tolist() == steps
    assert clip[-1] - clip[0] == math.floor(63 * video_fps / fps + 0.5)
    by_duration = Sampling(64, duration_secs=64 / fps).frames(times)[0]
    np.testing.assert_array_equal(by_duration, clip)


@pytest.mark.parametrize("rule", ["exact", "official"])
def test_every_start_is_drawn(rule):
    rng = np.random.default_rng(0)
    sampling = Sampling(4, frame_step=2, num_clips=2, rule=rule)
    starts = np.array(
        [sampling.frames(np.arange(30), None, rng)[:, 0] for _ in range(500)]
    )
    # 24 windows fit whole; the official rule has [8, 15) for the ends in each half.
    halves = {
        "exact": (range(12), range(12, 24)),
        "official": (range(7), range(15, 22)),
    }
    for k, expected in enumerate(halves[rule]):
        assert set(starts[:, k].tolist()) == set(expected)


def test_clips_of_evaluation_are_spread_over_the_video():
    times = np.arange(300) / 30
    clips = Sampling(16, frame_step=4, num_clips=8).frames(times)
    assert (np.abs(np.diff(clips[:, 0]) - 30) <= 1).all()
    assert abs(clips[0, 0] - (299 - clips[-1, -1])) <= 1
    official = Sampling(16, frame_step=4, num_clips=4, rule="official").frames(times)
    assert official[:, 0].tolist() == [0, 75, 150, 225]


def plain_official_clip(num, num_frames, step, num_clips, k, overlap, end):
    """Return frame numbers by the official rule, in plain numbers.

    `end` is where a random window ends in its part, None for the first.
    """
    window, part = num_frames * step, num // num_clips
    if part > window:
        first = (window if end is None else end) - window
        gap = window / max(1, num_frames - 1)
        inside = [
            min(math.floor(first + i * gap), first + window - 1)
            for i in range(num_frames)
        ]
        return [n + k * part for n in inside]
    length, shift = part, part
    if overlap:
        length = min(window, num) - 1
        shift = (num - window) // (num_clips - 1) if num > window else 0
    count = length // step
    gap = length / max(1, count - 1)
    inside = [min(math.floor(i * gap), length - 1) for i in range(count)]
    inside += [length - 1] * (num_frames - count)
    return [(n + k * shift) % num for n in inside]


@given(videos, spacings, st.integers(1, 64), st.integers(1, 8), st.booleans(), seeds)
def test_official_clips(video, spacing, num_frames, num_clips, overlap, seed):
    num, fps = video["num"], video["fps"]
    whole_fps = math.ceil(fps)
    if "fps" in spacing:
        step = int(whole_fps // spacing["fps"])
    elif "duration_secs" in spacing:
        step = int(spacing["duration_secs"] * whole_fps / num_frames)
    else:
        step = spacing["frame_step"]
    assume(num > 1)
    sampling = Sampling(
        num_frames,
        num_clips=num_clips,
        rule="official",
        allow_clip_overlap=overlap,
        **spacing,
    )
    times = np.arange(num) / fps
    if not step:
        with pytest.raises(LowFrameRateError):
            sampling.frames(times, fps, rng_of(seed))
        return
    clips = sampling.frames(times, fps, rng_of(seed))
    assert clips.shape == (num_clips, num_frames) and clips.dtype == np.int64
    draws = rng_of(seed)
    window, part = num_frames * step, num // num_clips
    for k, clip in enumerate(clips):
        end = None
        if draws is not None and part > window:
            end = int(draws.integers(window, part))
        expected = plain_official_clip(
            num, num_frames, step, num_clips, k, overlap, end
        )
        # Where linspace lands on a whole number, rounding may differ by one.
        assert np.abs(clip - expected).max() <= 1
        assert (clip != expected).mean() <= 0.2


def test_official_steps_and_known_clips():
    times = np.arange(300) / 30
    clip = Sampling(16, frame_step=4, rule="official").frames(times, 30.0)[0]
    assert clip.tolist() == [
        0, 4, 8, 12, 17, 21, 25, 29, 34, 38, 42, 46, 51, 55, 59, 63
    ]  # fmt: skip
    for video_fps, step in [(30, 7), (25, 6), (23.976, 6), (29.97, 7)]:
        clip = Sampling(2, fps=4, rule="official").frames(times, video_fps)[0]
        assert clip.tolist() == [0, 2 * step - 1]


@pytest.mark.parametrize("rule", ["exact", "official"])
@pytest.mark.parametrize("spacing", [{"frame_step": 4}, {"fps": 4}])
def test_a_still_image_is_shown_all_the_time(rule, spacing):
    sampling = Sampling(8, num_clips=3, rule=rule, **spacing)
    assert not sampling.frames(np.zeros(1), None, np.random.default_rng(0)).any()


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"num_frames": 0, "frame_step": 1}, r"data\.num_frames"),
        ({"num_clips": 0, "frame_step": 1}, r"data\.num_clips"),
        ({}, "must be positive and the others 0, not 0, 0, 0"),
        ({"frame_step": 4, "fps": 4}, r"one of data\.frame_step"),
        ({"fps": -1}, r"data\.fps"),
        ({"fps": math.nan}, r"data\.fps"),
        ({"duration_secs": math.inf}, r"data\.duration_secs"),
        ({"fps": 4, "rule": "offical"}, r"data\.sampling .* exact, official"),
        ({"fps": 4, "allow_clip_overlap": True}, r"data\.allow_clip_overlap"),
    ],
)
def test_impossible_samplings_are_refused(fields, match):
    with pytest.raises(UserError, match=match):
        Sampling(**{"num_frames": 4} | fields)


def test_samplings_are_picklable():
    sampling = Sampling(16, fps=4, num_clips=2, rule="official")
    assert pickle.loads(pickle.dumps(sampling)) == sampling
