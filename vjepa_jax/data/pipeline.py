"""Streams of batches of clips, decoded by worker processes.

The training stream is a pure function of (seed, step): batches are formed first and
then dealt out to hosts, nothing is ever filtered out, and a stream started at step k
continues the unbroken run's, whatever the number of workers. No iterator state needs
saving but the step.

A file that cannot be read is replaced by another, drawn with the random numbers of its
own place in the stream. Workers report it inside the batch; `TrainIterator` takes the
report out again, lists the file, and judges the share of bad files.

Workers are spawned, so a program that asks for them needs the usual
`if __name__ == "__main__"`. A worker that dies raises RuntimeError in the main process;
one that hangs, on a dead network file system say, blocks it.
"""

import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from vjepa_jax.data import decode
from vjepa_jax.data.sources import VideoList
from vjepa_jax.data.transforms import ClipTransform, central_box
from vjepa_jax.default_config import UserError

# Files tried for one place in the stream. With a tenth of all files bad, one place in
# 10^16 finds none; a source where this runs out has next to nothing to read.
_MAX_TRIES = 16

# A share of bad files means something only after this many samples.
_MIN_SAMPLES_TO_JUDGE = 100

Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Sampling:
    """How a clip is cut out of a video; see `decode.clip_indices`."""

    num_frames: int
    frame_step: int
    fps: float

    def __post_init__(self):
        # In a worker, where clips are read, it would come too late.
        decode.check_sampling(self.num_frames, self.frame_step, self.fps)


class _ReadTrainClip(grain.transforms.RandomMap):
    """Record index -> augmented clip, with a report on files replaced on the way."""

    def __init__(
        self, source: VideoList, sampling: _Sampling, transform: ClipTransform
    ):
        self._source = source
        self._sampling = dataclasses.asdict(sampling)
        self._transform = transform

    def random_map(self, element: int, rng: np.random.Generator) -> Batch:
        transform = self._transform
        tried = np.full(_MAX_TRIES, -1, np.int64)
        reasons = np.full(_MAX_TRIES, -1, np.int8)
        index = element
        for attempt in range(_MAX_TRIES):
            tried[attempt] = index
            try:
                video = decode.read_clip(
                    self._source[index].path,
                    **self._sampling,
                    rng=rng,
                    size=transform.resolution,
                    crop=lambda height, width: transform.crop_box(height, width, rng),
                )
            except decode.DecodeError as error:
                reasons[attempt] = decode.REASONS.index(error.reason)
                index = int(rng.integers(len(self._source)))
            else:
                video = transform.maybe_flip(video, rng)
                break
        else:
            # An exception would reach the main process as text only: let the report,
            # which has no successful try in it, tell.
            size = transform.resolution
            video = np.zeros((self._sampling["num_frames"], size, size, 3), np.uint8)
        return {"video": video, "tried": tried, "reasons": reasons}


class _ReadEvalClip(grain.transforms.Map):
    """Record index -> centred clip; one of zeros, marked invalid, for a bad file."""

    def __init__(self, source: VideoList, sampling: _Sampling, resolution: int):
        self._source = source
        self._sampling = dataclasses.asdict(sampling)
        self._resolution = resolution

    def map(self, element: int) -> Batch:
        record = self._source[element]
        size = self._resolution
        reason = -1
        try:
            video = decode.read_clip(
                record.path, **self._sampling, size=size, crop=central_box
            )
        except decode.DecodeError as error:
            video = np.zeros((self._sampling["num_frames"], size, size, 3), np.uint8)
            reason = decode.REASONS.index(error.reason)
        return {"video": video, "index": element, "reason": np.int8(reason)}


