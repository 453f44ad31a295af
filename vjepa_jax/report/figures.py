"""Figures of a page, as data for Plotly's script; page.js adds the page's colours."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_MAX_POINTS = 1000  # of a line
_DIGITS = 5  # significant digits of the numbers in the page
_MAX_LABELLED = 20  # classes of a confusion matrix whose cells show numbers


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a figure.

    Attributes:
      name: in the legend.
      x, y: its points; NaN is a gap.
      colour: index into the page's colours, which repeat.
      dash: `solid`, `dash` or `dot`.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dash: str = "solid"


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis: its title, with a unit, and its range; None: the range of the data."""

    title: str = ""
    range: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
      title: heading.
      summary: its content in words, for readers who cannot see it.
      plot: `{"data", "layout"}` for Plotly; a trace's `meta` is its colour's index.
      height: in pixels.
      is_wide: whether it takes the whole width of the page.
    """

    title: str
    summary: str
    plot: dict[str, Any]
    height: int = 230
    is_wide: bool = False


def make_lines(
    title: str,
    lines: Sequence[Line],
    x_axis: Axis,
    y_axis: Axis,
    *,
    markers: bool = False,
    height: int = 230,
) -> Figure:
    """Draw lines over a common axis.

    Args:
      title: of the figure.
      lines: what is drawn; long lines are thinned, see `thinned`.
      x_axis, y_axis: axes.
      markers: whether to mark the points.
      height: in pixels.
    """
    traces = []
    for line in lines:
        x, y = thinned(np.asarray(line.x, float), np.asarray(line.y, float))
        traces.append(
            {
                "type": "scatter",
                "x": _plain(x),
                "y": _plain(y),
                "name": line.name,
                "mode": "lines+markers" if markers else "lines",
                "line": {"dash": line.dash, "width": 2},
                "marker": {"size": 5},
                "meta": line.colour,
            }
        )
    y_axis = Axis(y_axis.title, y_axis.range or _range_of_constant(lines))
    layout: dict[str, Any] = {
        "hovermode": "x unified",
        "showlegend": len(lines) > 1,
        "xaxis": _layout(x_axis),
        "yaxis": _layout(y_axis),
    }
    summary = " ".join([f"{title}.", *map(_summary, lines)])
    return Figure(title, summary, {"data": traces, "layout": layout}, height)


def _layout(axis: Axis) -> dict[str, Any]:
    layout: dict[str, Any] = {"title": {"text": axis.title}}
    return layout | {"range": axis.range} if axis.range else layout


def _range_of_constant(lines: Sequence[Line]) -> tuple[float, float] | None:
    """Return 0 to twice the value if all lines have one value, else None."""
    values = {y for line in lines for y in line.y if math.isfinite(y)}
    if len(values) != 1:
        return None
    (value,) = values
    return (min(0.0, 2 * value), max(0.0, 2 * value)) if value else (0.0, 1.0)


def _summary(line: Line) -> str:
    known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    if not known:
        return f"{line.name}: never finite."
    (first, start), (last, end) = known[0], known[-1]
    return f"{line.name}: {start:.4g} at {first:g}, {end:.4g} at {last:g}."


def make_shares(title: str, shares: dict[str, dict[str, float]]) -> Figure:
    """Draw shares of a whole, a bar per run.

    Args:
      title: of the figure.
      shares: {run: {part: share, 0 to 1}}.
    """
    names = list(shares)
    parts = dict.fromkeys(part for run in shares.values() for part in run)
    traces = []
    for number, part in enumerate(parts):
        values = [shares[name].get(part, 0.0) for name in names]
        traces.append(
            {
                "type": "bar",
                "x": _plain(np.array(values)),
                "y": names,
                "name": part,
                "orientation": "h",
                "meta": number,
                "text": [f"{part} {v:.0%}" if v >= 0.08 else "" for v in values],
                "textposition": "inside",
                "insidetextanchor": "middle",
                "hovertemplate": f"{part}: %{{x:.1%}}<extra></extra>",
            }
        )
    layout = {
        "barmode": "stack",
        "bargap": 0.35,
        "xaxis": {"tickformat": ".0%", "range": (0, 1)},
        "yaxis": {"visible": len(names) > 1, "autorange": "reversed"},
    }
    summary = "; ".join(
        f"{name}: " + ", ".join(f"{part} {v:.1%}" for part, v in run.items())
        for name, run in shares.items()
    )
    plot = {"data": traces, "layout": layout}
    return Figure(title, f"{title}. {summary}.", plot, 100 + 50 * len(names), True)


def make_confusion(
    title: str, matrix: Sequence[Sequence[int]], names: list[str]
) -> Figure:
    """Draw a confusion matrix.

    Args:
      title: of the figure.
      matrix: int [K, K], videos by true class (rows) and predicted class (columns).
      names: of the classes.
    """
    counts = np.asarray(matrix)
    rates = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    is_small = len(names) <= _MAX_LABELLED
    heatmap = {
        "type": "heatmap",
        "z": [_plain(row) for row in rates],
        "customdata": counts.tolist(),
        "x": names,
        "y": names,
        "zmin": 0,
        "zmax": 1,
        "xgap": 1 if is_small else 0,
        "ygap": 1 if is_small else 0,
        "showscale": False,
        "textfont": {"size": 9},
        "hovertemplate": "%{y} predicted as %{x}: %{customdata} videos, %{z:.1%}"
        "<extra></extra>",
    }
    if is_small:
        percent = [[f"{100 * v:.0f}" if v >= 0.005 else "" for v in r] for r in rates]
        heatmap |= {"text": percent, "texttemplate": "%{text}"}
    axis = {"type": "category"}
    layout = {
        "xaxis": axis | {"title": {"text": "predicted class"}, "tickangle": -45},
        "yaxis": axis | {"title": {"text": "true class"}, "autorange": "reversed"},
    }
    right = np.trace(counts) / max(counts.sum(), 1)
    summary = [f"{title}: {right:.1%} are right."]
    mistakes = rates - np.diag(np.diag(rates))
    for index in np.argsort(-mistakes, axis=None)[:3]:
        row, column = np.unravel_index(index, mistakes.shape)
        if (rate := mistakes[row, column]) > 0:
            summary.append(f"{rate:.0%} of {names[row]} are taken for {names[column]}.")
    plot = {"data": [heatmap], "layout": layout}
    return Figure(title, " ".join(summary), plot, 470)


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return about `_MAX_POINTS` of a line's points, or fewer.

    The lowest and the highest point of each stretch stay, so that no spike is lost. A
    stretch that contains a NaN keeps one NaN.
    """
    if len(x) <= _MAX_POINTS:
        return x, y
    indices = [0, len(x) - 1]
    for part in np.array_split(np.arange(len(x)), _MAX_POINTS // 3):
        values = y[part]
        is_gap = np.isnan(values)
        indices += part[is_gap][:1].tolist()
        if not is_gap.all():
            indices += [part[np.nanargmin(values)], part[np.nanargmax(values)]]
    kept = np.unique(indices)
    return x[kept], y[kept]


def _plain(values: np.ndarray) -> list[float | None]:
    """Return rounded numbers for JSON, which has no NaN."""
    return [
        float(f"{v:.{_DIGITS}g}") if math.isfinite(v) else None for v in values.tolist()
    ]
