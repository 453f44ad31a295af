"""Metrics of a run: files, console line, speed. Only this file imports TensorBoard.

A metric's *step* is the number of updates finished when it was measured. A run resumed
from the checkpoint of step k thus repeats exactly the metrics of steps above k.
"""

import json
import math
import pathlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
import numpy as np

from vjepa_jax.base import files
from vjepa_jax.base.files import PathLike
from vjepa_jax.data.stream.bad_videos import REASONS
from vjepa_jax.parallel import distributed
from vjepa_jax.run.goodput import TimeAccount, duration

FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricWriter:
    """Writes scalars to JSON lines, TensorBoard and the console; a context manager.

    TensorBoard also gets images. Only the main process writes.
    """

    def __init__(
        self,
        workdir: PathLike,
        *,
        total_steps: int,
        start_step: int = 0,
        stream: TextIO | None = None,
    ):
        """Open the files.

        Args:
          workdir: local folder of the run, made if it is missing.
          total_steps: updates of the run, for the console line.
          start_step: updates already finished. Metrics of later steps, from before an
            interruption, are removed, since they are measured again.
          stream: for the console line; None: the standard error output.
        """
        self._is_main = distributed.is_main()
        if not self._is_main:
            return
        import tensorboardX  # only here, since it imports PyTorch if that is installed

        folder = pathlib.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        _drop_after(folder / FILE, start_step)
        self._file = open(folder / FILE, "a", encoding="utf-8")  # noqa: SIM115
        self._tensorboard = tensorboardX.SummaryWriter(
            str(folder / TENSORBOARD_FOLDER),
            # From this step on, TensorBoard hides what earlier processes wrote.
            purge_step=start_step + 1,
            flush_secs=10,
        )
        self._progress = ProgressLine(total_steps, stream or sys.stderr)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(
        self, step: int, scalars: Mapping[str, float], lines: Sequence[str] = ()
    ) -> None:
        """Write the scalars measured at a step.

        Args:
          step: number of finished updates.
          scalars: {name: number or array of one element}. NaN and infinity are written
            as null, since JSON has neither.
          lines: printed on the console instead of the progress.
        """
        if not self._is_main:
            return
        values = {name: float(value) for name, value in scalars.items()}
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": int(step)} | finite) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        if lines:
            self._progress.print_lines(lines)
        else:
            self._progress.show(step, values)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Write images, {name: uint8 [H, W, 3]}, to TensorBoard."""
        if self._is_main:
            for name, pixels in images.items():
                self._tensorboard.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Close the files and end the console line."""
        if not self._is_main:
            return
        self._progress.close()
        self._tensorboard.close()
        self._file.close()


def read_metrics(path: PathLike) -> list[dict[str, float]]:
    """Read the metrics of a run.

    Args:
      path: a workdir, or its `metrics.jsonl`.

    Returns:
      One dictionary per line, in the order written: `step` (int) and the scalars
      measured then; null is read as NaN. A line cut off by a kill is skipped.

    Raises:
      FileNotFoundError: no such file.
    """
    file = pathlib.Path(path)
    if file.is_dir():
        file = file / FILE
    rows = [row for _, row in _rows(file)]
    return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]


def earlier_rows(folder: pathlib.Path) -> list[dict[str, float]]:
    """Return the metrics that a run wrote before it was interrupted."""
    return read_metrics(folder) if (folder / FILE).exists() else []


# Metrics on the console line, in this order; the time left follows.
_SHOWN = {
    "train/loss": "loss {:.4f}",
    "optim/learning_rate": "learning rate {:.2e}",
    "perf/clips_per_second": "{:.1f} clips/s",
    "data/wait_fraction": "data wait {:.0%}",
}


class ProgressLine:
    """One line about the progress of a run.

    On a terminal it is overwritten; elsewhere each update is a new line.
    """

    def __init__(self, total_steps: int, stream: TextIO):
        """Show progress towards `total_steps` updates on a stream."""
        self._total_steps = total_steps
        self._stream = stream
        self._in_place = stream.isatty()
        self._width = 0

    def show(self, step: int, scalars: Mapping[str, float]) -> None:
        """Show the step and the known scalars; others are ignored."""
        line = self.format(step, scalars)
        if self._in_place:
            # Blanks overwrite the rest of a longer line.
            self._stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def print_lines(self, lines: Sequence[str]) -> None:
        """End the current line and print others below it."""
        self.close()
        self._stream.writelines(f"{line}\n" for line in lines)
        self._stream.flush()

    def close(self) -> None:
        """End the current line."""
        if self._in_place and self._width:
            self._stream.write("\n")
            self._stream.flush()
        self._width = 0

    def format(self, step: int, scalars: Mapping[str, float]) -> str:
        """Format the line, e.g. `step 20/100  loss 0.4321  left 1 m 20 s`."""
        parts = [f"step {step}/{self._total_steps}"]
        for name, template in _SHOWN.items():
            if name in scalars:
                parts.append(template.format(scalars[name]))
        if "perf/seconds_left" in scalars:
            parts.append("left " + duration(scalars["perf/seconds_left"]))
        return "  ".join(parts)


