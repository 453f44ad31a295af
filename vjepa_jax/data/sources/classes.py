"""Names of classes: a common numbering for sources that number theirs differently."""

import dataclasses
import unicodedata
from collections.abc import Sequence

import numpy as np
from etils import epath

from vjepa_jax.base import files
from vjepa_jax.base.errors import UserError
from vjepa_jax.data.sources.records import Record, Source

CLASSES_FILE = (
    "classes.txt"  # beside a list: names in the order of labels, one per line
)

_SHOWN = 5  # names in a message


class Renumbered(Source):
    """The records of a source with other labels.

    Attributes:
      source: all records.
      name: that of `source`.
    """

    def __init__(
        self, source: Source, numbers: np.ndarray, class_names: Sequence[str] | None
    ):
        """Replace the labels of `source`.

        Args:
          source: its labels are in [0, len(numbers)).
          numbers: int64, the new label of each of its labels.
          class_names: in the order of the new labels; None: they are numbers only.
        """
        self.source = source
        self.name = source.name
        self._numbers = numbers
        self._class_names = class_names

    @property
    def labels(self) -> np.ndarray:
        """The new labels, int64 [len(self)]."""
        return self._numbers[np.asarray(self.source.labels)]

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names of the classes in the order of the new labels."""
        return self._class_names

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        """Return a record; raise OSError if its storage fails."""
        record = self.source[index]
        label = int(self._numbers[record.label])
        return dataclasses.replace(record, label=label)

    def path_of(self, index: int) -> str:
        """Return the `path` of a record without reading it."""
        return self.source.path_of(index)

    def digest(self) -> str:
        """Return the hash of `source`: what is read does not depend on labels."""
        return self.source.digest()


def unite_classes(sources: Sequence[Source]) -> list[Source]:
    """Give the classes of several sources one numbering, by their names.

    Sources without names keep their numbers. Beside them, names must be the numbers
    themselves, such as folders `0`, `1`, `2`.

    Args:
      sources: each with or without `class_names`.

    Returns:
      The same records in the same order, with the same `class_names` in all sources:
      the names of all, sorted, unless all have the same names in one order.

    Raises:
      UserError: a label has no name, or names and numbers cannot be compared.
    """
    named: dict[int, list[str]] = {}
    for i, source in enumerate(sources):
        names = source.class_names
        if names is not None:
            # Some file systems store accents as separate characters.
            named[i] = [unicodedata.normalize("NFC", name) for name in names]
            _require_names(source, len(names))
    if not named:
        return list(sources)
    common: list[str] | None
    if len(named) == len(sources):
        common = next(iter(named.values()))
        if any(names != common for names in named.values()):
            common = sorted({name for names in named.values() for name in names})
        number_of = {name: number for number, name in enumerate(common)}
    else:
        common = None
        number_of = _numbers_of(sources, named)
    united = list(sources)
    for i, names in named.items():
        numbers = np.array([number_of[name] for name in names], np.int64)
        united[i] = Renumbered(sources[i], numbers, common)
    return united


def _require_names(source: Source, count: int) -> None:
    labels = np.asarray(source.labels)
    wrong = np.flatnonzero((labels < 0) | (labels >= count))
    if len(wrong):
        raise UserError(
            f"{source.path_of(int(wrong[0]))!r} of {source.name!r} has the label "
            f"{labels[wrong[0]]}, but only {count} classes have names"
        )


def _numbers_of(
    sources: Sequence[Source], named: dict[int, list[str]]
) -> dict[str, int]:
    """Return the numbers that names are, since some sources have numbers only."""
    number_of = {}
    for i, names in named.items():
        for name in names:
            if not (name.isascii() and name.isdecimal() and str(int(name)) == name):
                (other, *_) = (s for k, s in enumerate(sources) if k not in named)
                raise UserError(
                    f"{sources[i].name!r} has names of classes ({shown(names)}), but "
                    f"{other.name!r} has numbers only, so that they cannot be "
                    f"compared: put {CLASSES_FILE}, the names in the order of the "
                    "numbers, one per line, beside the list (shards: prepare them "
                    "again)"
                )
            number_of[name] = int(name)
    return number_of


def read_class_names(folder: str) -> list[str] | None:
    """Read the names of classes beside a list file; None if there are none.

    Args:
      folder: of the list, local or remote, with the file `classes.txt`: one name per
        line, in the order of the labels, which count from 0.

    Raises:
      UserError: the file cannot be read, or a line is empty or repeated.
    """
    path = epath.Path(folder) / CLASSES_FILE
    try:
        if not path.exists():
            return None
        text = files.read_text(path)
    except UserError:
        raise
    except Exception as error:  # the errors of stores' clients have no common base
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read: {reason}") from error
    names = [line.strip() for line in text.rstrip().splitlines()]
    for number, name in enumerate(names, start=1):
        if not name or name in names[: number - 1]:
            problem = f"repeats {name!r}" if name else "is empty"
            raise UserError(
                f"{path}:{number} {problem}: give a name per class, in the order of "
                "the labels"
            )
    return names


def shown(names: Sequence[str]) -> str:
    """Return the first names, for messages."""
    more = f", ... ({len(names)})" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
