"""Handle paths that may be remote; write files that appear when they are complete."""

import codecs
import contextlib
import os
import shutil
import struct
import uuid
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from etils import epath

from vjepa_jax.base.errors import UserError

PathLike = str | os.PathLike[str]

# What NumPy raises for a `.npz` file that is incomplete or changed.
_DAMAGE = (
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)

# The mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def is_remote(path: PathLike) -> bool:
    """Whether a path is a URL, such as `gs://bucket/file`."""
    return "://" in os.fspath(path)


def absolute(path: PathLike) -> str:
    """Return a local path as an absolute one, and a URL as it is."""
    text = os.fspath(path)
    return text if is_remote(text) else os.path.abspath(os.path.expanduser(text))


def read_text(path: PathLike) -> str:
    """Read a local or remote text file: UTF-8, or what its byte order mark says.

    Bytes that are not UTF-8 become surrogates, as in Python's names of files.

    Raises:
      UserError: its byte order mark is wrong.
    """
    content = epath.Path(path).read_bytes()
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            try:
                return content.decode(encoding)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{os.fspath(path)} begins like {encoding.upper()} text, but is "
                    "none: save it as UTF-8"
                ) from error
    return content.decode("utf-8-sig", "surrogateescape")


def read_arrays(path: PathLike, fix: str) -> dict[str, np.ndarray]:
    """Read the arrays of a local `.npz` file by name.

    Args:
      path: of the file.
      fix: what the user does about a damaged file, for the message.

    Raises:
      UserError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (*_DAMAGE, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is missing or damaged ({reason}): {fix}") from None


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
