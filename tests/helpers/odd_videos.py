"""Videos whose stamps do not show the order of their frames.

Frames carry their numbers: 16 black or white squares, bit `i` of a 4 x 4 grid in
reading order.
"""

import dataclasses
import functools
import io
import pathlib
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction

import av
import numpy as np

SIDE, FPS = 64, 25
_USER_DATA = b"\0\0\1\xb2DivX503b1393p"  # FFmpeg and XviD know packed streams by it
_PICTURE = b"\0\0\1\xb6"

_RAW_FORMATS = {
    "libx264": "h264",
    "libx265": "hevc",
    "mpeg4": "m4v",
    "mpeg2video": "mpeg2video",
}
X265 = "log-level=error:pools=none"
CODECS: dict[str, tuple[str, Callable[[int, int], dict[str, str]]]] = {
    "h264": ("libx264", lambda gop, b: {"g": str(gop), "bf": str(b)}),
    "h264_open": (
        "libx264",
        lambda gop, b: {
            "x264-params": f"keyint={gop}:bframes={b}:open-gop=1:b-adapt=0"
        },
    ),
    "hevc": (
        "libx265",
        lambda gop, b: {"x265-params": f"keyint={gop}:bframes={b}:open-gop=0:{X265}"},
    ),
    "hevc_open": (
        "libx265",
        lambda gop, b: {"x265-params": f"keyint={gop}:bframes={b}:open-gop=1:{X265}"},
    ),
    "mpeg4": ("mpeg4", lambda gop, b: {"g": str(gop), "bf": str(b)}),
    "mpeg2": ("mpeg2video", lambda gop, b: {"g": str(gop), "bf": str(b)}),
}


