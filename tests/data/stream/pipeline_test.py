import json
import multiprocessing

import bad_files
import numpy as np
import pytest
import video_files
from numbered_videos import NUM_VIDEOS, make_list
from train_iterators import make_iterator, take

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips.reader import ClipReader
from vjepa_jax.data.clips.sampling import Sampling
from vjepa_jax.data.sources.open import open_mixture
from vjepa_jax.data.stream import bad_videos
from vjepa_jax.data.transforms.transforms import ClipTransform

BATCH_SIZE = 4


@pytest.fixture
def source(videos):
    return open_mixture(str(videos))


def make_mixture(path, videos):
    """Mixes two lists of unequal weights, in which some files are broken."""
    make_list(path, videos, bad=(2, 5), name="a.csv")
    make_list(path, videos, bad=(7,), name="b.csv")
    paths = f"{path / 'a.csv'},{path / 'b.csv'}"
    return open_mixture(paths, (0.3, 0.7))


def test_batches_have_shape_type_and_variety(source):
    batches = take(6, source)
    assert batches.shape == (6, BATCH_SIZE, 4, 16, 16, 3)
    assert batches.dtype == np.uint8
    assert len({clip.tobytes() for clip in batches.reshape(24, -1)}) == 24


def test_batch_holds_clips_and_their_records(source):
    with make_iterator(source) as batches:
        batch = next(batches)
        assert list(batch) == ["video", "index"]
        assert batches.step == 1


def test_seed_decides_the_stream(source):
    first, again, other = (take(2, source, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=(2, 3, 4, 5)).all()


def whole_frame_clips(num_batches, source, **overrides):
    return take(
        num_batches,
        source,
        reader=ClipReader(Sampling(12, frame_step=1), resolution=32),
        transform=ClipTransform(
            32, crop_scale=(1.0, 1.0), crop_aspect_ratio=(1.0, 1.0), flip_probability=0
        ),
        **overrides,
    )


def test_every_video_comes_once_per_epoch_in_new_order(source):
    of_bytes = {
        video_files.decode_plainly(record.path).tobytes(): i
        for i, record in enumerate(source)
    }
    clips = whole_frame_clips(NUM_VIDEOS, source).reshape(4 * NUM_VIDEOS, -1)
    order = [of_bytes[clip.tobytes()] for clip in clips]
    epochs = [tuple(order[i : i + NUM_VIDEOS]) for i in range(0, 44, NUM_VIDEOS)]
    assert all(sorted(epoch) == list(range(NUM_VIDEOS)) for epoch in epochs)
    assert len(set(epochs)) == 4


def test_index_names_the_video_that_was_read_in_the_end(tmp_path, videos):
    source = make_list(tmp_path, videos, bad=(2, 5))
    reader = ClipReader(Sampling(12, frame_step=1), resolution=32)
    whole = {"crop_scale": (1.0, 1.0), "crop_aspect_ratio": (1.0, 1.0)}
    transform = ClipTransform(32, **whole, flip_probability=0)
    seen = set()
    with make_iterator(source, reader=reader, transform=transform) as batches:
        for _ in range(6):
            batch = next(batches)
            for clip, index in zip(batch["video"], batch["index"], strict=True):
                wanted = video_files.decode_plainly(source[int(index)].path)
                np.testing.assert_array_equal(clip, wanted)
            seen |= set(batch["index"].tolist())
    assert seen == set(range(NUM_VIDEOS)) - {2, 5}


def test_fewer_videos_than_a_batch_are_enough(source):
    batches = take(3, source, batch_size=2 * NUM_VIDEOS)
    assert batches.shape[:2] == (3, 2 * NUM_VIDEOS)
    assert len({clip.tobytes() for clip in batches.reshape(6 * NUM_VIDEOS, -1)}) > 60


@pytest.mark.parametrize("num_workers", [0, 2, 3])
def test_restarted_stream_continues_the_unbroken_one(tmp_path, videos, num_workers):
    source = make_list(tmp_path, videos, bad=(2, 5))
    unbroken = take(9, source)
    restarted = take(4, source, start_step=5, count=num_workers)
    np.testing.assert_array_equal(restarted, unbroken[5:])
    assert (restarted != unbroken[4:8]).any()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_hosts_share_the_global_batches(tmp_path, videos, num_workers):
    source = make_list(tmp_path, videos, bad=(2,))
    alone = take(4, source)
    shares = [
        take(
            3,
            source,
            start_step=1,
            process_index=host,
            process_count=2,
            count=num_workers,
        )
        for host in range(2)
    ]
    assert shares[0].shape[1] == BATCH_SIZE // 2
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), alone[1:])


