"""Videos and images named by list files or found in folders, local or remote."""

import io
import os
import pickle
from collections.abc import Iterable, Mapping

import numpy as np
from etils import epath

from vjepa_jax.base.errors import UserError
from vjepa_jax.base.files import absolute, is_remote
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
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MEDIA_SUFFIXES = VIDEO_SUFFIXES + IMAGE_SUFFIXES

_LABELS = np.iinfo(np.int64)


class VideoList(Source):
    """Files in a fixed order, videos and images alike.

    The paths are one bytes object instead of a Python string each.

    Attributes:
      name: the list file or folder that the files come from, for messages.
      root: folder or URL that relative entries are resolved against.
      labels: int64 `[len(self)]`.
    """

    def __init__(
        self, name: str, root: str, entries: Iterable[str], labels: Iterable[int]
    ):
        """Takes the paths as listed, absolute or relative to `root`."""
        encoded = [os.fsencode(entry) for entry in entries]
        self.name = name
        self.root = root
        self.labels = np.array(labels, np.int64)
        self._entries = b"".join(encoded)
        self._ends = np.cumsum([len(entry) for entry in encoded], dtype=np.int64)
        if len(self.labels) != len(encoded):
            raise ValueError(f"{len(encoded)} entries but {len(self.labels)} labels")

    def __len__(self) -> int:
        """Returns the number of files."""
        return len(self._ends)

    def __getitem__(self, index: int) -> Record:
        """Returns the record at `index`, which may count from the end."""
        index = range(len(self))[index]
        return Record(self.path_of(index), int(self.labels[index]))

    def path_of(self, index: int) -> str:
        """Returns the path or URL at `index`."""
        entry = self.entry(index)
        return entry if is_remote(entry) else os.path.join(self.root, entry)

    def entry(self, index: int) -> str:
        """Returns the path at `index` as listed, which does not depend on `root`."""
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._entries[start : int(self._ends[index])])

    def digest(self) -> str:
        """Identifies paths and labels; paths count as listed."""
        return digest_of(array.tobytes() for array in self.to_arrays().values())

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Returns entries and labels as arrays, to store them."""
        return {
            "entries": np.frombuffer(self._entries, np.uint8),
            "ends": self._ends.astype("<i8"),
            "labels": self.labels.astype("<i8"),
        }

    @classmethod
    def from_arrays(
        cls, name: str, root: str, arrays: Mapping[str, np.ndarray]
    ) -> "VideoList":
        """Makes a list from what `to_arrays` gave."""
        source = cls(name, root, [], [])
        source.labels = arrays["labels"].astype(np.int64)
        source._entries = arrays["entries"].tobytes()
        source._ends = arrays["ends"].astype(np.int64)
        return source

    @classmethod
    def from_list_file(cls, path: str) -> "VideoList":
        """Reads a text file with one `path label` per line.

        The official formats (`src/datasets/video_dataset.py`): fields are separated by
        white space, or by `::`; there is no header; what follows the label on a line
        of whole numbers is passed over. Beyond these, paths may hold spaces. They may
        stand in double quotes. Relative paths are resolved against the list file's
        folder. Blank lines are skipped.

        Raises:
          UserError: a line is not of this form; names file and line.
        """
        path, root = _located(path)
        content = io.BytesIO(epath.Path(path).read_bytes())
        entries, labels = [], []
        with io.TextIOWrapper(
            content, encoding="utf-8-sig", errors="surrogateescape"
        ) as lines:
            for number, line in enumerate(lines, start=1):
                line = line.strip()
                if not line:
                    continue
                entry, label = _split(line)
                if entry is None:
                    raise UserError(
                        f"{path}:{number}: expected 'path label' with a whole number "
                        "of at most 64 bits as label, found "
                        f"{_shortened(line)!r}; videos without a class take the label 0"
                    )
                entries.append(entry)
                labels.append(label)
        return cls(path, root, entries, labels)

    @classmethod
    def from_array_file(cls, path: str) -> "VideoList":
        """Reads a `.npy` array of paths, the official format of lists without labels.

        Relative paths are resolved against the file's folder. All labels are 0.

        Raises:
          UserError: the file is damaged, or not of strings that can be paths.
        """
        path, root = _located(path)
        content = epath.Path(path).read_bytes()
        try:
            entries = _read_array(content)
            return cls(path, root, entries, [0] * len(entries))
        except Exception as error:  # a damaged file may fail in any of the steps
            reason = _shortened(str(error)) or type(error).__name__
            raise UserError(f"{path} is no .npy array of paths: {reason}") from error

    @classmethod
    def from_folder(cls, path: str) -> "VideoList":
        """Finds the videos and images in a folder and all below, in sorted order.

        If all of them lie in sub folders of `path`, these are the classes: labels count
        the first-level sub folders with files in them, in sorted order. Otherwise all
        labels are 0. Hidden files and folders are skipped.
        """
        root = absolute(path.rstrip("/"))
        found = _remote_files(root) if is_remote(root) else _local_files(root)
        names = [entry for entry in found if entry.lower().endswith(MEDIA_SUFFIXES)]
        # Sorted by components, so that the order of files follows that of the classes.
        entries = sorted(names, key=lambda entry: entry.split("/"))
        classes = [entry.split("/", 1)[0] for entry in entries]
        if any("/" not in entry for entry in entries):
            labels = [0] * len(entries)
        else:
            label_of = {name: i for i, name in enumerate(sorted(set(classes)))}
            labels = [label_of[name] for name in classes]
        return cls(root, root, entries, labels)


def _located(path: str) -> tuple[str, str]:
    path = absolute(path)
    return path, os.path.dirname(path)


def _split(line: str) -> tuple[str | None, int]:
    for separator in ("::", None):
        fields = line.rsplit(separator, maxsplit=1)
        if len(fields) < 2:
            continue
        entry = fields[0].strip()
        try:
            label = int(fields[1])
            first, *others = entry.split(separator)
            if others and all(other.strip().isdecimal() for other in others):
                # Further columns: the official code takes the first two.
                entry, label = first.strip(), int(others[0])
        except ValueError:
            continue
        if not _LABELS.min <= label <= _LABELS.max:
            continue
        if len(entry) > 1 and entry[0] == entry[-1] == '"':
            entry = entry[1:-1].replace('""', '"')
        # A zero byte cannot be in a path: this is no text file.
        if entry and "\0" not in entry:
            return entry, label
    return None, 0


def _shortened(line: str) -> str:
    line = " ".join(line.split()) if "\n" in line else line
    return line if len(line) <= 100 else line[:97] + "..."


def _read_array(content: bytes) -> list[str]:
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise ValueError(f"version {version} of the format")
    shape, _, dtype = read_header(stream)
    if len(shape) != 1 or dtype.kind not in "OU":
        raise ValueError(
            f"{dtype} of shape {shape}, not a one-dimensional array of strings"
        )
    if dtype.hasobject:
        entries = _StringUnpickler(stream).strings()
    else:
        entries = np.load(io.BytesIO(content), allow_pickle=False).tolist()
    if len(entries) != shape[0]:
        raise ValueError(f"{len(entries)} entries where the header says {shape[0]}")
    for index, entry in enumerate(entries):
        if not isinstance(entry, str):
            raise ValueError(
                f"entry {index} has the type {type(entry).__name__}, not str"
            )
        if not entry or "\0" in entry:
            raise ValueError(f"entry {index} cannot be a path: {entry!r}")
    return entries


class _Pickled:
    """Stands for an array or a dtype in a pickle: what it would have been made of."""

    def __init__(self, *arguments):
        self.arguments = arguments
        self.state = ()

    def __setstate__(self, state):
        self.state = state


def _unpickle_scalar(dtype: _Pickled, content: bytes) -> str:
    (kind, *_), (_, order, *_) = dtype.arguments, dtype.state
    if not kind.startswith("U"):
        raise pickle.UnpicklingError(f"holds a value of type {kind}, not only strings")
    codec = {"<": "utf-32-le", ">": "utf-32-be"}[order]
    return content.decode(codec).rstrip("\0")


# All that the pickle of an array of strings may call; a list file is data, not code.
_STAND_INS = {
    ("numpy", "ndarray"): _Pickled,
    ("numpy", "dtype"): _Pickled,
} | {
    (f"numpy.{package}.multiarray", name): stand_in
    for package in ("core", "_core")
    for name, stand_in in (("_reconstruct", _Pickled), ("scalar", _unpickle_scalar))
}


class _StringUnpickler(pickle._Unpickler):
    """Reads the strings out of a pickled array, and nothing that could run code.

    No array is made: NumPy's own `__setstate__` crashes the process on damaged files.
    And this is the unpickler in Python: the one in C allocates a table as long as the
    largest index in the file, which in a damaged one is gigabytes. For the same reason
    it takes no bytearrays, which are allocated before their bytes are looked for.
    """

    dispatch = {  # noqa: RUF012, of the base class
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code != pickle.BYTEARRAY8[0]
    }

    def strings(self) -> list:
        """Returns the elements; not all need be strings.

        Raises:
          UnpicklingError: the pickle is damaged, or of something else.
        """
        try:
            *_, elements = self.load().state
            return list(elements)
        except pickle.UnpicklingError:
            raise
        except Exception as error:
            raise pickle.UnpicklingError(f"it is damaged ({error!r})") from error

    def find_class(self, module: str, name: str):
        """Returns a stand-in for what the array is made by."""
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"holds {module}.{name}, not only strings")
        return _STAND_INS[module, name]


def _local_files(root: str) -> Iterable[str]:
    visited = set()

    def refuse(error: OSError) -> None:
        if error.filename == root:  # below, some may be others' (lost+found)
            raise error

    for folder, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in visited:  # a link to a folder above would never end
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
            # Each question is a request: none where the name gives the answer.
            if path.name.lower().endswith(MEDIA_SUFFIXES):
                yield entry
            elif path.is_dir():
                folders.append(entry)