class StepClock:
    """Measures speed and shares of the wall time between two log steps."""

    def __init__(
        self,
        account: TimeAccount,
        *,
        total_steps: int,
        batch_size: int,
        start_step: int = 0,
        flops_per_clip: float | None = None,
        peak_flops: float | None = None,
    ):
        """Start the first window.

        Args:
          account: the time account of the loop.
          total_steps: updates of the run.
          batch_size: clips per update, over all processes.
          start_step: updates already finished.
          flops_per_clip: of one update, see `flops.train_step_flops`; None: unknown.
          peak_flops: FLOP/s of all devices of the run together; None: unknown.
        """
        self._account = account
        self._total_steps = total_steps
        self._batch_size = batch_size
        self._flops_per_clip = flops_per_clip
        self._peak_flops = peak_flops
        self._last_step = start_step
        self._num_windows = 0
        self._seconds_per_step = math.nan
        self._start_window()

    def _start_window(self) -> None:
        self._window_start = time.perf_counter()
        self._before = dict(self._account.seconds)

    def window(self, step: int) -> dict[str, float]:
        """End the window at `step` finished updates and start the next.

        Returns:
          `perf/steps_per_second`, `perf/clips_per_second`, `perf/seconds_left` (an
          estimate for the rest of the run); shares of the window's wall time
          `data/wait_fraction`, `perf/step_fraction`, `perf/checkpoint_fraction`,
          `perf/evaluation_fraction` and `perf/other_fraction`; with `flops_per_clip`
          `perf/tflops_per_second` (1e12, all devices together) and, with `peak_flops`,
          `perf/mfu` (0 to 1).

        Raises:
          ValueError: no update was finished in this window.
        """
        num_steps = step - self._last_step
        if num_steps <= 0:
            raise ValueError(f"window ends at {step}, but began at {self._last_step}")
        elapsed = time.perf_counter() - self._window_start
        steps_per_second = num_steps / elapsed
        spent = {k: v - self._before[k] for k, v in self._account.seconds.items()}
        scalars = {
            "perf/steps_per_second": steps_per_second,
            "perf/clips_per_second": steps_per_second * self._batch_size,
            "perf/seconds_left": self._estimate_left(step, elapsed / num_steps),
            "data/wait_fraction": spent["data"] / elapsed,
            "perf/step_fraction": spent["step"] / elapsed,
            "perf/checkpoint_fraction": spent["checkpoint"] / elapsed,
            "perf/evaluation_fraction": spent["evaluation"] / elapsed,
            "perf/other_fraction": max(0.0, 1.0 - sum(spent.values()) / elapsed),
        }
        if self._flops_per_clip is not None:
            flops = self._flops_per_clip * scalars["perf/clips_per_second"]
            scalars["perf/tflops_per_second"] = flops / 1e12
            if self._peak_flops is not None:
                scalars["perf/mfu"] = flops / self._peak_flops
        self._last_step = step
        self._start_window()
        return scalars

    def _estimate_left(self, step: int, seconds_per_step: float) -> float:
        # The first window contains the slow start, so the second replaces it. From
        # then on the speed is smoothed, since one slow window predicts little.
        self._num_windows += 1
        weight = 1.0 if self._num_windows <= 2 else 0.3
        previous = 0.0 if weight == 1.0 else self._seconds_per_step
        self._seconds_per_step = weight * seconds_per_step + (1 - weight) * previous
        return self._seconds_per_step * (self._total_steps - step)


def bad_video_scalars(step: int, counts: Mapping[str, int]) -> dict[str, int]:
    """Sum the unreadable videos of all processes; every process calls it.

    Args:
      step: of the log.
      counts: {reason: videos of this process}.

    Returns:
      `data/bad_videos` and `data/bad_REASON` of reasons that occurred.
    """
    sums = distributed.sum_on_main(
        f"bad_videos/{step}", [counts[r] for r in REASONS], distributed.WAIT_SECS
    )
    by_reason = zip(REASONS, sums, strict=True)
    return {"data/bad_videos": sum(sums)} | {
        f"data/bad_{reason}": count for reason, count in by_reason if count
    }


def memory_scalars() -> dict[str, float]:
    """Return the peak memory since the start of this process, in GiB.

    `perf/host_peak_gib` is resident memory without workers; `perf/device_peak_gib`, of
    the fullest local device, is absent on devices that do not report it.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    scalars = {"perf/host_peak_gib": peak * unit / 2**30}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        scalars["perf/device_peak_gib"] = max(peaks) / 2**30
    return scalars


def _rows(file: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the complete lines of a metrics file, as text and as dictionaries."""
    with open(file, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            is_row = isinstance(row, dict) and isinstance(row.get("step"), int)
            if line.endswith("\n") and is_row:
                yield line, row


def _drop_after(file: pathlib.Path, step: int) -> None:
    """Remove lines of later steps, and incomplete ones, in one atomic replacement."""
    if not file.exists():
        return
    kept = "".join(line for line, row in _rows(file) if row["step"] <= step)
    files.write_whole(file, kept)
