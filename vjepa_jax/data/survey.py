"""Examines every video of a source, in processes that may die or hang.

Each video is examined by one of several worker processes. A video that kills its worker
or holds it for too long costs that video only: the worker is replaced and the rest goes
on.
"""

import collections
import contextlib
import dataclasses
import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection as connections

import numpy as np

from vjepa_jax.data import decode
from vjepa_jax.data.records import Record, Source
from vjepa_jax.data.sampling import Sampling
from vjepa_jax.data.transforms import ClipTransform

CRASHED = "crashed"  # the process that examined it died, or met an error of its own
TIMED_OUT = "timed_out"  # the process that examined it gave no answer

# To import this module and to receive the source; no video is involved yet.
_START_TIMEOUT_SECS = 300
_END_TIMEOUT_SECS = 5


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
    """

    sampling: Sampling
    transform: ClipTransform
    deep: bool
    time_limit_secs: float

    def __call__(self, record: Record) -> Finding:
        """Examines one video; one that gives no clip is described by its reason."""
        # The same clip in every run, so that its outcome can be reproduced.
        rng = np.random.default_rng(0)
        try:
            info = decode.inspect(
                record, deep=self.deep, time_limit_secs=self.time_limit_secs
            )
            start_secs = time.process_time()
            clips = decode.read_clips(
                record,
                sampling=self.sampling,
                rng=rng,
                size=self.transform.resolution,
                crop=lambda height, width: self.transform.crop_box(height, width, rng),
                time_limit_secs=self.time_limit_secs,
            )
        except decode.DecodeError as error:
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
    workers = [_Worker(source, examine) for _ in range(num_workers)]
    try:
        while queue or any(worker.index is not None for worker in workers):
            for worker in workers:
                if queue and worker.is_idle:
                    worker.give(queue.popleft(), timeout_secs)
            deadline = min(worker.deadline for worker in workers)
            ready = connections.wait(
                [worker.connection for worker in workers],
                max(0.0, deadline - time.monotonic()),
            )
            for i, worker in enumerate(workers):
                index, error = worker.index, ""
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
                workers[i] = _Worker(source, examine)
                if error == CRASHED and index is not None and index not in have_crashed:
                    have_crashed.add(index)
                    queue.appendleft(index)
                elif index is not None:
                    path = source.path_of(index)
                    yield index, Finding(path, error=error, detail=cause)
    finally:
        for worker in workers:
            worker.kill()


class _Worker:
    """A process that examines one video at a time.

    Attributes:
      connection: becomes readable when there is something to `receive`.
      index: of the video that it examines; None if there is none.
      deadline: time of the monotonic clock after which it is late.
      is_starting: it has not said yet that it is ready.
    """

    def __init__(self, source: Source, examine: Examine):
        # A server that has imported this module forks, so that workers start in no
        # time. A fork of this process, which may have threads, could deadlock.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.connection, other_end = context.Pipe()
        self._process = context.Process(
            target=_work, args=(other_end, source, examine), daemon=True
        )
        self._process.start()
        other_end.close()
        self.index = None
        self.deadline = time.monotonic() + _START_TIMEOUT_SECS
        self.is_starting = True

    @property
    def is_idle(self) -> bool:
        """It waits for a video."""
        return self.index is None and not self.is_starting

    def give(self, index: int, timeout_secs: float) -> None:
        """Has it examine a video."""
        self.index = index
        self.deadline = time.monotonic() + timeout_secs
        # Where it is dead, receiving will tell.
        with contextlib.suppress(OSError):
            self.connection.send(index)

    def receive(self) -> Finding | None:
        """Returns its finding, after which it is idle; None if it has just started.

        Raises:
          EOFError, OSError: it is dead.
        """
        finding = self.connection.recv()
        self.index, self.deadline, self.is_starting = None, math.inf, False
        return finding

    def end(self) -> str:
        """Waits for one that is about to end, and says why it did."""
        self._process.join(_END_TIMEOUT_SECS)
        code = self._process.exitcode
        self.kill()
        if code is None:
            return "it hung while ending"
        return signal.strsignal(-code) if code < 0 else f"exit code {code}"

    def kill(self) -> str:
        """Ends it, whatever it does, and says so."""
        self._process.kill()
        # One that waits for a dead network file system may outlive even that.
        self._process.join(_END_TIMEOUT_SECS)
        self.connection.close()
        return "it was killed"


def _work(connection: connections.Connection, source: Source, examine: Examine) -> None:
    """Examines what it is given, until the other side closes the connection."""
    # A terminal sends Ctrl-C to all processes; the parent decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):
        connection.send(None)
        while True:
            index = connection.recv()
            try:
                finding = examine(source[index])
            except Exception as error:
                # A source that holds the videos itself may be damaged.
                reason = "unreadable" if isinstance(error, OSError) else CRASHED
                path = source.path_of(index)
                finding = Finding(path, error=reason, detail=repr(error))
            connection.send(finding)
