"""Which videos there are: a list file or a folder as a random-access `VideoList`."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence

import numpy as np

from vjepa_jax.default_config import UserError

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

_MAX_FILES_LOOKED_AT = 1000


@dataclasses.dataclass(frozen=True)
class Record:
    """One video.

    Attributes:
      path: absolute path of the file.
      label: class of the video; 0 where there are no classes.
    """

    path: str
    label: int


class VideoList(Sequence):
    """Videos in a fixed order.

    Picklable, and compact, since every worker process gets a copy: the paths are one
    bytes object instead of a Python string each.

    Attributes:
      name: the list file or folder that the videos come from, for messages.
      root: folder that relative entries are resolved against.
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
        """Returns the number of videos."""
        return len(self._ends)

    def __getitem__(self, index: int) -> Record:
        """Returns the video at `index`, which may count from the end."""
        index = range(len(self))[index]
        path = os.path.join(self.root, self.entry(index))
        return Record(path, int(self.labels[index]))

    def entry(self, index: int) -> str:
        """Returns the path at `index` as listed, which does not depend on `root`."""
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._entries[start : int(self._ends[index])])

    @classmethod
    def from_list_file(cls, path: str) -> "VideoList":
        """Reads a text file with one `path label` per line.

        The official formats: the label is an integer and the last field; fields are
        separated by white space, or by `::`. Paths may hold spaces and may stand in
        double quotes. Relative paths are resolved against the list file's folder. Blank
        lines are skipped.

        Raises:
          UserError: a line is not of this form; names file and line.
        """
        path = os.path.abspath(path)
        entries, labels = [], []
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.strip()
                if not line:
                    continue
                entry, label = _split(line)
                if entry is None:
                    raise UserError(
                        f"{path}:{number}: expected 'path label' with a whole number "
                        f"as label, found {_shortened(line)!r}; videos without a class "
                        "take the label 0"
                    )
                entries.append(entry)
                labels.append(label)
        return cls(path, os.path.dirname(path), entries, labels)

    @classmethod
    def from_folder(cls, path: str) -> "VideoList":
        """Finds the videos in a folder and all folders below, in sorted order.

        If all of them lie in sub folders of `path`, these are the classes: labels count
        the first-level sub folders with videos in them, in sorted order. Otherwise all
        labels are 0. Hidden files and folders are skipped.
        """
        root = os.path.abspath(path)
        # Sorted by components, so that the order of files follows that of the classes.
        entries = sorted(_videos_below(root), key=lambda entry: entry.split(os.sep))
        classes = [entry.split(os.sep, 1)[0] for entry in entries]
        if any(os.sep not in entry for entry in entries):
            labels = [0] * len(entries)
        else:
            label_of = {name: i for i, name in enumerate(sorted(set(classes)))}
            labels = [label_of[name] for name in classes]
        return cls(root, root, entries, labels)


def _split(line: str) -> tuple[str | None, int]:
    for fields in (line.rsplit("::", maxsplit=1), line.rsplit(maxsplit=1)):
        if len(fields) < 2:
            continue
        entry = fields[0].strip()
        if len(entry) > 1 and entry[0] == entry[-1] == '"':
            entry = entry[1:-1].replace('""', '"')
        try:
            label = int(fields[1])
        except ValueError:
            continue
        # A zero byte cannot be in a path: this is no text file.
        if entry and "\0" not in entry:
            return entry, label
    return None, 0


def _shortened(line: str) -> str:
    return line if len(line) <= 100 else line[:97] + "..."


def _videos_below(root: str) -> Iterable[str]:
    visited = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link to a folder above would never end
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if name.lower().endswith(VIDEO_SUFFIXES) and not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), root)


def open_source(path: str) -> VideoList:
    """Opens a folder of videos or a list file and checks that there is something in it.

    Of a list, up to 1000 evenly spaced files are looked for, to notice a wrong folder
    before the first step.

    Raises:
      UserError: nothing is there, or nothing that could be trained on.
    """
    if not path:
        raise UserError(
            "data.path is not set: give a folder of videos or a list file with one "
            "'path label' per line"
        )
    if not os.path.exists(path):
        raise UserError(f"data.path {path!r} does not exist")
    if os.path.isdir(path):
        source = VideoList.from_folder(path)
        if not len(source):
            raise UserError(
                f"no videos in folder {path!r} or below; known suffixes: "
                + " ".join(VIDEO_SUFFIXES)
            )
        return source
    if path.lower().endswith(VIDEO_SUFFIXES):
        raise UserError(
            f"data.path {path!r} is a video; give its folder, or a list file with one "
            "'path label' per line"
        )
    source = VideoList.from_list_file(path)
    if not len(source):
        raise UserError(f"list file {path!r} has no entries")
    _check_that_files_exist(source)
    return source


def _check_that_files_exist(source: VideoList) -> None:
    num_looked_at = min(len(source), _MAX_FILES_LOOKED_AT)
    for i in range(num_looked_at):
        if os.path.exists(source[i * len(source) // num_looked_at].path):
            return
    raise UserError(
        f"none of the {num_looked_at} files looked at of {source.name!r} exist, the "
        f"first being {source[0].path!r}; relative paths are resolved against the "
        f"list's folder {source.root!r}: mend the paths or move the list"
    )


def fingerprint(source: VideoList, **sampling) -> str:
    """Identifies a data stream, for the checkpoint to notice that it has changed.

    Paths count as listed, so that a dataset may be moved with its list.

    Args:
      source: the videos.
      **sampling: whatever else the stream depends on; JSON values and tuples.

    Returns:
      SHA-256 of paths, labels and sampling, in hexadecimal digits.
    """
    digest = hashlib.sha256()
    for part in (
        source._entries,
        source._ends.astype("<i8").tobytes(),
        source.labels.astype("<i8").tobytes(),
        json.dumps(sampling, sort_keys=True).encode(),
    ):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
