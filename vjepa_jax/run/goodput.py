"""Account for the wall time of a run, over all its restarts."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

import jax

PREFIX = "goodput/"
WALL_SECONDS = "perf/wall_seconds"
# `lost` is the time of steps that a restart had to repeat.
Part = Literal["startup", "compile", "data", "step", "checkpoint", "evaluation", "lost"]
PARTS: tuple[Part, ...] = get_args(Part)


class TimeAccount:
    """Measures how the wall time is spent on `PARTS`; the rest counts as `other`.

    Steps run asynchronously: the host spends their time where it waits for results, so
    that wait must also be measured as `step`.

    Attributes:
      seconds: {part: measured so far}.
    """

    def __init__(self) -> None:
        """Start to count."""
        self._began = time.perf_counter()
        self._earlier_seconds = self._measured_earlier = 0.0
        self.seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def measure(self, part: Part) -> Iterator[None]:
        """Add the time spent inside to one of `PARTS`; do not nest.

        A profile shows it by the same name.
        """
        start = time.perf_counter()
        try:
            with jax.profiler.TraceAnnotation(part):
                yield
        finally:
            self.seconds[part] += time.perf_counter() - start

    def end_startup(self) -> None:
        """Add the time since this start that no part has measured to `startup`."""
        measured = sum(self.seconds.values()) - self._measured_earlier
        self.seconds["startup"] += time.perf_counter() - self._began - measured

    def add_earlier(self, rows: Sequence[Mapping[str, float]], start_step: int) -> None:
        """Add the time of the run before it was interrupted.

        Args:
          rows: its metrics, in the order written. The time after the last row up to
            `start_step` is lost.
          start_step: of the checkpoint from which the run continues.
        """
        if not rows:
            return
        kept = next((row for row in reversed(rows) if row["step"] <= start_step), {})
        kept_seconds = kept.get(WALL_SECONDS, 0.0)
        earlier = {k: kept_seconds * kept.get(PREFIX + k, 0.0) for k in PARTS}
        self._earlier_seconds = rows[-1].get(WALL_SECONDS, 0.0)
        earlier["lost"] += self._earlier_seconds - kept_seconds
        self._measured_earlier = sum(earlier.values())
        for part, secs in earlier.items():
            self.seconds[part] += secs

    def total_seconds(self) -> float:
        """Return the wall time of the run, with its earlier parts."""
        return self._earlier_seconds + time.perf_counter() - self._began

    def scalars(self) -> dict[str, float]:
        """Return the shares `goodput/PART`, which add up to 1, and the wall time."""
        total = self.total_seconds()
        shares: dict[str, float] = {
            part: seconds / total for part, seconds in self.seconds.items()
        }
        shares["other"] = max(0.0, 1.0 - sum(shares.values()))
        return {PREFIX + k: v for k, v in shares.items()} | {WALL_SECONDS: total}

    def summary(self) -> str:
        """Return e.g. `1 h 2 m of wall time: step 91.0%, data 6.0%, other 3.0%`."""
        shares = {
            name.removeprefix(PREFIX): share
            for name, share in self.scalars().items()
            if name.startswith(PREFIX) and share >= 0.0005
        }
        largest_first = sorted(shares.items(), key=lambda item: -item[1])
        of_parts = ", ".join(f"{name} {share:.1%}" for name, share in largest_first)
        return f"{duration(self.total_seconds())} of wall time: {of_parts}"


def duration(seconds: float) -> str:
    """Format the two leading units, e.g. `3 d 4 h`, `1 m 20 s`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = [(days, "d"), (hours, "h"), (minutes, "m"), (seconds, "s")]
    while len(units) > 1 and units[0][0] == 0:
        units.pop(0)
    return " ".join(f"{count} {unit}" for count, unit in units[:2])
