"""Videos and images named by list files or found in folders, local or remote."""

import functools
import io
import os
import re
from collections.abc import Iterable, Mapping

import numpy as np
from etils import epath

from vjepa_jax.base.errors import UserError
from vjepa_jax.base.files import absolute, is_remote, read_text
from vjepa_jax.data.sources.classes import read_class_names
from vjepa_jax.data.sources.records import Record, Source, digest_of

VIDEO_SUFFIXES = (
    ".mp4",
    ".webm",
    ".mkv",
    ".avi",
    ".mov",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".ts",
    ".3gp",
    ".gif",
    ".wmv",
    ".asf",
    ".flv",
    ".mxf",
    ".mts",
    ".m2ts",
    ".vob",
    ".ogv",
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".avif", ".apng")
MEDIA_SUFFIXES = VIDEO_SUFFIXES + IMAGE_SUFFIXES

# Those of `etils.epath`; each needs the client of its store.
_STORES = ("gs://", "s3://", "az://", "hf://")

_LABELS = np.iinfo(np.int64)

_SPACES = " \t\r\n\f\v"  # others may be a part of names

# Between columns; the first that makes columns of a line is that of the line.
_SEPARATORS = tuple(map(re.compile, (r" *\t[ \t]*", r"[ \t]*::[ \t]*", r"[ \t]+")))
_SPACE_OR_COLONS = re.compile(r"[ \t]*::[ \t]*|[ \t]+")
_INTEGER = re.compile(r'[+-]?[0-9]+|"[+-]?[0-9]+"')
_NUMBER = re.compile(
    r'"?[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?"?', re.IGNORECASE
)
_PLAIN = re.compile(r'([^\s"\0]*[^\s"\0#,;]) (-?[0-9]{1,18})')
_QUOTED = re.compile(r'"((?:[^"]|"")+)"(?:[ \t]*::[ \t]*|[ \t]+)(.+)')
_SUFFIX = re.compile(r"\.[0-9]?[a-z]\w{0,4}$", re.IGNORECASE)


