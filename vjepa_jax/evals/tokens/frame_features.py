"""A map of features for every frame, of an encoder whose tokens span several frames."""

import dataclasses

import numpy as np

from vjepa_jax.evals.frozen import FrozenModel
from vjepa_jax.evals.tokens.clip_tokens import encode_in_calls


@dataclasses.dataclass(frozen=True)
class FrameEncoder:
    """Encodes frames, each into a map of its own.

    With `num_frames` of 1 the encoder sees the frame as an image if it has an image
    embedding (V-JEPA 2.1), or else repeated to fill a tubelet. With more it sees the
    clip around the frame, and the map is that of the clip's middle time step, whose
    tubelet holds the frame. The first and the last frame of a video are repeated where
    the clip reaches beyond it.

    Attributes:
      model: of the features.
      num_frames: frames that the encoder sees for each frame, W.
      clips_per_call: clips that it sees at once.
      out_layers: see `FrozenModel.encode`.
    """

    model: FrozenModel
    num_frames: int
    clips_per_call: int
    out_layers: tuple[int, ...] = ()

    def _clip_frames(self) -> int:
        encoder = self.model.encoder
        if self.num_frames > 1:
            return self.num_frames
        return 1 if encoder.image_embed else encoder.tubelet_size

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) of the maps of frames of a size in pixels.

        Raises:
          UserError: tubelets do not fill the clips.
        """
        return self.model.grid((self._clip_frames(), *size, 3))[1:]

    def _middle(self) -> int:
        """Return the time step whose tokens are the map."""
        return self.num_frames // self.model.encoder.tubelet_size // 2

    def window(self, frame: int, count: int) -> np.ndarray:
        """Return the indices of the frames that the encoder sees for one frame.

        Args:
          frame: its index in the video.
          count: frames of the video.

        Returns:
          int64 [W].
        """
        if self.num_frames == 1:
            return np.array([frame])
        tubelet = self.model.encoder.tubelet_size
        offset = self._middle() * tubelet + tubelet // 2
        return np.clip(np.arange(self.num_frames) + frame - offset, 0, count - 1)

    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """Encode frames.

        Args:
          windows: uint8 [B, W, H, W', 3], the frames of `window` for each frame.

        Returns:
          float32 [B, h, w, D].
        """
        if self.num_frames == 1:
            windows = np.repeat(windows, self._clip_frames(), axis=1)
        grid = self.grid(windows.shape[2:4])
        step = self._middle() if self.num_frames > 1 else 0

        def encode(clips):
            tokens = self.model.encode(clips, self.out_layers)
            return tokens[:, step].reshape(len(clips), *grid, -1)

        return encode_in_calls(encode, self.clips_per_call, windows, padded=True)
