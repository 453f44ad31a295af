"""Boxes by which clips are cropped, and the augmentation of clips.

Boxes are `(top, left, height, width)` in pixels of the displayed frame. The decoder
crops and resizes (`clips.frames`); `augment` changes colours and shapes afterwards.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

from vjepa_jax.base.choices import ERASE_MODES
from vjepa_jax.base.errors import UserError
from vjepa_jax.data.transforms import augment

Box = tuple[int, int, int, int]

_ATTEMPTS = 10

# The deterministic crop shows 224 of 256 pixels of the short side.
_CENTRAL_SHARE = 224 / 256


def random_resized_crop_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    aspect_ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """Draw the box of a random resized crop.

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


def motion_shift_boxes(first: Box, last: Box, num_frames: int) -> np.ndarray:
    """Interpolate between two boxes over the frames of a clip.

    Every number of the box is linear in the frame and rounded down, as in the official
    code (`random_resized_crop_with_shift`). If both boxes lie inside of the frame, all
    boxes between them do.

    Args:
      first: box of the first frame.
      last: box of the last frame; a clip of one frame has `first`.
      num_frames: frames in the clip, T.

    Returns:
      int64 [T, 4].
    """
    steps = np.arange(num_frames)[:, None]
    spans = max(1, num_frames - 1)
    # In integers: floats would round some exact values down to the previous pixel.
    return (np.array(first) * (spans - steps) + np.array(last) * steps) // spans


def central_box(height: int, width: int) -> Box:
    """Return the largest centred square: all of a square frame."""
    side = min(height, width)
    return _centred(height, width, side, side)


def spatial_views(height: int, width: int, num_views: int) -> list[Box]:
    """Return the square crops of an evaluation, the same for every frame.

    One view is the central crop after the short side is resized to 256/224 of the
    resolution. The official code rounds the resized side down to whole pixels: at 256
    it shows 256/292 of the short side, and this box shows 256/292.6. Several views are
    squares as large as the short side, equally spaced along the long side from its
    start (left or top). They miss its end by less than `num_views - 1` pixels, by the
    official rule (`EvalVideoTransform`), in pixels of the frame.

    Args:
      height: frame height in pixels.
      width: frame width in pixels.
      num_views: at least 1.
    """
    if num_views == 1:
        side = max(1, round(min(height, width) * _CENTRAL_SHARE))
        return [_centred(height, width, side, side)]
    side = min(height, width)
    step = (max(height, width) - side) // (num_views - 1)
    starts = [view * step for view in range(num_views)]
    if height > width:
        return [(start, 0, side, side) for start in starts]
    return [(0, start, side, side) for start in starts]


def make_views(num_views: int) -> tuple[Callable[[int, int], Box], ...]:
    """Return a picklable crop for each of `spatial_views`; see `read_all`."""
    return tuple(
        functools.partial(_view, num_views=num_views, view=view)
        for view in range(num_views)
    )


def _view(height: int, width: int, *, num_views: int, view: int) -> Box:
    return spatial_views(height, width, num_views)[view]


def _centred(height: int, width: int, crop_height: int, crop_width: int) -> Box:
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return top, left, crop_height, crop_width


def flip(video: np.ndarray) -> np.ndarray:
    """Return a copy of [..., H, W, C], mirrored left to right."""
    # Channel by channel is four times as fast as copying the reversed view.
    flipped = np.empty_like(video)
    for channel in range(video.shape[-1]):
        flipped[..., channel] = video[..., ::-1, channel]
    return flipped


