"""An open record, or the reason why it cannot be read.

All content is read through a Python file object: of a local file, of a remote one
(`gs://`), or of bytes in memory. Errors of the storage can therefore be distinguished
from damaged content, a file cannot make FFmpeg open other files (as playlists would),
and nothing is copied to disk.

PyAV's log level is never set: its log callback can deadlock with codec threads.
"""

import contextlib
import dataclasses
import errno
import io
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

import av
from etils import epath

from vjepa_jax.base.errors import UserError
from vjepa_jax.base.files import is_remote

REASONS = (
    "missing",  # no such file
    "empty",  # a file without bytes
    "unreadable",  # the file system refuses: permissions, I/O errors
    "not_a_video",  # not a known container
    "no_video_stream",  # a container without moving pictures, or of an unknown codec
    "no_frames",  # a video stream that yields no frame
    "undecodable",  # the decoder refuses the content of the stream
    "animated_webp",  # which FFmpeg before 9 cannot decode: GIF and MP4 can be read
    "tiled_image",  # such as HEIC: PyAV gives the tiles, but not how they are laid
    "not_a_file",  # a folder, or a pipe or device, which could block forever
    "too_large",  # frames of more pixels than allowed
    "too_slow",  # decoding took longer than allowed
    "zero_duration",  # several frames, all at the same time
    "low_frame_rate",  # the official sampling rule finds a step of 0
)

MAX_PIXELS = 1 << 25  # of a frame; 7680 x 4320 is a little less
TIME_LIMIT_SECS = 60.0  # of processor time, for one record

# What PyAV raises for damaged input; its own base class derives from Exception only.
AV_ERRORS = (
    av.FFmpegError,
    ArithmeticError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    ValueError,
)

# Errors of network file systems that often pass. Such reads are retried: replacing the
# video would make the data stream depend on the state of the network.
_TRANSIENT_ERRORS = (errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT)
_RETRY_WAITS_SECS = (0.5, 2.0, 8.0)

# Containers whose header holds all that a decoder needs to start. For others, FFmpeg
# has to decode the beginning before it knows the streams, which would take a tenth of
# the time of reading a clip of an H.264 file.
_FORMATS_WITH_FULL_HEADERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")

_IMAGE_SEQUENCES = ("avis", "msf1", "hevc", "hevx")  # brands of AVIF and HEIF

_READ_BYTES = 1 << 16
_SIZE = 1 << 16  # FFmpeg's AVSEEK_SIZE

T = TypeVar("T")


