import weakref

import numpy as np
import pytest
import video_files
from numbered_videos import NUM_VIDEOS, make_list

from vjepa_jax.data.clips.reader import ClipReader
from vjepa_jax.data.clips.sampling import Sampling
from vjepa_jax.data.sources.open import open_mixture, open_source
from vjepa_jax.data.stream import read_all as read_all_module
from vjepa_jax.data.transforms.transforms import make_views

BATCH_SIZE = 4


@pytest.fixture
def source(videos):
    return open_mixture(str(videos))


def iterate_all(source, **overrides):
    kwargs = {
        "reader": ClipReader(Sampling(4, frame_step=2), resolution=32),
        "batch_size": BATCH_SIZE,
        "num_workers": 0,
    }
    return read_all_module.read_all(source, **{**kwargs, **overrides})


def read_all(source, **overrides):
    return list(iterate_all(source, **overrides))


def concatenate(batches, key):
    return np.concatenate([batch[key] for batch in batches])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_read_all_gives_each_video_once_in_order(tmp_path, videos, num_workers):
    source = make_list(tmp_path, videos)
    batches = read_all(source, num_workers=num_workers)
    assert [len(batch["index"]) for batch in batches] == [4, 4, 3]
    np.testing.assert_array_equal(concatenate(batches, "index"), np.arange(NUM_VIDEOS))
    np.testing.assert_array_equal(concatenate(batches, "label"), np.arange(NUM_VIDEOS))
    assert concatenate(batches, "valid").all()
    clips = np.concatenate([batch["video"] for batch in batches])
    for clip, record in zip(clips, source, strict=True):
        # Twelve frames, of which the centred window of seven starts at the third.
        plain = video_files.decode_plainly(record.path)
        np.testing.assert_array_equal(clip, plain[2:9:2])


def test_read_all_frees_the_workers_memory(tmp_path, videos):
    kept, memory = [], []
    for batch in iterate_all(make_list(tmp_path, videos), num_workers=1):
        kept.append((batch["label"], batch["index"], batch["valid"]))
        memory.append(weakref.ref(batch["video"].base))
    del batch
    assert [place() for place in memory] == [None] * len(kept)


def test_read_all_marks_bad_videos(tmp_path, videos):
    source = make_list(tmp_path, videos, bad=(2, 5))
    batches = read_all(source)
    valid = concatenate(batches, "valid")
    assert np.flatnonzero(~valid).tolist() == [2, 5]
    clips = np.concatenate([batch["video"] for batch in batches])
    assert not clips[~valid].any() and clips[valid].reshape(9, -1).any(axis=1).all()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_read_all_gives_segments_and_views(tmp_path, num_workers):
    frames = video_files.moving_frames(12, height=32, width=64)
    video_files.write_video(tmp_path / "good.mp4", frames)
    (tmp_path / "bad.mp4").write_text("not a video")
    source = open_source(str(tmp_path))
    reader = ClipReader(Sampling(2, frame_step=1, num_clips=3), resolution=32)
    (batch,) = read_all(
        source, reader=reader, views=make_views(3), num_workers=num_workers
    )
    clips = batch["video"]
    assert clips.shape == (2, 9, 2, 32, 32, 3)
    assert batch["valid"].tolist() == [False, True] and not clips[0].any()
    plain = video_files.decode_plainly(source[1].path)
    segments = reader.sampling.frames(np.arange(12))
    views = [slice(0, 32), slice(16, 48), slice(32, 64)]
    for i, clip in enumerate(clips[1]):
        expected = plain[segments[i // 3]][:, :, views[i % 3]]
        np.testing.assert_array_equal(clip, expected)


def test_default_view_is_the_whole_square_and_one_view_is_smaller(tmp_path):
    frames = video_files.moving_frames(2, height=64, width=80)
    path = video_files.write_video(tmp_path / "wide.mp4", frames)
    plain = video_files.decode_plainly(path)
    source = open_source(str(tmp_path))
    # At the size of a crop nothing is resized: the pixels are those of a plain decode.
    for views, side in (({}, 64), ({"views": make_views(1)}, 56)):
        reader = ClipReader(Sampling(2, frame_step=1), resolution=side)
        (batch,) = read_all(source, reader=reader, **views)
        top, left = (64 - side) // 2, (80 - side) // 2
        expected = plain[:, top : top + side, left : left + side]
        np.testing.assert_array_equal(batch["video"][0], expected)


def test_read_all_pads_the_last_batch_if_asked(tmp_path, videos):
    source = make_list(tmp_path, videos)
    last = read_all(source, padded=True)[-1]
    assert last["video"].shape == (4, 4, 32, 32, 3)
    assert last["valid"].tolist() == [True, True, True, False]
    assert last["index"].tolist() == [8, 9, 10, -1]
    assert last["label"].tolist() == [8, 9, 10, 0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_videos_are_read_in_a_given_order(source, num_workers):
    plain = np.concatenate([b["video"] for b in read_all(source)])
    order = np.array([3, 3, 10, 0, 7, 3])
    found = read_all(source, order=order, num_workers=num_workers)
    assert [len(batch["index"]) for batch in found] == [4, 2]
    np.testing.assert_array_equal(concatenate(found, "index"), order)
    clips = np.concatenate([np.array(b["video"]) for b in found])
    np.testing.assert_array_equal(clips, plain[order])
