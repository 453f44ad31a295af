"""Processes for work that may kill its process or hold it for ever.

What FFmpeg does with a hostile file can be bounded from outside alone.
"""

import contextlib
import math
import multiprocessing
import signal
import time
from collections.abc import Callable
from multiprocessing import connection as connections
from multiprocessing import resource_tracker
from typing import Any

CRASHED = "crashed"  # the process died, or met an error of its own
TIMED_OUT = "timed_out"  # the process gave no answer

# To import the function's module and to receive its state; no video is involved yet.
_START_TIMEOUT_SECS = 300
_END_TIMEOUT_SECS = 5


class Child:
    """A process that works on one item at a time.

    Attributes:
      connection: becomes readable when there is something to `receive`.
      item: what it works on; None if it has nothing to do.
      deadline: time of the monotonic clock after which it is late.
      is_starting: it has not said yet that it is ready.
    """

    def __init__(self, function: Callable, *state: Any):
        """Starts the process.

        Args:
          function: called with `state` and an item; defined in a module, and catches
            the errors it expects: another ends the process.
          *state: given once; picklable.
        """
        # A server that has imported the module forks, so that children start in no
        # time. A fork of this process, which may have threads, could deadlock.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([function.__module__])
        self.connection, other_end = context.Pipe()
        self._process = context.Process(
            target=_work, args=(other_end, function, state), daemon=True
        )
        # A terminal sends Ctrl-C to all processes; the parent decides what follows. The
        # server is started here and inherits that, and its children from it.
        resource_tracker.ensure_running()  # which would lift the block
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        other_end.close()
        self.item = None
        self.deadline = time.monotonic() + _START_TIMEOUT_SECS
        self.is_starting = True

    @property
    def is_idle(self) -> bool:
        """It waits for an item."""
        return self.item is None and not self.is_starting

    def give(self, item: Any, timeout_secs: float) -> None:
        """Has it work on an item, which is not None."""
        self.item = item
        self.deadline = time.monotonic() + timeout_secs
        # Where it is dead, receiving will tell.
        with contextlib.suppress(OSError):
            self.connection.send(item)

    def wait(self) -> bool:
        """Waits until there is something to receive; False if its time is over."""
        return self.connection.poll(max(0.0, self.deadline - time.monotonic()))

    def receive(self) -> Any:
        """Returns the result, after which it is idle; None if it has just started.

        Raises:
          EOFError, OSError: it is dead.
        """
        result = self.connection.recv()
        self.item, self.deadline, self.is_starting = None, math.inf, False
        return result

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


def _work(connection: connections.Connection, function: Callable, state: tuple) -> None:
    """Works on what it is given, until the other side closes the connection."""
    with contextlib.suppress(EOFError, OSError):
        connection.send(None)
        while True:
            connection.send(function(*state, connection.recv()))
