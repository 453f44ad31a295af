"""Figures of a page, as what Plotly's script draws; their colours follow the page."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

# Neighbours stay apart for colour-blind eyes, on white and on black. The parts of a
# run's wall time need as many.
_LIGHT = (
    *("#1f5fbf", "#c4540a", "#177a5b", "#9a3f9a"),
    *("#8a6d00", "#5b6470", "#b02a4a", "#0b8aa6"),
)
_DARK = (
    *("#7fb2ff", "#ff9e57", "#5fd3ab", "#e49ae4"),
    *("#e3c34d", "#a9b2bd", "#ff8fa6", "#6fd8ef"),
)
_MAX_POINTS = 1000  # of a line
_DIGITS = 5  # significant ones that the page holds
_LABELLED_CLASSES = 20  # more would not be legible on a confusion matrix


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a figure.

    Attributes:
      name: in the legend.
      x, y: points; NaN is a gap.
      colour: number of its colour, counted round.
      dash: of the stroke: `solid`, `dash` or `dot`.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dash: str = "solid"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
      title: its heading.
      summary: in words, for those who do not see it.
      plot: `{"data", "layout"}` for Plotly; colours are names of `themes`.
      height: in pixels.
    """

    title: str
    summary: str
    plot: dict[str, Any]
    height: int = 230


def themes() -> dict[str, dict[str, Any]]:
    """Return what differs between light and dark pages: {"light", "dark"}."""
    colours = {
        "light": (_LIGHT, "#20262e", "#dfe3e8", "#ffffff", "#1f5fbf"),
        "dark": (_DARK, "#dfe5ec", "#353c46", "#1b2027", "#7fb2ff"),
    }
    return {
        name: {
            "colours": series,
            "ink": ink,
            "grid": grid,
            "surface": surface,
            "scale": [[0, surface], [1, accent]],
        }
        for name, (series, ink, grid, surface, accent) in colours.items()
    }


def lines(
    title: str,
    drawn: Sequence[Line],
    *,
    x_title: str = "step",
    y_title: str = "",
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    markers: bool = False,
    height: int = 230,
) -> Figure:
    """Draw lines over a common axis.

    Args:
      title: of the figure.
      drawn: the lines; long ones are thinned, their extremes kept.
      x_title, y_title: of the axes, with units.
      x_range, y_range: of the axes; None: what the data need.
      markers: show the points.
      height: in pixels.
    """
    figure, said = go.Figure(), []
    y_range = y_range or _range_of_constant(drawn)
    for line in drawn:
        x, y = thinned(np.asarray(line.x, float), np.asarray(line.y, float))
        figure.add_scatter(
            x=_plain(x),
            y=_plain(y),
            name=line.name,
            mode="lines+markers" if markers else "lines",
            line={"dash": line.dash, "width": 2, "shape": "linear"},
            marker={"size": 5},
            meta=line.colour,
        )
        said.append(_in_words(line))
    figure.update_layout(
        hovermode="x unified",
        showlegend=len(drawn) > 1,
        xaxis={"title": {"text": x_title}, "range": x_range},
        yaxis={"title": {"text": y_title}, "range": y_range},
    )
    return Figure(title, f"{title}. " + " ".join(said), _plot(figure), height)


def _range_of_constant(drawn: Sequence[Line]) -> tuple[float, float] | None:
    """Return from 0 to twice a value that never changes, which has no range."""
    values = {y for line in drawn for y in line.y if math.isfinite(y)}
    if len(values) != 1:
        return None
    (value,) = values
    return (min(0.0, 2 * value), max(0.0, 2 * value)) if value else (0.0, 1.0)


def _in_words(line: Line) -> str:
    known = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    if not known:
        return f"{line.name}: never finite."
    (first, start), (last, end) = known[0], known[-1]
    return f"{line.name}: {start:.4g} at {first:g}, {end:.4g} at {last:g}."


