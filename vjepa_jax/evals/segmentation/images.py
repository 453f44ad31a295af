"""Images with the class of every pixel: lists of them, and what the probe sees."""

import bisect
import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import GroupShuffleSplit

from vjepa_jax.base.errors import UserError
from vjepa_jax.base.files import read_text
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.data.clips import label_images
from vjepa_jax.data.sources.frame_folders import in_order
from vjepa_jax.data.sources.records import evenly_spread
from vjepa_jax.data.transforms.transforms import Box
from vjepa_jax.evals.frozen import FrozenModel
from vjepa_jax.evals.tokens.frame_features import FrameEncoder
from vjepa_jax.world.labelled import CLASS_LISTS, FOLDER

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclasses.dataclass(frozen=True)
class LabelledImage:
    """The files of an image and of the class of each of its pixels.

    Attributes:
      image: file; the other images of its folder are the frames around it.
      labels: PNG of the same size.
    """

    image: pathlib.Path
    labels: pathlib.Path

    def frames_around(self) -> tuple[Sequence[pathlib.Path], int]:
        """Return the images of its folder in order, and its index among them.

        They are the frames of a video where images lie in a folder per video.
        """
        frames = _images_of(self.image.parent, self.image.suffix)
        return frames, bisect.bisect_left(frames, _order(self.image), key=_order)


@functools.lru_cache(maxsize=1024)
def _images_of(folder: pathlib.Path, suffix: str) -> tuple[pathlib.Path, ...]:
    files = (file for file in folder.iterdir() if file.suffix == suffix)
    return tuple(sorted(files, key=_order))


def _order(file: pathlib.Path) -> tuple[list[str | int], str]:
    return in_order(file.name), file.name


def list_images(path: str) -> list[LabelledImage]:
    """List the images of a data set.

    Args:
      path: a text file with a line `IMAGE LABELS` per image: the paths of the image
        and of its label image, absolute or relative to the file's folder. Or a folder
        with `images/` and `masks/`, where both have the same name but for the suffix,
        in the same subfolders.

    Raises:
      UserError: there are no such images; names what is missing.
    """
    root = pathlib.Path(path)
    if root.is_dir():
        return _list_folder(root)
    if not root.is_file():
        raise UserError(
            f"{path} is neither a list of 'IMAGE LABELS' lines nor a folder with "
            "images/ and masks/"
        )
    images = []
    for number, line in enumerate(read_text(root).splitlines(), start=1):
        if not line.strip():
            continue
        names = line.strip().split("\t") if "\t" in line else line.split()
        if len(names) != 2:
            raise UserError(
                f"{path}:{number} is not 'IMAGE LABELS', separated by a space, or by a "
                f"tab: {line!r}"
            )
        files = [root.parent / name for name in names]
        for file in files:
            if not file.is_file():
                raise UserError(f"{path}:{number} names {file}, which is missing")
        images.append(LabelledImage(*files))
    if not images:
        raise UserError(f"{path} is empty: give a line 'IMAGE LABELS' per image")
    return images


def _list_folder(root: pathlib.Path) -> list[LabelledImage]:
    images = []
    for image in sorted((root / "images").rglob("*")):
        if image.suffix.lower() not in _SUFFIXES:
            continue
        name = image.relative_to(root / "images").with_suffix(".png")
        if not (root / "masks" / name).is_file():
            raise UserError(f"{image} has no label image {root / 'masks' / name}")
        images.append(LabelledImage(image, root / "masks" / name))
    if not images:
        raise UserError(f"{root} has no images in {root / 'images'}")
    return images


def hold_out(
    images: Sequence[LabelledImage], share: float, seed: int
) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """Split images: (the rest, the share held out).

    Images of one folder, such as the frames of a video, stay together, unless all
    images lie in one folder.

    Raises:
      UserError: one of the parts would be empty.
    """
    folders = [image.image.parent for image in images]
    if len(set(folders)) == 1:
        folders = [image.image for image in images]
    _, groups = np.unique([str(folder) for folder in folders], return_inverse=True)
    splitter = GroupShuffleSplit(1, test_size=share, random_state=seed)
    try:
        ((rest, held_out),) = splitter.split(groups, groups=groups)
    except ValueError:
        raise UserError(
            f"config.data.held_out_share={share} of {groups.max() + 1} folders or "
            "images leaves one part empty: give more of them, or another share"
        ) from None
    return [images[i] for i in rest], [images[i] for i in held_out]


