"""Tokens of videos, several clips and views of each, batch by batch.

A head sees the tokens of all clips of a video together, once per view.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.data.clips.reader import ClipReader
from vjepa_jax.data.sources.open import open_mixture
from vjepa_jax.data.sources.records import Joined, Mixture, Source
from vjepa_jax.data.stream import streams
from vjepa_jax.data.stream.bad_videos import BadVideoLimits
from vjepa_jax.data.stream.pipeline import Batching, TrainIterator
from vjepa_jax.data.stream.read_all import read_all
from vjepa_jax.data.stream.workers import Workers
from vjepa_jax.data.transforms.transforms import ClipTransform, make_views
from vjepa_jax.evals.frozen import FrozenModel, fill_up


def encode_in_calls(
    encode: Callable[..., np.ndarray],
    clips_per_call: int,
    *clips: np.ndarray,
    padded: bool = False,
) -> np.ndarray:
    """Encode clips, some at a time.

    Args:
      encode: from arrays [B, ...] to one of B rows.
      clips_per_call: rows per call.
      clips: arrays [N, ...].
      padded: fill the last call up with zeros, so that all have one shape.

    Returns:
      The N rows.
    """
    parts = []
    for start in range(0, len(clips[0]), clips_per_call):
        rows = [x[start : start + clips_per_call] for x in clips]
        count = len(rows[0])
        if padded:
            rows = fill_up(rows, clips_per_call)
        parts.append(encode(*rows)[:count])
    return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Tokens that heads are trained and tested on.

    Attributes:
      tokens: float32 [B, views, N, D].
      labels: int64 [B].
      index: int64 [B], indices into the source; -1 for padding.
      valid: bool [B]; False for unreadable videos and padding.
    """

    tokens: np.ndarray
    labels: np.ndarray
    index: np.ndarray
    valid: np.ndarray


