"""Where to crop a clip and whether to mirror it; no pixel is resampled here.

The same box and the same flip hold for every frame of a clip. Boxes are
`(top, left, height, width)` in pixels of the displayed frame; `decode.read_clip` cuts
them out and resizes them.
"""

import dataclasses
import math

import numpy as np

from vjepa_jax.default_config import UserError

Box = tuple[int, int, int, int]

_ATTEMPTS = 10


def random_resized_crop_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    aspect_ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """Draws the box of a random resized crop.

    The rule of torchvision and of the official V-JEPA code
    (`src/datasets/utils/video/transforms.py`): ten attempts, then a central crop.

    Args:
      height: frame height in pixels.
      width: frame width in pixels.
      scale: lowest and highest share of the frame's area; drawn uniformly.
      aspect_ratio: lowest and highest width / height; drawn log-uniformly.
      rng: consumed by up to 22 draws.

    Returns:
      `(top, left, height, width)`, inside the frame and at least one pixel each way.
    """
    log_low, log_high = math.log(aspect_ratio[0]), math.log(aspect_ratio[1])
    for _ in range(_ATTEMPTS):
        area = height * width * rng.uniform(scale[0], scale[1])
        ratio = math.exp(rng.uniform(log_low, log_high))
        crop_height = round(math.sqrt(area / ratio))
        crop_width = round(math.sqrt(area * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_height, crop_width = height, width
    if width < height * aspect_ratio[0]:
        crop_height = round(width / aspect_ratio[0])
    elif width > height * aspect_ratio[1]:
        crop_width = round(height * aspect_ratio[1])
    return _centred(height, width, max(1, crop_height), max(1, crop_width))


def central_box(height: int, width: int) -> Box:
    """Returns the largest centred square: the deterministic crop of evaluations."""
    side = min(height, width)
    return _centred(height, width, side, side)


def _centred(height: int, width: int, crop_height: int, crop_width: int) -> Box:
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return top, left, crop_height, crop_width


def flip(video: np.ndarray) -> np.ndarray:
    """Mirrors `[..., H, W, C]` left to right; returns a view."""
    return video[..., ::-1, :]


@dataclasses.dataclass(frozen=True)
class ClipTransform:
    """The augmentation of pretraining clips; picklable.

    The official configs use an area of 0.3 to 1, an aspect ratio of 0.75 to 1.35 and a
    flip probability of 0.5.

    Attributes:
      resolution: side of the square output in pixels.
      crop_scale: lowest and highest share of the frame's area, in (0, 1].
      crop_aspect_ratio: lowest and highest width / height of the crop.
      flip_probability: probability of mirroring a clip, in [0, 1].
    """

    resolution: int
    crop_scale: tuple[float, float] = (0.3, 1.0)
    crop_aspect_ratio: tuple[float, float] = (0.75, 1.35)
    flip_probability: float = 0.5

    def __post_init__(self):
        """Refuses values out of range; the UserError names the config key."""
        if self.resolution < 1:
            raise UserError(
                f"data.resolution must be at least 1, not {self.resolution}"
            )
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UserError(
                f"data.crop_scale must be 0 < low <= high <= 1, not {low, high}"
            )
        low, high = self.crop_aspect_ratio
        if not 0 < low <= high:
            raise UserError(
                f"data.crop_aspect_ratio must be 0 < low <= high, not {low, high}"
            )
        if not 0 <= self.flip_probability <= 1:
            raise UserError(
                f"data.flip_probability must lie in [0, 1], not {self.flip_probability}"
            )

    def crop_box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        """Draws the box of one clip; see `random_resized_crop_box`."""
        return random_resized_crop_box(
            height, width, self.crop_scale, self.crop_aspect_ratio, rng
        )

    def maybe_flip(self, video: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Mirrors `[T, H, W, 3]` with `flip_probability`; a view, never a copy."""
        return flip(video) if rng.random() < self.flip_probability else video
