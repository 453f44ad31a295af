"""Read every video once, in order, for evaluations; nothing is random."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import logging

from vjepa_jax.data.clips.frames import Crop
from vjepa_jax.data.clips.media import DecodeError
from vjepa_jax.data.clips.reader import ClipReader, take_record
from vjepa_jax.data.sources.records import Source
from vjepa_jax.data.stream.bad_videos import CODES, REASONS
from vjepa_jax.data.stream.workers import (
    Batch,
    SupervisedBatches,
    WorkLog,
    decoded_ahead,
    require_shared_memory,
    shared_bytes,
)
from vjepa_jax.data.transforms.transforms import central_box

# Batches that each worker decodes ahead.
_BATCHES_AHEAD = 2


class _ReadEvalClips(grain.transforms.Map):
    """Reads records by index; clips of bad files are zeros, with a reason."""

    def __init__(
        self,
        source: Source,
        reader: ClipReader,
        views: Sequence[Crop],
        quarantined: Mapping[int, str],
        work_log: WorkLog,
    ):
        self._source = source
        self._reader = reader
        self._views = views
        self._quarantined = quarantined
        self._work_log = work_log

    def map(self, elements: np.ndarray) -> Batch:
        shape = self._reader.shape(len(self._views))
        video = np.empty((len(elements), *shape), np.uint8)
        label = np.zeros(len(elements), np.int64)
        reason = np.full(len(elements), -1, np.int8)
        for i, index in enumerate(elements.tolist()):
            reason[i] = CODES.get(self._quarantined.get(index, ""), -1)
            if reason[i] < 0:
                try:
                    with self._work_log.at(index):
                        record = take_record(self._source, index)
                        label[i] = record.label
                        self._reader.read(record, self._views, out=video[i])
                except DecodeError as error:
                    reason[i] = CODES[error.reason]
            if reason[i] >= 0:
                video[i] = 0
        return {"video": video, "label": label, "index": elements, "reason": reason}


def read_all(
    source: Source,
    *,
    reader: ClipReader,
    batch_size: int,
    num_workers: int,
    worker_timeout_secs: float = 300.0,
    views: Sequence[Crop] = (central_box,),
    padded: bool = False,
    order: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Read every video once, in order; nothing is random.

    Args:
      source: the videos.
      reader: how they are decoded.
      batch_size: videos per batch, B.
      num_workers: decoding processes; 0 decodes in a thread of this process.
      worker_timeout_secs: longest time that a worker may take for one record.
      views: crops of every clip, see `ClipReader.read`; picklable. By default one,
        the largest centred square.
      padded: fill the last batch up to `batch_size` with invalid rows, for compiled
        functions of one shape; otherwise the last batch may be smaller.
      order: int [n], the videos to read in this order, with repetitions, such as the
        epochs of a training; None: every video once.

    Yields:
      `{"video": uint8 [B, K, T, H, W, 3], "label": int64 [B], "index": int64 [B],
      "valid": bool [B]}`. K counts the clips of a video and their views; if it is 1,
      there is no axis K. Rows without a video are zeros, with `valid` False: those of
      unreadable videos, which are logged, and the padding, whose index is -1.
    """
    if order is None:
        numbers = grain.MapDataset.range(len(source))
    else:
        numbers = grain.MapDataset.source(np.asarray(order, np.int64))
    # Starting a worker takes seconds, even if it gets no batch.
    num_workers = min(num_workers, math.ceil(len(numbers) / batch_size))
    work_log = WorkLog(has_workers=num_workers > 0)

    def open_batches(step: int, quarantined: Mapping[int, str]) -> Iterator:
        read_clips = _ReadEvalClips(source, reader, views, quarantined, work_log)
        dataset = numbers.batch(batch_size).map(read_clips)[step:]
        return decoded_ahead(dataset, num_workers, _BATCHES_AHEAD, work_log)

    batches: Any
    if num_workers:
        batch_bytes = batch_size * math.prod(reader.shape(len(views)))
        require_shared_memory(shared_bytes(num_workers, _BATCHES_AHEAD, batch_bytes))
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
            # Copied, so that a caller who keeps them does not keep shared memory.
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
