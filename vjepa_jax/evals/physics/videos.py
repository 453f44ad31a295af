"""Videos of possible and impossible events, in the folders of the benchmarks.

The videos of a group are compared: a possible and an impossible one, or two of each,
which are a quadruplet of IntPhys. Frames are resized without cropping.
"""

import csv
import dataclasses
import functools
import io
import json
import os
import pathlib
from collections.abc import Callable

import numpy as np

from vjepa_jax.base.errors import UserError
from vjepa_jax.base.files import read_text
from vjepa_jax.data.clips.frame_stream import whole_frame
from vjepa_jax.data.clips.media import DecodeError
from vjepa_jax.data.clips.reader import ClipReader, inspect
from vjepa_jax.data.clips.sampling import Sampling
from vjepa_jax.data.sources.file_lists import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from vjepa_jax.data.sources.frame_folders import in_order
from vjepa_jax.data.sources.open import open_source
from vjepa_jax.world import render

# In the order of the reference evaluation.
GRASP_PROPERTIES = (
    "Collision",
    "Continuity",
    "Gravity",
    "GravityContinuity",
    "GravityInertia",
    "GravityInertia2",
    "GravitySupport",
    "Inertia",
    "Inertia2",
    "ObjectPermanence",
    "ObjectPermanence2",
    "ObjectPermanence3",
    "SolidityContinuity",
    "SolidityContinuity2",
    "Unchangeableness",
    "Unchangeableness2",
)
INFLEVEL_PROPERTIES = ("continuity", "solidity", "gravity")
INTPHYS_PROPERTIES = ("O1", "O2", "O3")
INTPHYS2_SPLITS = ("Main", "Debug", "HeldOut")
# Conditions of IntPhys 2; variants have a suffix, such as `immutability_texture`.
INTPHYS2_PROPERTIES = ("permanence", "immutability", "continuity", "solidity")
_INTPHYS2_LABELS = {"possible": True, "impossible": False}


@dataclasses.dataclass(frozen=True)
class Video:
    """A video file, or a folder of frames.

    Attributes:
      path: of the file or folder.
      is_possible: whether it shows a possible event; None where that is not published.
      start: frames to skip at the beginning.
    """

    path: pathlib.Path
    is_possible: bool | None
    start: int = 0


@dataclasses.dataclass(frozen=True)
class Group:
    """Videos of one scene.

    Attributes:
      property: the law that the impossible videos break.
      videos: a possible and an impossible one, or two of each; without labels also a
        single one.
      is_end_aligned: whether the longer video is cut at its beginning to the length of
        the shorter one.
    """

    property: str
    videos: tuple[Video, ...]
    is_end_aligned: bool = False


def open_groups(
    dataset: str, path: str, lists: str = "", rows: str = "condition"
) -> list[Group]:
    """List the groups of a data set.

    Args:
      dataset: `world`, `intphys`, `intphys2`, `grasp` or `inflevel`.
      path: its folder.
      lists: folder of InfLevel's lists, `PROPERTY.csv`; "": `path`.
      rows: column of IntPhys 2's `metadata.csv` that gives a group's property.

    Raises:
      UserError: there is no such data set, or the folder does not hold it.
    """
    layouts: dict[str, Callable[[pathlib.Path], list[Group]]] = {
        "world": _list_world,
        "intphys": _list_intphys,
        "intphys2": functools.partial(_list_intphys2, rows=rows),
        "grasp": _list_grasp,
        "inflevel": functools.partial(
            _list_inflevel, lists=pathlib.Path(lists or path)
        ),
    }
    if dataset not in layouts:
        known = ", ".join(layouts)
        raise UserError(f"config.dataset={dataset!r}: known: {known}")
    root = pathlib.Path(path)
    if not root.is_dir():
        raise UserError(f"config.path={path!r} is not a folder")
    groups = layouts[dataset](root)
    if not groups:
        raise UserError(f"no videos of {dataset} in {path}: see docs/physics.md")
    videos = [video for group in groups for video in group.videos]
    unlabelled = [video.path for video in videos if video.is_possible is None]
    if 0 < len(unlabelled) < len(videos):
        raise UserError(
            f"{len(unlabelled)} of the {len(videos)} videos in {path} have no label, "
            f"the first is {unlabelled[0]}: complete the labels, or remove all"
        )
    return groups


