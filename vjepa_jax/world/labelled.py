"""Videos of the synthetic world with label maps, in the folders of DAVIS 2017.

They are clips of play: several objects meet, bounce and pass behind the occluder. Maps
of objects and maps of classes (background, shapes, occluder) have separate folders.
"""

import dataclasses
import pathlib

import numpy as np

from vjepa_jax.data.clips import label_images
from vjepa_jax.data.sources import davis
from vjepa_jax.world import play
from vjepa_jax.world.painting import paint
from vjepa_jax.world.scenes import SHAPES, World

FOLDER = "segmentation"  # of a world
CLASSES = ("background", *SHAPES, "occluder")
NUM_CLASSES = len(CLASSES)
_CLASS_MAPS = "Classes"
_QUALITY = "480p"  # the name in DAVIS, whatever the size
# Lists of images with maps of classes, by the keys of the evaluation.
CLASS_LISTS = {"train_path": "classes_train.txt", "test_path": "classes_val.txt"}
_MIN_VISIBILITY = 0.5  # of an object in the first frame


@dataclasses.dataclass(frozen=True)
class LabelledClip:
    """A clip with the object and the class of every pixel.

    Attributes:
      video: uint8 [T, S, S, 3].
      objects: uint8 [T, S, S]. 0 is the background, the occluder and objects of which
        less than half is visible in the first frame; the others are numbered from 1.
      classes: uint8 [T, S, S], indices into `CLASSES`.
    """

    video: np.ndarray
    objects: np.ndarray
    classes: np.ndarray


def make_labelled(
    world: World, seed: int | tuple[int, ...], index: int
) -> LabelledClip:
    """Make clip `index` of the stream `seed`."""
    scene, track, _, behind = play.simulate_clip(world, seed, index)
    clip = paint(world, scene, track, behind, play.LABEL)
    # Indexed by `Clip.objects`: the background, the objects, the occluder.
    is_followed = clip.visibility[0] >= _MIN_VISIBILITY
    numbers = np.where(is_followed, np.cumsum(is_followed), 0)
    classes = [0, *(scene.shape + 1), NUM_CLASSES - 1]
    return LabelledClip(
        clip.video,
        np.array([0, *numbers, 0], np.uint8)[clip.objects],
        np.array(classes, np.uint8)[clip.objects],
    )


def name_of(index: int) -> str:
    """Return the name of a clip."""
    return f"{index:05d}"


def write_clip(root: pathlib.Path, name: str, clip: LabelledClip) -> None:
    """Write frames and label maps losslessly, the maps of classes last."""
    kinds = {
        davis.FRAMES: clip.video,
        davis.LABELS: clip.objects,
        _CLASS_MAPS: clip.classes,
    }
    for kind, frames in kinds.items():
        folder = root / kind / _QUALITY / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, pixels in enumerate(frames):
            label_images.write_image(folder / f"{number:05d}.png", pixels)


def is_written(root: pathlib.Path, name: str, num_frames: int) -> bool:
    """Return whether a clip is complete."""
    last = f"{num_frames - 1:05d}.png"
    return (root / _CLASS_MAPS / _QUALITY / name / last).exists()


def write_lists(root: pathlib.Path, names: list[str], num_frames: int) -> None:
    """Write the lists: the first half of the videos to train on, the rest to evaluate.

    Args:
      root: of the folders.
      names: of all videos.
      num_frames: of each.
    """
    half = len(names) // 2
    lists = root / davis.LISTS / "2017"
    lists.mkdir(parents=True, exist_ok=True)
    for split, key, part in (
        ("train", "train_path", names[:half]),
        ("val", "test_path", names[half:]),
    ):
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in part))
        pairs = [
            f"{davis.FRAMES}/{_QUALITY}/{name}/{number:05d}.png "
            f"{_CLASS_MAPS}/{_QUALITY}/{name}/{number:05d}.png\n"
            for name in part
            for number in range(num_frames)
        ]
        (root / CLASS_LISTS[key]).write_text("".join(pairs))
