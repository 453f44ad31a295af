"""A map of features for every frame, of an encoder whose tokens span several frames."""

import dataclasses

import numpy as np

from vjepa_jax.evals.frozen import FrozenModel


@dataclasses.dataclass(frozen=True)
class FrameEncoder:
    """From frames to features, each frame's in a map of its own.

    With one frame per call the encoder sees an image: as such, where it has an
    embedding for images (V-JEPA 2.1), else repeated to a whole tubelet. With more it
    sees the clip around the frame, and the map is that of the clip's middle time step,
    whose tubelet holds the frame. A video that ends sooner stands still.

    Attributes:
      frozen: the model.
      num_frames: that the encoder sees for one of them, W.
      clips_per_call: clips that it sees at once.
      out_layers: see `FrozenModel.encode`.
    """

    frozen: FrozenModel
    num_frames: int
    clips_per_call: int
    out_layers: tuple[int, ...] = ()

    def _clip_frames(self) -> int:
        encoder = self.frozen.encoder
        if self.num_frames > 1:
            return self.num_frames
        return 1 if encoder.image_embed else encoder.tubelet_size

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) of the maps of frames of a size in pixels.

        Raises:
          UserError: tubelets do not fill the clips.
        """
        return self.frozen.grid((self._clip_frames(), *size, 3))[1:]

    def _middle(self) -> int:
        """Return the time step whose tokens are the map."""
        return self.num_frames // self.frozen.encoder.tubelet_size // 2

    def window(self, frame: int, count: int) -> np.ndarray:
        """Return which frames the encoder sees for one.

        Args:
          frame: its place in the video.
          count: frames of the video.

        Returns:
          int64 [W].
        """
        if self.num_frames == 1:
            return np.array([frame])
        tubelet = self.frozen.encoder.tubelet_size
        place = self._middle() * tubelet + tubelet // 2
        return np.clip(np.arange(self.num_frames) + frame - place, 0, count - 1)

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """Encode frames.

        Args:
          windows: uint8 [B, W, H, W', 3], what `window` says of each.

        Returns:
          float32 [B, h, w, D].
        """
        if self.num_frames == 1:
            windows = np.repeat(windows, self._clip_frames(), axis=1)
        height, width = self.grid(windows.shape[2:4])
        maps = []
        for start in range(0, len(windows), self.clips_per_call):
            part = windows[start : start + self.clips_per_call]
            count = len(part)
            # All calls have one shape, hence one compilation.
            missing = self.clips_per_call - count
            part = np.pad(part, [(0, missing)] + [(0, 0)] * (part.ndim - 1))
            tokens = self.frozen.encode(part, self.out_layers)[:count]
            step = self._middle() if self.num_frames > 1 else 0
            maps.append(tokens[:, step].reshape(count, height, width, -1))
        return np.concatenate(maps)
