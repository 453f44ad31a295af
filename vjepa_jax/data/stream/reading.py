"""How records become clips, and how processes decode them ahead; for all streams.

Workers are spawned, so a program that asks for them needs the usual
`if __name__ == "__main__"`.
"""

import dataclasses
import functools
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from vjepa_jax.base.host_memory import keep_freed_memory
from vjepa_jax.data.clips import reader
from vjepa_jax.data.clips.frames import Crop
from vjepa_jax.data.clips.sampling import Sampling
from vjepa_jax.data.sources.records import Record, Source
from vjepa_jax.data.stream.workers import WorkLog

Batch = dict[str, Any]

# Between attempts to get a record from its storage, which may fail for a moment; a
# replacement would make the stream depend on the state of a network.
_RETRY_WAITS_SECS = (0.5, 2.0)


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
    max_pixels: int = reader.MAX_PIXELS
    time_limit_secs: float = reader.TIME_LIMIT_SECS

    def read(
        self,
        record: Record,
        crop: Crop | Sequence[Crop],
        rng: np.random.Generator | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Reads uint8 `[K, T, S, S, 3]`; see `decode.read_clips`."""
        return reader.read_clips(
            record,
            sampling=self.sampling,
            rng=rng,
            size=self.resolution,
            crop=crop,
            resize=self.resize,
            max_pixels=self.max_pixels,
            time_limit_secs=self.time_limit_secs,
            out=out,
        )

    def shape(self, num_views: int = 1) -> tuple[int, int, int, int, int]:
        """Returns that of a record's clips, `[K, T, S, S, 3]`."""
        size, sampling = self.resolution, self.sampling
        num_clips = sampling.num_clips * num_views
        return num_clips, sampling.num_frames, size, size, 3


def take(source: Source, index: int) -> Record:
    """Returns a record; raises DecodeError where its storage fails."""
    waits_secs = [*_RETRY_WAITS_SECS]
    while True:
        try:
            return source[index]
        except OSError as error:
            if not waits_secs:
                path = source.path_of(index)
                raise reader.DecodeError(path, "unreadable", str(error)) from error
        time.sleep(waits_secs.pop(0))


def shared_bytes(num_workers: int, batches_ahead: int, batch_bytes: int) -> int:
    """Returns what workers' batches take in /dev/shm.

    Of each worker's queue and of the thread that empties it, one batch more than is
    buffered is under way; one is with whoever asked for it.
    """
    if not num_workers:
        return 0
    return (2 * num_workers * (batches_ahead + 1) + 1) * batch_bytes


def decoded_ahead(
    dataset: grain.MapDataset, num_workers: int, batches_ahead: int, work_log: WorkLog
) -> grain.IterDataset:
    if not flags.FLAGS.is_parsed():
        # Grain reads its own flags when it starts workers; tests and notebooks have no
        # command line.
        flags.FLAGS.mark_as_parsed()
    # A worker needs no thread: its batches wait in the queue to this process.
    threads, ahead = (0, 0) if num_workers else (1, batches_ahead)
    dataset = dataset.to_iter_dataset(grain.ReadOptions(threads, ahead))
    if num_workers:
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=num_workers, per_worker_buffer_size=batches_ahead
            ),
            worker_init_fn=functools.partial(_start_worker, work_log),
        )
    return dataset


def _start_worker(work_log: WorkLog, worker_index: int, worker_count: int) -> None:
    """Makes the process known, deaf to Ctrl-C and SIGTERM, and mortal with its parent.

    A terminal or a scheduler sends these to every process of the job, and a worker that
    died of them would end the run before the state is saved. A parent that is killed
    cannot end its workers, which then would wait for ever.
    """
    del worker_index, worker_count
    keep_freed_memory()
    work_log.begin()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
