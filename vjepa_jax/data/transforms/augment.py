"""Colour jitter, RandAugment and random erasing of clips; off by default.

An augmentation is drawn once per clip and applied to each of its frames, so that it
never makes a still video move or flicker. All draws come from the generator that is
passed in: the record's own seed determines its clip.

The pixel operations are Pillow's, which the official code (through timm's RandAugment)
and torchvision's colour jitter call: equal parameters give equal pixels. Other
libraries would have to be reseeded for every clip (albumentations, imgaug) or bring
PyTorch into the workers (kornia, timm, torchvision), and only timm has this
RandAugment.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vjepa_jax.base.errors import UserError
from vjepa_jax.base.pixels import IMAGENET_MEAN, IMAGENET_STD

Operation = Callable[[Image.Image], Image.Image]

_MEAN = 255 * np.array(IMAGENET_MEAN, np.float32)
_STD = 255 * np.array(IMAGENET_STD, np.float32)

_FILL = (128, 128, 128)  # colour outside of the frame
_ERASE_ATTEMPTS = 100
_ERASE_AREA = (0.02, 1 / 3)
_ERASE_ASPECT_RATIO = (0.3, 1 / 0.3)


def apply(video: np.ndarray, operations: list[Operation]) -> np.ndarray:
    """Apply the operations, in order, to each frame.

    Args:
      video: uint8 [T, H, W, 3], RGB.
      operations: from an RGB image to one of the same size.

    Returns:
      uint8 [T, H, W, 3]; `video` itself if there are no operations.
    """
    if not operations:
        return video
    changed = np.empty_like(video)
    for number, frame in enumerate(video):
        image = Image.fromarray(frame)
        for operation in operations:
            image = operation(image)
        changed[number] = np.asarray(image)
    return changed


def grayscale(image: Image.Image) -> Image.Image:
    """Remove the colour: the luma of ITU-R BT.601 in all three channels."""
    return image.convert("L").convert("RGB")


def check_color_jitter(strengths: tuple[float, float, float, float]) -> None:
    """Raise UserError unless `draw_color_jitter` can use the strengths."""
    if (
        len(strengths) != 4
        or not all(0 <= strength < math.inf for strength in strengths)
        or strengths[3] > 0.5
    ):
        raise UserError(
            "data.color_jitter must be 4 numbers of at least 0 (brightness, contrast, "
            f"saturation and hue, the last at most 0.5), not {strengths}"
        )


def draw_color_jitter(
    strengths: tuple[float, float, float, float], rng: np.random.Generator
) -> list[Operation]:
    """Draw a colour jitter, that of torchvision.

    Args:
      strengths: b of brightness, contrast and saturation, whose factors are drawn from
        [max(0, 1 - b), 1 + b], and h of hue, whose rotation is drawn from [-h, h] of
        the colour circle. Operations of strength zero are left out.
      rng: draws the factors and the order of the operations.
    """
    operations: list[Operation] = []
    for change, strength in zip(
        (_brightness, _contrast, _color, _turn_hue), strengths, strict=True
    ):
        if strength:
            low = -strength if change is _turn_hue else max(0.0, 1 - strength)
            high = strength if change is _turn_hue else 1 + strength
            amount = rng.uniform(low, high)
            operations.append(functools.partial(change, amount=amount))
    if operations:
        operations = [operations[i] for i in rng.permutation(len(operations))]
    return operations


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """RandAugment of video, as in timm and the official code.

    Operations are drawn with replacement from `OPERATIONS`, the "increasing" set, and
    each of them is skipped with probability 0.5. Magnitudes are on a scale of 0 to 10.

    Attributes:
      magnitude: mean of the normal distribution that magnitudes are drawn from.
      num_operations: operations drawn per clip.
      magnitude_std: standard deviation of the distribution.
    """

    magnitude: float
    num_operations: int
    magnitude_std: float

    @classmethod
    def parse(cls, text: str) -> "RandAugment":
        """Parse timm's notation, `rand-m7-n4-mstd0.5-inc1`, or raise UserError."""
        match = re.fullmatch(
            r"rand-m(10|\d)-n([1-9]\d?)-mstd(\d+(?:\.\d+)?)-inc1", text
        )
        if not match:
            raise UserError(
                "data.rand_augment must be '' or as rand-m7-n4-mstd0.5-inc1 (magnitude "
                "0 to 10, operations 1 to 99, standard deviation of the magnitude), "
                f"not {text!r}"
            )
        magnitude, num_operations, magnitude_std = match.groups()
        return cls(float(magnitude), int(num_operations), float(magnitude_std))

    def draw(self, rng: np.random.Generator) -> list[Operation]:
        """Draw the operations of one clip, at most `num_operations`."""
        names = list(OPERATIONS)
        operations: list[Operation] = []
        for index in rng.integers(len(names), size=self.num_operations):
            if rng.random() < 0.5:
                continue
            level = np.clip(rng.normal(self.magnitude, self.magnitude_std), 0, 10) / 10
            sign = 1 if rng.random() < 0.5 else -1
            operations.append(
                functools.partial(OPERATIONS[names[index]], level=sign * float(level))
            )
        return operations


