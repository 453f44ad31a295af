"""Make list files from a table of labels: choose rows, form classes, split by group."""

import csv
import dataclasses
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from etils import epath

from vjepa_jax.base import files
from vjepa_jax.base.errors import UserError
from vjepa_jax.data.sources.classes import CLASSES_FILE
from vjepa_jax.data.sources.file_lists import path_problem

TRAIN, TEST = "train.csv", "test.csv"
MISSING = ("refuse", "skip", "keep")

_SHOWN = 5  # examples in a message
_REQUESTS = 32  # at once, to a remote store


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
      name: its file, for messages.
      columns: their names.
      rows: {column: text} without white space around; as many as `lines`.
      lines: number of each row's last line in the file.
    """

    name: str
    columns: list[str]
    rows: list[dict[str, str]]
    lines: list[int]

    def require(self, column: str, asked_by: str) -> None:
        """Raise UserError unless the column exists; `asked_by` is the flag."""
        if column not in self.columns:
            hint = "; set --delimiter" if len(self.columns) == 1 else ""
            raise UserError(
                f"{asked_by}: {self.name} has no column {column!r}; its columns: "
                + ", ".join(self.columns)
                + hint
            )

    def require_values(self, column: str, values: Iterable[str], asked_by: str) -> None:
        """Raise UserError unless each value is in some row of the column."""
        self.require(column, asked_by)
        known = {row[column] for row in self.rows}
        unknown = [value for value in values if value not in known]
        if unknown:
            raise UserError(
                f"{asked_by}: no row of {self.name} has the {column} {unknown[0]!r}; "
                f"there is: {_some(sorted(known), 20)}"
            )


@dataclasses.dataclass(frozen=True)
class Condition:
    """A condition on the rows to keep.

    Attributes:
      column: its name.
      values: those to keep, or to leave out.
      is_kept: which of both.
    """

    column: str
    values: tuple[str, ...]
    is_kept: bool

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Read `COLUMN=VALUE,...` or `COLUMN!=VALUE,...`."""
        parts = re.fullmatch(r"([^=]+?)(!?=)(.*)", text, re.DOTALL)
        if parts is None:
            raise UserError(
                f"--where={text}: write COLUMN=VALUE,... or COLUMN!=VALUE,..."
            )
        return cls(parts[1].strip(), split_values(parts[3]), parts[2] == "=")

    def __str__(self) -> str:
        """Return the flag."""
        sign = "=" if self.is_kept else "!="
        return f"--where={self.column}{sign}{','.join(self.values)}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which rows are listed, and under which names.

    Attributes:
      file: path of a row's file, with `{COLUMN}` for the text of a column, and
        `{COLUMN:FORMAT}` for that text in a format of Python.
      root: folder or URL of relative paths.
      label: column of the classes; empty: there are none.
      classes: values of that column by the name of their class; empty: each value is a
        class.
      conditions: all of which a row meets.
      min_rows: rows that a class needs in every list; others are left out.
      missing_files: one of `MISSING`: what happens to files that do not exist.
    """

    file: str
    root: str
    label: str = ""
    classes: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    conditions: Sequence[Condition] = ()
    min_rows: int = 0
    missing_files: str = "refuse"


@dataclasses.dataclass(frozen=True)
class Split:
    """How rows are divided into a list to train on and one to test on.

    Attributes:
      column: rows with the same value stay together; empty: those of the same file.
      test_values: values of the column that are tested on.
      test_share: or the share of the rows to test on.
      seed: of the choice of values by share.
    """

    column: str = ""
    test_values: Sequence[str] = ()
    test_share: float = 0.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Lists:
    """Lists of files, all with the same numbers of classes.

    Attributes:
      files: of each list, by its name: (absolute path or URL, class).
      classes: names in the order of their labels, sorted; empty: no classes.
      left_out: rows of classes that are too small, by class, in each list.
      missing: paths of files that do not exist and are left out.
    """

    files: dict[str, list[tuple[str, str]]]
    classes: list[str]
    left_out: dict[str, list[int]]
    missing: list[str]

    def counts(self) -> dict[str, list[int]]:
        """Return the number of files of each class in each list."""
        return _counts(self.files, self.classes)

    def summary(self) -> str:
        """Return a table of the files of each class in each list, for people."""
        names = ["files", *self.classes, *self.left_out]
        width = max(map(len, names))
        lines = [" " * width + "".join(f"  {name:>9}" for name in self.files)]
        rows = [(name, n, "") for name, n in self.counts().items()]
        rows += [(name, n, "  left out") for name, n in self.left_out.items()]
        rows += [("files", [len(found) for found in self.files.values()], "")]
        for name, of_lists, note in rows:
            numbers = "".join(f"  {n:>9}" for n in of_lists)
            lines.append(f"{name:<{width}}{numbers}{note}")
        if self.missing:
            lines.append(
                f"left out: {len(self.missing)} files that do not exist, such as "
                + _some(self.missing)
            )
        return "\n".join(lines)


def split_values(text: str) -> tuple[str, ...]:
    """Split at commas; values with commas stand in double quotes."""
    (values,) = list(csv.reader([text], skipinitialspace=True)) or [[""]]
    return tuple(value.strip() for value in values) or ("",)


def parse_classes(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read classes, each `NAME=VALUE,...` or `VALUE,...` (a class for each value).

    Raises:
      UserError: a value is in two classes.
    """
    classes: dict[str, tuple[str, ...]] = {}
    home: dict[str, str] = {}
    for text in texts:
        parts = re.fullmatch(r'(?:([^="]+)=)?(.*)', text, re.DOTALL)
        assert parts is not None  # the second part takes anything
        values = split_values(parts[2])
        if parts[1]:
            named = {parts[1].strip(): values}
        else:
            named = {value: (value,) for value in values}
        for name, members in named.items():
            if not name or not all(members):
                raise UserError(
                    f"--class={text}: write NAME=VALUE,... or VALUE,... without empty "
                    "values"
                )
            if name in classes:
                raise UserError(f"--class={text}: {name!r} is named twice")
            for value in members:
                if value in home:
                    raise UserError(
                        f"--class={text}: {value!r} is already in the class "
                        f"{home[value]!r}"
                    )
                home[value] = name
            classes[name] = members
    return classes


