"""Tokens of videos, several clips and views of each, batch after batch.

What a head sees of a video are the tokens of all its clips together, once per view.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

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
from vjepa_jax.evals.frozen import FrozenModel


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """What heads are trained and judged on.

    Attributes:
      tokens: float32 [B, views, N, D].
      labels: int64 [B].
      index: int64 [B], the video's place in its source; -1 of padding.
      valid: bool [B]; False where a video is unreadable and of padding.
    """

    tokens: np.ndarray
    labels: np.ndarray
    index: np.ndarray
    valid: np.ndarray


@dataclasses.dataclass(frozen=True)
class Encoder:
    """From clips to the tokens that heads see.

    Attributes:
      frozen: the model.
      num_clips: of a video, far apart in time.
      clips_per_call: clips that the encoder sees at once.
      out_layers: blocks, counted from 0, whose outputs are taken instead of the
        features, each through the last layer norm.
      is_pooled: whether the tokens are averaged to one.
    """

    frozen: FrozenModel
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
        clips = video.reshape(-1, *video.shape[2:])
        starts = range(0, len(clips), self.clips_per_call)
        parts = []
        for start in starts:
            part = clips[start : start + self.clips_per_call]
            tokens = self.frozen.encode(part, self.out_layers)
            layers = max(len(self.out_layers), 1)
            tokens = tokens.reshape(len(part), -1, layers, tokens.shape[-1] // layers)
            if self.is_pooled:
                tokens = tokens.mean((1, 2), keepdims=True)
            parts.append(tokens)
        tokens = np.concatenate(parts)
        tokens = tokens.reshape(len(video), self.num_clips, -1, *tokens.shape[1:])
        tokens = tokens.transpose(0, 2, 4, 1, 3, 5)  # [B, views, layers, clips, ., D]
        tokens = tokens.reshape(*tokens.shape[:2], -1, tokens.shape[-1])
        return tokens.mean(2, keepdims=True) if self.is_pooled else tokens

    def settings(self) -> tuple:
        """Return what the tokens of given clips depend on, besides the model."""
        return self.out_layers, self.is_pooled


@dataclasses.dataclass(frozen=True)
class Videos:
    """A source's videos as an evaluation sees them: nothing is drawn.

    Attributes:
      source: the videos.
      reader: how their clips are cut.
      encoder: of the clips.
      num_views: crops of every clip, see `transforms.spatial_views`.
      num_workers: decoding processes.
      worker_timeout_secs: longest time at one video.
    """

    source: Source
    reader: ClipReader
    encoder: Encoder
    num_views: int
    num_workers: int
    worker_timeout_secs: float

    def __len__(self) -> int:
        """Return the number of videos."""
        return len(self.source)

    def encode(self, video: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Encode clips, see `Encoder`; `index` [B] are their videos' places."""
        del index
        return self.encoder(video)

    def batches(
        self, batch_size: int, order: np.ndarray | None = None
    ) -> Iterator[TokenBatch]:
        """Yield batches of one size, the last one padded.

        Args:
          batch_size: videos per batch.
          order: int [n], the videos to encode, as often as they stand there; None:
            every video once.
        """
        size = self.read_size(batch_size, self.num_views)
        return _joined(self._parts(size, order), batch_size)

    def read_size(self, batch_size: int, num_views: int = 1) -> int:
        """Return how many of a batch's videos are decoded and encoded together.

        As many as give the encoder `clips_per_call`: of a batch of the papers, 2048
        clips, the pixels alone have gigabytes, in every decoding process.
        """
        per_video = self.encoder.num_clips * num_views
        most = max(1, self.encoder.clips_per_call // per_video)
        return max(n for n in range(1, most + 1) if batch_size % n == 0)

    def _parts(self, batch_size: int, order: np.ndarray | None) -> Iterator[TokenBatch]:
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
) -> Iterator[TokenBatch]:
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
    size = videos.read_size(batch_size)
    parts = _augmented_parts(
        videos,
        transform,
        Batching(size * videos.reader.sampling.num_clips, seed),
        Workers(videos.num_workers, videos.worker_timeout_secs, prefetch_megabytes),
        BadVideoLimits(max_bad_fraction),
    )
    return _joined(parts, batch_size)