@pytest.mark.parametrize(
    ("start", "hosts", "num_workers"), [(0, 4, 0), (3, 1, 3), (5, 2, 2), (6, 4, 1)]
)
def test_a_mixture_is_the_same_for_any_hosts_and_workers(
    tmp_path, videos, start, hosts, num_workers
):
    mixture = make_mixture(tmp_path, videos)
    alone = take(8, mixture)
    shares = [
        take(
            8 - start,
            mixture,
            start_step=start,
            process_index=host,
            process_count=hosts,
            count=num_workers,
        )
        for host in range(hosts)
    ]
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), alone[start:])


def test_a_bad_video_is_replaced_from_its_own_source(tmp_path, videos):
    mixture = make_mixture(tmp_path, videos)
    with make_iterator(mixture) as batches:
        for _ in range(12):
            batch = next(batches._batches)
            for tried, reasons in zip(batch["tried"], batch["reasons"], strict=True):
                tried = tried[tried >= 0]
                assert (reasons[: len(tried) - 1] >= 0).all()
                assert reasons[len(tried) - 1] == -1
                assert {t < NUM_VIDEOS for t in tried.tolist()} in ({True}, {False})


def test_a_source_without_a_good_video_is_replaced_by_the_others(tmp_path, videos):
    make_list(tmp_path, videos, bad=range(NUM_VIDEOS), name="a.csv")
    make_list(tmp_path, videos, name="b.csv")
    paths = f"{tmp_path / 'a.csv'},{tmp_path / 'b.csv'}"
    mixture = open_mixture(paths, (0.1, 0.9))
    batches = take(12, mixture, max_fraction=1.0)
    assert batches.reshape(12 * BATCH_SIZE, -1).any(axis=1).all()


