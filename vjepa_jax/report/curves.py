"""Which curves of a run's metrics a page shows, and what they are called."""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from vjepa_jax.report import figures
from vjepa_jax.report.figures import Figure, Line
from vjepa_jax.report.run_files import Run
from vjepa_jax.run.goodput import PREFIX

_DASHES = ("solid", "dash")  # of the first and the second run
_MAX_OF_EVALUATIONS = 24  # charts; a run may evaluate more than can be looked at


@dataclasses.dataclass(frozen=True)
class _Chart:
    """A figure of all metrics whose whole names match a pattern."""

    title: str
    pattern: str
    unit: str = ""


GROUPS = {
    "Loss": (
        _Chart("Prediction loss", r"train/loss(_\w+)?", "L1 to normalised targets"),
        _Chart("What is minimised", r"train/total_loss"),
        _Chart("Further terms, unweighted", r"train/\w+_term"),
    ),
    "Feature health": (
        _Chart("Effective rank of features", r"repr/\w+_effective_rank", "dimensions"),
        _Chart("Standard deviation over tokens", r"repr/(target|context)_std"),
        _Chart("Cosine of tokens to their mean", r"repr/\w+_cosine"),
        _Chart("Spread of predictions / targets", r"repr/predictor_std_ratio"),
    ),
    "Schedules": (
        _Chart("Learning rate", r"optim/learning_rate"),
        _Chart("Weight decay", r"optim/weight_decay"),
        _Chart("EMA momentum of the target", r"optim/ema_momentum"),
    ),
    "Optimisation and speed": (
        _Chart("Gradient norm", r"optim/grad_norm_\w+"),
        _Chart("Updates refused so far", r"optim/skipped", "updates"),
        _Chart("Speed", r"perf/clips_per_second", "clips/s"),
        _Chart("Waiting for data", r"data/wait_fraction", "share of wall time"),
    ),
}


def draw(runs: Sequence[Run], charts: Sequence[_Chart]) -> list[Figure]:
    """Draw the charts of which the runs have metrics, both runs in each."""
    drawn = (_draw_one(runs, chart) for chart in charts)
    return [figure for figure in drawn if figure is not None]


def evaluations(runs: Sequence[Run]) -> tuple[list[Figure], int]:
    """Draw what evaluations during training measured, `eval/NAME/MEASURE[/COLUMN]`.

    Returns:
      (figures, one per measure; how many more there would be).
    """
    keys = [key.split("/") for run in runs for key in run.scalars("eval/")]
    measures = dict.fromkeys("/".join(parts[1:3]) for parts in keys)
    charts = [
        _Chart(measure.replace("_", " "), rf"eval/{re.escape(measure)}(/.+)?")
        for measure in measures
    ]
    return draw(runs, charts[:_MAX_OF_EVALUATIONS]), max(
        0, len(charts) - _MAX_OF_EVALUATIONS
    )


def goodput(runs: Sequence[Run]) -> Figure | None:
    """Draw where the wall time went; None where no run has noted it."""
    of_runs = {}
    for run in runs:
        last = run.metrics[-1] if run.metrics else {}
        parts = {
            key.removeprefix(PREFIX): last[key]
            for key in run.scalars(PREFIX)
            if key in last
        }
        known = {k: v for k, v in parts.items() if math.isfinite(v) and v > 0}
        if known:
            ordered = sorted(known.items(), key=lambda item: -item[1])
            of_runs[run.label] = dict(ordered)
    return figures.shares("Where the wall time went", of_runs) if of_runs else None


def _distinct(runs: Sequence[Run], keys: list[str]) -> list[str]:
    """Drop metrics that repeat another: with one mask type the loss is its mask's."""
    kept: list[str] = []
    for key in keys:
        is_new = all(
            any(
                not np.array_equal(run.curve(key), run.curve(other), equal_nan=True)
                for run in runs
            )
            for other in kept
        )
        if is_new:
            kept.append(key)
    return kept


def _draw_one(runs: Sequence[Run], chart: _Chart) -> Figure | None:
    keys = list(
        dict.fromkeys(
            key
            for run in runs
            for key in run.scalars("")
            if re.fullmatch(chart.pattern, key)
        )
    )
    keys = _distinct(runs, keys)
    drawn = []
    for number, run in enumerate(runs):
        for place, key in enumerate(keys):
            x, y = run.curve(key)
            if not x:
                continue
            name = key.split("/", 1)[1].replace("_", " ")
            if len(runs) > 1:
                name = run.label if len(keys) == 1 else f"{run.letter}: {name}"
            # One metric: runs differ in colour. Several: metrics do, and runs in dash.
            colour = number if len(keys) == 1 else place
            drawn.append(Line(name, x, y, colour, _DASHES[number]))
    if not drawn:
        return None
    return figures.lines(chart.title, drawn, y_title=chart.unit)
