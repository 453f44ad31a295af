"""Re-encode a video: small, H.264, and cheap to decode from any frame.

Measured on 320x320 at 12 frames per second on one core: without B-frames, CABAC and the
deblocking filter (x264's `fastdecode`) decoding takes half the time, and files of equal
PSNR are 5 % larger than plain H.264 with the same short groups of pictures. The preset
`medium` takes four times as long as `veryfast` and gains 0.4 dB at equal size. Without
x264's macroblock tree (`REPRODUCIBLE`) files are 2 to 3 % larger at equal PSNR.
"""

import dataclasses
import functools
import io
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import (
    ColorRange,
    Interpolation,
    VideoReformatter,
)

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips import packets
from vjepa_jax.data.clips.frames import view_plane
from vjepa_jax.data.clips.media import Limits, open_media, retried
from vjepa_jax.data.clips.orientation import Orientation

# x264's macroblock tree reads uninitialised memory: with it the same frames may make
# different files.
REPRODUCIBLE = {"x264-params": "mbtree=0"}

TIME_LIMIT_SECS = 3600.0  # for one video, of processor time

_MAX_PIXELS = 1 << 26  # of a source's frame: 8192 x 8192
_DEFAULT_FPS = 25  # of a video of one frame, which has no rate
_TIME_BASE = Fraction(1, 90000)  # of stored times; all common rates divide it

# A frame that is too late for its time is shown for this part of the usual time.
_LATE_PARTS = 16

# A time or a duration; a float only in a stream without times and without a rate.
_Seconds = Fraction | float


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

    def __post_init__(self) -> None:
        """Raise a UserError that names the flag of a value out of range."""
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
    """Re-encode a local or remote video or image, without sound.

    Frames keep their times; with `encoding.fps`, only the frames nearest to multiples
    of its inverse are kept. They are turned and mirrored as the source states (see
    `Orientation`), and scaled down to the short side. In a damaged stream, packets that
    the decoder rejects and frames that are late for their time are skipped. Odd sides
    lose a row or a column. Colours keep their matrix and become 8-bit, limited-range
    4:2:0. The pixel aspect ratio is dropped, since `ClipReader` ignores it.

    Raises:
      DecodeError: the source has no frame, or several that all have the same time.
    """
    return retried(path, functools.partial(_reencode, path, encoding))


def _reencode(path: str, encoding: Encoding) -> EncodedVideo:
    limits = Limits(_MAX_PIXELS, TIME_LIMIT_SECS)
    with open_media(path, None, limits) as media:
        index, in_order = packets.read_settled(media)
        with media.open(probe=True) as video:
            stream = video.stream
            interval = 1 / (stream.average_rate or stream.guessed_rate or _DEFAULT_FPS)
            timed = _timed(packets.decode_stated(video, index, in_order), interval)
            return _encode(_thinned(timed, encoding.fps), encoding)


def output_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Return `(height, width)` after scaling, both even and at least 2."""
    short, long = sorted((height, width))
    if short <= short_side:
        short, long = max(2, short // 2 * 2), max(2, long // 2 * 2)
    else:
        long = 2 * round(long * short_side / short / 2)
        short = short_side // 2 * 2
    return (short, long) if height <= width else (long, short)


def _timed(
    frames: Iterable[tuple[_Seconds | None, av.VideoFrame]], interval: _Seconds
) -> Iterator[tuple[_Seconds, av.VideoFrame]]:
    """Give frames strictly increasing times in seconds from the first.

    A frame without a time comes `interval` after the one before. One that is too late
    for its time, as in a damaged stream, comes directly after the one before.
    """
    start: _Seconds | None = None
    last: _Seconds | None = None
    for stated, frame in frames:
        due = Fraction(0) if last is None else last + interval
        if stated is not None and start is None:
            start = stated - due
        at = due if stated is None or start is None else stated - start
        if last is not None and at <= last:
            at = last + interval / _LATE_PARTS
        last = at
        yield at, frame


def _thinned(
    timed: Iterable[tuple[_Seconds, av.VideoFrame]], fps: float
) -> Iterator[tuple[_Seconds, av.VideoFrame]]:
    """Keep the frames nearest to multiples of `1 / fps`; 0 keeps all.

    A frame is nearest to the times between the midpoints to its two neighbours. It is
    kept, once, if they include a multiple.
    """
    if not fps:
        yield from timed
        return
    rate = Fraction(fps).limit_denominator(10000)

    def multiples_before(seconds: _Seconds) -> int:
        return math.ceil(seconds * rate)

    since: _Seconds = Fraction(0)
    before: tuple[_Seconds, av.VideoFrame] | None = None
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
    timed: Iterator[tuple[_Seconds, av.VideoFrame]], encoding: Encoding
) -> EncodedVideo:
    content = io.BytesIO()
    convert, stream, times = None, None, []
    with av.open(content, "w", format="mp4") as container:
        for at, frame in timed:
            convert = convert or _Converter(frame, encoding.short_side)
            converted = convert(frame)
            stream = stream or _add_stream(container, converted, encoding)
            # Otherwise every key frame of the original would be one here.
            converted.pict_type = PictureType.NONE
            converted.time_base = _TIME_BASE
            converted.pts = round(at / _TIME_BASE)
            times.append(at)
            container.mux(stream.encode(converted))
        assert stream is not None  # `decode_counted` yields at least one
        container.mux(stream.encode())
    fps = (len(times) - 1) / times[-1] if len(times) > 1 else _DEFAULT_FPS
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
        "sc_threshold": "0",  # key frames only every `gop` frames
        **REPRODUCIBLE,
    }
    stream = container.add_stream("libx264", rate=30, options=options)
    stream.height, stream.width = frame.height, frame.width
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.time_base = _TIME_BASE
    context.thread_count = 1
    # Readers convert to RGB by these two, as they do for the original.
    context.color_range = ColorRange.MPEG
    if frame.colorspace:  # 0: the frames were RGB
        context.colorspace = frame.colorspace
    return stream


class _Converter:
    """Scales frames in 8-bit 4:2:0, crops them to even sides and turns them upright."""

    def __init__(self, first: av.VideoFrame, short_side: int):
        # What the first frame shows has the size of all, even if the stream changes.
        shown = Orientation.of(first).swap(first.height, first.width)
        self._size = output_size(*shown, short_side)
        # Cropped, not scaled: scaling by one percent would blur.
        is_kept = min(shown) <= short_side and min(shown) > 1
        self._scaled_to = shown if is_kept else self._size
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        orientation = Orientation.of(frame)
        height, width = orientation.swap(*self._scaled_to)
        scaled = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="yuv420p",
            interpolation=Interpolation.BICUBIC,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )
        if orientation == Orientation() and self._scaled_to == self._size:
            return scaled
        height, width = orientation.swap(*self._size)
        planes = []
        for plane, half in zip(scaled.planes, (1, 2, 2), strict=True):
            pixels = view_plane(plane, height // half, width // half)
            planes.append(orientation.apply(pixels).ravel())
        height, width = self._size
        stacked = np.concatenate(planes).reshape(height * 3 // 2, width)
        upright = av.VideoFrame.from_ndarray(stacked, format="yuv420p")
        upright.colorspace, upright.color_range = scaled.colorspace, scaled.color_range
        return upright
