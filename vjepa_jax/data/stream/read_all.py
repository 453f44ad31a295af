"""Every video once, in order, as evaluations read them: nothing is drawn."""

import math
from collections.abc import Iterator, Mapping, Sequence

import grain
import numpy as np
from absl import logging

from vjepa_jax.data.clips import reader
from vjepa_jax.data.clips.frames import Crop
from vjepa_jax.data.sources.records import Source
from vjepa_jax.data.stream.bad_videos import CODES, REASONS
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
from vjepa_jax.data.transforms.transforms import central_box


class _ReadEvalClips(grain.transforms.Map):
    """Record indices -> clips of an evaluation; zeros, marked invalid, of bad files."""

    def __init__(
        self,
        source: Source,
        reading: Reading,
        views: Sequence[Crop],
        quarantined: Mapping[int, str],
        work_log: WorkLog,
    ):
        self._source = source
        self._reading = reading
        self._views = views
        self._quarantined = quarantined
        self._work_log = work_log

    def map(self, elements: np.ndarray) -> Batch:
        shape = self._reading.shape(len(self._views))
        video = np.empty((len(elements), *shape), np.uint8)
        label = np.zeros(len(elements), np.int64)
        reason = np.full(len(elements), -1, np.int8)
        for place, index in enumerate(elements.tolist()):
            reason[place] = CODES.get(self._quarantined.get(index, ""), -1)
            if reason[place] < 0:
                try:
                    with self._work_log.at(index):
                        record = take(self._source, index)
                        label[place] = record.label
                        self._reading.read(record, self._views, out=video[place])
                except reader.DecodeError as error:
                    reason[place] = CODES[error.reason]
            if reason[place] >= 0:
                video[place] = 0
        return {"video": video, "label": label, "index": elements, "reason": reason}


def read_all(
    source: Source,
    *,
    reading: Reading,
    batch_size: int,
    num_workers: int,
    batches_ahead: int = 2,
    worker_timeout_secs: float = 300.0,
    views: Sequence[Crop] = (central_box,),
    padded: bool = False,
    order: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Reads every video once, in order, as an evaluation does: nothing is drawn.

    Args:
      source: the videos.
      reading: how they are decoded.
      batch_size: videos per batch, B.
      num_workers: decoding processes; 0 decodes in a thread of this process.
      batches_ahead: batches decoded ahead by each worker, at least 1.
      worker_timeout_secs: longest time that a worker may be at one record.
      views: crops of every clip, see `decode.read_clips`; picklable.
      padded: fill the last batch up to `batch_size` with invalid rows, for compiled
        functions of one shape; otherwise the last batch may be smaller.
      order: int `[n]`, the videos to read, as often and in the order as they stand
        there, such as epochs of a training; None: every video once, in order.

    Yields:
      `{"video": uint8 [B, K, T, H, W, 3], "label": int64 [B], "index": int64
      [B], "valid": bool [B]}`, K being the clips of a video times their views; there is
      no axis K where it is 1. Rows of unreadable videos, which are logged, and of
      padding are zeros with `valid` False; the padding's index is -1.
    """
    if order is None:
        numbers = grain.MapDataset.range(len(source))
    else:
        numbers = grain.MapDataset.source(np.asarray(order, np.int64))
    # A worker without a batch would take seconds to start all the same.
    num_workers = min(num_workers, math.ceil(len(numbers) / batch_size))
    work_log = WorkLog(has_workers=num_workers > 0)

    def open_batches(step: int, quarantined: Mapping[int, str]) -> Iterator:
        read_clips = _ReadEvalClips(source, reading, views, quarantined, work_log)
        indices = numbers.batch(batch_size)
        dataset = indices.map(read_clips)[step:]
        return iter(decoded_ahead(dataset, num_workers, batches_ahead, work_log))

    if num_workers:
        batch_bytes = batch_size * math.prod(reading.shape(len(views)))
        require_shared_memory(shared_bytes(num_workers, batches_ahead, batch_bytes))
        batches = SupervisedBatches(
            open_batches,
            work_log,
            start_step=0,
            timeout_secs=worker_timeout_secs,
            name_of=source.path_of,
            on_quarantine=lambda record, reason, step: None,
        )
    else:
        batches = open_batches(0, {})
    try:
        for batch in batches:
            video = batch["video"]
            # Copies: who keeps these must not keep a worker's shared memory.
            label, index = np.array(batch["label"]), np.array(batch["index"])
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
                "video": video,
                "label": label,
                "index": index,
                "valid": valid,
            }
    finally:
        batches.close()
