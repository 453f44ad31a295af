"""Examines every video of a source, in processes that may die or hang.

Each video is examined by one of several worker processes. A video that kills its worker
or holds it for too long costs that video only: the worker is replaced and the rest goes
on.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection as connections

import numpy as np

from vjepa_jax.data.clips import reader
from vjepa_jax.data.clips.sampling import Sampling
from vjepa_jax.data.jobs.children import CRASHED, TIMED_OUT, Child
from vjepa_jax.data.sources.records import Record, Source
from vjepa_jax.data.transforms.transforms import ClipTransform


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one video turned out to be; None where it is not known.

    Attributes:
      path: names the video.
      frames, width, height, fps, codec: see `decode.VideoInfo`.
      error: None if it is readable, else one of `decode.REASONS`, CRASHED, TIMED_OUT.
      detail: more about the error, in words.
      clip_secs: processor time that reading one clip took.
    """

    path: str
    frames: int | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    codec: str | None = None
    error: str | None = None
    detail: str = ""
    clip_secs: float | None = None


Examine = Callable[[Record], Finding]


@dataclasses.dataclass(frozen=True)
class Examination:
    """Looks at a video's packets, then reads one clip of it as in training; picklable.

    Attributes:
      sampling: of the clip, or clips.
      transform: crop and size of the clip.
      deep: decode every frame as well.
      time_limit_secs: processor time that decoding may take.
      resize, max_pixels: see `decode.read_clips`.
    """

    sampling: Sampling
    transform: ClipTransform
    deep: bool
    time_limit_secs: float
    resize: str = "antialias"
    max_pixels: int = reader.MAX_PIXELS

    def __call__(self, record: Record) -> Finding:
        """Examines one video; one that gives no clip is described by its reason."""
        # The same clip in every run, so that its outcome can be reproduced.
        rng = np.random.default_rng(0)
        limits = {
            "max_pixels": self.max_pixels,
            "time_limit_secs": self.time_limit_secs,
        }
        try:
            info = reader.inspect(record, deep=self.deep, **limits)
            start_secs = time.process_time()
            clips = reader.read_clips(
                record,
                sampling=self.sampling,
                rng=rng,
                size=self.transform.resolution,
                crop=lambda height, width: self.transform.crop_box(height, width, rng),
                resize=self.resize,
                **limits,
            )
        except reader.DecodeError as error:
            # Of what the system says, not the path, which is there already.
            detail = getattr(error.__cause__, "strerror", None) or ""
            return Finding(record.path, error=error.reason, detail=detail)
        return Finding(
            record.path,
            frames=info.frames,
            width=info.width,
            height=info.height,
            fps=info.fps,
            codec=info.codec,
            clip_secs=(time.process_time() - start_secs) / len(clips),
        )


def survey(
    source: Source,
    examine: Examine,
    indices: Iterable[int],
    *,
    num_workers: int,
    timeout_secs: float,
) -> Iterator[tuple[int, Finding]]:
    """Examines videos in parallel; close the iterator to end the workers.

    A video whose worker dies is examined once more, by another, since the system may
    have killed the first for reasons of its own.

    Args:
      source: the videos; picklable, each worker gets a copy.
      examine: what to do with each; picklable.
      indices: of the videos to examine.
      num_workers: processes, at least 1.
      timeout_secs: wall time after which a worker that gives no answer is killed.

    Yields:
      index and finding of every video, in the order in which they are done.

    Raises:
      RuntimeError: a worker cannot be started.
    """
    queue, have_crashed = collections.deque(indices), set()
    workers = [Child(_examine, source, examine) for _ in range(num_workers)]
    try:
        while queue or any(worker.item is not None for worker in workers):
            for worker in workers:
                if queue and worker.is_idle:
                    worker.give(queue.popleft(), timeout_secs)
            deadline = min(worker.deadline for worker in workers)
            ready = connections.wait(
                [worker.connection for worker in workers],
                max(0.0, deadline - time.monotonic()),
            )
            for i, worker in enumerate(workers):
                index, error = worker.item, ""
                if worker.connection in ready:
                    try:
                        finding = worker.receive()
                    except (EOFError, OSError):
                        error = CRASHED
                elif time.monotonic() > worker.deadline:
                    error = TIMED_OUT
                else:
                    continue
                if not error:
                    if finding is not None:
                        yield index, finding
                    continue
                cause = worker.end() if error == CRASHED else worker.kill()
                if worker.is_starting:
                    raise RuntimeError(f"a worker could not start: {error} ({cause})")
                workers[i] = Child(_examine, source, examine)
                if error == CRASHED and index is not None and index not in have_crashed:
                    have_crashed.add(index)
                    queue.appendleft(index)
                elif index is not None:
                    path = source.path_of(index)
                    yield index, Finding(path, error=error, detail=cause)
    finally:
        for worker in workers:
            worker.kill()


def _examine(source: Source, examine: Examine, index: int) -> Finding:
    try:
        return examine(source[index])
    except Exception as error:
        # A source that holds the videos itself may be damaged.
        reason = "unreadable" if isinstance(error, OSError) else CRASHED
        return Finding(source.path_of(index), error=reason, detail=repr(error))
