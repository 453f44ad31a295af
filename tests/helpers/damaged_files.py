"""Ways in which files are damaged: lost writes, lost files, other content."""

import pathlib
import shutil
from collections.abc import Callable


def halve(content: bytes) -> bytes:
    return content[: len(content) // 2]


def empty(content: bytes) -> bytes:
    del content
    return b""


def zeros(content: bytes) -> bytes:
    return bytes(len(content))


def flip(content: bytes) -> bytes:
    """Invert a bit in the middle."""
    middle = len(content) // 2
    flipped = bytes([content[middle] ^ 0x80])
    return content[:middle] + flipped + content[middle + 1 :]


def other_json(text: str) -> Callable[[bytes], bytes]:
    return lambda _: text.encode()


def damage(path: pathlib.Path, change: Callable[[bytes], bytes] | None) -> None:
    """Change the content of a file; None: remove the file or folder."""
    if change is not None:
        path.write_bytes(change(path.read_bytes()))
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def largest(folder: pathlib.Path) -> pathlib.Path:
    """Return the largest file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def content_of(folder: pathlib.Path) -> dict[str, bytes]:
    """Return {path: content} of all files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