def open_images(
    model: FrozenModel, config: ConfigDict
) -> tuple[list[LabelledImage], list[LabelledImage], list[LabelledImage]]:
    """List the images to fit heads, to choose a head, and to test it.

    Raises:
      UserError: a list cannot be opened, or there are too few images.
    """
    data = config.data
    lists = {}
    for key in ("train_path", "val_path", "test_path"):
        path = data[key] or _list_of_world(model, key)
        images = list_images(path) if path else []
        if data.max_images:
            images = [images[i] for i in evenly_spread(len(images), data.max_images)]
        lists[key] = images
    fit, held_out, test = lists.values()
    if not held_out:
        fit, held_out = hold_out(fit, data.held_out_share, config.seed)
    if len(fit) < config.batch_size:
        raise UserError(
            f"config.batch_size={config.batch_size} exceeds the {len(fit)} images to "
            "train on: lower it"
        )
    return fit, held_out, test


def _list_of_world(model: FrozenModel, key: str) -> str:
    """Return the path of a list of the run's world; "" if it has no such list."""
    if key not in CLASS_LISTS:
        return ""
    path = pathlib.Path(model.config.world.path) / FOLDER / CLASS_LISTS[key]
    if not path.is_file():
        raise UserError(
            f"config.data.{key} is not set, and {path} is missing: give a list of "
            "'IMAGE LABELS' lines, or render a world with world.segmentation_videos"
        )
    return str(path)


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image as the probe sees it.

    Attributes:
      window: uint8 [W, H, W', 3], the image and the frames around it.
      shares: float32 [h, w, classes], of each class in every patch; a sum below 1 is
        due to ignored pixels.
      labels: uint8 [H, W], the classes in the resolution of the file;
        `label_images.IGNORED` is not counted.
    """

    window: np.ndarray
    shares: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class ImageReader:
    """Reads images.

    Attributes:
      encoder: of the images.
      size: (height, width) in pixels, to which a whole image is resized.
      num_classes, first_class, crop_scale, flip_probability: see
        `settings.segmentation`.
    """

    encoder: FrameEncoder
    size: tuple[int, int]
    num_classes: int
    first_class: int
    crop_scale: tuple[float, float]
    flip_probability: float

    def __call__(
        self, image: LabelledImage, seed: tuple[int, ...] | None = None
    ) -> Sample:
        """Read an image and its classes.

        Args:
          image: the files.
          seed: of crop and flip; None: the whole image.

        Raises:
          UserError: the files cannot be read, or do not fit.
        """
        labels = self.read_classes(image.labels)
        box, is_flipped = None, False
        if seed is not None:
            rng = np.random.default_rng(seed)
            box = _draw_box(labels.shape, self.crop_scale, rng)
            is_flipped = rng.random() < self.flip_probability
        files: Sequence[pathlib.Path] = [image.image]
        index = 0
        if self.encoder.num_frames > 1:
            files, index = image.frames_around()
        window = self.encoder.window(index, len(files))
        frames = {
            i: label_images.read_image(files[i], self.size, box, labels.shape)
            for i in np.unique(window)
        }
        pixels = np.stack([frames[i] for i in window])
        seen = label_images.resize_labels(labels, self.size, box)
        if is_flipped:
            pixels, seen = pixels[:, :, ::-1], seen[:, ::-1]
        grid = self.encoder.grid(self.size)
        shares = label_images.patch_shares(seen, self.size, grid, self.num_classes)
        return Sample(pixels, shares, labels)

    def read_classes(self, path: pathlib.Path) -> np.ndarray:
        """Return the classes of a label image, see `Sample.labels`.

        Raises:
          UserError: a class is out of range.
        """
        labels = label_images.read_labels(path)
        is_class = (labels >= self.first_class) & (labels != label_images.IGNORED)
        highest = self.first_class + self.num_classes
        if np.any(is_class & (labels >= highest)):
            raise UserError(
                f"{path} has the class {labels[is_class].max()}, and there are "
                f"{self.num_classes} from {self.first_class} on: set "
                "config.num_classes and config.data.first_class"
            )
        classes = labels - np.uint8(self.first_class)
        return np.where(is_class, classes, label_images.IGNORED)


def _draw_box(
    shape: tuple[int, ...], scale: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Draw a box of the image's own aspect ratio."""
    share = np.sqrt(rng.uniform(*scale))
    height, width = (max(1, round(side * share)) for side in shape)
    top = int(rng.integers(shape[0] - height + 1))
    left = int(rng.integers(shape[1] - width + 1))
    return top, left, height, width
