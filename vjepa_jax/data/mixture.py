"""Sources drawn together, each for its share of the samples."""

from collections.abc import Sequence

import grain
import numpy as np

from vjepa_jax.data.records import Record, Source, digest_of

# Grain deals sources in a fixed cycle, to which a stride over hosts is not blind: with
# weights of 1 to 1 and two hosts, each would see one source alone. Within windows of so
# many samples the order is therefore random, and every host gets the stated shares.
_WINDOW = 4096


class Mixture(Source):
    """Several sources as one; a single one is a mixture of itself.

    Records are numbered through, one source after the other.

    Attributes:
      sources: what is mixed.
      weights: each source's expected share of the samples, on every host; over any
        4096 consecutive samples of the global stream it is exact but for rounding.
      name: those of the sources.
    """

    def __init__(self, parts: Sequence[tuple[Source, float]]):
        """Takes sources, none of them empty, with their weights."""
        self.sources = [source for source, _ in parts]
        self.weights = [weight for _, weight in parts]
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
        """Identifies the sources, their order and their weights."""
        shares = np.array(self.weights, "<f8").tobytes()
        return digest_of([*(s.digest().encode() for s in self.sources), shares])

    def neighbours(self, index: int) -> range:
        """Returns the records of the source that a record is of."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        end = int(self._ends[part])
        return range(end - len(self.sources[part]), end)

    def _locate(self, index: int) -> tuple[Source, int]:
        span = self.neighbours(index)
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[part], index - span.start

    def samples(self, seed: int) -> grain.MapDataset:
        """Returns the endless stream of samples, each a number.

        Every source is gone through in epochs, each a new permutation of its records.

        Args:
          seed: of the permutations and of the order in which sources take turns.

        Returns:
          Numbers that `split` takes apart, a pure function of seed and place.
        """
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

    def _epochs(self, start: int, end: int, seed: int) -> grain.MapDataset:
        num, total = end - start, len(self)
        return (
            grain.MapDataset.range(start, end)
            .seed(seed)
            .shuffle()
            .repeat()
            .map_with_index(lambda place, index: place // num * total + index)
        )

    def split(self, sample: int) -> tuple[int, int]:
        """Returns which epoch of its source a sample belongs to, and its record."""
        return divmod(int(sample), len(self))
