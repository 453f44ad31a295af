"""What sections are made of."""

import dataclasses
from collections.abc import Callable
from typing import Any

from vjepa_jax.base.errors import UserError


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of a section.

    Attributes:
      kind: the macro of the template that writes it.
      content: what it writes.
      title: above it; "": none.
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
      key: of links to it.
      title: its heading.
      lead: how to read it.
      blocks: what it shows.
      missing: what there is not, and why; a line each.
    """

    key: str
    title: str
    lead: str = ""
    blocks: list[Block] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)

    def attempt(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function; where what the user has does not allow it, say so."""
        try:
            return function(*args)
        except UserError as error:
            line = f"{error}."
            if line not in self.missing:
                self.missing.append(line)
            return None


@dataclasses.dataclass(frozen=True)
class Tile:
    """A number of the summary, an entry per run."""

    label: str
    values: list[str]
