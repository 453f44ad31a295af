"""How much each window of a video surprises a pretrained predictor.

The measure of Garrido et al. (2025): the predictor predicts the features of a window's
later frames from its first frames; the surprise is the L1 distance to the target
encoder's features. `surprise` measures videos in memory, as the evaluation does;
`SurpriseMeter` takes the frames of a video of any length one after the other, and keeps
the error of every token.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips.frame_stream import FrameStream, TimedFrame
from vjepa_jax.data.sources.records import Record
from vjepa_jax.evals import frozen
from vjepa_jax.evals.frozen import FrozenModel, predicted_features, target_features
from vjepa_jax.models.encoder import VideoEncoder, normalise
from vjepa_jax.models.predictor import Predictor


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How the surprise of a video is measured.

    Attributes:
      num_frames: frames of a window, W.
      stride: frames from the start of one window to the next.
      context_frames: numbers of a window's first frames from which the rest is
        predicted; each gives a separate measure.
      mask_index: which of the predictor's mask tokens stands for the predicted tokens.
    """

    num_frames: int
    stride: int
    context_frames: tuple[int, ...]
    mask_index: int = 0

    def validate(self, tubelet_size: int, prefix: str = "config.") -> None:
        """Raise UserError unless windows and contexts are made of whole tubelets.

        Args:
          tubelet_size: length of a tubelet in frames.
          prefix: of the names in the message.
        """
        if self.num_frames < 1 or self.num_frames % tubelet_size or self.stride < 1:
            raise UserError(
                f"{prefix}num_frames={self.num_frames}, {prefix}stride={self.stride}: "
                f"give a multiple of the {tubelet_size} frames of a tubelet, and a "
                "stride of 1 frame or more"
            )
        contexts = self.context_frames
        if not contexts or any(
            not 0 < c < self.num_frames or c % tubelet_size for c in contexts
        ):
            raise UserError(
                f"{prefix}context_frames={contexts}: give multiples of the "
                f"{tubelet_size} frames of a tubelet, below the window's "
                f"{self.num_frames}"
            )


@functools.partial(
    jax.jit,
    static_argnames=("encoder", "predictor", "contexts", "mask_index"),
)
def _token_errors(
    params: Any,
    video: jax.Array,
    *,
    encoder: VideoEncoder,
    predictor: Predictor,
    contexts: tuple[int, ...],
    mask_index: int,
) -> list[jax.Array]:
    """Return the L1 error of every predicted token, [B, N - K] for K context tokens."""
    video = normalise(video)
    features = target_features(params, video, encoder)
    num_tokens = features.shape[1]
    errors = []
    for seen in contexts:
        prediction = predicted_features(
            params,
            video,
            encoder,
            predictor,
            range(seen),
            range(seen, num_tokens),
            mask_index,
        )
        errors.append(jnp.abs(prediction - features[:, seen:]).mean(-1))
    return errors


