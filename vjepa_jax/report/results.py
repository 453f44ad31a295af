"""Tables of evaluations' results: a row per measure, with intervals where known."""

import math
from collections.abc import Sequence
from typing import Any

from scipy.stats import binomtest

from vjepa_jax.report.run_files import CONFUSION, RESULTS, Run
from vjepa_jax.report.tables import ABSENT, Cell, Table

_MAX_ROWS = 60  # of a table
# Measures that are shown as the interval of another measure, or not at all.
_HIDDEN = ("lower_bound_accuracy", "upper_bound_accuracy", "videos_tested")
# Results of the world that are shares of all clips of its test split.
_TESTED_ON_ALL = ("attentive_accuracy", "linear_accuracy")


def make_tables(runs: Sequence[Run]) -> list[Table]:
    """Make a table of every results file, with all runs in each."""
    names = dict.fromkeys(name for run in runs for name in run.results)
    return [_make_table(runs, name) for name in names]


def _make_table(runs: Sequence[Run], name: str) -> Table:
    of_runs = [_cells(run, name) for run in runs]
    measures = list(dict.fromkeys(m for cells in of_runs for m in cells))
    columns = list(
        dict.fromkeys(c for cells in of_runs for row in cells.values() for c in row)
    )
    nothing = Cell(ABSENT)
    rows = [
        (
            words(measure),
            [
                [cells.get(measure, {}).get(column, nothing) for cells in of_runs]
                for column in columns
            ],
        )
        for measure in measures[:_MAX_ROWS]
    ]
    more = len(measures) - len(rows)
    note = f"{more} more rows are in {name}.json." if more else ""
    heads = ["measure", *map(words, columns)]
    # The probe of the world writes RESULTS without a name.
    title = words(name.removeprefix(RESULTS).lstrip("_") or "world").capitalize()
    return Table(f"{title} ({name}.json)", heads, rows, note, is_prose=False)


def _cells(run: Run, name: str) -> dict[str, dict[str, Cell]]:
    """Return {measure: {column: cell}}; bounds and spreads go into the cells."""
    rows = {
        measure: value if isinstance(value, dict) else {"value": value}
        for measure, value in run.results.get(name, {}).items()
        if measure != "seconds"
    }
    matrices = run.confusions.get(confusion_name(name), {})
    cells: dict[str, dict[str, Cell]] = {}
    for measure, row in rows.items():
        if measure in _HIDDEN:
            continue
        stem = measure.removesuffix("_spread")
        if stem != measure and f"{stem}_accuracy" in rows:
            continue
        cells[measure] = {}
        for column, value in row.items():
            if column == "null_std" and "null_accuracy" in row:
                continue
            interval = _interval(rows, measure, column)
            if not interval and name == RESULTS and measure in _TESTED_ON_ALL:
                interval = _wilson(value, _count(matrices.get(column)))
            cells[measure][column] = Cell(_number(value, measure, column), interval)
    return cells


def confusion_name(results: str) -> str:
    """Return the name of the confusion matrices that belong to a results file."""
    return results.replace(RESULTS, CONFUSION, 1)


def results_name(confusion: str) -> str:
    """Return the name of the results file that confusion matrices belong to."""
    return confusion.replace(CONFUSION, RESULTS, 1)


def _interval(rows: dict[str, dict[str, Any]], measure: str, column: str) -> str:
    """Return the interval of a value, from other rows or columns of its results."""

    def number(name: str) -> float:
        value = rows.get(name, {}).get(column)
        return value if isinstance(value, int | float) else math.nan

    if measure == "accuracy":
        low, high = number("lower_bound_accuracy"), number("upper_bound_accuracy")
        return f"{low:.1%} to {high:.1%}" if low <= high else ""
    if measure.startswith("knn_"):
        return _wilson(number(measure), number("videos_tested"))
    spread = number(measure.removesuffix("accuracy") + "spread")
    if column == "null_accuracy":
        spread = rows[measure].get("null_std", math.nan)
    return f"± {spread:.1%}" if spread >= 0 else ""


def _count(matrix: Any) -> Any:
    """Return the number of videos in a confusion matrix; NaN where there is none."""
    try:
        return sum(map(sum, matrix))
    except TypeError:
        return math.nan


def _wilson(accuracy: Any, total: Any) -> str:
    """Return the 95 % interval of an accuracy on `total` videos."""
    try:
        test = binomtest(round(accuracy * total), total)
    except (TypeError, ValueError):  # unknown, or written by another program
        return ""
    interval = test.proportion_ci(method="wilson")
    return f"{interval.low:.1%} to {interval.high:.1%}"


def _number(value: Any, measure: str, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ABSENT if value is None else str(value)[:80]
    if measure.endswith("accuracy") or column.endswith("accuracy"):
        return f"{value:.1%}"
    if "p_value" in column or column.startswith("p_"):
        return "< 0.001" if value < 0.001 else f"{value:.3f}"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def words(name: str) -> str:
    """Return a key as words."""
    return name.replace("_", " ").replace(" r2", " R²")
