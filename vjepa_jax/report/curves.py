"""Which metrics of a run a page draws as curves, and their titles."""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from vjepa_jax.report.figures import Axis, Figure, Line, make_lines, make_shares
from vjepa_jax.report.run_files import Run
from vjepa_jax.run.goodput import PREFIX

_DASHES = ("solid", "dash")  # of the first and the second run
_MAX_EVALUATION_CHARTS = 24


@dataclasses.dataclass(frozen=True)
class Chart:
    """A figure of all metrics whose names match a pattern."""

    title: str
    pattern: str
    unit: str = ""


GROUPS = {
    "Loss": (
        Chart("Prediction loss", r"train/loss(_\w+)?", "L1 to normalised targets"),
        Chart("Total loss, which is minimised", r"train/total_loss"),
        Chart("Further terms, unweighted", r"train/\w+_term"),
    ),
    "Feature health": (
        Chart("Effective rank of features", r"repr/\w+_effective_rank", "dimensions"),
        Chart("Standard deviation over tokens", r"repr/(target|context)_std"),
        Chart("Cosine of tokens to their mean", r"repr/\w+_cosine"),
        Chart("Spread of predictions / targets", r"repr/predictor_std_ratio"),
    ),
    "Schedules": (
        Chart("Learning rate", r"optim/learning_rate"),
        Chart("Weight decay", r"optim/weight_decay"),
        Chart("EMA momentum of the target", r"optim/ema_momentum"),
    ),
    "Optimisation and speed": (
        Chart("Gradient norm", r"optim/grad_norm_\w+"),
        Chart("Skipped updates so far", r"optim/skipped", "updates"),
        Chart("Speed", r"perf/clips_per_second", "clips/s"),
        Chart("Waiting for data", r"data/wait_fraction", "share of wall time"),
    ),
}


def draw(runs: Sequence[Run], charts: Sequence[Chart]) -> list[Figure]:
    """Draw the charts for which there are metrics, with all runs in each."""
    drawn = (_draw_one(runs, chart) for chart in charts)
    return [figure for figure in drawn if figure is not None]


def draw_evaluations(runs: Sequence[Run]) -> tuple[list[Figure], int]:
    """Draw the results of evaluations during training, `eval/NAME/MEASURE[/COLUMN]`.

    Returns:
      The figures, one per measure, and the number of measures that are not drawn.
    """
    keys = [key.split("/") for run in runs for key in run.scalars("eval/")]
    measures = list(dict.fromkeys("/".join(parts[1:3]) for parts in keys))
    charts = [
        Chart(measure.replace("_", " "), rf"eval/{re.escape(measure)}(/.+)?")
        for measure in measures[:_MAX_EVALUATION_CHARTS]
    ]
    return draw(runs, charts), len(measures) - len(charts)


def draw_wall_time(runs: Sequence[Run]) -> Figure | None:
    """Draw the parts of the wall time; None where no run has recorded them."""
    shares = {}
    for run in runs:
        last = run.metrics[-1] if run.metrics else {}
        parts = {
            key.removeprefix(PREFIX): last[key]
            for key in run.scalars(PREFIX)
            if math.isfinite(last.get(key, math.nan)) and last[key] > 0
        }
        if parts:
            shares[run.label] = dict(sorted(parts.items(), key=lambda x: -x[1]))
    return make_shares("Where the wall time went", shares) if shares else None


def _draw_one(runs: Sequence[Run], chart: Chart) -> Figure | None:
    matching = (
        key
        for run in runs
        for key in run.scalars("")
        if re.fullmatch(chart.pattern, key)
    )
    keys: list[str] = []
    for key in dict.fromkeys(matching):
        # With one mask type the loss is the loss of that mask: drawn once.
        if not any(_are_equal(runs, key, other) for other in keys):
            keys.append(key)
    lines = []
    for run_index, run in enumerate(runs):
        for key_index, key in enumerate(keys):
            x, y = run.curve(key)
            if not x:
                continue
            name = key.split("/", 1)[1].replace("_", " ")
            if len(runs) > 1:
                name = run.label if len(keys) == 1 else f"{run.letter}: {name}"
            # Colours distinguish metrics, dashes distinguish runs. With one metric,
            # colours distinguish runs as well.
            colour = run_index if len(keys) == 1 else key_index
            lines.append(Line(name, x, y, colour, _DASHES[run_index]))
    if not lines:
        return None
    return make_lines(chart.title, lines, Axis("step"), Axis(chart.unit))


def _are_equal(runs: Sequence[Run], key: str, other: str) -> bool:
    return all(
        np.array_equal(run.curve(key), run.curve(other), equal_nan=True) for run in runs
    )
