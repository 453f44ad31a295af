"""Sources of videos: random-access, picklable sequences of records.

`Joined` puts several sources one after the other, `Mixture` draws from them by weight,
and `Subset` chooses records of one.
"""

import abc
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vjepa_jax.base.errors import UserError

if TYPE_CHECKING:
    import grain


# Grain takes the sources of a mixture in a fixed cycle, and each process reads every
# P-th sample: with two processes and equal weights, each would see one source only.
# Shuffling within windows of so many samples gives every process the stated shares.
_WINDOW = 4096


@dataclasses.dataclass(frozen=True)
class Record:
    """One video or image.

    Attributes:
      path: name for messages; without `media`, the local path or URL to read.
      label: class of the video; 0 where there are no classes.
      media: content that the source itself holds: an encoded video or image, or
        frames, uint8 [T, H, W, 3]. None: it is read from `path`.
      fps: frames per second of frames in `media`, if known.
    """

    path: str
    label: int
    media: bytes | np.ndarray | None = dataclasses.field(
        default=None, compare=False, repr=False
    )
    fps: float | None = None


class Source(abc.ABC):
    """Records in a fixed order.

    Picklable and compact, since every worker process gets a copy.

    Attributes:
      name: where the records come from, for messages.
      labels: class of each record, int64 [len(self)]; an attribute or a property.
      unlabelled: why the records have no classes, and all labels are 0; empty: they
        may have.
    """

    name: str
    unlabelled: str = ""

    if TYPE_CHECKING:  # at run time, subclasses may set an attribute instead

        @property
        @abc.abstractmethod
        def labels(self) -> np.ndarray: ...

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names of the classes in the order of their labels; None: numbers only.

        Two sources may give a class different numbers: see `classes.unite_classes`.
        """
        return None

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of records."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record:
        """Return a record; raise OSError if its storage fails."""

    def __iter__(self) -> Iterator[Record]:
        """Yield all records in order."""
        return (self[index] for index in range(len(self)))

    @abc.abstractmethod
    def path_of(self, index: int) -> str:
        """Return the `path` of a record without reading it."""

    @abc.abstractmethod
    def digest(self) -> str:
        """Return a hash of content and order; a moved copy has the same one."""

    def fingerprint(self, **settings: object) -> str:
        """Return a hash by which a resumed run notices that its data has changed.

        Args:
          **settings: everything else that the clips depend on; JSON values and tuples.

        Returns:
          SHA-256 of the digest and the settings, in hexadecimal.
        """
        text = json.dumps(settings, sort_keys=True)
        return digest_of((self.digest().encode(), text.encode()))


class Joined(Source):
    """The records of several sources, one source after the other.

    Labels are those of each source: see `classes.unite_classes`.

    Attributes:
      sources: the sources.
      name: their names.
    """

    def __init__(self, sources: Sequence[Source]):
        """Join at least one source."""
        self.sources = list(sources)
        self.name = ", ".join(source.name for source in self.sources)
        self._ends = np.cumsum([len(source) for source in self.sources])

    @property
    def labels(self) -> np.ndarray:
        """Labels of all sources; some sources read all their records for that."""
        return np.concatenate([source.labels for source in self.sources])

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names of the classes, if all sources have the same."""
        names, *others = (source.class_names for source in self.sources)
        return names if all(other == names for other in others) else None

    def __len__(self) -> int:
        """Return the number of records of all sources together."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        """Return a record; raise OSError if its storage fails."""
        source, position = self._locate(range(len(self))[index])
        return source[position]

    def path_of(self, index: int) -> str:
        """Return the `path` of a record without reading it."""
        source, position = self._locate(range(len(self))[index])
        return source.path_of(position)

    def source_of(self, index: int) -> Source:
        """Return the source that a record belongs to."""
        return self._locate(range(len(self))[index])[0]

    def digest(self) -> str:
        """Return a hash of the sources and their order."""
        return digest_of(source.digest().encode() for source in self.sources)

    def neighbours(self, index: int) -> range:
        """Return the indices of all records of the source that a record belongs to."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        end = int(self._ends[part])
        return range(end - len(self.sources[part]), end)

    def _locate(self, index: int) -> tuple[Source, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[part]) - len(self.sources[part])
        return self.sources[part], index - start


