"""Sections become one HTML file that needs nothing beside itself."""

import datetime
import importlib.resources
from collections.abc import Sequence

import jinja2
import plotly.offline
from markupsafe import Markup

import vjepa_jax
from vjepa_jax.report import figures
from vjepa_jax.report.parts import Section, Tile
from vjepa_jax.report.run_files import Run

_FOLDER = "templates"


def render(
    runs: Sequence[Run], tiles: Sequence[Tile], sections: Sequence[Section]
) -> str:
    """Write the page.

    Whatever comes from a run is text to the template, which escapes it; script, style
    and Plotly are ours.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vjepa_jax.report", _FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    now = datetime.datetime.now(datetime.UTC)
    return environment.get_template("page.html.j2").render(
        runs=runs,
        tiles=tiles,
        sections=sections,
        themes=figures.themes(),
        version=vjepa_jax.__version__,
        written=now.strftime("%Y-%m-%d %H:%M UTC"),
        style=_own("page.css"),
        script=_own("page.js"),
        plotly=Markup(plotly.offline.get_plotlyjs()),
    )


def _own(name: str) -> Markup:
    folder = importlib.resources.files("vjepa_jax.report") / _FOLDER
    return Markup((folder / name).read_text(encoding="utf-8"))
