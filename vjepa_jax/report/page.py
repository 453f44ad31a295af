"""The parts of a page, and how they become one self-contained HTML file."""

import dataclasses
import datetime
import importlib.resources
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import plotly.offline
from markupsafe import Markup

import vjepa_jax
from vjepa_jax.base.errors import UserError
from vjepa_jax.report.run_files import Run

_FOLDER = "templates"


@dataclasses.dataclass(frozen=True)
class Tile:
    """A number of the summary, with one value per run."""

    label: str
    values: list[str]


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of a section.

    Attributes:
      kind: `table`, `figures`, `films`, `queries` or `pairs`.
      content: a `Table`, or a list of `Figure`, `FilmRow`, `Query` or `PairView`.
      title: heading; "" for none.
      lead: a sentence or two on how to read it.
    """

    kind: str
    content: Any
    title: str = ""
    lead: str = ""


@dataclasses.dataclass
class Section:
    """A section of the page.

    Attributes:
      key: anchor of links to it.
      title: heading.
      lead: how to read it.
      blocks: what it shows.
      missing: a line for each thing that cannot be shown, with the reason.
      part: the part of the page in which it stands.
    """

    key: str
    title: str
    lead: str = ""
    blocks: list[Block] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    part: str = ""

    def attempt(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function; after a `UserError` add it to `missing` and return None."""
        try:
            return function(*args)
        except UserError as error:
            line = f"{error}."
            if line not in self.missing:
                self.missing.append(line)
            return None


def render(
    runs: Sequence[Run], tiles: Sequence[Tile], sections: Sequence[Section]
) -> str:
    """Return the page as HTML.

    The template escapes everything that comes from a run; only the page's own script
    and style, and Plotly's script, are inserted as they are.
    """
    folder = importlib.resources.files("vjepa_jax.report") / _FOLDER
    style, script = (
        Markup((folder / name).read_text(encoding="utf-8"))
        for name in ("page.css", "page.js")
    )
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
        version=vjepa_jax.__version__,
        written=now.strftime("%Y-%m-%d %H:%M UTC"),
        style=style,
        script=script,
        plotly=Markup(plotly.offline.get_plotlyjs()),
    )
