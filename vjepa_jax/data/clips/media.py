"""A record becomes an open container, or a reason why not.

Everything is read through a Python file object: a local file, a remote one (`gs://`),
or bytes that the source holds. So an error of the file system is told from a damaged
file, a file cannot have others opened (as playlists would), and nothing is copied to
disk.

PyAV's log level is never set: its log callback can deadlock with codec threads.
"""

import errno
import io
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import av
from etils import epath

from vjepa_jax.base.errors import UserError
from vjepa_jax.base.files import is_remote

REASONS = (
    "missing",  # no such file
    "empty",  # a file of no bytes
    "unreadable",  # the file system refuses: permissions, I/O errors
    "not_a_video",  # no known container
    "no_video_stream",  # a container without moving pictures, or of an unknown codec
    "no_frames",  # a video stream that yields no frame
    "undecodable",  # the decoder refuses what the stream holds
    "not_a_file",  # a folder, or a pipe or device, which could block for ever
    "too_large",  # frames of more than the pixels allowed
    "too_slow",  # decoding took longer than allowed
    "zero_duration",  # several frames, all at the same time
    "low_frame_rate",  # the official sampling rule finds a step of 0
)

MAX_PIXELS = 1 << 25  # of a frame; 7680 x 4320 is a little less
TIME_LIMIT_SECS = 60.0  # of processor time, for one record

# What PyAV raises on damaged input; its own base class derives from Exception alone.
AV_ERRORS = (
    av.FFmpegError,
    ArithmeticError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    ValueError,
)

# What network file systems answer for a moment: worth another try, whereas replacing
# the video would make the data stream depend on the state of the network.
_TRANSIENT_ERRORS = (errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT)
_RETRY_WAITS_SECS = (0.5, 2.0, 8.0)

# Containers whose header says all that a decoder needs to start. Of others, FFmpeg has
# to decode the beginning before it knows the streams: for a clip of an H.264 file that
# would be a tenth of the time.
_TELLING_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")

_READ_BYTES = 1 << 16
_SIZE = 1 << 16  # FFmpeg's AVSEEK_SIZE

T = TypeVar("T")


class DecodeError(Exception):
    """A record that gives no clip.

    Attributes:
      path: the record's.
      reason: one of `REASONS`.
    """

    def __init__(self, path: str, reason: str, detail: str = ""):
        super().__init__(f"{path}: {reason}{detail and f' ({detail})'}")
        self.path = path
        self.reason = reason


class Deadline:
    """A limit on the processor time of one record.

    The time of the calling thread is counted, in which all decoding is done: on a busy
    machine the same files are given up as on an idle one. Time spent waiting for a file
    system is not counted.
    """

    def __init__(self, path: str, limit_secs: float):
        self._path = path
        self._limit_secs = limit_secs
        self._end = time.thread_time() + limit_secs

    def check(self) -> None:
        """Raises DecodeError once the time is over."""
        if time.thread_time() > self._end:
            raise DecodeError(self._path, "too_slow", f"over {self._limit_secs:g} s")


