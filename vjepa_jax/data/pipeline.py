"""Streams of batches of clips, decoded by worker processes.

The training stream is a pure function of (seed, step): batches are formed first and
then dealt out to hosts, nothing is ever filtered out, and a stream started at step k
continues the unbroken run's, whatever the number of workers and of hosts. No iterator
state needs saving but the step. A clip depends on (seed, epoch, record) alone.

A video that cannot be read is replaced by another of its source, drawn with random
numbers of the record's own. Workers report it inside the batch; `TrainIterator` takes
the report out again and keeps account of it (`bad_videos`). A process that dies or
hangs costs one restart (`workers`).

Workers are spawned, so a program that asks for them needs the usual
`if __name__ == "__main__"`.
"""

import dataclasses
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from vjepa_jax.data import decode
from vjepa_jax.data.bad_videos import CODES, REASONS, BadVideos
from vjepa_jax.data.frames import Crop
from vjepa_jax.data.mixture import Mixture
from vjepa_jax.data.records import Record, Source
from vjepa_jax.data.sampling import Sampling
from vjepa_jax.data.transforms import ClipTransform, central_box
from vjepa_jax.data.workers import SupervisedBatches, WorkLog, require_shared_memory
from vjepa_jax.default_config import UserError

# Records tried for one place in the stream. With a tenth of all files bad, one place in
# 10^16 finds none; a source where this runs out has next to nothing to read.
_MAX_TRIES = 16

