"""Sources drawn together, each for its share of the samples."""

from collections.abc import Sequence

import grain
import numpy as np

from vjepa_jax.data.sources.records import Joined, Source, digest_of

# Grain deals sources in a fixed cycle, to which a stride over hosts is not blind: with
# weights of 1 to 1 and two hosts, each would see one source alone. Within windows of so
# many samples the order is therefore random, and every host gets the stated shares.
_WINDOW = 4096


class Mixture(Joined):
    """Several sources as one, to be drawn from; a single one is a mixture of itself.

    Attributes:
      weights: each source's expected share of the samples, on every host; in each
        block of 4096 samples of the global stream it is exact but for rounding.
    """

    def __init__(self, parts: Sequence[tuple[Source, float]]):
        """Takes sources, none of them empty, with their weights."""
        super().__init__([source for source, _ in parts])
        self.weights = [weight for _, weight in parts]

    def digest(self) -> str:
        """Identifies the sources, their order and their weights."""
        shares = np.array(self.weights, "<f8").tobytes()
        return digest_of([super().digest().encode(), shares])

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