def read_table(
    path: str, delimiter: str = ",", header: Sequence[str] | None = None
) -> Table:
    """Read a table in the form of Python's `csv`.

    The text is UTF-8, or UTF-16 with a byte order mark.

    Args:
      path: local or remote.
      delimiter: between fields.
      header: names of the columns of a file that does not name them in its first line.

    Raises:
      UserError: it cannot be read; the message names the line.
    """
    path = files.absolute(path)
    try:
        text = files.read_text(path)
        text.encode()
    except UserError:
        raise
    except UnicodeEncodeError:  # surrogates
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    except Exception as error:  # the errors of stores' clients have no common base
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be read: {reason}") from error
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise UserError(f"--delimiter={delimiter!r} is not one character, or tab")
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        skipinitialspace=delimiter != " ",
        strict=True,
    )
    columns = list(header or ())
    rows, lines = [], []
    try:
        for fields in reader:
            fields = [field.strip() for field in fields]
            if not any(fields):
                continue
            if not columns:
                columns = fields
                continue
            if len(fields) != len(columns):
                raise UserError(
                    f"{path}:{reader.line_num}: {len(fields)} fields, but "
                    f"{len(columns)} columns: {', '.join(columns)}"
                )
            rows.append(dict(zip(columns, fields, strict=True)))
            lines.append(reader.line_num)
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}") from None
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice or not rows:
        problem = f"has two columns {twice[0]!r}" if twice else "has no rows"
        raise UserError(f"{path} {problem}")
    return Table(path, columns, rows, lines)


def make_lists(table: Table, choice: Choice, split: Split | None) -> Lists:
    """Choose rows, name their classes and divide them into lists.

    Args:
      table: the rows.
      choice: of the rows and their classes.
      split: of the rows; None: one list.

    Returns:
      The lists `train.csv` and, with a split, `test.csv`. A row that repeats a file and
      its class is left out.

    Raises:
      UserError: a column, value or file does not exist, nothing is left, a file has two
        classes or is in two lists, or a class has no row to train on.
    """
    rows = _chosen(table, choice)
    missing = _missing(rows) if choice.missing_files != "keep" else []
    if missing and choice.missing_files == "refuse":
        raise UserError(
            f"{len(missing)} files of {table.name} do not exist, such as "
            f"{_some(missing)}; set --root, or --missing_files=skip to leave them out"
        )
    lost = set(missing)
    rows = [row for row in rows if row.path not in lost]
    if not rows:
        raise UserError(
            f"none of the {len(missing)} files of {table.name} exists, such as "
            f"{missing[0]}: set --root"
        )
    tested = np.zeros(len(rows), bool) if split is None else _tested(table, rows, split)
    names = [TRAIN] if split is None else [TRAIN, TEST]
    listed: dict[str, list[tuple[str, str]]] = {name: [] for name in names}
    for row, is_tested in zip(rows, tested, strict=True):
        listed[TEST if is_tested else TRAIN].append((row.path, row.label))
    listed = {name: list(dict.fromkeys(found)) for name, found in listed.items()}
    classes = sorted({row.label for row in rows}) if choice.label else []
    counts = _counts(listed, classes)
    left_out = {k: n for k, n in counts.items() if min(n) < choice.min_rows}
    classes = [name for name in classes if name not in left_out]
    listed = {
        name: [item for item in found if item[1] not in left_out]
        for name, found in listed.items()
    }
    if left_out and not classes:
        raise UserError(f"no class has --min_rows={choice.min_rows} rows in every list")
    for name in classes:
        if not counts[name][0]:
            raise UserError(
                f"{name!r} has {counts[name][1]} rows to test on and none to train "
                "on: divide the rows otherwise, or set --min_rows=1 to leave out "
                "classes that are not in both lists"
            )
    return Lists(listed, classes, left_out, missing)