# Batches that a worker decodes ahead at most: more would only take memory.
_MAX_BATCHES_AHEAD = 8

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the clips of a record are decoded; see `decode.read_clips`.

    Attributes:
      sampling: which frames.
      resolution: side of the clips in pixels.
      resize: "antialias" or "official".
      max_pixels: pixels of a frame above which a video is refused.
      time_limit_secs: processor time for one record.
    """

    sampling: Sampling
    resolution: int
    resize: str = "antialias"
    max_pixels: int = decode.MAX_PIXELS
    time_limit_secs: float = decode.TIME_LIMIT_SECS

    def read(
        self,
        record: Record,
        crop: Crop | Sequence[Crop],
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """Reads uint8 `[K, T, S, S, 3]`; see `decode.read_clips`."""
        return decode.read_clips(
            record,
            sampling=self.sampling,
            rng=rng,
            size=self.resolution,
            crop=crop,
            resize=self.resize,
            max_pixels=self.max_pixels,
            time_limit_secs=self.time_limit_secs,
        )

    def zeros(self, num_views: int = 1) -> np.ndarray:
        """Returns what stands for the clips of a record that gives none."""
        size, sampling = self.resolution, self.sampling
        num_clips = sampling.num_clips * num_views
        return np.zeros((num_clips, sampling.num_frames, size, size, 3), np.uint8)


def _take(source: Source, index: int) -> Record:
    """Returns a record; raises DecodeError where its storage fails."""
    try:
        return source[index]
    except OSError as error:
        path = source.path_of(index)
        raise decode.DecodeError(path, "unreadable", str(error)) from error


class _ReadTrainClips(grain.transforms.Map):
    """Sample -> augmented clips, with a report on records replaced on the way."""

    def __init__(
        self,
        source: Mixture,
        reading: Reading,
        transform: ClipTransform,
        seed: int,
        quarantined: Mapping[int, int],
        work_log: WorkLog,
    ):
        self._source = source
        self._reading = reading
        self._transform = transform
        self._seed = seed
        self._quarantined = quarantined
        self._work_log = work_log

    def map(self, element: int) -> Batch:
        epoch, index = self._source.split(element)
        neighbours = self._source.neighbours(index)
        # A generator of its own, for replacements not to depend on what was drawn from
        # the other before a video turned out to be bad.
        of_clip, of_replacement = np.random.SeedSequence(
            (self._seed, epoch, index)
        ).spawn(2)
        replacements = np.random.default_rng(of_replacement)
        tried = np.full(_MAX_TRIES, -1, np.int64)
        reasons = np.full(_MAX_TRIES, -1, np.int8)
        for attempt in range(_MAX_TRIES):
            tried[attempt] = index
            reasons[attempt] = self._quarantined.get(index, -1)
            if reasons[attempt] < 0:
                try:
                    with self._work_log.at(index):
                        video = self._read(index, np.random.default_rng(of_clip))
                    break
                except decode.DecodeError as error:
                    reasons[attempt] = CODES[error.reason]
            index = int(replacements.integers(neighbours.start, neighbours.stop))
        else:
            # An exception would reach the main process as text only: let the report,
            # which has no successful try in it, tell.
            video = self._reading.zeros()
        return {"video": video, "tried": tried, "reasons": reasons}

    def _read(self, index: int, rng: np.random.Generator) -> np.ndarray:
        num_frames = self._reading.sampling.num_frames

        def crop(height: int, width: int) -> np.ndarray:
            return self._transform.crop_boxes(height, width, num_frames, rng)

        clips = self._reading.read(_take(self._source, index), crop, rng)
        return np.stack([self._transform.augment(clip, rng) for clip in clips])


class _ReadEvalClips(grain.transforms.Map):
    """Record index -> clips of an evaluation; zeros, marked invalid, for a bad file."""

    def __init__(self, source: Source, reading: Reading, views: Sequence[Crop]):
        self._source = source
        self._reading = reading
        self._views = views

    def map(self, element: int) -> Batch:
        reason, label = -1, 0
        try:
            record = _take(self._source, element)
            label = record.label
            video = self._reading.read(record, self._views)
        except decode.DecodeError as error:
            video = self._reading.zeros(len(self._views))
            reason = CODES[error.reason]
        return {
            "video": video,
            "label": np.int64(label),
            "index": np.int64(element),
            "reason": np.int8(reason),
        }


def make_train_iterator(
    source: Mixture,
    *,
    reading: Reading,
    transform: ClipTransform,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_workers: int,
    prefetch_megabytes: float,
    worker_timeout_secs: float,
    max_bad_fraction: float,
    bad_videos_path: str | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> "TrainIterator":
    """Makes the endless stream of training batches of this process.

    Every epoch is a new permutation of a source's records; a record gives
    `reading.sampling.num_clips` clips per epoch, side by side in the batch. A batch may
    span two epochs, so fewer records than a batch are enough.

    Args:
      source: the videos.
      reading: how they are decoded.
      transform: how clips are cropped and augmented.
      batch_size: clips per global batch, a multiple of `process_count` times clips per
        video.
      seed: of order, windows and augmentations.
      start_step: step of the first batch.
      num_workers: decoding processes; 0 decodes in a thread of this process, where
        nothing can be done about a decode that hangs or crashes.
      prefetch_megabytes: memory for batches decoded ahead, of all workers together;
        each has one batch at least and 8 at most.
      worker_timeout_secs: longest time that a worker may be at one record.
      max_bad_fraction: share of the videos drawn that may be unreadable.
      bad_videos_path: JSON lines file that unreadable videos are listed in; give every
        process of a run its own, `NAME.jsonl` and `NAME_1.jsonl`.
      process_index: this process, in `[0, process_count)`.
      process_count: processes that share each global batch.

    Raises:
      UserError: the batch does not divide among the processes, or /dev/shm is too
        small.
    """
    num_clips = reading.sampling.num_clips
    if batch_size % (process_count * num_clips):
        among = f"{process_count} processes" + (
            f" of {num_clips} clips per video" if num_clips > 1 else ""
        )
        raise UserError(
            f"batch_size {batch_size} does not divide among {among}: take a multiple "
            f"of {process_count * num_clips}"
        )
    num_local = batch_size // process_count
    batch_bytes = num_local // num_clips * reading.zeros().nbytes
    ahead = prefetch_megabytes * 1e6 / batch_bytes / max(num_workers, 1)
    ahead = min(max(int(ahead), 1), _MAX_BATCHES_AHEAD)
    if num_workers:
        # One more per worker is being made, and one is with whoever asked for it.
        require_shared_memory((num_workers * (ahead + 1) + 1) * batch_bytes)
    bad_videos = BadVideos(source, bad_videos_path, max_bad_fraction)
    quarantined = bad_videos.quarantined()
    work_log = WorkLog()

    def open_batches(step: int, since: Mapping[int, str]) -> Iterator:
        read_clips = _ReadTrainClips(
            source,
            reading,
            transform,
            seed,
            quarantined | {record: CODES[reason] for record, reason in since.items()},
            work_log,
        )
        dataset = (
            source.samples(seed)
            .map(read_clips)
            .batch(num_local // num_clips, drop_remainder=True)
        )
        dataset = dataset[step * process_count + process_index :: process_count]
        return iter(_decoded_ahead(dataset, num_workers, ahead))

    batches: Iterator
    if num_workers:
        batches = SupervisedBatches(
            open_batches,
            work_log,
            start_step=start_step,
            timeout_secs=worker_timeout_secs,
            name_of=source.path_of,
            on_quarantine=bad_videos.add,
        )
    else:
        batches = open_batches(start_step, {})
    return TrainIterator(
        batches, bad_videos=bad_videos, start_step=start_step, on_close=work_log.remove
    )


def _decoded_ahead(
    dataset: grain.MapDataset, num_workers: int, batches_ahead: int
) -> grain.IterDataset:
    if not flags.FLAGS.is_parsed():
        # Grain reads its own flags when it starts workers; tests and notebooks have no
        # command line.
        flags.FLAGS.mark_as_parsed()
    # A worker's batches wait in the queue to the main process, so that its thread need
    # not be more than one ahead of them.
    dataset = dataset.to_iter_dataset(
        grain.ReadOptions(
            num_threads=1, prefetch_buffer_size=1 if num_workers else batches_ahead
        )
    )
    if num_workers:
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=num_workers, per_worker_buffer_size=batches_ahead
            ),
            worker_init_fn=_leave_interrupts_to_parent,
        )
    return dataset


def _leave_interrupts_to_parent(worker_index: int, worker_count: int) -> None:
    """Ignores Ctrl-C, which a terminal sends to every process of the job.

    A worker that died of it would end the run before the state is saved.
    """
    del worker_index, worker_count
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class TrainIterator(Iterator):
    """Yields `{"video": {"video": uint8 [B, T, H, W, 3]}}`, B being clips per process.

    Close it, or use it as a context manager, to end its workers. With workers, batches
    lie in shared memory until they are dropped; those that outlive the iterator make
    Python warn of leaked shared memory at exit.

    Attributes:
      step: step of the next batch.

    Raises (from `next`):
      UserError: too many of the videos are unreadable, or workers fail again and again.
    """

    def __init__(
        self,
        batches: Iterator,
        *,
        bad_videos: BadVideos,
        start_step: int,
        on_close: Callable[[], None],
    ):
        self._batches = batches
        self._bad_videos = bad_videos
        self._on_close = on_close
        self.step = start_step

    @property
    def bad_counts(self) -> Mapping[str, int]:
        """Unreadable videos known so far, by reason."""
        return self._bad_videos.counts

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._bad_videos.account(batch["tried"], batch["reasons"], self.step)
        self.step += 1
        video = batch["video"]
        return {"video": {"video": video.reshape(-1, *video.shape[2:])}}

    def close(self) -> None:
        """Ends the workers; the iterator is of no use afterwards."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
            self._on_close()

    def __enter__(self) -> "TrainIterator":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_all(
    source: Source,
    *,
    reading: Reading,
    batch_size: int,
    num_workers: int,
    batches_ahead: int = 2,
    views: Sequence[Crop] = (central_box,),
    padded: bool = False,
) -> Iterator[Batch]:
    """Reads every video once, in order, as an evaluation does: nothing is drawn.

    Args:
      source: the videos.
      reading: how they are decoded.
      batch_size: videos per batch, B.
      num_workers: decoding processes; 0 decodes in a thread of this process.
      batches_ahead: batches decoded ahead by each worker, at least 1.
      views: crops of every clip, see `decode.read_clips`; picklable.
      padded: fill the last batch up to `batch_size` with invalid rows, for compiled
        functions of one shape; otherwise the last batch may be smaller.

    Yields:
      `{"video": {"video": uint8 [B, K, T, H, W, 3]}, "label": int64 [B], "index": int64
      [B], "valid": bool [B]}`, K being the clips of a video times their views; there is
      no axis K where it is 1. Rows of unreadable videos, which are logged, and of
      padding are zeros with `valid` False; the padding's index is -1.
    """
    dataset = grain.MapDataset.range(len(source)).map(
        _ReadEvalClips(source, reading, views)
    )
    dataset = dataset.batch(batch_size, drop_remainder=False)
    batches = iter(_decoded_ahead(dataset, num_workers, batches_ahead))
    try:
        for batch in batches:
            video, label, index = (batch[k] for k in ("video", "label", "index"))
            valid = batch["reason"] < 0
            for i in np.flatnonzero(~valid):
                logging.warning(
                    "Skipped unreadable video %r: %s",
                    source.path_of(int(index[i])),
                    REASONS[batch["reason"][i]],
                )
            if padded and len(index) < batch_size:
                missing = batch_size - len(index)
                video = np.pad(video, [(0, missing)] + [(0, 0)] * (video.ndim - 1))
                label = np.pad(label, (0, missing))
                index = np.pad(index, (0, missing), constant_values=-1)
                valid = np.pad(valid, (0, missing))
            if video.shape[1] == 1:
                video = video[:, 0]
            yield {
                "video": {"video": video},
                "label": label,
                "index": index,
                "valid": valid,
            }
    finally:
        batches.close()