@dataclasses.dataclass(frozen=True)
class ClipTransform:
    """The augmentation of training clips; picklable.

    The defaults are those of the official pretraining. Its probes of video train with
    `crop_scale=(0.08, 1)`, `crop_aspect_ratio=(3/4, 4/3)`, `flip_probability=0`,
    `rand_augment="rand-m7-n4-mstd0.5-inc1"` and `erase_probability=0.25`.

    All draws of a clip come from the generator that is passed in. An augmentation that
    is off draws nothing.

    Attributes:
      resolution: side of the square output in pixels, S.
      crop_scale: lowest and highest share of the frame's area, in (0, 1].
      crop_aspect_ratio: lowest and highest width / height of the crop.
      motion_shift: whether the box moves during the clip, between two drawn boxes.
      color_jitter: strengths of brightness, contrast, saturation and hue; zeros are
        off. See `augment.draw_color_jitter`.
      grayscale_probability: probability of a clip without colour, in [0, 1].
      rand_augment: such as "rand-m7-n4-mstd0.5-inc1"; "" is off. See
        `augment.RandAugment`.
      flip_probability: probability of mirroring a clip, in [0, 1].
      erase_probability: probability of erasing a rectangle, in [0, 1].
      erase_mode: what the rectangle is filled with, one of `choices.ERASE_MODES`.
    """

    resolution: int
    crop_scale: tuple[float, float] = (0.3, 1.0)
    crop_aspect_ratio: tuple[float, float] = (0.75, 1.35)
    flip_probability: float = 0.5
    motion_shift: bool = False
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    grayscale_probability: float = 0.0
    rand_augment: str = ""
    erase_probability: float = 0.0
    erase_mode: str = "pixel"

    def __post_init__(self):
        """Refuse values out of range; the UserError names the config key."""
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
        if not 0 < low <= high < math.inf:
            raise UserError(
                f"data.crop_aspect_ratio must be 0 < low <= high, not {low, high}"
            )
        for event in ("grayscale", "flip", "erase"):
            key = f"{event}_probability"
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(
                    f"data.{key} must lie in [0, 1], not {getattr(self, key)}"
                )
        augment.check_color_jitter(self.color_jitter)
        if self.rand_augment:
            augment.RandAugment.parse(self.rand_augment)
        if self.erase_mode not in ERASE_MODES:
            raise UserError(
                f"data.erase_mode must be one of {', '.join(ERASE_MODES)}, not "
                f"{self.erase_mode!r}"
            )

    def crop_box(self, height: int, width: int, rng: np.random.Generator) -> Box:
        """Draw one box; see `random_resized_crop_box`."""
        return random_resized_crop_box(
            height, width, self.crop_scale, self.crop_aspect_ratio, rng
        )

    def crop_boxes(
        self, height: int, width: int, num_frames: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Draw the boxes of one clip.

        Args:
          height: frame height in pixels.
          width: frame width in pixels.
          num_frames: frames in the clip, T.
          rng: draws one box, or two with `motion_shift`.

        Returns:
          int64 [T, 4]: a box for each frame, all the same without `motion_shift`.
        """
        first = self.crop_box(height, width, rng)
        last = self.crop_box(height, width, rng) if self.motion_shift else first
        return motion_shift_boxes(first, last, num_frames)

    def maybe_flip(self, video: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Mirror [T, H, W, 3] with `flip_probability`, else return `video` itself."""
        return flip(video) if rng.random() < self.flip_probability else video

    def augment(self, video: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Augment a cropped clip: colours, RandAugment, flip, erasing, in this order.

        The official code applies RandAugment to the whole frame before the crop. Here
        the crop is part of decoding, so that shares of the width and the statistics of
        `AutoContrast`, `Equalize` and `Contrast` are those of the crop.

        Args:
          video: uint8 [T, S, S, 3], not changed.
          rng: draws the augmentation, the same for every frame.

        Returns:
          uint8 [T, S, S, 3]; `video` itself if nothing changes.
        """
        operations = augment.draw_color_jitter(self.color_jitter, rng)
        if self.grayscale_probability and rng.random() < self.grayscale_probability:
            operations.append(augment.grayscale)
        if self.rand_augment:
            operations += augment.RandAugment.parse(self.rand_augment).draw(rng)
        video = self.maybe_flip(augment.apply(video, operations), rng)
        if self.erase_probability and rng.random() < self.erase_probability:
            video = augment.erase(video, self.erase_mode, rng)
        return video
