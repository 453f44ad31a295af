"""Open `data.path` as a random-access source.

| `data.path` | opens |
|---|---|
| a text file | a list of `path label` lines (`file_lists`) |
| a `.npy` file | an array of paths (`file_lists`) |
| a folder | the videos and images in it (`file_lists`) |
| a folder of prepared shards | their records (`shards`) |
| `tfds:NAME:SPLIT[@DIR]` | a prepared TFDS dataset (`tfds_source`) |
| several of these, separated by commas | a mixture |

Files, folders and the entries of lists may be remote (`gs://`).
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from absl import logging
from etils import epath

from vjepa_jax.base.errors import UserError
from vjepa_jax.base.files import absolute, is_remote
from vjepa_jax.data.sources import frame_folders, shards, tfds_source
from vjepa_jax.data.sources.file_lists import (
    IMAGE_SUFFIXES,
    MEDIA_SUFFIXES,
    VideoList,
    path_problem,
)
from vjepa_jax.data.sources.records import Joined, Mixture, Source

_MAX_FILES_CHECKED = 1000
_MAX_REMOTE_FILES_CHECKED = 20

T = TypeVar("T")


def open_mixture(path: str, weights: Sequence[float] = ()) -> Mixture:
    """Open one source, or several separated by commas.

    If the whole path exists, it is one source, even if it contains commas.

    Args:
      path: `data.path`.
      weights: expected share of the samples of each source, positive, in any unit;
        empty: each source's number of records.

    Returns:
      The sources with weights that sum to 1.

    Raises:
      UserError: a source cannot be opened, or the weights do not fit.
    """
    paths = _split(path)
    sources = [open_source(part) for part in paths]
    if len(weights) not in (0, len(paths)):
        raise UserError(
            f"data.mix_weights has {len(weights)} numbers but data.path names "
            f"{len(paths)} sources: give one for each, or none to draw every video "
            "equally often"
        )
    for weight in weights:
        if not 0 < weight < math.inf:
            raise UserError(
                f"data.mix_weights must be positive numbers, not {weight}: remove a "
                "source from data.path if it should not be drawn"
            )
    weights = weights or [len(source) for source in sources]
    total = sum(weights)
    return Mixture(
        [(s, float(w / total)) for s, w in zip(sources, weights, strict=True)]
    )


def _split(path: str) -> list[str]:
    if "," not in path or _exists(path):
        return [path]
    paths = [part.strip() for part in path.split(",")]
    if not all(paths):
        raise UserError(f"data.path {path!r} has nothing between two commas")
    return paths


def open_source(path: str) -> Source:
    """Open one source and check that it is not empty.

    Up to 1000 evenly spaced files of a list, or 20 remote ones, are looked for, to
    notice a wrong folder before the first step.

    Raises:
      UserError: the path does not exist, or holds nothing to train on.
    """
    if not path:
        raise UserError(
            "data.path is not set: give a folder of videos or a list file with one "
            "'path label' per line"
        )
    if path.startswith(tfds_source.PREFIX):
        return tfds_source.open_tfds(path)
    if problem := path_problem(path):
        raise UserError(f"data.path {problem}")
    if not _exists(path):
        raise UserError(f"data.path {path!r} does not exist")
    if _is_folder(path):
        return _open_folder(path)
    if path.lower().endswith(MEDIA_SUFFIXES):
        raise UserError(
            f"data.path {path!r} is a single video or image; give its folder, or a "
            "list file with one 'path label' per line"
        )
    if path.endswith(shards.SUFFIX):
        raise UserError(f"data.path {path!r} is a single shard; give its folder")
    is_array = path.lower().endswith(".npy")
    read = VideoList.from_array_file if is_array else VideoList.from_list_file
    source = _with_storage_errors(path, read)
    if not len(source):
        raise UserError(f"list file {path!r} has no entries")
    _check_that_files_exist(source)
    return source


def open_videos(path: str) -> Source:
    """Open videos as one source: as `open_source`, or single video files.

    Args:
      path: of a source or of a video file, or several separated by commas. If the whole
        path exists, it is one, even if it contains commas.

    Raises:
      UserError: see `open_source`.
    """
    return Joined(
        [
            VideoList(part, "", [absolute(part)], [0])
            if _is_video_file(part)
            else open_source(part)
            for part in _split(path)
        ]
    )


def _is_video_file(path: str) -> bool:
    """Whether a path is a file, but no list: lists are text."""
    suffix = path.lower()
    if suffix.endswith((".npy", shards.SUFFIX)) or not path:
        return False
    if path.startswith(tfds_source.PREFIX) or path_problem(path):
        return False
    if not _exists(path) or _is_folder(path):
        return False
    if suffix.endswith(MEDIA_SUFFIXES):
        return True
    start = _with_storage_errors(path, _read_start)
    return b"\0" in start and not start.startswith((b"\xff\xfe", b"\xfe\xff"))


def _read_start(path: str) -> bytes:
    with epath.Path(path).open("rb") as file:
        return file.read(4096)


def _open_folder(path: str) -> Source:
    if shards.is_shard_folder(path):
        return shards.ShardSource(path)
    source = _with_storage_errors(path, VideoList.from_folder)
    if not len(source):
        raise UserError(
            f"no videos or images in folder {path!r} or below; known suffixes: "
            + " ".join(MEDIA_SUFFIXES)
        )
    _point_out_pictures(source)
    return source


def _point_out_pictures(source: VideoList) -> None:
    """Log in a line that a folder holds pictures that may not be meant as clips."""
    entries = [source.entry(index) for index in range(len(source))]
    images = [entry for entry in entries if entry.lower().endswith(IMAGE_SUFFIXES)]
    if images and len(images) < len(entries):
        _warn_once(
            f"{source.name!r} holds {len(images)} images beside "
            f"{len(entries) - len(images)} videos, such as {images[0]!r}: each is read "
            "as a clip of one frame; remove them if they are covers or thumbnails"
        )
        return
    groups = frame_folders.find(images)
    if 2 * sum(map(len, groups)) > len(images):
        folder = os.path.join(source.root, os.path.dirname(groups[0][0]))
        names = [os.path.basename(image) for image in groups[0]]
        _warn_once(
            f"the images in {folder!r} are numbered in a row, like the frames of a "
            f"video (one of {len(groups)} such rows): each is read as a still image; "
            "if they are frames, make a video of each row: "
            + frame_folders.command(folder, names)
        )


@functools.cache
def _warn_once(message: str) -> None:
    logging.warning("%s", message)  # evaluations of a run open their data every time


def _folder_is_listed(source: VideoList, path: str) -> str:
    """Return what to do about a list that names a folder."""
    names = [entry.name for entry in epath.Path(path).iterdir()]
    images = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    if not images:
        return (
            f"{source.name!r} lists {path!r}, which is a folder: give the folder as "
            "data.path, or list its files"
        )
    frames = max(frame_folders.find(images), default=sorted(images), key=len)
    return (
        f"{source.name!r} lists {path!r}, a folder of {len(images)} images: extracted "
        "frames are not read; make a video of every folder and list the videos: "
        + frame_folders.command(path, frames)
    )


def _exists(path: str) -> bool:
    if not is_remote(path):
        return os.path.exists(path)
    return _with_storage_errors(path, lambda path: epath.Path(path).exists())


def _is_folder(path: str) -> bool:
    if not is_remote(path):
        return os.path.isdir(path)
    return _with_storage_errors(path, lambda path: epath.Path(path).is_dir())


def _with_storage_errors(path: str, read: Callable[[str], T]) -> T:
    """Return `read(path)`; put an error of the storage into one line."""
    try:
        return read(path)
    except UserError:
        raise
    except Exception as error:  # the errors of stores' clients have no common base
        if not is_remote(path) and not isinstance(error, OSError):
            raise
        if isinstance(error, ImportError):
            raise UserError(
                f"{path!r} needs a client of its store ({error}); for gs:// run "
                "pip install 'vjepa_jax[gcs]'"
            ) from error
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        reason = reason or type(error).__name__
        raise UserError(f"{path!r} cannot be read: {reason}") from error


def _check_that_files_exist(source: VideoList) -> None:
    limit = _MAX_FILES_CHECKED
    if is_remote(source.path_of(0)):
        limit = _MAX_REMOTE_FILES_CHECKED
    num_checked = min(len(source), limit)
    for i in range(num_checked):
        path = source.path_of(i * len(source) // num_checked)
        if _exists(path):
            if _is_folder(path):
                raise UserError(_folder_is_listed(source, path))
            return
    raise UserError(
        f"none of the {num_checked} files looked for of {source.name!r} exist, the "
        f"first being {source.path_of(0)!r}; relative paths are resolved against the "
        f"list's folder {source.root!r}: fix the paths or move the list"
    )