def _list_world(root: pathlib.Path) -> list[Group]:
    """List the split `physics` of a world, see `world.render`."""
    truth_path = root / f"{render.PHYSICS}.npz"
    if not truth_path.exists():
        raise UserError(
            f"{truth_path} is missing: render a world with world.physics_pairs "
            "(python -m vjepa_jax.prepare --config=...)"
        )
    source = open_source(str(root / f"{render.PHYSICS}.csv"))
    paths = [pathlib.Path(source.path_of(i)) for i in range(len(source))]
    truth = render.read_truth(truth_path)
    if len(truth["property"]) != len(paths):
        raise UserError(
            f"{truth_path} describes {len(truth['property'])} videos, the list beside "
            f"it {len(paths)}: one of them is damaged; render the world again"
        )
    rows = zip(paths, truth["property"], truth["possible"], strict=True)
    videos = [(str(name), Video(p, bool(possible))) for p, name, possible in rows]
    return [
        Group(name, (video, other))
        for (name, video), (_, other) in zip(videos[::2], videos[1::2], strict=True)
    ]


def _list_intphys(root: pathlib.Path) -> list[Group]:
    """List O1/SCENE/1..4/scene/*.png, with status.json where labels are published."""
    groups = []
    for name in INTPHYS_PROPERTIES:
        for scene in _folders(root / name):
            videos = []
            for folder in _folders(scene):
                status, label = folder / "status.json", None
                if status.exists():
                    label = bool(
                        json.loads(status.read_text())["header"]["is_possible"]
                    )
                videos.append(Video(folder / "scene", label))
            labels = [video.is_possible for video in videos]
            if len(videos) != 4 or labels.count(True) != labels.count(False):
                raise UserError(f"{scene} does not hold a quadruplet of IntPhys")
            groups.append(Group(name, tuple(videos)))
    return groups


def _list_intphys2(root: pathlib.Path, rows: str) -> list[Group]:
    """List the pairs of a split's metadata.csv, or the videos of a split without it."""
    path = root / "metadata.csv"
    if not path.exists():
        if any((root / split).is_dir() for split in INTPHYS2_SPLITS):
            known = ", ".join(INTPHYS2_SPLITS)
            raise UserError(f"{root} holds several splits: give the folder of {known}")
        return _without_metadata(root)
    listed = [*csv.DictReader(io.StringIO(read_text(path), newline=""))]
    if listed and "type" not in listed[0]:
        return _without_metadata(root)
    # {(property, scene, number of the pair): {is possible: videos}}
    pairs: dict[tuple[str, str, str], dict[bool, list[Video]]] = {}
    for line, row in enumerate(listed, start=2):
        try:
            number, kind = row["type"].strip().split("_")
            is_possible = _INTPHYS2_LABELS[kind.lower()]
            property = _intphys2_property(rows, row[rows].strip())
            name = row.get("file_name") or f"Videos/{row['name']}.mp4"
            key = property, row["SceneIndex"].strip(), number
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}:{line}: not the metadata of IntPhys 2 ({error})"
            ) from None
        of_pair = pairs.setdefault(key, {True: [], False: []})
        of_pair[is_possible].append(Video(root / name.strip(), is_possible))
    groups = []
    for (property, scene, number), of_pair in pairs.items():
        possible, impossible = of_pair[True], of_pair[False]
        if len(possible) != len(impossible):
            raise UserError(
                f"{path}: scene {scene} has {len(possible)} videos of the type "
                f"{number}_Possible and {len(impossible)} of {number}_Impossible: "
                "complete the pair, or leave it out"
            )
        # The split Debug has several recordings of a scene, in the same order.
        of_scene = zip(possible, impossible, strict=True)
        groups += [Group(property, pair) for pair in of_scene]
    order = {name: i for i, name in enumerate(INTPHYS2_PROPERTIES)}
    return sorted(groups, key=lambda g: (order.get(g.property, len(order)), g.property))


def _intphys2_property(column: str, value: str) -> str:
    if column != "condition":
        return value
    name = value.lower().split("_")[0]
    if name not in INTPHYS2_PROPERTIES:
        raise ValueError(f"unknown condition {value!r}")
    return name


def _without_metadata(root: pathlib.Path) -> list[Group]:
    """List the videos of a split of IntPhys 2 that is published without labels."""
    folder = root / "Videos" if (root / "Videos").is_dir() else root
    files = (f for f in folder.iterdir() if f.suffix.lower() in VIDEO_SUFFIXES)
    return [Group(root.name, (Video(file, None),)) for file in sorted(files)]


def _list_grasp(root: pathlib.Path) -> list[Group]:
    """List P_PROPERTY/SCENE and IP_PROPERTY/SCENE."""
    groups = []
    for name in GRASP_PROPERTIES:
        folders = [root / f"{kind}_{name}" for kind in ("P", "IP")]
        if not any(folder.is_dir() for folder in folders):
            continue
        scenes = [set(os.listdir(f)) if f.is_dir() else set() for f in folders]
        if scenes[0] != scenes[1]:
            odd = min(scenes[0] ^ scenes[1])
            raise UserError(f"{odd} is in only one of {folders[0]} and {folders[1]}")
        for scene in sorted(scenes[0]):
            pair = Video(folders[0] / scene, True), Video(folders[1] / scene, False)
            groups.append(Group(name, pair))
    return groups


