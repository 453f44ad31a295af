"""Features of all videos of a source in memory: an encoder's, or the pixels."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import numpy as np

from vjepa_jax.data.clips.reader import ClipReader
from vjepa_jax.data.sources.records import Source
from vjepa_jax.data.stream.read_all import read_all
from vjepa_jax.models.encoder import token_grid

# uint8 video [B, T, H, W, 3] -> tokens float32 [B, T', S, D]
Encode = Callable[[np.ndarray], np.ndarray]

Name = TypeVar("Name", bound=Hashable)


@dataclasses.dataclass
class Features:
    """Tokens and labels of the readable videos of a source, in its order.

    Attributes:
      tokens: float32 [N, T', S, D]: T' time steps of S positions.
      labels: int64 [N].
      index: int64 [N], indices into the source.
    """

    tokens: np.ndarray
    labels: np.ndarray
    index: np.ndarray

    def pooled(self) -> np.ndarray:
        """Average over time and space: [N, D]."""
        return self.tokens.mean((1, 2))

    def pooled_in_time_steps(self) -> np.ndarray:
        """Average over space: [N, T', D]."""
        return self.tokens.mean(2)

    def flat(self) -> np.ndarray:
        """Return all tokens of a clip in one axis: [N, T' * S, D]."""
        n, t, s, d = self.tokens.shape
        return self.tokens.reshape(n, t * s, d)


def make_pixel_encode(patch_size: int, tubelet_size: int) -> Encode:
    """Make tokens of raw pixels: the tubelets, averaged over cells of 2 x 2 pixels.

    Args:
      patch_size: side of a tubelet in pixels, even.
      tubelet_size: frames of a tubelet.
    """
    cell = 2

    def encode(video: np.ndarray) -> np.ndarray:
        t, h, w = token_grid(video.shape, patch_size, tubelet_size)
        cells = patch_size // cell
        x = video.astype(np.float32).reshape(
            len(video), t, tubelet_size, h, cells, cell, w, cells, cell, 3
        )
        x = x.mean((5, 8)).transpose(0, 1, 3, 5, 2, 4, 6, 7)
        return x.reshape(len(video), t, h * w, -1) / 255

    return encode


def extract(
    encodes: Mapping[Name, Encode],
    source: Source,
    reader: ClipReader,
    batch_size: int,
    num_workers: int,
) -> dict[Name, Features]:
    """Read every video of a source once and encode it in several ways.

    Unreadable videos are left out.

    Args:
      encodes: functions that encode clips, by name.
      source: the videos.
      reader: how to cut the clips.
      batch_size: clips per call of an encode.
      num_workers: decoding processes.
    """
    tokens: dict[Name, list[np.ndarray]] = {name: [] for name in encodes}
    labels, index = [], []
    for batch in read_all(
        source,
        reader=reader,
        batch_size=batch_size,
        num_workers=num_workers,
        padded=True,
    ):
        video, valid = np.asarray(batch["video"]), batch["valid"]
        for name, encode in encodes.items():
            tokens[name].append(encode(video)[valid])
        labels.append(batch["label"][valid])
        index.append(batch["index"][valid])
    return {
        name: Features(
            np.concatenate(parts), np.concatenate(labels), np.concatenate(index)
        )
        for name, parts in tokens.items()
    }


def read_clips(source: Source, reader: ClipReader, order: np.ndarray) -> np.ndarray:
    """Read one clip of some videos, uint8 [n, T, H, W, 3], without unreadable ones.

    Args:
      source: the videos.
      reader: how to cut the clips.
      order: int [at least n], indices of the videos.
    """
    (batch,) = read_all(
        source, reader=reader, batch_size=len(order), num_workers=0, order=order
    )
    return np.asarray(batch["video"])[batch["valid"]]
