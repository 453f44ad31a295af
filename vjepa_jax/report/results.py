"""Tables of what evaluations found: a row per measure, with intervals where known."""

import math
from collections.abc import Sequence
from typing import Any

from scipy.stats import binomtest

from vjepa_jax.report.run_files import CONFUSION, RESULTS, Run
from vjepa_jax.report.tables import ABSENT, Cell, Table

_MAX_ROWS = 60  # of a table
# Rows that only say how sure others are.
_OF_INTERVALS = ("lower_bound_accuracy", "upper_bound_accuracy", "videos_tested")
# Of the world, both are shares of all clips of its test split.
_OF_ALL_TEST_CLIPS = ("attentive_accuracy", "linear_accuracy")


def make_tables(runs: Sequence[Run]) -> list[Table]:
    """Make the table of every results file; runs that have the same share it."""
    names = dict.fromkeys(name for run in runs for name in run.results)
    return [_results_table(runs, name) for name in names]


def _results_table(runs: Sequence[Run], name: str) -> Table:
    of_runs = [_cells(run, name) for run in runs]
    measures = list(dict.fromkeys(m for cells in of_runs for m in cells))
    columns = list(
        dict.fromkeys(c for cells in of_runs for row in cells.values() for c in row)
    )
    nothing = Cell(ABSENT)
    rows = [
        (
            spoken(measure),
            [
                [cells.get(measure, {}).get(column, nothing) for cells in of_runs]
                for column in columns
            ],
        )
        for measure in measures[:_MAX_ROWS]
    ]
    left_out = len(measures) - len(rows)
    note = f"{left_out} more rows are in {name}.json." if left_out else ""
    heads = ["measure", *map(spoken, columns)]
    return Table(f"{name}.json", heads, rows, note, is_prose=False)


def _cells(run: Run, name: str) -> dict[str, dict[str, Cell]]:
    """Return {measure: {column: cell}}; bounds and spreads go into the cells."""
    found = {
        measure: value if isinstance(value, dict) else {"value": value}
        for measure, value in run.results.get(name, {}).items()
        if measure != "seconds"
    }
    matrices = run.confusions.get(confusion_name(name), {})
    out: dict[str, dict[str, Cell]] = {}
    for measure, row in found.items():
        if measure in _OF_INTERVALS:
            continue
        if measure.endswith("_spread") and _accuracy_of(measure) in found:
            continue
        cells = {}
        for column, value in row.items():
            if column == "null_std" and "null_accuracy" in row:
                continue
            interval = _interval(found, measure, column)
            if not interval and name == RESULTS and measure in _OF_ALL_TEST_CLIPS:
                interval = _wilson(value, _count(matrices.get(column)))
            cells[column] = Cell(_number(value, measure, column), interval)
        out[measure] = cells
    return out


def confusion_name(results_name: str) -> str:
    """Return the name of the confusion matrices that belong to a results file."""
    return results_name.replace(RESULTS, CONFUSION, 1)


def results_name(confusion: str) -> str:
    """Return the name of the results file that confusion matrices belong to."""
    return confusion.replace(CONFUSION, RESULTS, 1)


def _accuracy_of(spread: str) -> str:
    return spread.removesuffix("spread") + "accuracy"


def _interval(found: dict[str, dict], measure: str, column: str) -> str:
    """Say how sure a value is by what stands beside it in the results."""

    def share(name):
        value = found.get(name, {}).get(column)
        return value if isinstance(value, int | float) else math.nan

    if measure == "accuracy":
        low, high = share("lower_bound_accuracy"), share("upper_bound_accuracy")
        return f"{low:.1%} to {high:.1%}" if low <= high else ""
    if measure.startswith("knn_"):
        return _wilson(share(measure), share("videos_tested"))
    spread = share(measure.removesuffix("accuracy") + "spread")
    if column == "null_accuracy":
        spread = found[measure].get("null_std", math.nan)
    return f"± {spread:.1%}" if spread >= 0 else ""


def _count(matrix: Any) -> Any:
    """Return how many videos a confusion matrix counts; NaN where it is none."""
    try:
        return sum(map(sum, matrix))
    except TypeError:
        return math.nan


def _wilson(accuracy: Any, total: Any) -> str:
    """Return the 95 % interval of an accuracy on so many videos."""
    try:
        found = binomtest(round(accuracy * total), total).proportion_ci(method="wilson")
    except (TypeError, ValueError):  # none, or of another program
        return ""
    return f"{found.low:.1%} to {found.high:.1%}"


def _number(value: Any, measure: str, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ABSENT if value is None else str(value)[:80]
    if measure.endswith("accuracy") or column.endswith("accuracy"):
        return f"{value:.1%}"
    if "p_value" in column or column.startswith("p_"):
        return "< 0.001" if value < 0.001 else f"{value:.3f}"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def spoken(name: str) -> str:
    """Turn a key into words."""
    return name.replace("_", " ").replace(" r2", " R²")