def make_train_iterator(
    source: VideoList,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_frames: int,
    frame_step: int,
    fps: float,
    resolution: int,
    crop_scale: tuple[float, float],
    crop_aspect_ratio: tuple[float, float],
    flip_probability: float,
    num_workers: int,
    prefetch_batches: int,
    max_bad_fraction: float,
    bad_videos_path: str | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> "TrainIterator":
    """Makes the endless stream of training batches of this process.

    Every epoch is a new permutation of the videos; a video gives one clip per epoch. A
    batch may span two epochs, so fewer videos than a batch are enough.

    Args:
      source: the videos.
      batch_size: clips per global batch, a multiple of `process_count`.
      seed: of order, windows, crops and flips.
      start_step: step of the first batch.
      num_frames: frames per clip, T.
      frame_step: see `decode.clip_indices`; 0 to use `fps`.
      fps: see `decode.clip_indices`; 0 to use `frame_step`.
      resolution: see `ClipTransform`.
      crop_scale: see `ClipTransform`.
      crop_aspect_ratio: see `ClipTransform`.
      flip_probability: see `ClipTransform`.
      num_workers: decoding processes; 0 decodes in a thread of this process.
      prefetch_batches: local batches decoded ahead by each worker, at least 1.
      max_bad_fraction: share of the files drawn that may be unreadable.
      bad_videos_path: JSON lines file that unreadable files are listed in; give every
        process of a run its own.
      process_index: this process, in `[0, process_count)`.
      process_count: processes that share each global batch.

    Raises:
      UserError: a value is out of range, or the batch does not divide among the
        processes.
    """
    if batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} does not divide among {process_count} processes: "
            f"take a multiple of {process_count}"
        )
    read_clip = _ReadTrainClip(
        source,
        _Sampling(num_frames, frame_step, fps),
        ClipTransform(resolution, crop_scale, crop_aspect_ratio, flip_probability),
    )
    dataset = (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(read_clip)
        .batch(batch_size // process_count, drop_remainder=True)
    )
    dataset = dataset[start_step * process_count + process_index :: process_count]
    return TrainIterator(
        iter(_decoded_ahead(dataset, num_workers, prefetch_batches)),
        source=source,
        start_step=start_step,
        max_bad_fraction=max_bad_fraction,
        bad_videos_path=bad_videos_path,
    )


def _decoded_ahead(
    dataset: grain.MapDataset, num_workers: int, prefetch_batches: int
) -> grain.IterDataset:
    if not flags.FLAGS.is_parsed():
        # Grain reads its own flags when it starts workers; tests and notebooks have no
        # command line.
        flags.FLAGS.mark_as_parsed()
    # A worker's batches wait in the queue to the main process, so that its thread need
    # not be more than one ahead of them.
    dataset = dataset.to_iter_dataset(
        grain.ReadOptions(
            num_threads=1, prefetch_buffer_size=1 if num_workers else prefetch_batches
        )
    )
    if num_workers:
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=num_workers, per_worker_buffer_size=prefetch_batches
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
      bad_count: unreadable files known so far, those of earlier runs included.

    Raises (from `next`):
      UserError: too many of the files are unreadable.
      RuntimeError: a worker has died.
    """

    def __init__(
        self,
        batches: Iterator,
        *,
        source: VideoList,
        start_step: int,
        max_bad_fraction: float,
        bad_videos_path: str | None,
    ):
        self._batches = batches
        self._source = source
        self._max_bad_fraction = max_bad_fraction
        self._bad_videos_path = bad_videos_path
        self._drawn = np.zeros(len(source), bool)
        self._bad = np.zeros(len(source), bool)
        self._num_samples = 0
        self._listed = _read_bad_videos(bad_videos_path)
        self.step = start_step

    @property
    def bad_count(self) -> int:
        """Unreadable files known so far."""
        return len(self._listed)

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self._account(batch["tried"], batch["reasons"])
        self.step += 1
        return {"video": {"video": batch["video"]}}

    def close(self) -> None:
        """Ends the workers; the iterator is of no use afterwards."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def __enter__(self) -> "TrainIterator":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _account(self, tried: np.ndarray, reasons: np.ndarray) -> None:
        """Takes note of the files drawn: int64, int8 `[B, _MAX_TRIES]`, -1 for none."""
        self._num_samples += len(tried)
        self._drawn[tried[tried >= 0]] = True
        is_bad = reasons >= 0
        if not is_bad.any():
            return
        self._bad[tried[is_bad]] = True
        self._list(tried[is_bad], reasons[is_bad])
        num_bad, num_drawn = int(self._bad.sum()), int(self._drawn.sum())
        where = f"of {self._source.name!r}" + (
            f" (listed in {self._bad_videos_path!r})" if self._bad_videos_path else ""
        )
        if is_bad.all(axis=1).any():
            raise UserError(
                f"{_MAX_TRIES} videos {where} in a row cannot be read: mend or drop "
                "them"
            )
        if (
            self._num_samples >= _MIN_SAMPLES_TO_JUDGE
            and num_bad > self._max_bad_fraction * num_drawn
        ):
            raise UserError(
                f"{num_bad} of the {num_drawn} videos {where} drawn so far cannot be "
                f"read, more than data.max_bad_fraction={self._max_bad_fraction:g} "
                "allows: mend or drop them, or allow more"
            )

    def _list(self, indices: np.ndarray, reasons: np.ndarray) -> None:
        lines = []
        for index, reason in zip(indices.tolist(), reasons.tolist(), strict=True):
            path = self._source[index].path
            if path in self._listed:
                continue
            self._listed.add(path)
            entry = {"path": path, "reason": decode.REASONS[reason], "step": self.step}
            lines.append(json.dumps(entry) + "\n")
            logging.warning("Replaced unreadable video %r: %s", path, entry["reason"])
        if lines and self._bad_videos_path:
            os.makedirs(os.path.dirname(self._bad_videos_path) or ".", exist_ok=True)
            with open(self._bad_videos_path, "a") as file:
                file.writelines(lines)


def _read_bad_videos(path: str | None) -> set[str]:
    """Returns the paths listed; ends a last line that a killed run left unfinished."""
    if not path or not os.path.exists(path):
        return set()
    listed = set()
    line = ""
    with open(path, "r+") as file:
        for line in file:
            try:
                listed.add(json.loads(line)["path"])
            except (ValueError, TypeError, KeyError):
                continue
        if line and not line.endswith("\n"):
            file.write("\n")
    return listed


def read_all(
    source: VideoList,
    *,
    batch_size: int,
    num_frames: int,
    frame_step: int,
    fps: float,
    resolution: int,
    num_workers: int,
    prefetch_batches: int = 2,
    padded: bool = False,
) -> Iterator[Batch]:
    """Reads every video once, in order: the centred clip, centre-cropped.

    Args:
      source: the videos.
      batch_size: clips per batch, B.
      num_frames: frames per clip, T.
      frame_step: see `decode.clip_indices`; 0 to use `fps`.
      fps: see `decode.clip_indices`; 0 to use `frame_step`.
      resolution: side of the square clips in pixels.
      num_workers: decoding processes; 0 decodes in a thread of this process.
      prefetch_batches: batches decoded ahead by each worker, at least 1.
      padded: fill the last batch up to `batch_size` with invalid rows, for compiled
        functions of one shape; otherwise the last batch may be smaller.

    Yields:
      `{"video": {"video": uint8 [B, T, H, W, 3]}, "label": int64 [B], "index": int64
      [B], "valid": bool [B]}`. Rows of unreadable files, which are logged, and of
      padding are zeros with `valid` False; the padding's index is -1.
    """
    read_clip = _ReadEvalClip(
        source, _Sampling(num_frames, frame_step, fps), resolution
    )
    dataset = grain.MapDataset.range(len(source)).map(read_clip)
    dataset = dataset.batch(batch_size, drop_remainder=False)
    batches = iter(_decoded_ahead(dataset, num_workers, prefetch_batches))
    try:
        for batch in batches:
            video, index = batch["video"], batch["index"].astype(np.int64)
            valid = batch["reason"] < 0
            for i in np.flatnonzero(~valid):
                logging.warning(
                    "Skipped unreadable video %r: %s",
                    source[index[i]].path,
                    decode.REASONS[batch["reason"][i]],
                )
            label = source.labels[index]
            if padded and len(index) < batch_size:
                missing = batch_size - len(index)
                video = np.pad(video, [(0, missing)] + [(0, 0)] * 4)
                label = np.pad(label, (0, missing))
                index = np.pad(index, (0, missing), constant_values=-1)
                valid = np.pad(valid, (0, missing))
            yield {
                "video": {"video": video},
                "label": label,
                "index": index,
                "valid": valid,
            }
    finally:
        batches.close()
