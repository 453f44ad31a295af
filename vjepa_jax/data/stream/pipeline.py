"""The training stream of one source: batches of clips, decoded by worker processes.

The stream is a pure function of (seed, step). Batches are formed first and then split
among the processes of the run, and no sample is ever left out. A stream that starts at
step k therefore continues an uninterrupted one, for any number of workers and
processes, and only the step has to be saved. A clip depends on (seed, epoch, record)
only.

An unreadable video is replaced by another one of its source, drawn with random numbers
of the record's own. Workers report it inside of the batch, and `TrainIterator` counts
and lists it (`bad_videos`). A worker that dies or hangs costs one restart (`workers`).
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips.media import DecodeError
from vjepa_jax.data.clips.reader import ClipReader, take_record
from vjepa_jax.data.sources.records import Mixture
from vjepa_jax.data.stream.bad_videos import CODES, BadVideoLimits, BadVideos
from vjepa_jax.data.stream.workers import (
    Batch,
    SupervisedBatches,
    Workers,
    WorkLog,
    decoded_ahead,
    require_shared_memory,
    shared_bytes,
)
from vjepa_jax.data.transforms.transforms import ClipTransform

# Records tried for one position of a batch, the first half of them of the same source.
# With half of all files bad, one position in 10^19 gets no clip.
_MAX_TRIES = 64

# Batches that a worker decodes ahead at most: more would only take memory.
_MAX_BATCHES_AHEAD = 8


@dataclasses.dataclass(frozen=True)
class Batching:
    """Which batches a process reads.

    Attributes:
      batch_size: clips per global batch, a multiple of `process_count` times the clips
        per video.
      seed: of the order, the clips' starts and the augmentations.
      start_step: step of the first batch.
      process_index: this process, in [0, process_count).
      process_count: processes that share each global batch.
    """

    batch_size: int
    seed: int
    start_step: int = 0
    process_index: int = 0
    process_count: int = 1

    def local_size(self, clips_per_video: int) -> int:
        """Return the clips per batch of one process, or raise UserError."""
        multiple = self.process_count * clips_per_video
        if self.batch_size % multiple:
            among = f"{self.process_count} processes"
            if clips_per_video > 1:
                among += f" of {clips_per_video} clips per video"
            raise UserError(
                f"batch_size {self.batch_size} does not divide among {among}: take a "
                f"multiple of {multiple}"
            )
        return self.batch_size // self.process_count


class _ReadTrainClips(grain.transforms.Map):
    """Reads the samples of a batch: augmented clips, and reports of bad records."""

    def __init__(
        self,
        source: Mixture,
        reader: ClipReader,
        transform: ClipTransform,
        seed: int,
        quarantined: Mapping[int, int],
        work_log: WorkLog,
    ):
        self._source = source
        self._reader = reader
        self._transform = transform
        self._seed = seed
        self._quarantined = quarantined
        self._work_log = work_log

    def map(self, elements: np.ndarray) -> Batch:
        shape = len(elements), _MAX_TRIES
        tried, reasons = np.full(shape, -1, np.int64), np.full(shape, -1, np.int8)
        # Clips are decoded into the batch: stacking and sharing them later would copy
        # megabytes twice.
        with self._work_log.array((len(elements), *self._reader.shape())) as video:
            clips = np.asarray(video)
            for i, element in enumerate(elements.tolist()):
                self._read_sample(element, clips[i], tried[i], reasons[i])
        return {"video": video, "tried": tried, "reasons": reasons}

    def _read_sample(
        self, element: int, clips: np.ndarray, tried: np.ndarray, reasons: np.ndarray
    ) -> None:
        """Fill the clips and the report of one sample."""
        epoch, drawn = self._source.split(element)
        # Two generators: replacements must not depend on how many numbers the clip had
        # drawn before its video turned out to be bad.
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
                except DecodeError as error:
                    reasons[attempt] = CODES[error.reason]
        # No exception here: it would reach the main process as text only. The main
        # process raises one when it finds that no try in this report succeeded.
        clips[:] = 0

    def _candidates(self, index: int, rng: np.random.Generator) -> Iterator[int]:
        """Yield records, each once: the one drawn, some of its source, some of any."""
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
        record = take_record(self._source, index)
        crop = functools.partial(
            self._transform.crop_boxes,
            num_frames=self._reader.sampling.num_frames,
            rng=rng,
        )
        self._reader.read(record, crop, rng, clips)
        for clip in clips:
            augmented = self._transform.augment(clip, rng)
            if augmented is not clip:  # a clip has megabytes to copy
                clip[:] = augmented


class TrainIterator(Iterator[Batch]):
    """The endless training batches of this process.

    Yields `{"video": uint8 [B, T, H, W, 3], "index": int64 [B / K]}`: B clips per
    process, K clips per video side by side, and the records that they come from. The
    index of an unreadable record is that of its replacement.

    Every epoch is a new permutation of a source's records; a record gives
    `reader.sampling.num_clips` clips per epoch. A batch may span two epochs, so fewer
    records than a batch are enough.

    Close it, or use it as a context manager, to end its workers. With workers, batches
    lie in shared memory until they are dropped. Python warns at exit of shared memory
    that outlives the iterator.

    Attributes:
      step: step of the next batch.
      shared_bytes: largest size of its batches in /dev/shm.

    Raises (from `next`):
      UserError: too many of the videos are unreadable, or workers fail again and again.
    """

    def __init__(
        self,
        source: Mixture,
        reader: ClipReader,
        transform: ClipTransform,
        batching: Batching,
        workers: Workers,
        bad_videos: BadVideoLimits,
    ):
        """Start the workers.

        Args:
          source: the videos.
          reader: how they are decoded.
          transform: how clips are cropped and augmented.
          batching: which batches to read.
          workers: how batches are decoded ahead.
          bad_videos: how many unreadable videos are accepted.

        Raises:
          UserError: the batch does not divide among the processes, or /dev/shm is too
            small.
        """
        clips_per_video = reader.sampling.num_clips
        num_records = batching.local_size(clips_per_video) // clips_per_video
        batch_bytes = num_records * math.prod(reader.shape())
        # Grain buffers the same number again in a thread per worker.
        ahead = workers.prefetch_megabytes * 1e6 / batch_bytes
        ahead = int(ahead / max(2 * workers.count, 1))
        self._ahead = min(max(ahead, 1), _MAX_BATCHES_AHEAD)
        self.shared_bytes = shared_bytes(workers.count, self._ahead, batch_bytes)
        require_shared_memory(self.shared_bytes)
        self.step = batching.start_step
        self._source = source
        self._reader = reader
        self._transform = transform
        self._batching = batching
        self._num_workers = workers.count
        self._num_records = num_records
        self._bad_videos = BadVideos(source, bad_videos, batching.process_index)
        self._quarantined = self._bad_videos.quarantined()
        self._work_log = WorkLog(has_workers=workers.count > 0)
        self._batches: Any  # SupervisedBatches, or Grain's iterator
        if workers.count:
            self._batches = SupervisedBatches(
                self._open_batches,
                self._work_log,
                start_step=self.step,
                timeout_secs=workers.timeout_secs,
                name_of=source.path_of,
                on_quarantine=self._bad_videos.add,
            )
        else:
            self._batches = self._open_batches(self.step, {})

    def _open_batches(
        self, step: int, quarantined: Mapping[int, str]
    ) -> grain.DatasetIterator:
        """Return the batches from `step` on; also skip the given records."""
        codes = {record: CODES[reason] for record, reason in quarantined.items()}
        batching = self._batching
        read_clips = _ReadTrainClips(
            self._source,
            self._reader,
            self._transform,
            batching.seed,
            self._quarantined | codes,
            self._work_log,
        )
        samples = self._source.samples(batching.seed)
        # Rounding up would make the length of an endless mixture exceed an index.
        dataset = samples.batch(self._num_records, drop_remainder=True).map(read_clips)
        first, stride = batching.process_index, batching.process_count
        dataset = dataset[step * stride + first :: stride]
        return decoded_ahead(dataset, self._num_workers, self._ahead, self._work_log)

    @property
    def bad_counts(self) -> Mapping[str, int]:
        """Unreadable videos known so far, by reason."""
        return self._bad_videos.counts

    def __next__(self) -> Batch:
        batch = next(self._batches)
        video, tried = batch["video"], batch["tried"]
        self._bad_videos.add_batch(tried, batch["reasons"], self.step)
        self.step += 1
        num_tried = (tried >= 0).sum(1)
        return {
            "video": video.reshape(-1, *video.shape[2:]),
            "index": tried[np.arange(len(tried)), num_tried - 1],
        }

    def close(self) -> None:
        """End the workers; the iterator cannot be used afterwards."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
            self._work_log.remove()

    def __enter__(self) -> "TrainIterator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