class VideoList(Source):
    """Video and image files in a fixed order.

    The paths are held in one bytes object, not in a Python string each.

    Attributes:
      name: the list file or folder, for messages.
      root: folder or URL against which relative entries are resolved.
      labels: int64 [len(self)].
    """

    def __init__(
        self, name: str, root: str, entries: Iterable[str], labels: Iterable[int]
    ):
        """Hold paths as listed, absolute or relative to `root`, and their labels."""
        encoded = [os.fsencode(entry) for entry in entries]
        self.name = name
        self.root = root
        self.labels: np.ndarray = np.array(labels, np.int64)
        self._class_names: list[str] | None = None
        self._names_folder = ""
        self._entries = b"".join(encoded)
        self._ends = np.cumsum([len(entry) for entry in encoded], dtype=np.int64)
        if len(self.labels) != len(encoded):
            raise ValueError(f"{len(encoded)} entries but {len(self.labels)} labels")

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._ends)

    def __getitem__(self, index: int) -> Record:
        """Return the record at `index`, which may count from the end."""
        index = range(len(self))[index]
        return Record(self.path_of(index), int(self.labels[index]))

    @functools.cached_property
    def class_names(self) -> list[str] | None:
        """Names of the class folders, or in `classes.txt` beside the list.

        Raises:
          UserError: that file is damaged.
        """
        if self._names_folder:
            return read_class_names(self._names_folder)
        return self._class_names

    def path_of(self, index: int) -> str:
        """Return the path or URL at `index`."""
        entry = self.entry(index)
        return entry if is_remote(entry) else os.path.join(self.root, entry)

    def entry(self, index: int) -> str:
        """Return the path at `index` as listed, which does not depend on `root`."""
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._entries[start : int(self._ends[index])])

    def digest(self) -> str:
        """Return a hash of the labels and the paths as listed."""
        return digest_of(array.tobytes() for array in self.to_arrays().values())

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return entries and labels as arrays, to store them."""
        return {
            "entries": np.frombuffer(self._entries, np.uint8),
            "ends": self._ends.astype("<i8"),
            "labels": self.labels.astype("<i8"),
        }

    @classmethod
    def from_arrays(
        cls, name: str, root: str, arrays: Mapping[str, np.ndarray]
    ) -> "VideoList":
        """Make a list from the result of `to_arrays`."""
        source = cls(name, root, [], [])
        source.labels = arrays["labels"].astype(np.int64)
        source._entries = arrays["entries"].tobytes()
        source._ends = arrays["ends"].astype(np.int64)
        return source

    @classmethod
    def from_list_file(cls, path: str) -> "VideoList":
        """Read a text file with one `path label` per line.

        The formats of the official code (`src/datasets/video_dataset.py`) are read:
        columns are separated by white space or by `::`, there is no header, and further
        columns of numbers after the label are ignored. In addition, paths may contain
        spaces and may stand in double quotes. Relative paths are resolved against the
        list file's folder. Blank lines are skipped. The text is UTF-8, or UTF-16 with a
        byte order mark. Names of the classes are read from `classes.txt` in the list's
        folder when they are asked for.

        Raises:
          UserError: a line has another form; the message names file and line.
        """
        path = absolute(path)
        entries, labels = [], []
        lines = io.StringIO(read_text(path), newline=None)  # of any system
        for number, line in enumerate(lines, start=1):
            line = line.strip(_SPACES)
            if not line:
                continue
            try:
                entry, label = _split(line)
            except ValueError as error:
                raise UserError(f"{path}:{number}: {error}") from None
            if problem := path_problem(entry):
                raise UserError(f"{path}:{number}: the path {problem}")
            entries.append(entry)
            labels.append(label)
        source = cls(path, os.path.dirname(path), entries, labels)
        source._names_folder = source.root
        return source

    @classmethod
    def from_array_file(cls, path: str) -> "VideoList":
        """Read a `.npy` array of paths, the official format of lists without labels.

        Only arrays of NumPy strings are read. Arrays of Python objects are pickles and
        are refused. Relative paths are resolved against the file's folder. All labels
        are 0.

        Raises:
          UserError: the file is damaged, or does not hold strings that can be paths.
        """
        path = absolute(path)
        content = epath.Path(path).read_bytes()
        try:
            entries = _read_array(content)
            source = cls(path, os.path.dirname(path), entries, [0] * len(entries))
        except Exception as error:  # NumPy raises many kinds for damaged files
            reason = _shortened(str(error)) or type(error).__name__
            raise UserError(f"{path} is not a .npy array of paths: {reason}") from error
        source.unlabelled = "a .npy array of paths has no labels"
        return source

    @classmethod
    def from_folder(cls, path: str) -> "VideoList":
        """Find the videos and images in a folder and all below, in sorted order.

        If all files lie in subfolders of `path`, the label of a file is the index of
        its first-level subfolder, in sorted order, among those with files. Otherwise
        all labels are 0. Hidden files and folders are skipped.
        """
        root = absolute(path.rstrip("/"))
        found = _remote_files(root) if is_remote(root) else _local_files(root)
        names = [entry for entry in found if entry.lower().endswith(MEDIA_SUFFIXES)]
        # Sorted by components, so that the order of files follows that of the classes.
        entries = sorted(names, key=lambda entry: entry.split("/"))
        classes = [entry.split("/", 1)[0] for entry in entries]
        stray = [entry for entry in entries if "/" not in entry]
        if stray:
            source = cls(root, root, entries, [0] * len(entries))
            source.unlabelled = (
                f"{len(stray)} of its {len(entries)} files lie above class folders, "
                f"such as {stray[0]!r}: every file must lie in the folder of its class"
            )
            return source
        names = sorted(set(classes))
        label_of = {name: i for i, name in enumerate(names)}
        source = cls(root, root, entries, [label_of[name] for name in classes])
        source._class_names = names
        return source


def _split(line: str) -> tuple[str, int]:
    """Return the path and the label of a line; raise ValueError with the reason."""
    plain = _PLAIN.fullmatch(line)  # as nearly all lines of long lists
    if plain and "::" not in line:
        return plain[1], int(plain[2])
    if "\0" in line:
        raise _bad_line(line, "; this is not UTF-8 text: save it as UTF-8")
    if line.startswith(("# ", "#\t")):
        raise _bad_line(line, "; remove comments")
    quoted = _QUOTED.match(line)
    if quoted:
        label, *others = _SPACE_OR_COLONS.split(quoted[2])
        if _INTEGER.fullmatch(label) and all(map(_NUMBER.fullmatch, others)):
            return quoted[1].replace('""', '"'), _as_label(label, line)
    for separator in _SEPARATORS:
        cuts = [match.span() for match in separator.finditer(line)]
        starts, ends = (0, *(end for _, end in cuts)), (*(at for at, _ in cuts), None)
        fields = [line[i:j] for i, j in zip(starts, ends, strict=True)]
        # A label is a whole number and followed by numbers only.
        first = len(fields)
        while first > 1 and _NUMBER.fullmatch(fields[first - 1]):
            first -= 1
        columns = [
            i for i in range(first, len(fields)) if _INTEGER.fullmatch(fields[i])
        ]
        if not columns:
            continue
        entry = line[: ends[columns[0] - 1]].strip()
        # The official code takes the first two columns.
        is_clear = columns[0] == 1 or len(columns) == 1 or _SUFFIX.search(entry)
        if not is_clear:
            raise _bad_line(line, "; put a path that ends in a number in double quotes")
        if entry.endswith((",", ";")) or entry == '""':
            break
        if entry:
            return entry, _as_label(fields[columns[0]], line)
    raise _bad_line(line)


def _as_label(text: str, line: str) -> int:
    text = text.strip('"')
    # Python refuses to convert very long numbers.
    if len(text) > 20 or not _LABELS.min <= int(text) <= _LABELS.max:
        raise _bad_line(line)
    return int(text)


def _bad_line(line: str, hint: str = "") -> ValueError:
    """Return the error of a line that is not a path and a label."""
    if not hint and re.search(r"[,;]\s*\S*$", line):
        hint = "; columns are separated by a space, a tab or '::'"
    return ValueError(
        "expected 'path label' with a whole number of at most 64 bits as label, found "
        f"{_shortened(line)!r}; videos without a class take the label 0{hint}"
    )


def path_problem(entry: str) -> str | None:
    """Return why this is no path or URL that can be read; None if it is."""
    if not entry or "\0" in entry:
        return f"cannot be a path: {_shortened(entry)!r}"
    if is_remote(entry) and not entry.startswith(_STORES):
        return (
            f"is a URL, but videos are not downloaded: {_shortened(entry)!r}; download "
            "them, and list the files"
        )
    return None


def _shortened(line: str) -> str:
    line = " ".join(line.split()) if "\n" in line else line
    return line if len(line) <= 100 else line[:97] + "..."


def _read_array(content: bytes) -> list[str]:
    try:
        np.lib.format.read_magic(io.BytesIO(content))
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise ValueError(
            "it holds pickled objects; save it again with "
            "np.save(path, np.array(paths, str))"
        ) from None
    if array.ndim != 1 or array.dtype.kind != "U":
        raise ValueError(
            f"{array.dtype} of shape {array.shape}, not a one-dimensional array of "
            "strings"
        )
    entries = array.tolist()
    for index, entry in enumerate(entries):
        if problem := path_problem(entry):
            raise ValueError(f"entry {index} {problem}")
    return entries


def _local_files(root: str) -> Iterable[str]:
    visited = set()

    def refuse(error: OSError) -> None:
        if error.filename == root:  # subfolders of other users are skipped
            raise error

    for folder, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in visited:  # a link to a parent folder would never end
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root)


def _remote_files(root: str) -> Iterable[str]:
    folders = [""]
    while folders:
        folder = folders.pop()
        for path in (epath.Path(root) / folder).iterdir():
            entry = f"{folder}/{path.name}" if folder else path.name
            if path.name.startswith("."):
                continue
            # `is_dir` is a request to the store, so known names are decided first.
            if path.name.lower().endswith(MEDIA_SUFFIXES):
                yield entry
            elif path.is_dir():
                folders.append(entry)