class DecodeError(Exception):
    """A record that gives no clip.

    Attributes:
      path: the record's.
      reason: one of `REASONS`.
      detail: more about it, in words.
    """

    def __init__(self, path: str, reason: str, detail: str = ""):
        super().__init__(f"{path}: {reason}{detail and f' ({detail})'}")
        self.path = path
        self.reason = reason
        self.detail = detail


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of the size and the decoding time of one record.

    Attributes:
      max_pixels: larger frames are refused before memory is allocated for them.
      time_limit_secs: limit of processor time; a read that blocks is not noticed.
    """

    max_pixels: int = MAX_PIXELS
    time_limit_secs: float = TIME_LIMIT_SECS


def retried(path: str, read: Callable[[], T]) -> T:
    """Return `read()`; retry it, after a wait, if the storage fails temporarily.

    Args:
      path: of the record, for messages.
      read: raises OSError if the storage fails.

    Raises:
      DecodeError: the storage fails permanently.
    """
    for wait_secs in (*_RETRY_WAITS_SECS, None):
        try:
            return read()
        except OSError as error:
            is_transient = error.errno is None or error.errno in _TRANSIENT_ERRORS
            if wait_secs is None or not is_transient:
                raise DecodeError(path, "unreadable", str(error)) from error
        time.sleep(wait_secs)
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def open_media(path: str, content: bytes | None, limits: Limits) -> Iterator["Media"]:
    """Open the encoded bytes of a record; use it inside of `retried`.

    Args:
      path: name of the record; a local or remote file, unless there is `content`.
      content: the bytes, if the source itself holds them.
      limits: of size and decoding time.

    Raises:
      DecodeError: why the record cannot be decoded.
      OSError: the storage failed, which FFmpeg may have ignored.
    """
    with _open_file(path, content) as file:
        media = Media(path, file, limits)
        try:
            yield media
        except DecodeError:
            if media.read_error is None:
                raise
        except AV_ERRORS as error:
            if media.read_error is None:
                raise DecodeError(path, "undecodable", str(error)) from error
        if media.read_error is not None:
            raise media.read_error


class Media:
    """The encoded bytes of one record, as the file object that PyAV reads.

    Attributes:
      path: the record's.
      name: file name for PyAV: the suffix only, since FFmpeg might take a whole name
        for a pattern.
      read_error: error of the storage, if it failed; FFmpeg may ignore it.
      is_probed: whether `open` has let FFmpeg decode the beginning.
    """

    def __init__(self, path: str, file: io.IOBase, limits: Limits):
        self.path = path
        self.name = "media" + os.path.splitext(path)[1]
        self.read_error: OSError | None = None
        self.is_probed = False
        self._file = file
        self._limits = limits
        # CPU time of this thread, which does all decoding: a busy machine gives up on
        # the same files as an idle one.
        self._end_secs = time.thread_time() + limits.time_limit_secs
        # The decoder also counts the rows and columns with which it pads a frame.
        self._codec_options = {"max_pixels": str(2 * limits.max_pixels + (1 << 16))}

    def check_time(self) -> None:
        """Raise DecodeError if the time limit is exceeded."""
        if time.thread_time() > self._end_secs:
            limit = f"over {self._limits.time_limit_secs:g} s"
            raise DecodeError(self.path, "too_slow", limit)

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes."""
        self.check_time()
        try:
            return self._file.read(size)
        except Exception as error:  # the clients' errors have no common base
            self.read_error = _as_os_error(error)
            raise self.read_error from error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position and return it; `_SIZE` returns the size instead."""
        if whence == _SIZE:
            position = self.tell()
            size = self.seek(0, os.SEEK_END)
            self.seek(position)
            return size
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the position."""
        return self._file.tell()

    @property
    def version(self) -> tuple[int, float] | None:
        """Size and time of the last change of a file; None if they are not known."""
        if isinstance(self._file, io.BytesIO):
            return None
        try:
            if is_remote(self.path):
                found = epath.Path(self.path).stat()
                return found.length, found.mtime
            status = os.fstat(self._file.fileno())
        except Exception:  # the clients' errors have no common base
            return None
        return status.st_size, status.st_mtime_ns

    def open(self, *, probe: bool = False) -> "VideoStream":
        """Open the video stream, at the start.

        Args:
          probe: let FFmpeg decode the beginning, as it does by default, to find what
            the header does not hold; always done if the header is insufficient.

        Raises:
          DecodeError: this is not a container, has no video stream, or its frames are
            too large.
        """
        container = self._open_container(probe)
        if not probe and not _has_full_header(container):
            container.close()
            return self.open(probe=True)
        self.is_probed = probe
        try:
            if container.format.name == "webp_pipe":
                self._refuse_animated_webp()
            return VideoStream(self, container, self._open_stream(container))
        except BaseException:
            container.close()
            raise

    def _refuse_animated_webp(self) -> None:
        position = self.tell()
        self.seek(0)
        head = self.read(21)
        self.seek(position)
        if head[12:16] == b"VP8X" and head[20] & 2:
            detail = "FFmpeg cannot decode it: convert it to MP4 or GIF"
            raise DecodeError(self.path, "animated_webp", detail)

    def _open_container(self, probe: bool) -> av.container.InputContainer:
        options = dict(self._codec_options)
        if not probe:
            options |= {"probesize": "32", "skip_frame": "all"}
        self.seek(0)
        try:
            return av.open(
                self,
                "r",
                options=options,
                # Metadata is not used, and its encoding may be broken.
                metadata_errors="ignore",
                buffer_size=_READ_BYTES,
                io_open=_refuse_to_open,
            )
        except AV_ERRORS as error:
            self.check_time()
            if not self.seek(0, _SIZE):
                raise DecodeError(self.path, "empty") from error
            raise DecodeError(self.path, "not_a_video", str(error)) from error

    def _open_stream(self, container: av.container.InputContainer) -> av.VideoStream:
        """Open the decoder of the video stream and turn the other streams off."""
        stream = _video_stream(container)
        if (
            stream is None
            or stream.disposition & av.stream.Disposition.attached_pic  # cover art
        ):
            raise DecodeError(self.path, "no_video_stream")
        dependent = av.stream.Disposition.dependent
        if any(
            s.disposition & dependent and s.frames == 1 for s in container.streams.video
        ):
            detail = "such as HEIC: convert it to JPEG"
            raise DecodeError(self.path, "tiled_image", detail)
        context = stream.codec_context
        if context.width * context.height > self._limits.max_pixels:
            raise DecodeError(
                self.path, "too_large", f"{context.width} x {context.height}"
            )
        for other in container.streams:
            if other is not stream:
                other.discard = av.stream.Discard.all
        # The header may be wrong: the decoder rejects large frames before it allocates.
        context.options = self._codec_options
        # Threads cost more than they gain while each core decodes a clip of its own.
        context.thread_type = "NONE"
        context.thread_count = 1
        # Before `skip_frame` is set for the first time: libdav1d would keep it forever.
        context.open()
        return stream


