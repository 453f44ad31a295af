"""Where the videos come from: `data.path` opened as a random-access source.

| `data.path` | opens |
|---|---|
| a text file | a list of `path label` lines (`file_lists`) |
| a `.npy` file | a list of paths (`file_lists`) |
| a folder | the videos and images in it (`file_lists`) |
| a folder of prepared shards | their records (`shards`) |
| `tfds:NAME:SPLIT[@DIR]` | a prepared TFDS dataset (`tfds_source`) |
| several of these, with commas between | a mixture |

Files, folders and the entries of lists may be remote (`gs://`).
"""

import json
import math
import os
from collections.abc import Sequence

from etils import epath

from vjepa_jax.base.errors import UserError
from vjepa_jax.base.files import is_remote
from vjepa_jax.data.sources import shards, tfds_source
from vjepa_jax.data.sources.file_lists import MEDIA_SUFFIXES, VideoList
from vjepa_jax.data.sources.records import Record, Source, digest_of

__all__ = [
    "Record",
    "Source",
    "VideoList",
    "fingerprint",
    "open_source",
    "open_sources",
]

_MAX_FILES_LOOKED_AT = 1000
_MAX_REMOTE_FILES_LOOKED_AT = 20


def open_sources(
    path: str, weights: Sequence[float] = ()
) -> list[tuple[Source, float]]:
    """Opens one source or a mixture, written with commas between the paths.

    A path that exists as it stands is one source, whatever commas are in it.

    Args:
      path: `data.path`.
      weights: expected share of the samples for each source, positive, in any unit;
        empty to draw every record equally often, which is by length.

    Returns:
      Sources and their weights, which sum to 1.

    Raises:
      UserError: a source cannot be opened, or the weights do not fit.
    """
    one = "," not in path or _exists(path)
    paths = [path] if one else [part.strip() for part in path.split(",")]
    if not one and not all(paths):
        raise UserError(f"data.path {path!r} has nothing between two commas")
    opened = [open_source(part) for part in paths]
    if len(weights) not in (0, len(paths)):
        raise UserError(
            f"data.mix_weights has {len(weights)} numbers but data.path names "
            f"{len(paths)} sources: give one for each, or none to draw every video "
            "equally often"
        )
    for weight in weights:
        if not 0 < weight < math.inf:
            raise UserError(
                f"data.mix_weights must be positive numbers, not {weight}: leave a "
                "source out of data.path that should not be drawn"
            )
    weights = weights or [len(source) for source in opened]
    total = sum(weights)
    return [(s, float(w / total)) for s, w in zip(opened, weights, strict=True)]


def open_source(path: str) -> Source:
    """Opens what one path names and checks that there is something in it.

    Of a list, up to 1000 evenly spaced files are looked for, 20 if remote, to notice a
    wrong folder before the first step.

    Raises:
      UserError: nothing is there, or nothing that could be trained on.
    """
    if not path:
        raise UserError(
            "data.path is not set: give a folder of videos or a list file with one "
            "'path label' per line"
        )
    if path.startswith(tfds_source.PREFIX):
        return tfds_source.open_tfds(path)
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
    source = _asked(path, read)
    if not len(source):
        raise UserError(f"list file {path!r} has no entries")
    _check_that_files_exist(source)
    return source


def _open_folder(path: str) -> Source:
    if shards.is_shard_folder(path):
        return shards.ShardSource(path)
    source = _asked(path, VideoList.from_folder)
    if not len(source):
        raise UserError(
            f"no videos or images in folder {path!r} or below; known suffixes: "
            + " ".join(MEDIA_SUFFIXES)
        )
    return source


def _exists(path: str) -> bool:
    if not is_remote(path):
        return os.path.exists(path)
    return _asked(path, lambda path: epath.Path(path).exists())


def _is_folder(path: str) -> bool:
    if not is_remote(path):
        return os.path.isdir(path)
    return _asked(path, lambda path: epath.Path(path).is_dir())


def _asked(path: str, question):
    """Puts what a file system or a remote store says about a path into one line."""
    try:
        return question(path)
    except UserError:
        raise
    except Exception as error:  # the clients' errors have no base in common
        if not is_remote(path) and not isinstance(error, OSError):
            raise
        if isinstance(error, ImportError):
            raise UserError(
                f"{path!r} needs a client of its store ({error}); for gs:// it comes "
                "with pip install 'vjepa_jax[gcs]'"
            ) from error
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        reason = reason or type(error).__name__
        raise UserError(f"{path!r} cannot be read: {reason}") from error


def _check_that_files_exist(source: VideoList) -> None:
    limit = (
        _MAX_REMOTE_FILES_LOOKED_AT
        if is_remote(source.path_of(0))
        else _MAX_FILES_LOOKED_AT
    )
    num_looked_at = min(len(source), limit)
    for i in range(num_looked_at):
        if _exists(source.path_of(i * len(source) // num_looked_at)):
            return
    raise UserError(
        f"none of the {num_looked_at} files looked at of {source.name!r} exist, the "
        f"first being {source.path_of(0)!r}; relative paths are resolved against the "
        f"list's folder {source.root!r}: mend the paths or move the list"
    )


def fingerprint(source: Source, **sampling) -> str:
    """Identifies a data stream, for the checkpoint to notice that it has changed.

    Args:
      source: the videos; a moved copy counts as the same.
      **sampling: whatever else the stream depends on; JSON values and tuples.

    Returns:
      SHA-256 of the source's digest and of the sampling, in hexadecimal digits.
    """
    settings = json.dumps(sampling, sort_keys=True)
    return digest_of((source.digest().encode(), settings.encode()))