def write_lists(lists: Lists, folder: str) -> list[str]:
    """Write the lists and the names of the classes.

    Paths below the folder are written relative to it, so that it can be moved.

    Args:
      lists: what to write.
      folder: local or remote; made if missing.

    Returns:
      The paths of the written files.

    Raises:
      UserError: the folder holds another list or cannot be written.
    """
    folder = files.absolute(folder)
    label_of = {name: label for label, name in enumerate(lists.classes)}
    contents: dict[str, str] = {}
    for name, found in lists.files.items():
        contents[name] = "".join(
            f"{_entry(path, folder)} {label_of.get(label, 0)}\n"
            for path, label in found
        )
    if lists.classes:
        contents[CLASSES_FILE] = "".join(f"{name}\n" for name in lists.classes)
    try:
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
        for name in (TRAIN, TEST, CLASSES_FILE):
            path = epath.Path(folder) / name
            if path.exists() and path.read_bytes() != contents.get(name, "").encode():
                raise UserError(
                    f"{path} exists with other content: choose another --output, or "
                    "remove it"
                )
        for name, content in contents.items():
            files.write_whole(epath.Path(folder) / name, content)
    except OSError as error:
        raise UserError(f"--output={folder} cannot be written: {error}") from None
    return [os.path.join(folder, name) for name in contents]


@dataclasses.dataclass(frozen=True)
class _Row:
    path: str
    label: str
    group: Mapping[str, str]


def _chosen(table: Table, choice: Choice) -> list[_Row]:
    for condition in choice.conditions:
        wanted = condition.values if condition.is_kept else ()
        table.require_values(condition.column, wanted, str(condition))
    class_of = {v: name for name, members in choice.classes.items() for v in members}
    if choice.label:
        table.require_values(
            choice.label, class_of, "--class" if class_of else "--label"
        )
    elif class_of:
        raise UserError("--class needs --label, the column of the classes")
    pattern = _Pattern(choice.file, table)
    root = files.absolute(choice.root)
    rows = []
    seen: dict[str, tuple[str, int]] = {}
    for row, line in zip(table.rows, table.lines, strict=True):
        if any((row[c.column] in c.values) != c.is_kept for c in choice.conditions):
            continue
        label = ""
        if choice.label:
            label = row[choice.label]
            if class_of and label not in class_of:
                continue
            label = " ".join(class_of.get(label, label).split())
            if not label:
                raise UserError(
                    f"{table.name}:{line}: no {choice.label}; "
                    f"--where='{choice.label}!=' leaves such rows out"
                )
        path = _resolved(pattern.fill(row, line), root)
        if problem := path_problem(path):
            raise UserError(f"{table.name}:{line}: the path {problem}")
        other, other_line = seen.setdefault(path, (label, line))
        if other != label:
            raise UserError(
                f"{table.name}:{line}: {path} is {label!r} here and {other!r} in line "
                f"{other_line}: choose rows by --where so that a file has one class"
            )
        rows.append(_Row(path, label, row))
    if not rows:
        raise UserError(f"no row of {table.name} meets all conditions")
    return rows


class _Pattern:
    """The path of a row's file, made of its columns."""

    def __init__(self, text: str, table: Table):
        self._text, self._table = text, table
        self._parts = re.split(r"\{([^{}]*)\}", text)
        names = [part.partition(":")[0] for part in self._parts[1::2]]
        if not names:
            raise UserError(f"--file={text} names no column: write it as {{COLUMN}}")
        for name in names:
            table.require(name, f"--file={text}")

    def fill(self, row: Mapping[str, str], line: int) -> str:
        parts, where = list(self._parts), f"{self._table.name}:{line}"
        for i in range(1, len(parts), 2):
            column, _, form = parts[i].partition(":")
            if not row[column]:
                raise UserError(
                    f"{where}: no {column}, which --file={self._text} needs"
                )
            try:
                parts[i] = format(row[column], form)
            except ValueError as error:
                raise UserError(f"--file={self._text}: {error}") from None
        path = "".join(parts)
        if len(path.splitlines()) > 1:
            raise UserError(f"{where}: {path!r} cannot be in a list")
        return path