def numbered_frames(numbers: Sequence[int]) -> np.ndarray:
    """Return uint8 [T, S, S, 3]."""
    bits = (np.array(numbers)[:, None] >> np.arange(16)) & 1
    squares = np.array(bits, np.uint8).reshape(-1, 4, 4) * 255
    frames = squares.repeat(SIDE // 4, 1).repeat(SIDE // 4, 2)
    return np.repeat(frames[..., None], 3, -1)


def numbers_of(frames: np.ndarray) -> list[int]:
    """Return the numbers that frames carry, uint8 [T, S, S, 3]."""
    side = frames.shape[1] // 4
    squares = frames[..., 0].reshape(-1, 4, side, 4, side).mean((2, 4)) > 128
    return (squares.reshape(-1, 16) << np.arange(16)).sum(1).tolist()


@dataclasses.dataclass(frozen=True)
class Packet:
    """An encoded frame; `pts` and `dts` count frames."""

    content: bytes
    pts: int
    dts: int
    is_key: bool


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Packets in decoding order, and a raw stream of them."""

    packets: tuple[Packet, ...]
    raw: bytes


@functools.cache
def encode(
    codec: str, numbers: Sequence[int], gop: int = 12, num_b: int = 2
) -> Encoded:
    """Encode numbered frames.

    Args:
      codec: key of `CODECS`.
      numbers: of the frames; hashable.
      gop: frames between key frames, at most.
      num_b: B-frames in a row.
    """
    name, options = CODECS[codec]
    file, packets = io.BytesIO(), []
    with av.open(file, "w", format=_RAW_FORMATS[name]) as container:
        stream = container.add_stream(name, rate=FPS, options=options(gop, num_b))
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        pictures = numbered_frames(numbers)
        frames = [av.VideoFrame.from_ndarray(pixels, "rgb24") for pixels in pictures]
        for frame in [*frames, None]:
            for packet in stream.encode(frame):
                pts, dts = packet.pts, packet.dts
                packets.append(Packet(bytes(packet), pts, dts, packet.is_keyframe))
                container.mux(packet)
    return Encoded(tuple(packets), file.getvalue())


def write(
    path,
    encoded: Encoded,
    *,
    places: Sequence[int] | None = None,
    shown_at: Sequence[int] | None = None,
) -> str:
    """Write packets with times in frames; return the path.

    Args:
      path: its suffix chooses the container.
      encoded: the packets.
      places: when each packet is decoded, increasing; None: one after the other.
      shown_at: when its frame is shown; None: when it is decoded, which is wrong for
        reordered frames.
    """
    places = range(len(encoded.packets)) if places is None else places
    with (
        av.open(io.BytesIO(encoded.raw)) as source,
        av.open(str(path), "w") as container,
    ):
        stream = container.add_stream_from_template(source.streams.video[0])
        stream.time_base = Fraction(1, FPS)
        for i, content in enumerate(encoded.packets):
            packet = av.Packet(content.content)
            packet.stream, packet.time_base = stream, Fraction(1, FPS)
            packet.dts = places[i]
            packet.pts = places[i] if shown_at is None else shown_at[i]
            packet.duration = 1
            packet.is_keyframe = content.is_key
            container.mux(packet)
    return str(path)


def set_edits(path, edits: Sequence[tuple[int, int]]) -> None:
    """Replace the edit list of an MP4, by (first frame, frames) of each part shown."""
    content = bytearray(pathlib.Path(path).read_bytes())

    def number_at(position):
        return struct.unpack_from(">I", content, position)[0]

    box = content.index(b"elst") - 4
    start = struct.unpack_from(">i", content, box + 20)[0]  # where frame 0 is shown
    movie_frame = number_at(content.index(b"mvhd") + 16) // FPS
    media_frame = number_at(content.index(b"mdhd") + 16) // FPS
    entries = b"".join(
        struct.pack(">Iihh", count * movie_frame, start + first * media_frame, 1, 0)
        for first, count in edits
    )
    new = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits)) + entries
    grown = len(new) - number_at(box)
    content[box : box + number_at(box)] = new
    for name in (b"edts", b"trak", b"moov"):
        at = content.index(name) - 4
        struct.pack_into(">I", content, at, number_at(at) + grown)
    pathlib.Path(path).write_bytes(content)


def pack_b_frames(encoded: Encoded) -> Encoded:
    """Pack MPEG-4 as XviD does: a B-frame in the packet of the frame before it.

    The packet where the last B-frame of a group belongs has a picture that repeats the
    one before, by which players keep in step.
    """
    contents = [packet.content for packet in encoded.packets]
    first = contents[0].index(_PICTURE)
    contents[0] = contents[0][:first] + _USER_DATA + contents[0][first:]
    packed: list[bytes] = []
    in_group = False
    for content in contents:
        is_b = _picture_type(content) == _B
        if is_b and not in_group:
            packed[-1] += content
        elif is_b:
            packed.append(content)
        elif in_group:
            packed += [_repeating_picture(packed[-1]), content]
        else:
            packed.append(content)
        in_group = is_b
    if in_group:
        packed.append(_repeating_picture(packed[-1]))
    packets = (
        Packet(content, i, i, _picture_type(content) == _I)
        for i, content in enumerate(packed)
    )
    return Encoded(tuple(packets), encoded.raw)


def repeat_pictures(encoded: Encoded, places: Sequence[int]) -> Encoded:
    """Replace packets of MPEG-4 by pictures that repeat the one before."""
    packets = list(encoded.packets)
    for i in places:
        content = _repeating_picture(packets[i].content)
        packets[i] = dataclasses.replace(packets[i], content=content)
    return Encoded(tuple(packets), encoded.raw)


_I, _B = 0, 2


def _picture_type(content: bytes) -> int:
    return content[content.index(_PICTURE) + len(_PICTURE)] >> 6


def _repeating_picture(content: bytes) -> bytes:
    """Return a picture without content, with the time of the last one in a packet."""
    start = content.rindex(_PICTURE) + len(_PICTURE)
    bits = "".join(f"{byte:08b}" for byte in content[start : start + 4])
    # Type P; ones and a zero: whole seconds; a marker, 5 bits of time, a marker.
    end = bits.index("0", 2) + 1 + 1 + 5 + 1
    bits = "01" + bits[2:end] + "0" + "0"
    bits += "1" * (-len(bits) % 8)
    return _PICTURE + int(bits, 2).to_bytes(len(bits) // 8, "big")
