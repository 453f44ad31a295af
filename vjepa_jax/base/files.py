"""Handle paths that may be remote; write files that appear when they are complete."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator

from etils import epath

PathLike = str | os.PathLike[str]


def is_remote(path: PathLike) -> bool:
    """Whether a path is a URL, such as `gs://bucket/file`."""
    return "://" in os.fspath(path)


def absolute(path: PathLike) -> str:
    """Return a local path as an absolute one, and a URL as it is."""
    text = os.fspath(path)
    return text if is_remote(text) else os.path.abspath(os.path.expanduser(text))


@contextlib.contextmanager
def renamed_when_complete(path: PathLike) -> Iterator[epath.Path]:
    """Yield a temporary path beside `path`, which is renamed to `path` on success.

    A reader therefore sees the complete file, the old one, or none. After an error the
    temporary file is removed. A killed process leaves `.NAME-*.part`.

    Args:
      path: local or remote file, or local folder; its parent folder exists.
    """
    target = epath.Path(path)
    part = target.parent / f".{target.name}-{uuid.uuid4().hex}.part"
    try:
        yield part
        part.replace(target)
    except BaseException:
        remove(part)
        raise


def write_whole(path: PathLike, content: bytes | str) -> None:
    """Write a local or remote file that appears when it is complete.

    Args:
      path: of the file; its folder exists.
      content: text is encoded as UTF-8.
    """
    with renamed_when_complete(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def remove(path: PathLike) -> None:
    """Remove a file, or a local folder with its content, if it exists."""
    target = epath.Path(path)
    if is_remote(path) or not target.is_dir():
        target.unlink(missing_ok=True)
    else:
        shutil.rmtree(target)