TokenBatches = Generator[TokenBatch, None, None]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encodes clips into the tokens that heads see.

    Attributes:
      model: of the features.
      num_clips: of a video, spread over its time.
      clips_per_call: clips that the encoder sees at once.
      out_layers: see `FrozenModel.encode`.
      is_pooled: whether the tokens of a view are averaged to one.
    """

    model: FrozenModel
    num_clips: int
    clips_per_call: int
    out_layers: tuple[int, ...] = ()
    is_pooled: bool = False

    def __call__(self, video: np.ndarray) -> np.ndarray:
        """Encode the clips of videos.

        Args:
          video: uint8 [B, clips * views, T, H, W, 3], a clip's views side by side.

        Returns:
          float32 [B, views, N, D]. N are the tokens of all clips in the order of time,
          those of one layer after those of another; 1 where they are pooled.
        """
        layers = max(len(self.out_layers), 1)

        def encode(clips):
            tokens = self.model.encode(clips, self.out_layers)
            tokens = tokens.reshape(len(clips), -1, layers, tokens.shape[-1] // layers)
            return tokens.mean((1, 2), keepdims=True) if self.is_pooled else tokens

        clips = video.reshape(-1, *video.shape[2:])
        tokens = encode_in_calls(encode, self.clips_per_call, clips)
        tokens = tokens.reshape(len(video), self.num_clips, -1, *tokens.shape[1:])
        tokens = tokens.transpose(0, 2, 4, 1, 3, 5)  # [B, views, layers, clips, ., D]
        tokens = tokens.reshape(*tokens.shape[:2], -1, tokens.shape[-1])
        return tokens.mean(2, keepdims=True) if self.is_pooled else tokens

    def cache_key(self) -> tuple:
        """Return what the tokens of given clips depend on, besides the model."""
        return self.out_layers, self.is_pooled


@dataclasses.dataclass(frozen=True)
class Videos:
    """The videos of a source as an evaluation sees them; nothing is drawn at random.

    Attributes:
      source: the videos.
      reader: how their clips are cut.
      encoder: of the clips.
      num_views: crops of every clip, see `transforms.spatial_views`.
      num_workers: decoding processes.
      worker_timeout_secs: longest time for one video.
    """

    source: Source
    reader: ClipReader
    encoder: Any  # `Encoder`, or the one of a subclass
    num_views: int
    num_workers: int
    worker_timeout_secs: float

    def __len__(self) -> int:
        """Return the number of videos."""
        return len(self.source)

    def encode(self, video: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Encode clips, see `Encoder`; `index` [B] holds the videos' indices."""
        del index
        return self.encoder(video)

    def batches(self, batch_size: int, order: np.ndarray | None = None) -> TokenBatches:
        """Yield batches of one size; padding fills the last one.

        Args:
          batch_size: videos per batch.
          order: int [n], indices of the videos to encode, with repetitions; None:
            every video once.
        """
        size = self.read_size(batch_size, self.num_views)
        return _join(self._parts(size, order), batch_size)

    def read_size(self, batch_size: int, num_views: int = 1) -> int:
        """Return how many videos of a batch are decoded and encoded together.

        The encoder gets at most `clips_per_call` clips: the pixels of a complete batch
        of the papers, 2048 clips, would take gigabytes in every decoding process.
        """
        per_video = self.encoder.num_clips * num_views
        most = max(1, self.encoder.clips_per_call // per_video)
        return max(n for n in range(1, most + 1) if batch_size % n == 0)

    def _parts(self, batch_size: int, order: np.ndarray | None) -> TokenBatches:
        for batch in read_all(
            self.source,
            reader=self.reader,
            batch_size=batch_size,
            num_workers=self.num_workers,
            worker_timeout_secs=self.worker_timeout_secs,
            views=make_views(self.num_views),
            padded=True,
            order=order,
        ):
            video = np.asarray(batch["video"])
            if self.reader.sampling.num_clips * self.num_views == 1:
                video = video[:, None]
            tokens = self.encode(video, batch["index"])
            rows = (batch[key] for key in ("label", "index", "valid"))
            yield TokenBatch(tokens, *rows)


def augmented_batches(
    videos: Videos,
    transform: ClipTransform,
    *,
    batch_size: int,
    seed: int,
    prefetch_megabytes: float,
    max_bad_fraction: float,
) -> TokenBatches:
    """Yield batches of augmented clips without end, one view of each.

    An epoch goes through all videos in a new order. Unreadable ones are replaced.

    Args:
      videos: what to draw from; their views are not used.
      transform: how each clip is cropped and augmented.
      batch_size: videos per batch.
      seed: of order, windows and augmentation.
      prefetch_megabytes: see `Workers`.
      max_bad_fraction: see `BadVideoLimits`.

    Raises:
      UserError: too many of the videos are unreadable.
    """
    size, num_clips = videos.read_size(batch_size), videos.reader.sampling.num_clips
    iterator = TrainIterator(
        Mixture([(videos.source, 1.0)]),
        videos.reader,
        transform,
        Batching(size * num_clips, seed),
        Workers(videos.num_workers, videos.worker_timeout_secs, prefetch_megabytes),
        BadVideoLimits(max_bad_fraction),
    )
    return _join(_augmented_parts(videos, iterator), batch_size)


def _augmented_parts(videos: Videos, iterator: TrainIterator) -> TokenBatches:
    num_clips = videos.reader.sampling.num_clips
    labels = np.asarray(videos.source.labels)
    with iterator:
        for batch in iterator:
            video, index = np.asarray(batch["video"]), batch["index"]
            video = video.reshape(-1, num_clips, *video.shape[1:])
            tokens = videos.encode(video, index)
            valid = np.ones(len(index), bool)
            yield TokenBatch(tokens, labels[index], index, valid)


def _join(parts: TokenBatches, batch_size: int) -> TokenBatches:
    """Join parts, whose size divides `batch_size`, to batches; pad the last one."""
    with contextlib.closing(parts):
        group: list[TokenBatch] = []
        for part in parts:
            group.append(part)
            if len(group) * len(part.index) == batch_size:
                yield _concatenate(group)
                group = []
        if group:
            missing = batch_size - len(group) * len(group[0].index)
            padding = TokenBatch(
                np.zeros((missing, *group[0].tokens.shape[1:]), np.float32),
                np.zeros(missing, np.int64),
                np.full(missing, -1, np.int64),
                np.zeros(missing, bool),
            )
            yield _concatenate([*group, padding])


def _concatenate(group: Sequence[TokenBatch]) -> TokenBatch:
    if len(group) == 1:
        return group[0]
    names = (field.name for field in dataclasses.fields(TokenBatch))
    return TokenBatch(
        *(np.concatenate([getattr(part, name) for part in group]) for name in names)
    )


def open_source(config: ConfigDict, key: str) -> Source:
    """Open `config.data[key]`; several sources become one, see `open_parts`.

    Their labels are not compared: see `labelled.open_labelled`.
    """
    return joined(open_parts(config, key))


def open_parts(config: ConfigDict, key: str) -> list[Source]:
    """Open the sources of `config.data[key]`, separated by commas.

    Raises:
      UserError: it is not set, or cannot be opened.
    """
    path = config.data[key]
    if not path:
        raise UserError(
            f"config.data.{key} is not set: give a list file with one 'path label' per "
            "line, or anything else that data.path of a run may be"
        )
    try:
        return open_mixture(path).sources
    except UserError as error:  # which names the key of a run
        message = str(error)
        if message.startswith("data.path"):
            message = f"config.data.{key}" + message.removeprefix("data.path")
        raise UserError(message) from error


def joined(parts: Sequence[Source]) -> Source:
    """Return several sources as one."""
    return parts[0] if len(parts) == 1 else Joined(parts)


def make_videos(
    model: FrozenModel,
    config: ConfigDict,
    source: Source,
    is_pooled: bool,
    num_views: int = 0,
) -> Videos:
    """Make the encoded videos of a source, as an evaluation's config describes them.

    Args:
      model: of the features.
      config: of the evaluation, see `settings`.
      source: the videos.
      is_pooled: whether the tokens of a video are averaged to one.
      num_views: crops of every clip; 0: as in the config.

    Raises:
      UserError: tubelets do not fill the clips.
    """
    data = config.data.copy_and_resolve_references()
    with data.unlocked():
        data.num_frames = data.num_frames or model.video_shape[0]
        data.resolution = data.resolution or model.video_shape[1]
    reader = streams.make_reader(data, data)
    model.grid(reader.shape()[1:])
    encoder = Encoder(
        model,
        data.num_clips,
        config.clips_per_call,
        tuple(config.out_layers),
        is_pooled,
    )
    return Videos(
        source,
        reader,
        encoder,
        num_views or data.num_views,
        data.num_workers,
        data.worker_timeout_secs,
    )