class Mixture(Joined):
    """Sources from which samples are drawn by weight; one source is a mixture too.

    Attributes:
      weights: expected share of each source in the samples of every process. In each
        block of 4096 samples of the global stream the share is exact up to rounding.
    """

    def __init__(self, parts: Sequence[tuple[Source, float]]):
        """Mix (source, weight) pairs; no source is empty."""
        super().__init__([source for source, _ in parts])
        self.weights = [weight for _, weight in parts]

    def digest(self) -> str:
        """Return a hash of the sources, their order and their weights."""
        shares = np.array(self.weights, "<f8").tobytes()
        return digest_of([super().digest().encode(), shares])

    def samples(self, seed: int) -> "grain.MapDataset":
        """Return the endless stream of samples, as integers.

        Each source is read in epochs, and each epoch is a new permutation of its
        records.

        Args:
          seed: of the permutations and of the order of the sources.

        Returns:
          Integers for `split`; each is a pure function of the seed and its position.
        """
        import grain  # takes a second to import, and few users of sources draw samples

        streams, start = [], 0
        for source, end in zip(self.sources, self._ends.tolist(), strict=True):
            streams.append(self._epochs(start, end, seed))
            start += len(source)
        if len(streams) == 1:
            return streams[0]
        mixed = grain.MapDataset.mix(streams, self.weights)
        return grain.experimental.WindowShuffleMapDataset(
            mixed, window_size=_WINDOW, seed=seed
        )

    def _epochs(self, start: int, end: int, seed: int) -> "grain.MapDataset":
        import grain

        num, total = end - start, len(self)
        return (
            grain.MapDataset.range(start, end)
            .seed(seed)
            .shuffle()
            .repeat()
            .map_with_index(lambda position, index: position // num * total + index)
        )

    def split(self, sample: int) -> tuple[int, int]:
        """Return the epoch of its source that a sample belongs to, and its record."""
        return divmod(int(sample), len(self))


class Subset(Source):
    """Chosen records of a source.

    Attributes:
      source: all records.
      indices: int64 [len(self)], index in `source` of each chosen record.
      name: that of `source`.
    """

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
        """Choose records of `source` by their indices."""
        self.source = source
        self.indices = np.asarray(indices, np.int64)
        self.name = source.name

    @property
    def labels(self) -> np.ndarray:
        """Labels of the chosen records."""
        return np.asarray(self.source.labels)[self.indices]

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names of the classes of all records."""
        return self.source.class_names

    def __len__(self) -> int:
        """Return the number of chosen records."""
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        """Return a record; raise OSError if its storage fails."""
        return self.source[int(self.indices[index])]

    def path_of(self, index: int) -> str:
        """Return the `path` of a record without reading it."""
        return self.source.path_of(int(self.indices[index]))

    def digest(self) -> str:
        """Return a hash of the source and the chosen indices."""
        chosen = self.indices.astype("<i8").tobytes()
        return digest_of((self.source.digest().encode(), chosen))


def hold_out(source: Source, share: float, seed: int) -> tuple[Subset, Subset]:
    """Split a source by video: (the rest, the share held out).

    Records with the same path, such as several clips of one file, stay together.

    Args:
      source: all records; both parts keep their order.
      share: share of the videos to hold out; at least one video is.
      seed: of the choice.

    Raises:
      UserError: there is only one video.
    """
    paths = [source.path_of(index) for index in range(len(source))]
    _, video = np.unique(paths, return_inverse=True)
    num_videos = int(video.max()) + 1
    num_held_out = max(1, round(share * num_videos))
    if num_held_out >= num_videos:
        raise UserError(
            f"{source.name!r} has {num_videos} videos, of which {num_held_out} would "
            "be held out: give more videos, or a smaller data.held_out_share"
        )
    chosen = np.random.default_rng(seed).permutation(num_videos)[:num_held_out]
    is_held_out = np.isin(video, chosen)
    return (
        Subset(source, np.flatnonzero(~is_held_out)),
        Subset(source, np.flatnonzero(is_held_out)),
    )


def evenly_spread(count: int, wanted: int) -> np.ndarray:
    """Return evenly spaced indices below `count`: int64 [min(wanted, count)].

    Lists are often sorted by class, so that their first records are not typical.
    """
    return np.linspace(0, count - 1, min(wanted, count)).astype(np.int64)


def digest_of(parts: Iterable[bytes]) -> str:
    """Return the SHA-256, in hexadecimal, of byte strings and their lengths."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
