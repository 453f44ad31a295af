"""What the probe of segmentation sees of images and their masks."""

import dataclasses
import pathlib

import numpy as np

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.data.clips import label_images
from vjepa_jax.data.sources.records import evenly_spread
from vjepa_jax.evals.frozen import FrozenModel
from vjepa_jax.evals.segmentation.pairs import Pair, frames_around, hold_out, open_pairs
from vjepa_jax.evals.tokens.frame_features import FrameEncoder
from vjepa_jax.world.labelled import CLASS_LISTS, FOLDER


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image as the probe sees it.

    Attributes:
      window: uint8 [W, H, W', 3], the image and the frames around it.
      shares: float32 [h, w, classes], of each class in every patch; what is missing to
        1 is ignored.
      labels: uint8 [H, W] of the mask as it is; `masks.IGNORED` counts nowhere.
    """

    window: np.ndarray
    shares: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reader:
    """How images are read.

    Attributes:
      encoder: that sees them.
      size: (height, width) in pixels to which a whole image is resized.
      num_classes, first_class, crop_scale, flip_probability: see `settings`.
    """

    encoder: FrameEncoder
    size: tuple[int, int]
    num_classes: int
    first_class: int
    crop_scale: tuple[float, float]
    flip_probability: float

    def __call__(self, pair: Pair, seed: tuple[int, ...] | None = None) -> Sample:
        """Read an image and its mask.

        Args:
          pair: the files.
          seed: of crop and flip; None: the whole image.

        Raises:
          UserError: they cannot be read, or do not fit.
        """
        labels = self._labels(pair)
        box, is_flipped = None, False
        if seed is not None:
            rng = np.random.default_rng(seed)
            box = _draw_box(labels.shape, self.crop_scale, rng)
            is_flipped = rng.random() < self.flip_probability
        files, place = [pair.image], 0
        if self.encoder.num_frames > 1:
            files, place = frames_around(pair)
        window = self.encoder.window(place, len(files))
        frames = {
            i: label_images.read_image(files[i], self.size, box, labels.shape)
            for i in np.unique(window)
        }
        pixels = np.stack([frames[i] for i in window])
        seen = label_images.resize_mask(labels, self.size, box)
        if is_flipped:
            pixels, seen = pixels[:, :, ::-1], seen[:, ::-1]
        grid = self.encoder.grid(self.size)
        shares = label_images.patch_shares(seen, self.size, grid, self.num_classes)
        return Sample(pixels, shares, labels)

    def _labels(self, pair: Pair) -> np.ndarray:
        mask = label_images.read_mask(pair.mask)
        is_class = (mask >= self.first_class) & (mask != label_images.IGNORED)
        highest = self.first_class + self.num_classes
        if np.any(is_class & (mask >= highest)):
            raise UserError(
                f"{pair.mask} has the class {mask[is_class].max()}, and there are "
                f"{self.num_classes} from {self.first_class} on: set "
                "config.num_classes and config.data.first_class"
            )
        return np.where(
            is_class, mask - np.uint8(self.first_class), label_images.IGNORED
        )


def _draw_box(shape, scale, rng) -> tuple[int, int, int, int]:
    """Draw a box of the image's own aspect ratio."""
    share = np.sqrt(rng.uniform(*scale))
    height, width = (max(1, round(side * share)) for side in shape)
    top = int(rng.integers(shape[0] - height + 1))
    left = int(rng.integers(shape[1] - width + 1))
    return top, left, height, width


def open_images(
    frozen: FrozenModel, config: ConfigDict
) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """List the images to fit heads, to choose one, and to judge it by.

    Raises:
      UserError: a list cannot be opened, or there are too few images.
    """
    data = config.data
    lists = {}
    for key in ("train_path", "val_path", "test_path"):
        path = data[key] or _of_world(frozen, key)
        pairs = open_pairs(path) if path else []
        if data.max_images:
            pairs = [pairs[i] for i in evenly_spread(len(pairs), data.max_images)]
        lists[key] = pairs
    fit, held_out, test = lists.values()
    if not held_out:
        fit, held_out = hold_out(fit, data.held_out_share, config.seed)
    if len(fit) < config.batch_size:
        raise UserError(
            f"config.batch_size={config.batch_size} exceeds the {len(fit)} images to "
            "train on: lower it"
        )
    return fit, held_out, test


def _of_world(frozen: FrozenModel, key: str) -> str:
    """Return the path of a list of the run's world; "" of a list it does not have."""
    if key not in CLASS_LISTS:
        return ""
    path = pathlib.Path(frozen.config.world.path) / FOLDER / CLASS_LISTS[key]
    if not path.is_file():
        raise UserError(
            f"config.data.{key} is not set, and {path} is missing: give a list of "
            "'image mask' lines, or render a world with world.segmentation_videos"
        )
    return str(path)
