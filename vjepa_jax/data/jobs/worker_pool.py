"""Processes for work that may kill its process or hang.

FFmpeg may crash on a hostile file, or read it forever. Only a separate process can
limit that. `pebble.ProcessPool` (5.2.3) is not suitable. It does not notice a worker
that dies before the pool has read that it took a task: with large results under way, 15
of 60 crashes were reported as timeouts, after the whole time limit. It also waits
without limit for a killed process, which may hang in a dead network file system.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable
from multiprocessing import connection as connections
from multiprocessing import resource_tracker
from typing import Any

CRASHED = "crashed"  # the process died, or raised an unexpected error
TIMED_OUT = "timed_out"  # the process gave no result in time

# Time to import the function's module and to receive its state, before any item.
_START_TIMEOUT_SECS = 300
_END_TIMEOUT_SECS = 5
_POLL_SECS = 1.0  # a thread notices within this time that the pool is closed


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why there is no result.

    Attributes:
      reason: CRASHED, TIMED_OUT, or a reason that the function gave.
      detail: more about it, in words.
    """

    reason: str
    detail: str


class WorkerPool:
    """Worker processes that call one function; started as needed, reused when idle."""

    def __init__(self, function: Callable, *state: Any, timeout_secs: float):
        """Start no process yet.

        Args:
          function: called as `function(*state, item)`; defined in a module. It catches
            the errors that it expects: any other ends its process.
          *state: sent to each process once; picklable.
          timeout_secs: wall time after which a worker without a result is killed.
        """
        self._function, self._state = function, state
        self._timeout_secs = timeout_secs
        self._lock = threading.Lock()
        self._is_closed = False
        self._workers: set[_Worker] = set()
        self._idle: list[_Worker] = []

    def call(self, item: Any) -> Any:
        """Return the function's result for an item; each thread has its own process.

        An item whose process dies is tried once more, since the system may have killed
        the first process for reasons of its own.

        Returns:
          The result; a Failure if the process died twice or gave no result in time.

        Raises:
          RuntimeError: a process cannot be started, or the pool is closed.
        """
        for is_last in (False, True):
            worker = self._take()
            try:
                worker.connection.send(item)
                if not self._wait(worker, self._timeout_secs):
                    return Failure(TIMED_OUT, self._end(worker, kill=True))
                result = worker.connection.recv()
            except (EOFError, OSError):
                cause = self._end(worker)
                self._check_open()
                if is_last:
                    return Failure(CRASHED, cause)
            except BaseException:  # in this thread; a later call would get this result
                self._end(worker, kill=True)
                raise
            else:
                self._idle.append(worker)
                return result
        raise AssertionError("the last attempt returns")

    def call_each(
        self, items: Iterable[Any], num_workers: int
    ) -> Generator[tuple[Any, Any]]:
        """Call the function with all items in parallel, then close the pool.

        Args:
          items: taken as workers become free.
          num_workers: processes, at least 1.

        Yields:
          (item, result as of `call`), in the order in which they are done. Closing the
          iterator closes the pool.
        """
        items = iter(items)
        # Closed twice: first to end the threads, then the workers that they left.
        with (
            contextlib.closing(self),
            concurrent.futures.ThreadPoolExecutor(num_workers) as threads,
            contextlib.closing(self),
        ):

            def call(item: Any) -> tuple[Any, Any]:
                return item, self.call(item)

            def submitted(count: int) -> set[concurrent.futures.Future]:
                return {
                    threads.submit(call, item)
                    for item in itertools.islice(items, count)
                }

            pending = submitted(2 * num_workers)
            while pending:
                done, pending = concurrent.futures.wait(
                    pending, return_when=concurrent.futures.FIRST_COMPLETED
                )
                pending |= submitted(len(done))
                for future in done:
                    yield future.result()

    def close(self) -> None:
        """Kill all processes; calls in other threads end with a RuntimeError."""
        with self._lock:
            self._is_closed = True
            for worker in self._workers:
                worker.process.kill()
        while self._idle:
            self._end(self._idle.pop(), kill=True)

    def _take(self) -> "_Worker":
        """Return an idle worker, or a new one."""
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        with self._lock:
            self._check_open()
            worker = _Worker(self._function, self._state)
            self._workers.add(worker)
        try:
            if self._wait(worker, _START_TIMEOUT_SECS):
                worker.connection.recv()
                return worker
            cause = self._end(worker, kill=True)
        except (EOFError, OSError):
            cause = self._end(worker)
        except BaseException:
            self._end(worker, kill=True)
            raise
        raise RuntimeError(f"a worker process could not start: {cause}")

    def _wait(self, worker: "_Worker", timeout_secs: float) -> bool:
        """Return whether a worker has sent something, or died, in time."""
        deadline = time.monotonic() + timeout_secs
        while (left := deadline - time.monotonic()) > 0:
            if worker.connection.poll(min(left, _POLL_SECS)):
                return True
            self._check_open()
        return worker.connection.poll()

    def _end(self, worker: "_Worker", kill: bool = False) -> str:
        """Forget a worker that is dead or is to be killed; return why it ended."""
        with self._lock:
            self._workers.discard(worker)
        return worker.end(kill)

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the worker pool is closed")


class _Worker:
    """A process and the connection to it."""

    def __init__(self, function: Callable, state: tuple):
        # A server that has imported the module forks, so that workers start fast. A
        # fork of this process, which may have threads, could deadlock.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([function.__module__])
        self.connection, other_end = context.Pipe()
        self.process = context.Process(
            target=_work, args=(other_end, function, state), daemon=True
        )
        # A terminal sends Ctrl-C to all processes; this one decides what follows. The
        # server is started here and inherits the block, and its workers from it.
        resource_tracker.ensure_running()  # it would lift the block
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        other_end.close()

    def end(self, kill: bool) -> str:
        """Wait until the process has ended, after killing it or not; return why."""
        if not kill:
            self.process.join(_END_TIMEOUT_SECS)
        code = self.process.exitcode
        self.process.kill()
        # A process that waits for a dead network file system may outlive SIGKILL.
        self.process.join(_END_TIMEOUT_SECS)
        self.connection.close()
        if kill:
            return "it was killed"
        if code is None:
            return "it hung while ending"
        if code < 0:
            return signal.strsignal(-code) or f"signal {-code}"
        return f"exit code {code}"


def _work(connection: connections.Connection, function: Callable, state: tuple) -> None:
    """Send the results of received items until the other side closes."""
    with contextlib.suppress(EOFError, OSError):
        connection.send(None)
        while True:
            connection.send(function(*state, connection.recv()))