class Media:
    """The encoded bytes of one record, as the file object that PyAV reads.

    Attributes:
      path: the record's.
      name: what PyAV takes for the file's name: its suffix alone, for in a whole name
        FFmpeg might find a pattern.
      deadline: checked between reads, packets and frames.
      read_error: what the file system said, if it failed; FFmpeg may pass over it.
      probed: whether `open` has had FFmpeg decode the beginning.
    """

    def __init__(
        self, path: str, file: io.IOBase, max_pixels: int, time_limit_secs: float
    ):
        self.path = path
        self.name = "media" + os.path.splitext(path)[1]
        self.deadline = Deadline(path, time_limit_secs)
        self.read_error = None
        self.probed = False
        self._file = file
        self._max_pixels = max_pixels
        # The decoder counts rows and columns of padding, too.
        self._codec_options = {"max_pixels": str(2 * max_pixels + (1 << 16))}

    def read(self, size: int) -> bytes:
        """Reads up to `size` bytes."""
        self.deadline.check()
        try:
            return self._file.read(size)
        except Exception as error:
            self.read_error = _as_os_error(error)
            raise self.read_error from error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a place and returns it; `_SIZE` asks for the size instead."""
        if whence == _SIZE:
            place = self.tell()
            size = self.seek(0, os.SEEK_END)
            self.seek(place)
            return size
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Returns the place."""
        return self._file.tell()

    def open(self, *, probe: bool = False) -> av.container.InputContainer:
        """Opens the container from its start.

        Args:
          probe: have FFmpeg decode the beginning, as it does by default, to learn what
            the header does not tell; done without being asked where that must be.

        Raises:
          DecodeError: this is no container, or one of hostile size.
        """
        options = dict(self._codec_options)
        if not probe:
            options |= {"probesize": "32", "skip_frame": "all"}
        self.seek(0)
        try:
            container = av.open(
                self,
                options=options,
                # Metadata is of no interest, least of all in a broken encoding.
                metadata_errors="ignore",
                buffer_size=_READ_BYTES,
                io_open=_refuse_to_open,
            )
        except AV_ERRORS as error:
            self.deadline.check()
            if not self.seek(0, _SIZE):
                raise DecodeError(self.path, "empty") from error
            raise DecodeError(self.path, "not_a_video", str(error)) from error
        self.probed = probe
        if not probe and not _is_understood(container):
            container.close()
            return self.open(probe=True)
        return container

    def video_stream(self, container: av.container.InputContainer) -> av.VideoStream:
        """Chooses the stream to decode and turns the others off.

        Raises:
          DecodeError: there is none, or its frames are too large.
        """
        stream = container.streams.best("video")
        if (
            stream is None
            or stream.codec_context is None
            or stream.disposition & av.stream.Disposition.attached_pic  # cover art
        ):
            raise DecodeError(self.path, "no_video_stream")
        context = stream.codec_context
        if context.width * context.height > self._max_pixels:
            raise DecodeError(
                self.path, "too_large", f"{context.width} x {context.height}"
            )
        for other in container.streams:
            if other is not stream:
                other.discard = av.stream.Discard.all
        # The header may lie: the decoder refuses larger frames before it allocates.
        context.options = self._codec_options
        # Threads cost more than they give while each core has its own clip to decode.
        context.thread_type = "NONE"
        context.thread_count = 1
        # Before anything is told to be skipped: libdav1d would take that for good.
        context.open()
        return stream

    def packets(
        self, container: av.container.InputContainer, stream: av.VideoStream
    ) -> Iterator[av.Packet]:
        """Yields the packets to decode and, last, the one that flushes the decoder."""
        for packet in container.demux(stream):
            self.deadline.check()
            if not packet.size:
                # In the middle of a stream it would flush too early.
                flush = packet
            elif not packet.is_corrupt:  # such as the half packet where a file ends
                yield packet
        yield flush


def read_media(
    path: str,
    content: bytes | None,
    work: Callable[[Media], T],
    *,
    max_pixels: int,
    time_limit_secs: float,
) -> T:
    """Does some work on the encoded bytes of a record.

    Args:
      path: names the record; of a local or remote file, unless there is `content`.
      content: the bytes, where the source itself holds them.
      work: called with the media; called again, after a wait, where the file system
        failed in a way that may pass.
      max_pixels: frames larger than this are refused.
      time_limit_secs: limit of processor time for each call of `work`.

    Returns:
      What `work` returns.

    Raises:
      DecodeError: why the record cannot be read.
    """
    waits_secs = [*_RETRY_WAITS_SECS]
    while True:
        media = None
        try:
            with _open_file(path, content) as file:
                media = Media(path, file, max_pixels, time_limit_secs)
                result = work(media)
            read_error = media.read_error
        except DecodeError:
            read_error = media and media.read_error
            if read_error is None:
                raise
        except AV_ERRORS as error:
            read_error = media.read_error if media else error
            if read_error is None:
                raise DecodeError(path, "undecodable", str(error)) from error
        if read_error is None:
            return result
        if read_error.errno not in _TRANSIENT_ERRORS or not waits_secs:
            raise DecodeError(path, "unreadable", str(read_error)) from read_error
        time.sleep(waits_secs.pop(0))


def _open_file(path: str, content: bytes | None) -> io.IOBase:
    if content is not None:
        return io.BytesIO(content)
    try:
        if is_remote(path):
            return epath.Path(path).open("rb")
        # Opening a pipe would otherwise wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DecodeError(path, "missing") from error
    except IsADirectoryError as error:
        raise DecodeError(path, "not_a_file") from error
    except ImportError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENXIO:  # a socket
            raise DecodeError(path, "not_a_file") from error
        raise _as_os_error(error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DecodeError(path, "not_a_file")
    return os.fdopen(descriptor, "rb", buffering=0)


def _as_os_error(error: Exception) -> OSError:
    """Libraries for remote files have errors of their own, mostly of the network's."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return OSError(errno.EIO, f"{type(error).__name__}: {error}")


def _refuse_to_open(url: str, flags: int, options: dict) -> None:
    del flags, options
    raise PermissionError(errno.EACCES, "a video may not refer to other files", url)


def _is_understood(container: av.container.InputContainer) -> bool:
    """Whether the header told what a decoder needs and the official sampling uses."""
    stream = container.streams.best("video")
    return (
        container.format.name in _TELLING_FORMATS
        and stream is not None
        and stream.codec_context is not None
        and stream.codec_context.width > 0
        and bool(stream.average_rate)
    )
