"""Videos with a label image of objects for every frame, laid out as DAVIS 2017.

ROOT/ImageSets/2017/val.txt             a name per line
ROOT/JPEGImages/480p/NAME/00000.jpg     frames, also PNG
ROOT/Annotations/480p/NAME/00000.png    0 the background, k object k
"""

import dataclasses
import pathlib

from vjepa_jax.base.errors import UserError
from vjepa_jax.base.files import read_text
from vjepa_jax.data.sources.frame_folders import in_order

FRAMES, LABELS, LISTS = "JPEGImages", "Annotations", "ImageSets"


@dataclasses.dataclass(frozen=True)
class LabelledVideo:
    """Frames and their label images, in order.

    Attributes:
      name: of the folders.
      frames, labels: files, one of each per frame.
    """

    name: str
    frames: tuple[pathlib.Path, ...]
    labels: tuple[pathlib.Path, ...]


def list_videos(path: str, split: str, quality: str) -> list[LabelledVideo]:
    """List the videos of a split.

    Args:
      path: the root.
      split: of `ImageSets/`, such as `2017/val`.
      quality: folder of frames and label images, such as `480p`.

    Raises:
      UserError: something is missing, or frames and label images do not match.
    """
    root = pathlib.Path(path)
    names = root / LISTS / f"{split}.txt"
    if not names.is_file():
        raise UserError(
            f"{names} is missing: config.path is a folder laid out as DAVIS 2017, and "
            "config.split one of its lists (docs/segmentation.md)"
        )
    videos = []
    for name in read_text(names).split():
        frames, labels = (
            tuple(_files(root / kind / quality / name)) for kind in (FRAMES, LABELS)
        )
        odd = {file.stem for file in frames} ^ {file.stem for file in labels}
        if odd:
            raise UserError(
                f"{name}: {min(odd)} is only a frame or only a label image; every "
                f"frame needs a label image in {root / LABELS / quality / name}"
            )
        if len(frames) < 3:
            raise UserError(
                f"{name} has {len(frames)} frames, and the first and the last are not "
                f"scored: remove it from {names}"
            )
        videos.append(LabelledVideo(name, frames, labels))
    if not videos:
        raise UserError(f"{names} lists no videos")
    return videos


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is missing, but config.split lists its video")
    # File managers leave other files.
    files = [
        f for f in folder.iterdir() if f.suffix.lower() in (".jpg", ".jpeg", ".png")
    ]
    return sorted(files, key=lambda file: in_order(file.name))
