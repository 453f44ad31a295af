"""Choose the frames of a video's clips by their times; no file is read here."""

import dataclasses
import math

import numpy as np

from vjepa_jax.base.choices import SAMPLINGS
from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict

_CLIP_KEYS = ("num_frames", "frame_step", "fps", "duration_secs")

# Added to times: the later of two equally near frames is then chosen whatever the
# rounding error.
TIE_SECS = 1e-6


class LowFrameRateError(ValueError):
    """The integer step of the official rule is 0: the frame rate is too low."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How clips are chosen from a video in time; picklable.

    Exactly one of `frame_step`, `fps` and `duration_secs` gives the distance between
    the frames of a clip; the others are 0.

    Rule "exact": with `frame_step`, the frames are exactly that far apart. Otherwise
    frame `i` of a clip is the frame shown nearest to `i / fps` seconds after the first,
    by the video's own time stamps; of two equally near frames, the later one. Reducing
    30 frames per second to 4 thus takes steps of 7 and 8, and variable frame rates are
    handled correctly. A clip may start at every frame from which it fits. Clip `k` of
    `num_clips` draws from the `k`-th equal part of these starts, or takes the middle
    one. Only a video shorter than a clip is padded, with its last frame.

    Rule "official", of the official code (`src/datasets/video_dataset.py`): the step is
    an integer, `ceil(average fps) // fps` or `int(duration_secs * ceil(average fps) /
    num_frames)`. The video is split into `num_clips` parts of equal length, and one
    clip is taken from each, at the part's start or at random. Its frames are
    `linspace(start, start + num_frames * step, num_frames)` rounded down, with a
    slightly larger mean step: 4.27 for 16 frames with step 4. A part shorter than a
    clip is sampled from its start and padded with its last frame; with
    `allow_clip_overlap`, clips then extend into the other parts instead.

    Attributes:
      num_frames: frames per clip, T.
      frame_step: distance of a clip's frames in video frames.
      fps: frames of a clip per second of video.
      duration_secs: seconds of video in a clip; `fps = num_frames / duration_secs`.
      num_clips: clips per video, K.
      rule: one of `choices.SAMPLINGS`.
      allow_clip_overlap: only for the official rule.
    """

    num_frames: int
    frame_step: int = 0
    fps: float = 0.0
    duration_secs: float = 0.0
    num_clips: int = 1
    rule: str = "exact"
    allow_clip_overlap: bool = False

    def __post_init__(self):
        """Refuse values out of range; the UserError names the config key."""
        for name in ("num_frames", "num_clips"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"data.{name} must be at least 1, not {getattr(self, name)}"
                )
        spacing = {
            name: getattr(self, name) for name in ("frame_step", "fps", "duration_secs")
        }
        # Written so that NaN is refused as well.
        if not (
            all(0 <= value < math.inf for value in spacing.values())
            and sum(value > 0 for value in spacing.values()) == 1
        ):
            raise UserError(
                "one of data.frame_step, data.fps and data.duration_secs must be "
                "positive and the others 0, not "
                + ", ".join(f"{value:g}" for value in spacing.values())
            )
        if self.rule not in SAMPLINGS:
            raise UserError(
                f"data.sampling must be one of {', '.join(SAMPLINGS)}, not "
                f"{self.rule!r}"
            )
        if self.allow_clip_overlap and self.rule != "official":
            raise UserError(
                "data.allow_clip_overlap belongs to data.sampling='official'; the rule "
                f"{self.rule!r} lets clips overlap where a video is short of frames"
            )

    @property
    def spacing_secs(self) -> float | None:
        """Seconds between a clip's frames; None with `frame_step`."""
        if self.frame_step:
            return None
        return 1 / self.fps if self.fps else self.duration_secs / self.num_frames

    def window(self, average_fps: float | None) -> tuple[float, float] | None:
        """Return the seconds (from, to) of the video that hold all clips, if known.

        A subclass whose clips lie at known times returns them, so that only this part
        of a long video is read. Here clips may lie anywhere. See `frames` for the
        argument.
        """
        del average_fps
        return None

    def frames(
        self,
        times: np.ndarray,
        average_fps: float | None = None,
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """Choose the frames of every clip.

        Args:
          times: float [n], when each frame is shown, in seconds and increasing; n is
            at least 1.
          average_fps: frame rate for the step of the official rule, as the container
            states it; None if unknown.
          rng: draws the starts; None takes the middle ones, or the first of each part
            by the official rule.

        Returns:
          int64 [K, T], in [0, n), not decreasing along T.

        Raises:
          LowFrameRateError: the official rule finds a step of 0.
        """
        if len(times) == 1:  # a still image
            return np.zeros((self.num_clips, self.num_frames), np.int64)
        if self.rule == "official":
            return self._official_frames(len(times), average_fps, rng)
        return self._exact_frames(np.asarray(times, np.float64), rng)

    def _exact_frames(
        self, times: np.ndarray, rng: np.random.Generator | None
    ) -> np.ndarray:
        if self.frame_step:
            # Frames are counted; it does not matter when they are shown.
            times = np.arange(len(times), dtype=np.float64)
        spacing = self.spacing_secs or self.frame_step
        offsets = np.arange(self.num_frames) * spacing
        between = (times[1:] + times[:-1]) / 2
        # The last frame is shown as long as the others are on average.
        end = times[-1] + (times[-1] - times[0]) / (len(times) - 1) / 2
        num_starts = np.searchsorted(times, end - offsets[-1] - TIE_SECS)
        num_starts = max(1, int(num_starts))
        clips = []
        for k in range(self.num_clips):
            low = min(k * num_starts // self.num_clips, num_starts - 1)
            high = max((k + 1) * num_starts // self.num_clips, low + 1)
            start = (low + high - 1) // 2 if rng is None else rng.integers(low, high)
            wanted = times[start] + offsets + TIE_SECS
            clips.append(np.searchsorted(between, wanted, side="right"))
        return np.array(clips, np.int64)

    def _official_frames(
        self, num: int, average_fps: float | None, rng: np.random.Generator | None
    ) -> np.ndarray:
        step = self._official_step(average_fps)
        clip_len = self.num_frames * step
        part_len = num // self.num_clips
        clips = []
        for k in range(self.num_clips):
            if part_len > clip_len:
                end = clip_len if rng is None else rng.integers(clip_len, part_len)
                places = np.linspace(end - clip_len, end, self.num_frames)
                frames = np.minimum(places, end - 1).astype(np.int64) + k * part_len
            elif not self.allow_clip_overlap:
                frames = self._official_padded(part_len, step) + k * part_len
            else:
                shift = 0
                if num > clip_len:
                    shift = (num - clip_len) // (self.num_clips - 1)
                frames = self._official_padded(min(clip_len, num) - 1, step) + k * shift
            clips.append(frames)
        # With fewer frames than clips, parts are empty and their frame is -1, which
        # decord reads as the last one.
        return np.array(clips) % num

    def _official_padded(self, length: int, step: int) -> np.ndarray:
        frames = np.full(self.num_frames, length - 1, np.int64)
        num = length // step
        frames[:num] = np.minimum(np.linspace(0, length, num), length - 1)
        return frames

    def _official_step(self, average_fps: float | None) -> int:
        if self.frame_step:
            return self.frame_step
        video_fps = math.ceil(average_fps or 0)
        if self.fps:
            step = int(video_fps // self.fps)
        else:
            step = int(self.duration_secs * video_fps / self.num_frames)
        if step < 1:
            raise LowFrameRateError(
                f"{video_fps} frames per second are too few for a step of one frame"
            )
        return step


def make_sampling(data: ConfigDict, clip: ConfigDict) -> Sampling:
    """Make the sampling of a config's stream.

    Args:
      data: a config's `data`, for what all its streams share.
      clip: the stream's own fields, `data` itself for the main one.

    Raises:
      UserError: a value is out of range.
    """
    return Sampling(
        **{key: clip[key] for key in _CLIP_KEYS},
        num_clips=data.num_clips,
        rule=data.sampling,
        allow_clip_overlap=data.allow_clip_overlap,
    )
