"""What every source of videos is: a random-access, picklable sequence of records."""

import abc
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Record:
    """One video or image.

    Attributes:
      path: names it in messages; without `media`, the local path or URL to read.
      label: class of the video; 0 where there are no classes.
      media: where the source itself holds it, an encoded video or image, or frames,
        uint8 `[T, H, W, 3]`.
      fps: frames per second of frames in `media`, where known.
    """

    path: str
    label: int
    media: bytes | np.ndarray | None = dataclasses.field(
        default=None, compare=False, repr=False
    )
    fps: float | None = None


class Source(Sequence[Record]):
    """Records in a fixed order.

    Picklable and compact, since every worker process gets a copy.

    Indexing raises OSError where the storage fails to give a record.

    Attributes:
      name: what the records come from, for messages.
      labels: int64 `[len(self)]`.
    """

    name: str
    labels: np.ndarray

    @abc.abstractmethod
    def path_of(self, index: int) -> str:
        """Returns the `path` of a record without reading it."""

    @abc.abstractmethod
    def digest(self) -> str:
        """Identifies content and order, in hexadecimal digits; true to a moved copy."""


class Joined(Source):
    """The records of several sources, numbered through, one source after the other.

    Attributes:
      sources: the sources.
      name: all of theirs.
    """

    def __init__(self, sources: Sequence[Source]):
        """Takes at least one source."""
        self.sources = list(sources)
        self.name = ", ".join(source.name for source in self.sources)
        self._ends = np.cumsum([len(source) for source in self.sources])

    @property
    def labels(self) -> np.ndarray:
        """Labels as the sources number them; some read all their records for that."""
        return np.concatenate([source.labels for source in self.sources])

    def __len__(self) -> int:
        """Returns the number of records of all sources together."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        """Returns a record; raises OSError where its storage fails."""
        source, position = self._locate(range(len(self))[index])
        return source[position]

    def path_of(self, index: int) -> str:
        """Returns the `path` of a record without reading it."""
        source, position = self._locate(range(len(self))[index])
        return source.path_of(position)

    def digest(self) -> str:
        """Identifies the sources and their order."""
        return digest_of(source.digest().encode() for source in self.sources)

    def neighbours(self, index: int) -> range:
        """Returns the records of the source that a record is of."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        end = int(self._ends[part])
        return range(end - len(self.sources[part]), end)

    def _locate(self, index: int) -> tuple[Source, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[part]) - len(self.sources[part])
        return self.sources[part], index - start


def digest_of(parts: Iterable[bytes]) -> str:
    """Returns the SHA-256 of several byte strings and of where each ends."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
