"""Watch a run: for hanging steps, for skipped updates, with a profiler."""

import contextlib
import datetime
import faulthandler
import pathlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import jax

from vjepa_jax.base.errors import UserError
from vjepa_jax.base.files import PathLike
from vjepa_jax.parallel import distributed
from vjepa_jax.run.checkpoint import Checkpointer

PROFILE_FOLDER = "profile"


class Watchdog:
    """Dumps the stacks of all threads when a step takes too long; a context manager.

    It repeats the dump after each further timeout. It does not end the run: a file
    system may recover, and dead processes are found by their heartbeats.
    """

    def __init__(
        self, workdir: PathLike, timeout_secs: float, *, stream: TextIO | None = None
    ):
        """Prepare the dumps.

        Args:
          workdir: folder of the run, for `stacks_<process>.txt`.
          timeout_secs: longest time without a step; 0 turns the watchdog off.
          stream: also gets the stacks; it needs a file descriptor. None: the standard
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

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def finished(self, step: int) -> None:
        """Record that a step has ended."""
        self._step, self._last = step, time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Allow any time for work that is not a step."""
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
            f"{secs:.0f} s, the last was step {self._step}; stacks of its threads:"
        )
        print(f"{message} (also in {self._path})", file=self._stream, flush=True)
        faulthandler.dump_traceback(self._stream)
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                print(message, file=file, flush=True)
                faulthandler.dump_traceback(file)
                print(file=file)
        except OSError as error:  # the run may hang on the same file system
            print(f"{self._path}: {error}", file=self._stream, flush=True)


class SkipWatch:
    """Reports skipped updates; ends a run that skips too many in a row."""

    def __init__(self, skipped: int, most_in_row: int, checkpointer: Checkpointer):
        """Set the counts.

        Args:
          skipped: updates skipped before.
          most_in_row: skipped updates in a row that end the run.
          checkpointer: for the last saved step, which the message names.
        """
        self._skipped, self._most_in_row = skipped, most_in_row
        self._checkpointer = checkpointer

    def check(self, step: int, values: Mapping[str, Any]) -> None:
        """Check a step's metrics; earlier steps may have been left out.

        Raises:
          UserError: too many updates in a row were skipped.
        """
        skipped = int(values["optim/skipped"])
        in_row = int(values["optim/skipped_in_row"])
        most = int(values["optim/most_skipped_in_row"])
        if most >= self._most_in_row:
            last = self._checkpointer.latest_step()
            saved = "nothing was saved" if last is None else f"step {last} is saved"
            raise UserError(
                f"loss or gradient is not finite, or the loss is a spike, in {most} "
                f"steps in a row, up to step {step}; {saved}: "
                "lower config.optim.learning_rate or clip the gradient "
                "(config.optim.clip_norm) in a new --workdir"
            )
        if skipped > self._skipped:
            distributed.print_on_main(
                f"skipped updates: {skipped - self._skipped} more up to step {step}, "
                f"{in_row} in a row now: loss or gradient not finite, or a spike"
            )
        self._skipped = skipped


class ProfileWindow:
    """Traces steps on the main process for xprof; a context manager.

    The trace shows the numbers of steps, the parts of `TimeAccount` for the host, and
    `target`, `encoder`, `predictor`, `loss`, `optimiser` and `ema` for the device.
    """

    def __init__(self, workdir: PathLike, *, start_step: int, num_steps: int):
        """Plan the trace.

        Args:
          workdir: folder of the run; the trace goes to `profile/` in it.
          start_step: the first traced step, from 1; 0 for no trace.
          num_steps: number of traced steps.
        """
        self._folder = str(pathlib.Path(workdir) / PROFILE_FOLDER)
        self._first, self._last = start_step, start_step + num_steps - 1
        self._is_wanted = start_step > 0 and distributed.is_main()
        self._is_tracing = False

    def __enter__(self) -> "ProfileWindow":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def begin(self, step: int) -> None:
        """Start the trace before its first step."""
        if self._is_wanted and step == self._first:
            options = jax.profiler.ProfileOptions()
            # A trace of every Python call would hide the rest.
            options.python_tracer_level = 0
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._is_tracing = True

    def end(self, step: int, results: Any) -> None:
        """Write the trace after its last step, once the results are ready."""
        if self._is_tracing and step == self._last:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()