@dataclasses.dataclass(frozen=True)
class VideoStream:
    """The video stream of an open container; a context manager that closes it."""

    media: Media
    container: av.container.InputContainer
    stream: av.VideoStream

    def __enter__(self) -> "VideoStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    @property
    def stated_fps(self) -> float | None:
        """Mean frames per second as the container states it; None if it does not."""
        return float(self.stream.average_rate or self.stream.guessed_rate or 0) or None

    def packets(self) -> Iterator[av.Packet]:
        """Yield the packets to decode and, last, the one that flushes the decoder."""
        corrupt: av.Packet | None = None
        for packet in self.container.demux(self.stream):
            self.media.check_time()
            if not packet.size:
                # In the middle of a stream it would flush too early.
                flush = packet
                continue
            if packet.has_sidedata("encryption_info"):
                # Decoders conceal it: most of its frames would be black or noise.
                raise DecodeError(self.media.path, "undecodable", "it is encrypted")
            if corrupt is not None:
                yield corrupt
                corrupt = None
            if packet.is_corrupt:
                # The half packet where a file ends is left out. Elsewhere a packet may
                # only seem corrupt, as where recordings were joined.
                corrupt = packet
            else:
                yield packet
        yield flush


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
        raise UserError(
            f"{path} needs a client of its store ({error}); for gs:// run pip install "
            "'vjepa_jax[gcs]'"
        ) from error
    except Exception as error:  # the clients' errors have no common base
        if isinstance(error, OSError) and error.errno == errno.ENXIO:  # a socket
            raise DecodeError(path, "not_a_file") from error
        raise _as_os_error(error) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise DecodeError(path, "not_a_file", "a folder" if stat.S_ISDIR(mode) else "")
    return os.fdopen(descriptor, "rb", buffering=0)


def _as_os_error(error: Exception) -> OSError:
    """Return an OSError for an error of a store's client, mostly of the network."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return OSError(errno.EIO, f"{type(error).__name__}: {error}")


def _refuse_to_open(url: str, flags: int, options: dict) -> None:
    del flags, options
    raise PermissionError(errno.EACCES, "a video may not refer to other files", url)


def _video_stream(container: av.container.InputContainer) -> av.VideoStream | None:
    """Return the video stream; None if there is none of a known codec."""
    if container.metadata.get("major_brand") in _IMAGE_SEQUENCES:
        # A still image and its opacity, then the frames, then their opacity.
        return max(container.streams.video, key=lambda stream: stream.frames)
    stream = cast("av.VideoStream | None", container.streams.best("video"))
    return None if stream is None or stream.codec_context is None else stream


def _has_full_header(container: av.container.InputContainer) -> bool:
    """Whether the header has all that the decoder and the official sampling need.

    Of several streams, FFmpeg prefers the one of which it has decoded more frames.
    """
    stream = _video_stream(container)
    pictures = av.stream.Disposition.attached_pic
    videos = [s for s in container.streams.video if not s.disposition & pictures]
    return (
        container.format.name in _FORMATS_WITH_FULL_HEADERS
        and len(videos) == 1
        and stream is not None
        and stream.codec_context.width > 0
        and bool(stream.average_rate)
    )