def test_several_clips_of_a_video_lie_side_by_side(source):
    reader = ClipReader(Sampling(4, frame_step=1, num_clips=2), resolution=16)
    batches = take(4, source, reader=reader)
    assert batches.shape == (4, BATCH_SIZE, 4, 16, 16, 3)
    with make_iterator(source, reader=reader) as iterator:
        for batch in batches:
            raw = next(iterator._batches)
            assert raw["video"].shape == (BATCH_SIZE // 2, 2, 4, 16, 16, 3)
            np.testing.assert_array_equal(raw["video"].reshape(batch.shape), batch)
    with pytest.raises(UserError, match=r"1 processes of 2 clips .*multiple of 2"):
        make_iterator(source, reader=reader, batch_size=3)


def test_a_crop_may_move_during_the_clip(source):
    still, moving = (
        take(2, source, transform=ClipTransform(16, motion_shift=shift))
        for shift in (False, True)
    )
    assert (still != moving).any(axis=(2, 3, 4, 5)).all()
    np.testing.assert_array_equal(
        take(2, source, transform=ClipTransform(16, motion_shift=True)), moving
    )


def test_batch_must_divide_among_the_processes(source):
    with pytest.raises(UserError, match="batch_size 4 does not divide among 3"):
        make_iterator(source, process_count=3)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_videos_are_replaced_and_listed_once(tmp_path, videos, num_workers):
    source = make_list(tmp_path, videos, bad=(2, 5))
    (tmp_path / "bad5.mp4").unlink()
    (tmp_path / "bad5.mp4").touch()
    listing = tmp_path / "workdir" / "bad_videos.jsonl"
    with make_iterator(source, path=str(listing), count=num_workers) as batches:
        for _ in range(9):
            video = next(batches)["video"]
            assert video.shape[0] == BATCH_SIZE
            assert video.reshape(BATCH_SIZE, -1).any(axis=1).all()
        assert sum(batches.bad_counts.values()) == 2
        del video
    entries = read_lines(listing)
    assert {(entry["path"], entry["reason"]) for entry in entries} == {
        (str(tmp_path / "bad2.mp4"), "not_a_video"),
        (str(tmp_path / "bad5.mp4"), "empty"),
    }
    assert len(entries) == 2
    # An epoch is 11 samples, so that both came within the first three batches.
    assert all(entry["step"] in (0, 1, 2) for entry in entries)


def test_restart_does_not_list_bad_videos_again(tmp_path, videos):
    source = make_list(tmp_path, videos, bad=(2, 5))
    listing = tmp_path / "bad_videos.jsonl"
    take(9, source, path=str(listing))
    # A killed run may leave half a line.
    whole = listing.read_text().splitlines(keepends=True)
    listing.write_text(whole[0] + whole[1][:20])
    with make_iterator(source, path=str(listing), start_step=9) as batches:
        assert sum(batches.bad_counts.values()) == 1
        for _ in range(9):
            next(batches)
        assert sum(batches.bad_counts.values()) == 2
    lines = listing.read_text().splitlines(keepends=True)
    assert lines[:2] == [whole[0], whole[1][:20] + "\n"]
    assert json.loads(lines[2])["path"] == json.loads(whole[1])["path"]
    assert len(lines) == 3


def test_streams_without_bad_videos_list_nothing(tmp_path, source):
    take(3, source, path=str(tmp_path / "bad_videos.jsonl"))
    assert not list(tmp_path.iterdir())


def test_too_many_bad_videos_end_the_run(tmp_path, videos):
    source = make_list(tmp_path, videos, bad=(2, 5))
    listing = tmp_path / "bad_videos.jsonl"
    with make_iterator(source, path=str(listing), max_fraction=0.1) as batches:
        # The share is checked after 100 samples.
        for _ in range(24):
            next(batches)
        with pytest.raises(UserError) as caught:
            for _ in range(12):
                next(batches)
    message = str(caught.value)
    assert message.startswith("2 of the 11 videos of ")
    assert str(tmp_path / "list.csv") in message
    assert str(listing) in message
    assert "data.max_bad_fraction=0.1" in message


def test_allowed_share_of_bad_videos_does_not_end_the_run(tmp_path, videos):
    source = make_list(tmp_path, videos, bad=(2, 5))
    take(36, source, max_fraction=0.2)


def test_every_kind_of_bad_file_costs_itself_alone(tmp_path):
    cases = bad_files.make_all(tmp_path / "files")
    source = open_mixture(str(tmp_path / "files" / "list.csv"))
    listing = tmp_path / "bad_videos.jsonl"
    num_batches = -(-2 * len(cases) // BATCH_SIZE)  # two epochs
    batches = take(
        num_batches,
        source,
        count=1,
        max_fraction=1.0,
        path=str(listing),
    )
    assert batches.shape == (num_batches, BATCH_SIZE, 4, 16, 16, 3)
    reasons = {entry["path"]: entry["reason"] for entry in read_lines(listing)}
    assert len(reasons) > 15
    for path, case in cases.items():
        assert reasons.get(path, bad_files.GOOD) in case.outcomes, path


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_readable_ends_the_run_at_once(tmp_path, videos, num_workers):
    source = make_list(tmp_path, videos, bad=range(NUM_VIDEOS))
    with (
        make_iterator(source, count=num_workers) as batches,
        pytest.raises(UserError, match=r"11 videos of .*list\.csv.* cannot be read"),
    ):
        next(batches)


def test_close_ends_the_workers(source):
    batches = make_iterator(source, count=2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    batches.close()
    assert not multiprocessing.active_children()


def test_reasons_fit_the_report():
    assert len(bad_videos.REASONS) < np.iinfo(np.int8).max
