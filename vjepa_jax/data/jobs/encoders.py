"""`reencode` in a process of its own, which a video may crash or hold for ever."""

import collections
import dataclasses

from vjepa_jax.data.clips.media import DecodeError
from vjepa_jax.data.jobs.children import CRASHED, TIMED_OUT, Child
from vjepa_jax.data.jobs.reencode import (
    TIME_LIMIT_SECS,
    EncodedVideo,
    Encoding,
    reencode,
)

# Of wall time: a read that hangs takes no processor time.
_TIMEOUT_SECS = 2 * TIME_LIMIT_SECS

# Children wait here between videos, since starting one takes a second.
_IDLE: collections.deque[Child] = collections.deque()


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why there is no encoded video.

    Attributes:
      reason: one of `media.REASONS`, CRASHED or TIMED_OUT.
      detail: more about it, in words.
    """

    reason: str
    detail: str


def reencode_apart(path: str, encoding: Encoding) -> EncodedVideo | Failure:
    """Does `reencode` in another process; threads may do so at the same time.

    A video whose process dies is tried once more, since the system may have killed the
    first for reasons of its own.

    Raises:
      RuntimeError: a process cannot be started.
    """
    for is_last in (False, True):
        child = _started_child()
        child.give((path, encoding), _TIMEOUT_SECS)
        try:
            if not child.wait():
                return Failure(TIMED_OUT, child.kill())
            result = child.receive()
        except (EOFError, OSError):
            cause = child.end()
            if is_last:
                return Failure(CRASHED, cause)
        except BaseException:  # of this thread; the child would answer a later question
            child.kill()
            raise
        else:
            _IDLE.append(child)
            return result
    raise AssertionError("the last attempt returns")


def end_children() -> None:
    """Ends the processes that wait for videos."""
    while _IDLE:
        _IDLE.pop().kill()


def _started_child() -> Child:
    try:
        return _IDLE.pop()
    except IndexError:
        child = Child(_answer)
    try:
        if child.wait():
            child.receive()
            return child
        cause = child.kill()
    except (EOFError, OSError):
        cause = child.end()
    raise RuntimeError(f"a process to encode videos could not start: {cause}")


def _answer(question: tuple[str, Encoding]) -> EncodedVideo | Failure:
    try:
        return reencode(*question)
    except DecodeError as error:
        detail = str(error).removeprefix(f"{error.path}: {error.reason}")
        return Failure(error.reason, detail.strip(" ()"))
    except Exception as error:
        return Failure(CRASHED, repr(error))