def erase(video: np.ndarray, mode: str, rng: np.random.Generator) -> np.ndarray:
    """Erase a rectangle, the same in every frame.

    Its area is 2 to 33 % of the frame's, and its height / width 0.3 to 3.3,
    log-uniformly. The official code fills normalised frames. Here the same values are
    rounded to pixels and clipped to [0, 255], about 2 sigma.

    Args:
      video: uint8 [T, H, W, 3], not changed.
      mode: one of `choices.ERASE_MODES`. "pixel" fills with normal noise of ImageNet's
        mean and standard deviation, independent for every pixel of every frame;
        "const" fills with ImageNet's mean.
      rng: draws the rectangle and the noise.

    Returns:
      uint8 [T, H, W, 3]; `video` itself if no drawn rectangle fits.
    """
    num_frames, height, width, channels = video.shape
    box = erase_box(height, width, rng)
    if box is None:
        return video
    top, left, erased_height, erased_width = box
    fill = _MEAN
    if mode == "pixel":
        noise = rng.standard_normal(
            (num_frames, erased_height, erased_width, channels), np.float32
        )
        fill = _MEAN + _STD * noise
    video = video.copy()
    video[:, top : top + erased_height, left : left + erased_width] = np.clip(
        np.rint(fill), 0, 255
    )
    return video


def erase_box(
    height: int, width: int, rng: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """Draw the rectangle of `erase`, smaller than the frame both ways.

    Returns:
      `(top, left, height, width)` in pixels; None if none of 100 attempts fits.
    """
    log_low, log_high = (math.log(aspect) for aspect in _ERASE_ASPECT_RATIO)
    for _ in range(_ERASE_ATTEMPTS):
        area = height * width * rng.uniform(*_ERASE_AREA)
        aspect = math.exp(rng.uniform(log_low, log_high))
        erased_height = round(math.sqrt(area * aspect))
        erased_width = round(math.sqrt(area / aspect))
        if 0 < erased_height < height and 0 < erased_width < width:
            top = int(rng.integers(height - erased_height + 1))
            left = int(rng.integers(width - erased_width + 1))
            return top, left, erased_height, erased_width
    return None


def _brightness(image: Image.Image, amount: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(amount)


def _contrast(image: Image.Image, amount: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(amount)


def _color(image: Image.Image, amount: float) -> Image.Image:
    return ImageEnhance.Color(image).enhance(amount)


def _sharpness(image: Image.Image, amount: float) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(amount)


def _turn_hue(image: Image.Image, amount: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    # Hues are a circle of 256 steps; a rotation is rounded to zero, as in torchvision.
    turn = int(amount * 255)
    hue = hue.point([(step + turn) % 256 for step in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        resample=Image.Resampling.BICUBIC,
        fillcolor=_FILL,
    )


def _auto_contrast(image: Image.Image, level: float) -> Image.Image:
    del level
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, level: float) -> Image.Image:
    del level
    return ImageOps.equalize(image)


def _invert(image: Image.Image, level: float) -> Image.Image:
    del level
    return ImageOps.invert(image)


def _rotate(image: Image.Image, level: float) -> Image.Image:
    return image.rotate(
        30.0 * level, resample=Image.Resampling.BICUBIC, fillcolor=_FILL
    )


def _posterize(image: Image.Image, level: float) -> Image.Image:
    # From 4 bits down to 0, which Pillow 13's own function refuses.
    step = 2 ** (4 + int(4 * abs(level)))
    return image.point(3 * [value - value % step for value in range(256)])


def _solarize(image: Image.Image, level: float) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(256 * abs(level)))


def _solarize_add(image: Image.Image, level: float) -> Image.Image:
    added = int(110 * abs(level))
    dark = [min(255, value + added) for value in range(128)]
    return image.point(3 * [*dark, *range(128, 256)])


def _shear_x(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, (1, 0.3 * level, 0, 0, 1, 0))


def _shear_y(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, (1, 0, 0, 0.3 * level, 1, 0))


def _translate_x(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, (1, 0, 0.45 * level * image.width, 0, 1, 0))


def _translate_y(image: Image.Image, level: float) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, 0.45 * level * image.height))


# Operations of RandAugment, by timm's names. Each takes an image and a level in
# [-1, 1], the signed magnitude / 10. The change grows with the absolute level;
# operations without a direction ignore the sign.
OPERATIONS = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": lambda image, level: _color(image, 1 + 0.9 * level),
    "ContrastIncreasing": lambda image, level: _contrast(image, 1 + 0.9 * level),
    "BrightnessIncreasing": lambda image, level: _brightness(image, 1 + 0.9 * level),
    "SharpnessIncreasing": lambda image, level: _sharpness(image, 1 + 0.9 * level),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
}
