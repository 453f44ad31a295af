"""Some of the videos of a source."""

from collections.abc import Sequence

import numpy as np

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.sources.records import Record, Source, digest_of


class Subset(Source):
    """Chosen records of a source, numbered anew.

    Attributes:
      source: the whole.
      indices: int64 `[len(self)]`, the place in the whole of each record.
      name: that of the whole.
    """

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
        """Takes the whole and what is chosen of it."""
        self.source = source
        self.indices = np.asarray(indices, np.int64)
        self.name = source.name

    @property
    def labels(self) -> np.ndarray:
        """Labels of the chosen records."""
        return np.asarray(self.source.labels)[self.indices]

    def __len__(self) -> int:
        """Returns the number of chosen records."""
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        """Returns a record; raises OSError where its storage fails."""
        return self.source[int(self.indices[index])]

    def path_of(self, index: int) -> str:
        """Returns the `path` of a record without reading it."""
        return self.source.path_of(int(self.indices[index]))

    def digest(self) -> str:
        """Identifies the whole and what is chosen of it."""
        chosen = self.indices.astype("<i8").tobytes()
        return digest_of((self.source.digest().encode(), chosen))


def hold_out(source: Source, share: float, seed: int) -> tuple[Subset, Subset]:
    """Splits a source by video: (the rest, the share held out).

    Records of one path, as several clips of one file, stay on one side.

    Args:
      source: the whole; order is kept on both sides.
      share: of the videos that is held out, rounded up to at least one video.
      seed: of the choice.

    Raises:
      UserError: there is but one video.
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
    """Return int64 [min(wanted, count)], numbers below `count` from first to last.

    Lists often go by class, so that their first records are not like the others.
    """
    return np.linspace(0, count - 1, min(wanted, count)).astype(np.int64)