def _list_inflevel(root: pathlib.Path, lists: pathlib.Path) -> list[Group]:
    """List the pairs of PROPERTY.csv, without the priming part of the videos."""
    groups = []
    for name in INFLEVEL_PROPERTIES:
        path = lists / f"{name}.csv"
        if not path.exists():
            continue
        for row in csv.DictReader(io.StringIO(read_text(path), newline="")):
            try:
                videos = [
                    Video(
                        root / row[f"{v}_path"],
                        row[f"{v}_label"] == "possible",
                        int(row[f"{v}_end_priming_2"]) + 1,
                    )
                    for v in ("vid1", "vid2")
                ]
            except (KeyError, ValueError, TypeError) as error:
                raise UserError(f"{path}: not a list of InfLevel ({error})") from None
            if videos[0].is_possible == videos[1].is_possible:
                raise UserError(
                    f"{path}: {row['vid1_path']} and {row['vid2_path']}: exactly "
                    "one must be 'possible': fix vid1_label or vid2_label"
                )
            groups.append(Group(name, tuple(videos), is_end_aligned=True))
    return groups


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
    if not path.is_dir():
        return []
    return sorted(child for child in path.iterdir() if child.is_dir())


def read_group(
    group: Group, *, size: int, frame_step: int, max_frames: int = 0
) -> list[np.ndarray]:
    """Read the videos of a group, every frame resized to a square without cropping.

    Args:
      group: of the videos.
      size: side of the output in pixels, S.
      frame_step: one of so many frames is kept, starting with the first.
      max_frames: frames of the file that are used, rounded down to a multiple of
        `frame_step` as in the reference evaluation (49 frames of 99 with step 2); 0:
        all.

    Returns:
      uint8 [n, S, S, 3] of each video.

    Raises:
      UserError: a video cannot be read.
    """
    try:
        totals = [_count_frames(video.path) for video in group.videos]
        counts = [n - v.start for n, v in zip(totals, group.videos, strict=True)]
        shortest = min(counts)
        out = []
        for video, total, count in zip(group.videos, totals, counts, strict=True):
            first = video.start
            if group.is_end_aligned:
                first, count = first + count - shortest, shortest
            if max_frames:
                count = min(count, max_frames // frame_step * frame_step)
            frames = range(first, first + count, frame_step)
            out.append(_read_frames(video.path, total, frames, size))
    except DecodeError as error:
        raise UserError(f"{error}: repair it, or leave its group out") from None
    return out


def _frame_files(folder: pathlib.Path) -> list[pathlib.Path]:
    # File managers leave other files.
    files = (
        file
        for file in folder.iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
    )
    return sorted(files, key=lambda file: in_order(file.name))


def _count_frames(path: pathlib.Path) -> int:
    if path.is_dir():
        return len(_frame_files(path))
    return inspect(path).frames


def _read_frames(
    path: pathlib.Path, total: int, frames: range, size: int
) -> np.ndarray:
    """Read some of the `total` frames of a file or folder: [n, S, S, 3]."""
    if not len(frames):
        return np.empty((0, size, size, 3), np.uint8)
    if path.is_dir():
        files = _frame_files(path)[frames.start : frames.stop : frames.step]
        of_image = ClipReader(Sampling(1, frame_step=1), size)
        return np.concatenate([of_image.read(f, whole_frame)[0] for f in files])
    (pixels,) = ClipReader(Sampling(total, frame_step=1), size).read(path, whole_frame)
    return pixels[frames.start : frames.stop : frames.step]


def matched_pairs(group: Group, videos: list[np.ndarray]) -> list[tuple[int, int]]:
    """Match possible and impossible videos.

    Of a quadruplet, those with the most identical first frames are matched.

    Args:
      group: of labelled videos.
      videos: from `read_group`.

    Returns:
      (index of the possible video, index of the impossible one) of each pair.
    """
    possible = [i for i, video in enumerate(group.videos) if video.is_possible]
    impossible = [i for i, video in enumerate(group.videos) if not video.is_possible]
    first = max(impossible, key=lambda j: shared_frames(videos[possible[0]], videos[j]))
    rest = [j for j in impossible if j != first]
    return [*zip(possible, [first, *rest], strict=True)]


def shared_frames(one: np.ndarray, other: np.ndarray) -> int:
    """Return the number of identical frames at the beginning of two videos."""
    count = min(len(one), len(other))
    differs = np.any(one[:count] != other[:count], axis=(1, 2, 3))
    return int(np.argmax(differs)) if differs.any() else count
