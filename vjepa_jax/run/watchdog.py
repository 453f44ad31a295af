"""Tells where a run that makes no progress stands."""

import contextlib
import datetime
import faulthandler
import pathlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import TextIO

from vjepa_jax.parallel import distributed


class Watchdog:
    """Dumps the stacks of all threads when no step ends for long; a context manager.

    It ends nothing: a file system may come back, and what else is dead is for the
    heartbeats of the processes to find. Another dump follows each time as long again
    has passed.
    """

    def __init__(
        self, workdir: str, timeout_secs: float, *, stream: TextIO | None = None
    ):
        """Prepares the file, `stacks_<process>.txt`.

        Args:
          workdir: folder of the run.
          timeout_secs: time without a step; 0: there is no watchdog.
          stream: where the stacks go too, with a file descriptor; None is the standard
            error output.
        """
        self._path = pathlib.Path(workdir)
        self._path /= f"stacks_{distributed.process_index()}.txt"
        self._timeout_secs = timeout_secs
        self._stream = stream or sys.stderr
        self._step, self._last = 0, time.monotonic()
        self._is_paused = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        self._last = time.monotonic()
        if self._timeout_secs > 0:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def finished(self, step: int) -> None:
        """Notes that a step has ended."""
        self._step, self._last = step, time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Lets what is no step take as long as it likes."""
        self._is_paused = True
        try:
            yield
        finally:
            self._last = time.monotonic()
            self._is_paused = False

    def _watch(self) -> None:
        due = self._last + self._timeout_secs
        while not self._done.wait(max(due - time.monotonic(), 0.0)):
            now = time.monotonic()
            if self._is_paused:
                self._last = now
            if now - self._last < self._timeout_secs:
                due = self._last + self._timeout_secs
            else:
                self._dump(now - self._last)
                due = now + self._timeout_secs

    def _dump(self, secs: float) -> None:
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        message = (
            f"{when} process {distributed.process_index()}: no step ended for "
            f"{secs:.0f} s, the last was step {self._step}; its threads stand at"
        )
        print(f"{message} (also in {self._path})", file=self._stream, flush=True)
        faulthandler.dump_traceback(self._stream)
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                print(message, file=file, flush=True)
                faulthandler.dump_traceback(file)
                print(file=file)
        except OSError as error:  # mostly the very reason why nothing goes on
            print(f"{self._path}: {error}", file=self._stream, flush=True)
