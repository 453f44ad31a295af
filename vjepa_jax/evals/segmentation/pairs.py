"""Images with masks of classes: a list of pairs, or a folder of them."""

import bisect
import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import GroupShuffleSplit

from vjepa_jax.base.errors import UserError

_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclasses.dataclass(frozen=True)
class Pair:
    """An image and the class of each of its pixels.

    Attributes:
      image: file; the other images of its folder are the frames around it.
      mask: PNG of the same size.
    """

    image: pathlib.Path
    mask: pathlib.Path


def open_pairs(path: str) -> list[Pair]:
    """List the pairs of a data set.

    Args:
      path: a text file with a line `image mask` per pair, whose relative paths count
        from its folder; or a folder with `images/` and `masks/`, in which the files of
        a pair have the same name but for the suffix, in the same folders.

    Raises:
      UserError: there are no such pairs; names what is missing.
    """
    root = pathlib.Path(path)
    if root.is_dir():
        return _of_folder(root)
    if not root.is_file():
        raise UserError(
            f"{path} is neither a list of 'image mask' lines nor a folder with images/ "
            "and masks/"
        )
    pairs = []
    for number, line in enumerate(root.read_text().splitlines(), start=1):
        names = line.split()
        if not names:
            continue
        if len(names) != 2:
            raise UserError(
                f"{path}:{number} is not 'image mask', separated by a space: {line!r}"
            )
        pair = Pair(*(root.parent / name for name in names))
        for file in (pair.image, pair.mask):
            if not file.is_file():
                raise UserError(f"{path}:{number} names {file}, which is missing")
        pairs.append(pair)
    if not pairs:
        raise UserError(f"{path} is empty: give a line 'image mask' per image")
    return pairs


def _of_folder(root: pathlib.Path) -> list[Pair]:
    pairs = []
    for image in sorted((root / "images").rglob("*")):
        if image.suffix.lower() not in _IMAGES:
            continue
        name = image.relative_to(root / "images").with_suffix(".png")
        if not (root / "masks" / name).is_file():
            raise UserError(f"{image} has no mask {root / 'masks' / name}")
        pairs.append(Pair(image, root / "masks" / name))
    if not pairs:
        raise UserError(f"{root} has no images in {root / 'images'}")
    return pairs


def frames_around(pair: Pair) -> tuple[Sequence[pathlib.Path], int]:
    """Return the images of a pair's folder in the order of their names, and its place.

    They are the frames of a video, where images lie in a folder per video.
    """
    frames = _frames(pair.image.parent, pair.image.suffix)
    return frames, bisect.bisect_left(frames, pair.image)


@functools.lru_cache(maxsize=1024)
def _frames(folder: pathlib.Path, suffix: str) -> tuple[pathlib.Path, ...]:
    return tuple(sorted(file for file in folder.iterdir() if file.suffix == suffix))


def hold_out(
    pairs: Sequence[Pair], share: float, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """Split pairs: (the rest, the share held out).

    Images of one folder, as the frames of a video, stay on one side; where all lie in
    one folder, each is on its own.

    Raises:
      UserError: there is but one to choose from.
    """
    folders = [pair.image.parent for pair in pairs]
    if len(set(folders)) == 1:
        folders = [pair.image for pair in pairs]
    _, groups = np.unique([str(folder) for folder in folders], return_inverse=True)
    splitter = GroupShuffleSplit(1, test_size=share, random_state=seed)
    try:
        ((rest, held_out),) = splitter.split(groups, groups=groups)
    except ValueError:
        raise UserError(
            f"config.data.held_out_share={share} of {groups.max() + 1} folders or "
            "images leaves none on one side: give more of them, or another share"
        ) from None
    return [pairs[i] for i in rest], [pairs[i] for i in held_out]