def token_errors(
    model: FrozenModel, windows: Sequence[np.ndarray], protocol: Protocol, rows: int
) -> list[np.ndarray]:
    """Measure the error of every predicted token of windows.

    Args:
      model: with a predictor.
      windows: B of them, uint8 [W, S, S, 3] each.
      protocol: of the measure.
      rows: windows of the call, B or more: calls of one shape share a compilation.

    Returns:
      For each context the mean L1 error over channels, float32 [B, T', H', W']; T' are
      the time steps after the context.
    """
    time_steps, height, width = model.grid(windows[0].shape)
    seen_steps = [c // model.encoder.tubelet_size for c in protocol.context_frames]
    batch = [*windows, *[windows[-1]] * (rows - len(windows))]
    errors = model.call(
        _token_errors,
        np.stack(batch),
        encoder=model.encoder,
        predictor=model.predictor,
        contexts=tuple(steps * height * width for steps in seen_steps),
        mask_index=protocol.mask_index,
    )
    return [
        of_context[: len(windows)].reshape(-1, time_steps - steps, height, width)
        for of_context, steps in zip(errors, seen_steps, strict=True)
    ]


def surprise(
    model: FrozenModel,
    videos: Sequence[np.ndarray],
    protocol: Protocol,
    batch_size: int,
) -> list[np.ndarray]:
    """Measure the surprise in every window of videos.

    Args:
      model: with a predictor.
      videos: uint8 [n, S, S, 3] each, at least as long as a window.
      protocol: of the measure.
      batch_size: windows per call.

    Returns:
      float32 [windows, contexts] of each video.
    """
    starts = [
        range(0, len(video) - protocol.num_frames + 1, protocol.stride)
        for video in videos
    ]
    windows = [(v, start) for v, of_video in enumerate(starts) for start in of_video]
    losses = np.empty((len(windows), len(protocol.context_frames)), np.float32)
    for first in range(0, len(windows), batch_size):
        batch = [
            videos[v][start : start + protocol.num_frames]
            for v, start in windows[first : first + batch_size]
        ]
        errors = token_errors(model, batch, protocol, batch_size)
        for column, of_context in enumerate(errors):
            losses[first : first + len(batch), column] = of_context.mean((1, 2, 3))
    return np.split(losses, np.cumsum([len(of_video) for of_video in starts])[:-1])


# ---------------------------------------------------------------- one video, any length


@dataclasses.dataclass(frozen=True)
class Window:
    """A window of a video, and the errors of what is predicted in it.

    Attributes:
      times: float [W], seconds of its frames from the first frame of the video.
      num_context: number of its first frames from which the others are predicted.
      errors: float32 [T', H', W'], L1 error of each predicted token; T' are the time
        steps after the context.
    """

    times: np.ndarray
    num_context: int
    errors: np.ndarray

    @property
    def time(self) -> float:
        """Middle of the predicted frames, in seconds."""
        return float(self.times[self.num_context :].mean())

    @property
    def surprise(self) -> float:
        """Mean of the errors."""
        return float(self.errors.mean())


@dataclasses.dataclass(frozen=True)
class VideoSurprise:
    """The surprise over a video.

    Attributes:
      times: float64 [n], middle of each window's predicted frames, in seconds.
      surprise: float32 [n], mean L1 error of each window.
      maps: float32 [n, T', H', W'], the error of every predicted token: T' time steps
        after the context, H' x W' patches from the top left.
    """

    times: np.ndarray
    surprise: np.ndarray
    maps: np.ndarray


class SurpriseMeter:
    """Measures how much videos surprise a model: call it with a video.

    Attributes:
      model: with a predictor.
      protocol: of the windows, with one context.
      resolution: side of the frames that the model sees, in pixels.
      batch_size: windows per call of the model.
    """

    def __init__(
        self,
        model: FrozenModel,
        protocol: Protocol,
        resolution: int = 0,
        batch_size: int = 8,
    ):
        """Check that the model can predict such windows.

        Args:
          model: with a predictor.
          protocol: of the windows. 0 stands for a window as long as the clips of
            training, for a context of half a window, and for a stride of a tubelet.
          resolution: side of the frames in pixels; 0: as in training.
          batch_size: windows per call.

        Raises:
          UserError: the model has no predictor of its own features, or the windows do
            not fit it.
        """
        model.require_predictor(protocol.mask_index)
        tubelet = model.encoder.tubelet_size
        num_frames = protocol.num_frames or model.video_shape[0]
        (context,) = protocol.context_frames
        half = max(tubelet, num_frames // 2 // tubelet * tubelet)
        self.protocol = Protocol(
            num_frames,
            protocol.stride or tubelet,
            (context or half,),
            protocol.mask_index,
        )
        self.protocol.validate(tubelet, "")
        if self.protocol.stride > num_frames:
            raise UserError(
                f"stride={protocol.stride}: windows of {num_frames} frames would leave "
                "frames out: give at most their length"
            )
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: give 1 or more")
        self.model, self.batch_size = model, batch_size
        self.resolution = resolution or model.video_shape[1]
        model.grid((num_frames, self.resolution, self.resolution, 3))

    def windows(self, frames: Iterable[TimedFrame]) -> Iterator[Window]:
        """Measure windows of a video of any length, with bounded memory.

        Args:
          frames: (seconds, uint8 [S, S, 3]) in order, S being `resolution`.

        Yields:
          The windows, in order; none if the video is shorter than one.
        """
        length, stride = self.protocol.num_frames, self.protocol.stride
        recent: collections.deque[TimedFrame] = collections.deque(maxlen=length)
        waiting: list[tuple[np.ndarray, np.ndarray]] = []
        for number, frame in enumerate(frames):
            recent.append(frame)
            start = number - length + 1
            if start < 0 or start % stride:
                continue
            times, pixels = zip(*recent, strict=True)
            waiting.append((np.array(times), np.stack(pixels)))
            if len(waiting) == self.batch_size:
                yield from self._measure(waiting)
                waiting = []
        if waiting:
            yield from self._measure(waiting)

    def _measure(
        self, waiting: list[tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[Window]:
        (errors,) = token_errors(
            self.model, [x for _, x in waiting], self.protocol, self.batch_size
        )
        (context,) = self.protocol.context_frames
        for (times, _), of_window in zip(waiting, errors, strict=True):
            yield Window(times, context, of_window)

    def __call__(self, video: np.ndarray, fps: float = 1.0) -> VideoSurprise:
        """Measure the windows of a video in memory.

        Args:
          video: uint8 RGB [T, H, W, 3] of any size, with the frames as far apart in
            time as those of the clips of training. Every frame is resized to a square
            without cropping.
          fps: frames per second of the video; 1: `times` are numbers of frames.

        Raises:
          UserError: this is no such array, or it is shorter than a window.
        """
        video = np.asarray(video)
        if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8:
            raise UserError(
                f"a video of {video.dtype} {video.shape} is not uint8 [T, H, W, 3]"
            )
        if not 0 < fps < np.inf:
            raise UserError(f"fps={fps}: give a positive number")
        length = self.protocol.num_frames
        if len(video) < length:
            raise UserError(
                f"a video of {len(video)} frames is shorter than a window of {length}: "
                "give a longer video, or a smaller num_frames"
            )
        stream = FrameStream(self.resolution, frame_step=1)
        record = Record("the video", 0, video, fps)
        found = list(self.windows(stream.read(record)))
        return VideoSurprise(
            np.array([window.time for window in found]),
            np.array([window.surprise for window in found], np.float32),
            np.stack([window.errors for window in found]),
        )


def load_surprise(
    path: str,
    step: int | None = None,
    *,
    num_frames: int = 0,
    context_frames: int = 0,
    stride: int = 0,
    resolution: int = 0,
) -> SurpriseMeter:
    """Load a checkpoint to measure how much videos surprise it.

    Args:
      path: workdir of a run, or folder of a conversion.
      step: a saved step; None: the latest.
      num_frames: frames of a window; 0: as in the clips of training.
      context_frames: first frames of a window, from which the others are predicted; 0:
        half of them.
      stride: frames from the start of one window to the next; 0: a tubelet.
      resolution: side of the frames in pixels; 0: as in training.

    Raises:
      UserError: there is no such checkpoint, it has no predictor of its own features,
        or the windows do not fit it.
    """
    protocol = Protocol(num_frames, stride, (context_frames,))
    return SurpriseMeter(frozen.load(path, step), protocol, resolution)
