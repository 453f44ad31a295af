"""Images, and label images: the number of a class or an object per pixel.

Both are read upright: turned and mirrored as their EXIF data states.
"""

import contextlib
import pathlib

import numpy as np
from PIL import Image, ImageOps

from vjepa_jax.base import files
from vjepa_jax.base.errors import UserError
from vjepa_jax.data.transforms.transforms import Box

IGNORED = 255  # label of pixels that are not counted

# Pillow raises these for damaged files; a broken PNG is a SyntaxError.
_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def _unreadable(path: pathlib.Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read ({error}): fix or remove it")


def _turn_upright(image: Image.Image) -> None:
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF data states nothing
        ImageOps.exif_transpose(image, in_place=True)


def read_image(
    path: pathlib.Path,
    size: tuple[int, int],
    box: Box | None = None,
    shape: tuple[int, int] | None = None,
) -> np.ndarray:
    """Read an image, cropped and resized bilinearly with a filter.

    Args:
      path: of the file.
      size: (height, width) of the output.
      box: (top, left, height, width) of the upright image to crop; None: all of it.
      shape: (height, width) of the label image, which must be the image's; None: any.

    Returns:
      uint8 [height, width, 3].

    Raises:
      UserError: the file cannot be read, or its size is not `shape`.
    """
    try:
        with Image.open(path) as image:
            stored = image.size
            _turn_upright(image)
            if shape is not None and image.size != shape[::-1]:
                width, height = image.size
                turned = ", turned as its EXIF data state," * (image.size != stored)
                raise UserError(
                    f"{path}{turned} has {height}x{width} pixels and its label image "
                    f"{shape[0]}x{shape[1]}: give both the same size"
                )
            edges = None
            if box is not None:
                top, left, height, width = box
                edges = (left, top, left + width, top + height)
            bilinear = Image.Resampling.BILINEAR
            resized = image.convert("RGB").resize(size[::-1], bilinear, edges)
            return np.asarray(resized)
    except UserError:
        raise
    except _ERRORS as error:
        raise _unreadable(path, error) from None


def read_labels(path: pathlib.Path) -> np.ndarray:
    """Read a label image of one channel, with or without a palette: uint8 [H, W].

    Raises:
      UserError: the file cannot be read, or has more than one channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1"):
                raise UserError(
                    f"{path} is an image of mode {image.mode}: give a PNG with the "
                    "number of a class or object per pixel, palette or grey"
                )
            _turn_upright(image)
            return np.asarray(image).astype(np.uint8)
    except UserError:
        raise
    except _ERRORS as error:
        raise _unreadable(path, error) from None


def resize_labels(
    labels: np.ndarray, size: tuple[int, int], box: Box | None = None
) -> np.ndarray:
    """Crop and resize a label image by nearest neighbours.

    Args:
      labels: uint8 [H, W].
      size, box: see `read_image`.
    """
    top, left, height, width = box or (0, 0, *labels.shape)
    rows, columns = (
        start + ((np.arange(n) + 0.5) * length / n).astype(int)
        for start, length, n in zip((top, left), (height, width), size, strict=True)
    )
    return labels[rows[:, None], columns]


def patch_shares(
    labels: np.ndarray, size: tuple[int, int], grid: tuple[int, int], num_labels: int
) -> np.ndarray:
    """Return the share of each label in every patch: float32 [h, w, num_labels].

    Args:
      labels: uint8 [H, W]; values of `num_labels` and above are not counted.
      size: (height, width) in pixels, to which the labels are resized first.
      grid: (h, w), patches.
      num_labels: number of labels.
    """
    labels = resize_labels(labels, size)
    patch = [pixels // count for pixels, count in zip(size, grid, strict=True)]
    rows, columns = (np.arange(n) // side for n, side in zip(size, patch, strict=True))
    places = rows[:, None] * grid[1] + columns
    counted = labels < num_labels
    index = places[counted] * num_labels + labels[counted]
    counts = np.bincount(index, minlength=grid[0] * grid[1] * num_labels)
    return (counts / (patch[0] * patch[1])).reshape(*grid, -1).astype(np.float32)


def write_image(path: pathlib.Path, pixels: np.ndarray) -> None:
    """Write uint8 [H, W, 3], or a label image [H, W] with a palette, as PNG."""
    image = Image.fromarray(pixels)
    if pixels.ndim == 2:
        image = image.convert("P")
        image.putpalette(_palette())
    with files.renamed_when_complete(path) as part:
        image.save(part, "PNG")


def _palette() -> list[int]:
    """Return the 256 colours of VOC and DAVIS, which differ for close numbers.

    Bit 3j + c of a number becomes bit 7 - j of the channel c.
    """
    numbers = np.arange(256)
    channels = [
        sum(((numbers >> (3 * j + c)) & 1) << (7 - j) for j in range(3))
        for c in range(3)
    ]
    return np.stack(channels, axis=1).ravel().tolist()
