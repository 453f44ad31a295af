"""The surprise of windows, in memory and from a stream of frames; `load_surprise`."""

import numpy as np
import pytest
from physics_files import SIZE
from surprise_setup import (
    BATCH,
    FAMILIES,
    TUBELET,
    make_model,
    plain_surprise,
    random_videos,
    write_checkpoint,
)

import vjepa_jax
from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips.frame_stream import FrameStream
from vjepa_jax.data.sources.records import Record
from vjepa_jax.evals.physics import surprise as measure
from vjepa_jax.evals.physics.surprise import Protocol, SurpriseMeter, surprise


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize(
    ("protocol", "lengths"),
    [
        (Protocol(8, 2, (2, 4)), (8, 13, 13)),
        (Protocol(4, 3, (2,), mask_index=1), (8, 12)),
    ],
    ids=["whole clips", "shorter windows"],
)
def test_surprise_is_that_of_every_window_and_context(model, rng, protocol, lengths):
    videos = random_videos(rng, *lengths)
    found = surprise(model, videos, protocol, BATCH if protocol.num_frames == 8 else 5)
    for losses, video in zip(found, videos, strict=True):
        wanted = plain_surprise(model, video, protocol)
        assert losses.shape == wanted.shape
        np.testing.assert_allclose(losses, wanted, rtol=1e-4)


def test_surprise_sees_the_context_and_the_end(model, rng):
    videos = random_videos(rng, *[8] * 6)  # of one alone it may be the same by chance
    protocol = Protocol(8, 2, (2, 4))
    base = np.stack(surprise(model, videos, protocol, BATCH))
    for frame in (0, 7):
        others = [video.copy() for video in videos]
        for other in others:
            other[frame] = 255 - other[frame]
        changed = np.stack(surprise(model, others, protocol, BATCH))
        assert (abs(changed - base).max(0) > 1e-4).all()


# --------------------------------------------------------------------- the tool's meter


@pytest.mark.parametrize("family", FAMILIES)
def test_the_meter_gives_the_numbers_of_the_evaluation(family, rng):
    """One video of any length, streamed in calls of few windows."""
    model = make_model(family)
    (video,) = random_videos(rng, 21)
    protocol = Protocol(8, 1, (4,))
    (wanted,) = surprise(model, [video], protocol, 8)
    found = SurpriseMeter(model, protocol, batch_size=8)(video, fps=4.0)
    np.testing.assert_allclose(found.surprise, wanted[:, 0], rtol=1e-4)
    np.testing.assert_allclose(found.surprise, found.maps.mean((1, 2, 3)), rtol=1e-5)
    # 14 windows, two time steps after the context, 2 x 2 patches.
    assert found.maps.shape == (14, 2, 2, 2) and found.maps.dtype == np.float32
    np.testing.assert_allclose(found.times, (np.arange(14) + 5.5) / 4)


def test_maps_are_the_errors_of_the_tokens(model, rng):
    (video,) = random_videos(rng, 8)
    found = SurpriseMeter(model, Protocol(8, 2, (4,)))(video)
    prediction, target = model.predict(video[None], range(8), range(8, 16))
    errors = np.abs(prediction - target)[0].mean(-1)
    np.testing.assert_allclose(found.maps[0], errors.reshape(2, 2, 2), rtol=1e-4)


def test_what_is_not_given_is_as_in_training(model):
    meter = SurpriseMeter(model, Protocol(0, 0, (0,)))
    assert meter.protocol == Protocol(8, TUBELET, (4,))
    assert meter.resolution == SIZE


def test_videos_of_any_size_are_resized_as_the_reader_does(model, rng):
    meter = SurpriseMeter(model, Protocol(0, 0, (0,)))
    video = rng.integers(0, 256, (9, 40, 70, 3), np.uint8)
    stream = FrameStream(SIZE, frame_step=1)
    small = np.stack([x for _, x in stream.read(Record("x", 0, video, 1.0))])
    np.testing.assert_allclose(meter(video).surprise, meter(small).surprise, rtol=1e-5)


def test_a_long_video_is_never_held(model, rng, monkeypatch):
    """No call sees more windows than `batch_size`, and frames are taken as needed."""
    taken, calls = 0, []

    def frames():
        nonlocal taken
        for number in range(200):
            taken += 1
            yield number / 4, np.full((SIZE, SIZE, 3), number, np.uint8)

    def counted(model, windows, protocol, rows):
        calls.append((len(windows), taken))
        return [np.zeros((len(windows), 2, 2, 2), np.float32)]

    monkeypatch.setattr(measure, "token_errors", counted)
    meter = SurpriseMeter(model, Protocol(8, 2, (4,)), batch_size=4)
    windows = list(meter.windows(frames()))
    assert len(windows) == 97
    # The k-th call has the windows up to the frame that completes its last one.
    assert calls == [(4, 14 + 8 * k) for k in range(24)] + [(1, 200)]


def test_a_short_video_has_no_window(model):
    meter = SurpriseMeter(model, Protocol(8, 2, (4,)))
    frame = np.zeros((SIZE, SIZE, 3), np.uint8)
    assert list(meter.windows([(float(i), frame) for i in range(7)])) == []
    with pytest.raises(UserError, match="7 frames is shorter than a window of 8"):
        meter(np.zeros((7, SIZE, SIZE, 3), np.uint8))


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (Protocol(7, 0, (0,)), "num_frames=7, stride=2: give a multiple of the 2"),
        (Protocol(8, 0, (3,)), r"context_frames=\(3,\): give multiples"),
        (Protocol(8, 0, (8,)), "below the window's 8"),
        (Protocol(8, 9, (4,)), "stride=9: windows of 8 frames would leave"),
        (Protocol(2, 0, (0,)), r"context_frames=\(2,\)"),
        (Protocol(8, 0, (4,), 2), "mask_index=2: the predictor has 2 mask tokens"),
    ],
)
def test_windows_that_do_not_fit_are_named(model, protocol, message):
    with pytest.raises(UserError, match=message):
        SurpriseMeter(model, protocol)


def test_arrays_that_are_no_video_are_named(model):
    meter = SurpriseMeter(model, Protocol(8, 2, (4,)))
    for video in (np.zeros((8, SIZE, SIZE, 3)), np.zeros((8, SIZE, SIZE), np.uint8)):
        with pytest.raises(UserError, match=r"is not uint8 \[T, H, W, 3\]"):
            meter(video)
    with pytest.raises(UserError, match="fps=0"):
        meter(np.zeros((8, SIZE, SIZE, 3), np.uint8), fps=0)


def test_load_surprise_reads_a_checkpoint(model, tmp_path, rng):
    write_checkpoint(tmp_path, model)
    meter = vjepa_jax.load_surprise(str(tmp_path), stride=1)
    (video,) = random_videos(rng, 10)
    (wanted,) = surprise(model, [video], Protocol(8, 1, (4,)), 8)
    np.testing.assert_allclose(meter(video).surprise, wanted[:, 0], rtol=1e-4)


def test_a_model_without_predictor_is_named(model, tmp_path):
    write_checkpoint(tmp_path, model, parts=())
    with pytest.raises(UserError, match="the checkpoint has no predictor"):
        vjepa_jax.load_surprise(str(tmp_path))
