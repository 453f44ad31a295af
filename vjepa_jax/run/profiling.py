"""A trace of some steps of a run, for xprof or TensorBoard."""

import pathlib
from typing import Any

import jax

from vjepa_jax.parallel import distributed

FOLDER = "profile"


class ProfileWindow:
    """Traces steps on the main process; a context manager.

    Steps have their number in the trace, host work the name under which its time is
    booked, device work the names `target`, `encoder`, `predictor`, `loss`, `optimiser`
    and `ema`.
    """

    def __init__(self, workdir: str, *, start_step: int, num_steps: int):
        """Plans the trace.

        Args:
          workdir: folder of the run; the trace goes to `profile/` in it.
          start_step: the first step traced, from 1; 0: none.
          num_steps: how many.
        """
        self._folder = str(pathlib.Path(workdir) / FOLDER)
        self._first, self._last = start_step, start_step + num_steps - 1
        self._is_wanted = start_step > 0 and distributed.is_main()
        self._is_tracing = False

    def __enter__(self) -> "ProfileWindow":
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def begin(self, step: int) -> None:
        """Starts the trace if this step, about to be computed, is the first of it."""
        if self._is_wanted and step == self._first:
            options = jax.profiler.ProfileOptions()
            # Every Python call of several steps would bury what they are made of.
            options.python_tracer_level = 0
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._is_tracing = True

    def end(self, step: int, results: Any) -> None:
        """Writes the trace if this step is its last, once its results are there."""
        if self._is_tracing and step == self._last:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()