def _augmented_parts(
    videos: Videos,
    transform: ClipTransform,
    batching: Batching,
    workers: Workers,
    bad_videos: BadVideoLimits,
) -> Iterator[TokenBatch]:
    num_clips = videos.reader.sampling.num_clips
    labels = np.asarray(videos.source.labels)
    source = Mixture([(videos.source, 1.0)])
    with TrainIterator(
        source, videos.reader, transform, batching, workers, bad_videos
    ) as iterator:
        for batch in iterator:
            clips, index = np.asarray(batch["video"]), batch["index"]
            clips = clips.reshape(-1, num_clips, *clips.shape[1:])
            tokens = videos.encode(clips, index)
            valid = np.ones(len(index), bool)
            yield TokenBatch(tokens, labels[index], index, valid)


def _joined(parts: Iterator[TokenBatch], batch_size: int) -> Iterator[TokenBatch]:
    """Join batches of a divisor of `batch_size` to such ones, the last one padded."""
    with contextlib.closing(parts):
        group: list[TokenBatch] = []
        for part in parts:
            group.append(part)
            if len(group) * len(part.index) == batch_size:
                yield _concatenated(group)
                group = []
        if group:
            missing = batch_size - len(group) * len(group[0].index)
            padding = TokenBatch(
                np.zeros((missing, *group[0].tokens.shape[1:]), np.float32),
                np.zeros(missing, np.int64),
                np.full(missing, -1, np.int64),
                np.zeros(missing, bool),
            )
            yield _concatenated([*group, padding])


def _concatenated(group: Sequence[TokenBatch]) -> TokenBatch:
    if len(group) == 1:
        return group[0]
    names = (field.name for field in dataclasses.fields(TokenBatch))
    return TokenBatch(
        *(np.concatenate([getattr(part, name) for part in group]) for name in names)
    )


def open_source(config: ConfigDict, key: str) -> Source:
    """Open `config.data[key]`, several sources with commas between as one.

    Raises:
      UserError: it is not set, or cannot be opened.
    """
    path = config.data[key]
    if not path:
        raise UserError(
            f"config.data.{key} is not set: give a list file with one 'path label' per "
            "line, or what else data.path of a run may be"
        )
    parts = open_mixture(path).sources
    return parts[0] if len(parts) == 1 else Joined(parts)


def make_videos(
    frozen: FrozenModel,
    config: ConfigDict,
    source: Source,
    is_pooled: bool,
    num_views: int = 0,
) -> Videos:
    """Make what an evaluation sees of a source's videos.

    Args:
      frozen: the model.
      config: of the evaluation, see `settings`.
      source: the videos.
      is_pooled: whether their tokens are averaged to one.
      num_views: crops of every clip; 0: as the config says.

    Raises:
      UserError: tubelets do not fill the clips.
    """
    data = config.data.copy_and_resolve_references()
    with data.unlocked():
        data.num_frames = data.num_frames or frozen.video_shape[0]
        data.resolution = data.resolution or frozen.video_shape[1]
    reader = streams.make_reader(data, data)
    frozen.grid(reader.shape()[1:])
    encoder = Encoder(
        frozen,
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


def require_labels(source: Source, num_classes: int) -> None:
    """Raise UserError unless all labels lie in [0, num_classes)."""
    labels = np.asarray(source.labels)
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        label = labels[wrong[0]]
        said = (
            "and labels count from 0: mend the list"
            if label < 0
            else f"and there are {num_classes} classes: mend the list, or set "
            "config.num_classes"
        )
        path = source.path_of(int(wrong[0]))
        raise UserError(f"{path!r} of {source.name!r} has the label {label}, {said}")