def shares(title: str, of_runs: dict[str, dict[str, float]]) -> Figure:
    """Draw shares of a whole as one bar per run.

    Args:
      title: of the figure.
      of_runs: {run: {part: share, 0 to 1}}.
    """
    figure = go.Figure()
    parts = list(dict.fromkeys(part for run in of_runs.values() for part in run))
    names = list(of_runs)
    for number, part in enumerate(parts):
        values = [of_runs[name].get(part, 0.0) for name in names]
        figure.add_bar(
            x=_plain(np.array(values)),
            y=names,
            name=part,
            orientation="h",
            meta=number,
            text=[f"{part} {v:.0%}" if v >= 0.08 else "" for v in values],
            textposition="inside",
            insidetextanchor="middle",
            hovertemplate=f"{part}: %{{x:.1%}}<extra></extra>",
        )
    figure.update_layout(
        barmode="stack",
        bargap=0.35,
        xaxis={"tickformat": ".0%", "range": (0, 1)},
        yaxis={"visible": len(names) > 1, "autorange": "reversed"},
    )
    summary = "; ".join(
        f"{name}: " + ", ".join(f"{part} {v:.1%}" for part, v in run.items())
        for name, run in of_runs.items()
    )
    height = 130 + 50 * len(names)
    return Figure(title, f"{title}. {summary}.", _plot(figure), height)


def confusion(title: str, matrix: Sequence[Sequence[int]], names: list[str]) -> Figure:
    """Draw a confusion matrix.

    Args:
      title: of the figure.
      matrix: int [K, K], videos by true class (rows) and class said (columns).
      names: of the classes.
    """
    counts = np.asarray(matrix)
    of_class = counts.sum(1, keepdims=True)
    rates = counts / np.maximum(of_class, 1)
    is_small = len(names) <= _LABELLED_CLASSES
    figure = go.Figure(
        go.Heatmap(
            z=[_plain(row) for row in rates],
            customdata=counts.tolist(),
            x=names,
            y=names,
            zmin=0,
            zmax=1,
            xgap=1 if is_small else 0,
            ygap=1 if is_small else 0,
            showscale=False,
            text=[[f"{100 * v:.0f}" if v >= 0.005 else "" for v in r] for r in rates],
            texttemplate="%{text}" if is_small else None,
            textfont={"size": 9},
            hovertemplate="%{y} taken for %{x}: %{customdata} videos, %{z:.1%}"
            "<extra></extra>",
        )
    )
    figure.update_layout(
        xaxis={"title": {"text": "class said"}, "type": "category", "tickangle": -45},
        yaxis={
            "title": {"text": "true class"},
            "type": "category",
            "autorange": "reversed",
        },
    )
    summary = [f"{title}: {np.trace(counts) / max(counts.sum(), 1):.1%} are right."]
    mistakes = rates - np.diag(np.diag(rates))
    for place in np.argsort(-mistakes, axis=None)[:3]:
        row, column = np.unravel_index(place, mistakes.shape)
        if mistakes[row, column] > 0:
            summary.append(
                f"{mistakes[row, column]:.0%} of {names[row]} are taken for "
                f"{names[column]}."
            )
    return Figure(title, " ".join(summary), _plot(figure), 470)


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return at most about `_MAX_POINTS` of a line's points.

    Of each stretch the lowest and the highest stay, so that no spike is lost; a stretch
    that holds a NaN shows it.
    """
    if len(x) <= _MAX_POINTS:
        return x, y
    kept = [0, len(x) - 1]
    for part in np.array_split(np.arange(len(x)), _MAX_POINTS // 3):
        values = y[part]
        is_gap = np.isnan(values)
        kept += part[is_gap][:1].tolist()
        if not is_gap.all():
            kept += [part[np.nanargmin(values)], part[np.nanargmax(values)]]
    places = np.unique(kept)
    return x[places], y[places]


def _plain(values: np.ndarray) -> list[float | None]:
    """Return numbers as JSON has them, with as many digits as can be seen."""
    return [
        float(f"{v:.{_DIGITS}g}") if math.isfinite(v) else None for v in values.tolist()
    ]


def _plot(figure: go.Figure) -> dict[str, Any]:
    # Plotly's own look would come with every figure; the page's script sets ours.
    figure.layout.template = go.layout.Template()
    return figure.to_plotly_json()
