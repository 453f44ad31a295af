"""One video encoded anew: small, H.264, and cheap to enter anywhere.

Measured on 320x320 at 12 frames per second, one core: leaving out B-frames, CABAC and
the deblocking filter (x264's `fastdecode`) halves the time to decode and costs 5 % of
bytes beside plain H.264 of the same short groups of pictures, at an equal PSNR. The
preset `medium` takes four times as long as `veryfast` for as many bytes and 0.4 dB.
"""

import dataclasses
import io
import math
import os
import time
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import (
    ColorRange,
    Interpolation,
    VideoReformatter,
)
from etils import epath

from vjepa_jax.data.decode import DecodeError
from vjepa_jax.data.file_lists import is_remote
from vjepa_jax.default_config import UserError

_MAX_PIXELS = 1 << 26  # of a source's frame: 8192 x 8192
_TIME_LIMIT_SECS = 3600.0  # for one video, of processor time
_REMOTE_WAITS_SECS = (0.5, 2.0, 8.0)
_STILL_FPS = 25  # given to a video of one frame, which has no rate
_TIME_BASE = Fraction(1, 90000)  # of stored times; whole for all common rates

_AV_ERRORS = (
    av.FFmpegError,
    ArithmeticError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    ValueError,
)


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How videos are encoded.

    Attributes:
      short_side: of larger videos in pixels; smaller ones keep their size.
      gop: frames from one key frame to the next.
      crf: x264's constant rate factor; lower is better and larger.
      fps: frames per second kept of videos with more; 0 keeps every frame.
    """

    short_side: int = 320
    gop: int = 12
    crf: int = 20
    fps: float = 0.0

    def __post_init__(self):
        """Refuses values out of range; the UserError names the flag."""
        if self.short_side < 2:
            raise UserError(f"--short_side must be at least 2, not {self.short_side}")
        if self.gop < 1:
            raise UserError(f"--gop must be at least 1, not {self.gop}")
        if not 0 <= self.crf <= 51:
            raise UserError(f"--crf must lie in 0..51, not {self.crf}")
        if not 0 <= self.fps < math.inf:
            raise UserError(f"--fps must be 0 or more, not {self.fps}")


@dataclasses.dataclass(frozen=True)
class EncodedVideo:
    """An MP4 file in memory; `fps` is the mean rate of its frames per second."""

    content: bytes
    num_frames: int
    width: int
    height: int
    fps: float


def reencode(path: str, encoding: Encoding) -> EncodedVideo:
    """Encodes a local or remote video or image anew, without sound.

    Every frame that the decoder gives is kept with its time (with `encoding.fps`, those
    nearest to whole multiples of its inverse), turned as the container says, and
    scaled where the short side is too long. Odd sides lose a row or a column. Colours
    keep their matrix and become 8-bit, limited-range 4:2:0. The pixel aspect ratio is
    dropped, since `decode` applies none.

    Raises:
      DecodeError: the source gives no frame.
    """
    deadline = time.thread_time() + _TIME_LIMIT_SECS
    try:
        with _open(path) as container:
            frames = _frames(path, container, deadline)
            frames = _thinned(_timed(frames), encoding.fps)
            return _encode(path, frames, encoding)
    except _AV_ERRORS as error:
        raise DecodeError(path, "undecodable", str(error)) from error


def output_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Returns `(height, width)` after scaling, both even and at least 2."""
    scale = min(1.0, short_side / min(height, width))
    if scale == 1:
        return max(2, height // 2 * 2), max(2, width // 2 * 2)
    return max(2, 2 * round(height * scale / 2)), max(2, 2 * round(width * scale / 2))


def _open(path: str) -> av.container.InputContainer:
    source = path
    if is_remote(path):
        source = io.BytesIO(_read_remote(path))
    try:
        if not (os.path.getsize(path) if source is path else source.getbuffer().nbytes):
            raise DecodeError(path, "empty")
        return av.open(source, metadata_errors="ignore")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DecodeError(path, "missing") from error
    except (PermissionError, IsADirectoryError) as error:
        raise DecodeError(path, "unreadable", str(error)) from error
    except av.InvalidDataError as error:
        raise DecodeError(path, "not_a_video") from error


def _read_remote(path: str) -> bytes:
    for wait_secs in (*_REMOTE_WAITS_SECS, None):
        try:
            return epath.Path(path).read_bytes()
        except FileNotFoundError as error:
            raise DecodeError(path, "missing") from error
        except Exception as error:  # the clients' errors have no base in common
            if wait_secs is None:
                raise DecodeError(path, "unreadable", str(error)) from error
            time.sleep(wait_secs)
    raise AssertionError("the last attempt returns or raises")


def _frames(
    path: str, container: av.container.InputContainer, deadline: float
) -> Iterator[av.VideoFrame]:
    """Yields what the decoder gives; packets that it refuses are passed over."""
    stream = container.streams.best("video")
    if (
        stream is None
        or stream.codec_context is None
        or stream.disposition & av.stream.Disposition.attached_pic  # cover art
    ):
        raise DecodeError(path, "no_video_stream")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > _MAX_PIXELS:
        raise DecodeError(path, "too_large", f"{width}x{height}")
    for other in container.streams:
        if other is not stream:
            other.discard = av.stream.Discard.all
    stream.thread_type = "NONE"  # every core has a video of its own
    flush, refused, count = None, None, 0
    packets = (packet for packet in container.demux(stream) if not packet.is_corrupt)
    for packet in packets:
        if not packet.size:  # in the middle of a stream it would flush too early
            flush = packet
            continue
        if time.thread_time() > deadline:
            raise DecodeError(path, "too_slow", f"over {_TIME_LIMIT_SECS:g} s")
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            refused = error
            continue
        count += len(frames)
        yield from frames
    if flush is not None:
        try:
            frames = flush.decode()
        except av.FFmpegError as error:
            refused, frames = error, []
        count += len(frames)
        yield from frames
    if not count:
        if refused is not None:
            raise DecodeError(path, "undecodable", str(refused)) from refused
        raise DecodeError(path, "no_frames")


def _timed(
    frames: Iterable[av.VideoFrame],
) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Pairs frames with their times in seconds from the first, always increasing."""
    first, last, step = None, None, 1 / Fraction(_STILL_FPS)
    for frame in frames:
        at = None if frame.pts is None else frame.pts * frame.time_base
        if last is None:
            first, at = at or Fraction(0), Fraction(0)
        elif at is None or at - first <= last:
            at = last + step  # at the pace of the two before
        else:
            at -= first
            step = at - last
        last = at
        yield at, frame


def _thinned(
    timed: Iterable[tuple[Fraction, av.VideoFrame]], fps: float
) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Keeps the frames nearest to whole multiples of `1 / fps`; 0 keeps all.

    A frame is nearest to the times from half-way after the frame before it to half-way
    to the next. It is kept if a multiple is among them, and once if several are.
    """
    if not fps:
        yield from timed
        return
    rate = Fraction(fps).limit_denominator(10000)

    def multiples_before(seconds: Fraction) -> int:
        return math.ceil(seconds * rate)

    since, before = Fraction(0), None
    for at, frame in timed:
        if before is not None:
            until = (before[0] + at) / 2
            if multiples_before(until) > multiples_before(since):
                yield before
            since = until
        before = at, frame
    if before is not None:
        until = 2 * before[0] - since
        if not until or multiples_before(until) > multiples_before(since):
            yield before


def _encode(
    path: str,
    timed: Iterator[tuple[Fraction, av.VideoFrame]],
    encoding: Encoding,
) -> EncodedVideo:
    content = io.BytesIO()
    convert, stream, times = None, None, []
    with av.open(content, "w", format="mp4") as container:
        for at, frame in timed:
            convert = convert or _Converter(frame, encoding.short_side)
            converted = convert(frame)
            stream = stream or _add_stream(container, converted, encoding)
            converted.time_base = _TIME_BASE
            converted.pts = round(at / _TIME_BASE)
            times.append(at)
            container.mux(stream.encode(converted))
        if stream is None:
            raise DecodeError(path, "no_frames")
        container.mux(stream.encode())
    fps = (len(times) - 1) / times[-1] if len(times) > 1 else _STILL_FPS
    return EncodedVideo(
        content=content.getvalue(),
        num_frames=len(times),
        width=stream.width,
        height=stream.height,
        fps=float(fps),
    )


def _add_stream(
    container: av.container.OutputContainer, frame: av.VideoFrame, encoding: Encoding
) -> av.VideoStream:
    options = {
        "preset": "veryfast",
        "tune": "fastdecode",
        "bf": "0",
        "crf": str(encoding.crf),
        "g": str(encoding.gop),
        "sc_threshold": "0",  # key frames at the gop's pace alone
    }
    stream = container.add_stream("libx264", rate=30, options=options)
    stream.height, stream.width = frame.height, frame.width
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.time_base = _TIME_BASE
    context.thread_count = 1
    # A reader turns the pixels into RGB by these, as it would have the original's.
    context.color_range = ColorRange.MPEG
    if frame.colorspace:  # 0 is that of frames which were RGB
        context.colorspace = frame.colorspace
    return stream


class _Converter:
    """Scales frames, in 8-bit 4:2:0, cuts them to even sides and turns them."""

    def __init__(self, first: av.VideoFrame, short_side: int):
        # A stream that changes its frame size or turn keeps to those of its first.
        stored = first.height, first.width
        self._turns = round(first.rotation / 90) % 4
        self._size = output_size(*stored, short_side)
        # Cut, not scaled by a percent, which would blur.
        is_kept = min(stored) <= short_side and min(stored) > 1
        self._scaled_to = stored if is_kept else self._size
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        height, width = self._scaled_to
        scaled = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="yuv420p",
            interpolation=Interpolation.BICUBIC,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )
        if not self._turns and self._scaled_to == self._size:
            return scaled
        height, width = self._size
        planes = []
        for plane, half in zip(scaled.planes, (1, 2, 2), strict=True):
            pixels = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
            pixels = pixels[: height // half, : width // half]
            planes.append(np.rot90(pixels, self._turns).ravel())
        if self._turns % 2:
            height, width = width, height
        stacked = np.concatenate(planes).reshape(height * 3 // 2, width)
        turned = av.VideoFrame.from_ndarray(stacked, format="yuv420p")
        turned.colorspace, turned.color_range = scaled.colorspace, scaled.color_range
        return turned
