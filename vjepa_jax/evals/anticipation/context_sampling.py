"""The frames of a clip that precedes a given moment of a video."""

import dataclasses

import numpy as np

from vjepa_jax.data.clips.sampling import TIE_SECS, LowFrameRateError, Sampling


@dataclasses.dataclass(frozen=True)
class ContextSampling(Sampling):
    """One clip that ends some time before a moment of the video; nothing is drawn.

    If the video begins later than the clip, its first frame is repeated.

    Rule "exact": the frames are those shown nearest to `T / fps`, ..., `2 / fps`,
    `1 / fps` seconds before the clip's end, by the video's own time stamps.

    Rule "official", of V-JEPA 2's action anticipation
    (`evals/action_anticipation_frozen/epickitchens.py`): the step is `int(average fps /
    fps)` frames, the clip ends before frame `int(moment_frame - int(ahead_secs *
    average fps))`, and the time of a frame follows from the average frame rate.

    Attributes:
      moment_secs: seconds from the video's first frame to the moment.
      moment_frame: the same in frames, for the official rule only.
      ahead_secs: seconds from the clip's end to the moment.
    """

    moment_secs: float = 0.0
    moment_frame: float = 0.0
    ahead_secs: float = 0.0

    def window(self, average_fps: float | None) -> tuple[float, float]:
        """Return the seconds (from, to) of the video that hold the clip."""
        wanted = self._wanted_secs(average_fps)
        return float(wanted[0]), float(wanted[-1])

    def frames(
        self,
        times: np.ndarray,
        average_fps: float | None = None,
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """Choose the frames, see `Sampling.frames`; `rng` is not used."""
        del rng
        between = (times[1:] + times[:-1]) / 2
        wanted = self._wanted_secs(average_fps) + TIE_SECS
        return np.searchsorted(between, wanted, side="right")[None]

    def _wanted_secs(self, average_fps: float | None) -> np.ndarray:
        if self.rule == "exact":
            before_end = np.arange(self.num_frames, 0, -1) / self.fps
            return self.moment_secs - self.ahead_secs - before_end
        average_fps = average_fps or 0.0
        step = int(average_fps / self.fps)
        if step < 1:
            raise LowFrameRateError(
                f"{average_fps:g} frames per second are too few for a step of one frame"
            )
        stop = int(self.moment_frame - int(self.ahead_secs * average_fps))
        frames = np.arange(stop - self.num_frames * step, stop, step)
        return np.maximum(frames, 0) / average_fps
