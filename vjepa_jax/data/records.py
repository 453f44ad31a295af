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


def digest_of(parts: Iterable[bytes]) -> str:
    """Returns the SHA-256 of several byte strings and of where each ends."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
