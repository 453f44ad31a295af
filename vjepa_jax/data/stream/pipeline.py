"""Streams of batches of clips, decoded by worker processes.

The training stream is a pure function of (seed, step): batches are formed first and
then dealt out to hosts, nothing is ever filtered out, and a stream started at step k
continues the unbroken run's, whatever the number of workers and of hosts. No iterator
state needs saving but the step. A clip depends on (seed, epoch, record) alone.

A video that cannot be read is replaced by another of its source, drawn with random
numbers of the record's own. Workers report it inside the batch; `TrainIterator` takes
the report out again and keeps account of it (`bad_videos`). A process that dies or
hangs costs one restart (`workers`).
"""

import math
from collections.abc import Callable, Iterator, Mapping

import grain
import numpy as np

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips import reader
from vjepa_jax.data.sources.records import Mixture
from vjepa_jax.data.stream.bad_videos import CODES, BadVideos
from vjepa_jax.data.stream.reading import (
    Batch,
    Reading,
    decoded_ahead,
    shared_bytes,
    take,
)
from vjepa_jax.data.stream.workers import (
    SupervisedBatches,
    WorkLog,
    require_shared_memory,
)
from vjepa_jax.data.transforms.transforms import ClipTransform

# Records tried for one place in the stream, the first half of them of the same source.
# With half of all files bad, one place in 10^19 finds none.
_MAX_TRIES = 64

# Batches that a worker decodes ahead at most: more would only take memory.
_MAX_BATCHES_AHEAD = 8


class _ReadTrainClips(grain.transforms.Map):
    """The samples of a batch -> augmented clips, with reports on records replaced."""

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

    def map(self, elements: np.ndarray) -> Batch:
        shape = len(elements), _MAX_TRIES
        tried, reasons = np.full(shape, -1, np.int64), np.full(shape, -1, np.int8)
        # Clips are decoded to their places: to stack and to share them would copy
        # megabytes twice.
        with self._work_log.array((len(elements), *self._reading.shape())) as video:
            clips = np.asarray(video)
            for place, element in enumerate(elements.tolist()):
                self._read_sample(element, clips[place], tried[place], reasons[place])
        return {"video": video, "tried": tried, "reasons": reasons}

    def _read_sample(
        self, element: int, clips: np.ndarray, tried: np.ndarray, reasons: np.ndarray
    ) -> None:
        """Fills the clips and the report of one sample."""
        epoch, drawn = self._source.split(element)
        # A generator of its own, for replacements not to depend on what was drawn from
        # the other before a video turned out to be bad.
        of_clip, of_replacement = np.random.SeedSequence(
            (self._seed, epoch, drawn)
        ).spawn(2)
        for attempt, index in enumerate(
            self._candidates(drawn, np.random.default_rng(of_replacement))
        ):
            tried[attempt] = index
            reasons[attempt] = self._quarantined.get(index, -1)
            if reasons[attempt] < 0:
                try:
                    with self._work_log.at(index):
                        self._read(index, np.random.default_rng(of_clip), clips)
                    return
                except reader.DecodeError as error:
                    reasons[attempt] = CODES[error.reason]
        # An exception would reach the main process as text only: let the report, which
        # has no successful try in it, tell.
        clips[:] = 0

    def _candidates(self, index: int, rng: np.random.Generator) -> Iterator[int]:
        """Yields records, each once: the one drawn, some of its source, some of any."""
        tried = {index}
        yield index
        everything = range(len(self._source))
        for span, most in (
            (self._source.neighbours(index), _MAX_TRIES // 2),
            (everything, _MAX_TRIES),
        ):
            while len(tried) < min(most, len(span)):
                index = int(rng.integers(span.start, span.stop))
                while index in tried:
                    index = span[(index + 1 - span.start) % len(span)]
                tried.add(index)
                yield index

    def _read(self, index: int, rng: np.random.Generator, clips: np.ndarray) -> None:
        num_frames = self._reading.sampling.num_frames

        def crop(height: int, width: int) -> np.ndarray:
            return self._transform.crop_boxes(height, width, num_frames, rng)

        self._reading.read(take(self._source, index), crop, rng, clips)
        for clip in clips:
            augmented = self._transform.augment(clip, rng)
            if augmented is not clip:  # a clip has megabytes to copy
                clip[:] = augmented


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
        each has two batches at least and 16 at most.
      worker_timeout_secs: longest time that a worker may be at one record.
      max_bad_fraction: share of the videos drawn that may be unreadable.
      bad_videos_path: JSON lines file that unreadable videos are listed in; further
        processes of a run have `NAME_1.jsonl` and so on beside it.
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
    batch_bytes = num_local // num_clips * math.prod(reading.shape())
    # Grain keeps as many again in a thread per worker.
    ahead = prefetch_megabytes * 1e6 / batch_bytes / max(2 * num_workers, 1)
    ahead = min(max(int(ahead), 1), _MAX_BATCHES_AHEAD)
    needed = shared_bytes(num_workers, ahead, batch_bytes)
    require_shared_memory(needed)
    bad_videos = BadVideos(source, bad_videos_path, max_bad_fraction, process_index)
    quarantined = bad_videos.quarantined()
    work_log = WorkLog(has_workers=num_workers > 0)

    def open_batches(step: int, since: Mapping[int, str]) -> Iterator:
        read_clips = _ReadTrainClips(
            source,
            reading,
            transform,
            seed,
            quarantined | {record: CODES[reason] for record, reason in since.items()},
            work_log,
        )
        num_records = num_local // num_clips
        # Not rounded up: the length of an endless mixture would exceed an index.
        samples = source.samples(seed).batch(num_records, drop_remainder=True)
        dataset = samples.map(read_clips)
        dataset = dataset[step * process_count + process_index :: process_count]
        return iter(decoded_ahead(dataset, num_workers, ahead, work_log))

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
        batches,
        bad_videos=bad_videos,
        start_step=start_step,
        shared_bytes=needed,
        on_close=work_log.remove,
    )


class TrainIterator(Iterator):
    """Yields `{"video": uint8 [B, T, H, W, 3]}`, B being clips per process.

    Under `index` stand the records that the clips are of, int64 [videos]; one that was
    unreadable is replaced there too.

    Close it, or use it as a context manager, to end its workers. With workers, batches
    lie in shared memory until they are dropped; those that outlive the iterator make
    Python warn of leaked shared memory at exit.

    Attributes:
      step: step of the next batch.
      shared_bytes: what its batches take in /dev/shm, at most.

    Raises (from `next`):
      UserError: too many of the videos are unreadable, or workers fail again and again.
    """

    def __init__(
        self,
        batches: Iterator,
        *,
        bad_videos: BadVideos,
        start_step: int,
        shared_bytes: int,
        on_close: Callable[[], None],
    ):
        self._batches = batches
        self._bad_videos = bad_videos
        self._on_close = on_close
        self.step = start_step
        self.shared_bytes = shared_bytes

    @property
    def bad_counts(self) -> Mapping[str, int]:
        """Unreadable videos known so far, by reason."""
        return self._bad_videos.counts

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._bad_videos.account(batch["tried"], batch["reasons"], self.step)
        self.step += 1
        video, tried = batch["video"], batch["tried"]
        num_tried = (tried >= 0).sum(1)
        return {
            "video": video.reshape(-1, *video.shape[2:]),
            "index": tried[np.arange(len(tried)), num_tried - 1],
        }

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