def _resolved(path: str, root: str) -> str:
    path = path if files.is_remote(path) else os.path.join(root, path)
    return path if files.is_remote(path) else os.path.normpath(path)


def _entry(path: str, folder: str) -> str:
    """Return a path as it is written into a list in `folder`."""
    path = path.removeprefix(folder.rstrip("/") + "/")
    if re.search(r'[\s",;#]|::', path):
        return '"' + path.replace('"', '""') + '"'
    return path


def _tested(table: Table, rows: Sequence[_Row], split: Split) -> np.ndarray:
    """Return which rows are tested on, bool [len(rows)]."""
    if bool(split.test_values) == bool(split.test_share):
        raise UserError("give --test_values or --test_share, one of both")
    if split.column:
        table.require(split.column, "--split_by")
        groups = [row.group[split.column] for row in rows]
    else:
        groups = [row.path for row in rows]
    if split.test_values:
        if not split.column:
            raise UserError("--test_values needs --split_by, the column of the values")
        chosen = set(split.test_values)
        unknown = sorted(chosen - set(groups))
        if unknown:
            raise UserError(
                f"--test_values: no chosen row has the {split.column} {unknown[0]!r}; "
                f"there is: {_some(sorted(set(groups)), 20)}"
            )
    else:
        labels = [row.label for row in rows]
        chosen = _draw(groups, labels, split.test_share, split.seed)
    tested = np.array([group in chosen for group in groups])
    if tested.all():
        raise UserError(
            "all rows would be tested on and none trained on: name fewer --test_values"
        )
    lists: tuple[set[str], set[str]] = set(), set()
    for row, is_tested in zip(rows, tested, strict=True):
        lists[int(is_tested)].add(row.path)
    both = sorted(lists[0] & lists[1])
    if both:
        raise UserError(
            f"{len(both)} files would be trained and tested on, since their rows "
            f"differ in {split.column!r}: {_some(both)}"
        )
    return tested


def _draw(
    groups: Sequence[str], labels: Sequence[str], share: float, seed: int
) -> set[str]:
    """Choose groups in random order while they bring the classes nearer to `share`.

    The distance is the sum over the classes of the difference between the rows of the
    chosen groups and the share of all rows. At least one group is chosen, and one not.
    """
    if not 0 < share < 1:
        raise UserError(f"--test_share must lie between 0 and 1, not {share}")
    names, group = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise UserError(f"all chosen rows are of {names[0]!r}: they cannot be split")
    _, label = np.unique(labels, return_inverse=True)
    counts = np.zeros((len(names), int(label.max()) + 1), np.int64)
    np.add.at(counts, (group, label), 1)
    missing = share * counts.sum(0)
    order = np.random.default_rng(seed).permutation(len(names))
    chosen: list[int] = []
    for index in order:
        is_nearer = np.abs(missing - counts[index]).sum() < np.abs(missing).sum()
        if is_nearer and len(chosen) < len(names) - 1:
            chosen.append(int(index))
            missing = missing - counts[index]
    if not chosen:  # all are too large
        chosen = [int(order[np.abs(missing - counts[order]).sum(1).argmin()])]
    return {str(names[index]) for index in chosen}


def _counts(
    listed: Mapping[str, Sequence[tuple[str, str]]], classes: Sequence[str]
) -> dict[str, list[int]]:
    counters = [Counter(label for _, label in found) for found in listed.values()]
    return {name: [counter[name] for counter in counters] for name in classes}


def _missing(rows: Sequence[_Row]) -> list[str]:
    """Return the paths that do not exist."""
    paths = list(dict.fromkeys(row.path for row in rows))
    with ThreadPoolExecutor(_REQUESTS) as pool:
        exists = pool.map(_exists, paths)
        return [path for path, found in zip(paths, exists, strict=True) if not found]


def _exists(path: str) -> bool:
    if not files.is_remote(path):
        return os.path.exists(path)
    try:
        return epath.Path(path).exists()
    except Exception as error:  # the errors of stores' clients have no common base
        raise UserError(
            f"{path} cannot be looked for: {' '.join(str(error).split())}; "
            "--missing_files=keep does not look"
        ) from error


def _some(names: Sequence[str], most: int = _SHOWN) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
