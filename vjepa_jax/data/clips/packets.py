"""The packets of a video stream: when its frames are shown, and how to decode them.

Frames are numbered in order of presentation. A pass over the packets, which decodes
nothing, gives the time stamp of every packet. Decoding then starts at the last key
frame before a wanted frame, skips frames that no other frame needs, and continues at
the next key frame if that is sooner. Neither the header's frame count nor a constant
frame rate is trusted.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import cast

import av
import numpy as np

from vjepa_jax.data.clips.media import DecodeError, VideoStream

# A 10 s clip of Kinetics has under 1 MB. Larger files are read twice instead of held.
_MAX_HELD_BYTES = 64 << 20

# Added before and after a window: the key frame before it is found by its decoding
# time, which is some frames before its presentation time.
_MARGIN_SECS = 1.0
# No codec has more packets than this before that of the first frame shown.
_MAX_REORDERED = 32


@dataclasses.dataclass(frozen=True)
class Index:
    """The packets of a video stream, in decoding order.

    Attributes:
      num_frames: packets of frames that are shown.
      order: int64 [num_frames], time stamps of the frames in order of presentation;
        None if packets have none, or share one.
      times: float64 [num_frames], `order` in seconds from the video's first frame.
      fps: mean frame rate in frames per second, by the time stamps if there are any;
        None if unknown.
      average_fps: the same as the container states it, else `fps`.
      positions: int64 [num_frames], position of each frame's packet among all packets.
      key_stamps: int64 [k], time stamps of key frames, in decoding order.
      key_positions: int64 [k], position of each of them among all packets.
      packets: all packets and the final flushing one; None if they are too large to
        hold.
    """

    num_frames: int
    order: np.ndarray | None
    times: np.ndarray | None
    fps: float | None
    average_fps: float | None
    positions: np.ndarray | None
    key_stamps: np.ndarray
    key_positions: np.ndarray
    packets: list[av.Packet] | None


def read_index(video: VideoStream, window: tuple[float, float] | None = None) -> Index:
    """Read all packets once, or those of a part of a long video.

    Args:
      video: at its start.
      window: (from, to) in seconds from the first frame. If the file can be sought in,
        the index has only the frames of the window and some around it; times still
        count from the first frame of the video. None: all frames.

    Raises:
      DecodeError: there is no frame, or all are at the same time.
    """
    stamps: list[int | None] = []
    positions, key_stamps, key_positions = [], [], []
    packets: list[av.Packet] | None = []
    num_bytes = 0
    origin = last = None
    time_base = cast(Fraction, video.stream.time_base)  # every file's streams have one
    remaining = video.packets()
    if window is not None:
        head = list(itertools.islice(remaining, _MAX_REORDERED))
        origin = _first_stamp(head)
        remaining = itertools.chain(head, remaining)
    if window is not None and origin is not None:
        start, last = (
            max(origin, origin + round(secs / time_base))
            for secs in (window[0] - _MARGIN_SECS, window[1] + _MARGIN_SECS)
        )
        video.container.seek(start, stream=video.stream)
        remaining = video.packets()
    for position, packet in enumerate(remaining):
        # A frame is never decoded after it is shown.
        if last is not None and packet.dts is not None and packet.dts > last:
            break
        if packets is not None:
            packets.append(packet)
            num_bytes += packet.size
            if num_bytes > _MAX_HELD_BYTES:
                packets = None
        if not packet.size:
            break
        # An edit list has packets that are decoded but not shown.
        if not packet.is_discard:
            stamps.append(packet.pts)
            positions.append(position)
        if packet.is_keyframe and packet.pts is not None:
            key_stamps.append(packet.pts)
            key_positions.append(position)
    num_frames, path = len(stamps), video.media.path
    if not num_frames:
        raise DecodeError(path, "no_frames")

    order = times = in_order = None
    fps = video.stated_fps
    known = [stamp for stamp in stamps if stamp is not None]
    if len(known) == num_frames:
        if num_frames > 1 and min(known) == max(known):
            raise DecodeError(path, "zero_duration")
        if len(set(known)) == num_frames:
            sorter = np.argsort(known)
            order = np.array(known)[sorter]
            in_order = np.array(positions)[sorter]
            origin = order[0] if origin is None else origin
            times = (order - origin) * float(time_base)
            if num_frames > 1:
                fps = float((num_frames - 1) / (times[-1] - times[0]))
    return Index(
        num_frames=num_frames,
        order=order,
        times=times,
        fps=fps,
        average_fps=video.stated_fps or fps,
        positions=in_order,
        key_stamps=np.array(key_stamps, np.int64),
        key_positions=np.array(key_positions, np.int64),
        packets=packets,
    )


def _first_stamp(packets: Iterable[av.Packet]) -> int | None:
    """Return when the first frame is shown; None if a packet has no time stamp."""
    stamps = [p.pts for p in packets if p.size and not p.is_discard]
    known = [stamp for stamp in stamps if stamp is not None]
    return min(known, default=None) if len(known) == len(stamps) else None


@dataclasses.dataclass
class _Span:
    """Packets to decode without interruption, from a key frame to a wanted frame."""

    start: int
    stop: int
    key_stamp: int
    stamps: set[int]


def _spans(index: Index, wanted: np.ndarray) -> Iterator[_Span]:
    """Yield the spans to decode for frames with the given increasing numbers."""
    assert index.order is not None and index.positions is not None
    span = None
    for number in wanted.tolist():
        stamp, position = int(index.order[number]), int(index.positions[number])
        # Frames shown before a key frame but stored after it may need earlier frames.
        # Therefore a key frame that is shown after the wanted frame is no start.
        keys = np.flatnonzero(index.key_stamps <= stamp)
        start, key_stamp = 0, int(index.order[0])
        if len(keys):
            start = int(index.key_positions[keys[-1]])
            key_stamp = int(index.key_stamps[keys[-1]])
        if span is None or start > span.stop + 1:
            if span is not None:
                yield span
            span = _Span(start, position, key_stamp, set())
        span.stop = max(span.stop, position)
        span.stamps.add(stamp)
    if span is not None:
        yield span


def decode_indexed(
    video: VideoStream, index: Index, wanted: np.ndarray
) -> Iterator[tuple[av.VideoFrame, int]]:
    """Decode frames from the key frames before them.

    Args:
      video: the stream that `index` was read from.
      index: with time stamps.
      wanted: int [k], increasing numbers of frames.

    Yields:
      Each frame and its number, but not those that the decoder fails to give.

    Raises:
      av.FFmpegError: the decoder refuses a packet.
    """
    assert index.order is not None
    number_of = {int(index.order[number]): number for number in wanted.tolist()}
    context = video.stream.codec_context
    is_fresh = True
    packets: Iterable[av.Packet]
    for span in _spans(index, wanted):
        if not is_fresh:
            context.flush_buffers()
        is_fresh = False
        if index.packets is not None:
            packets = index.packets[span.start : span.stop + 1]
        else:
            video.container.seek(span.key_stamp, stream=video.stream)
            packets = video.packets()
        for frame in _decode_span(video, packets, span.stamps):
            if frame.pts in number_of:
                yield frame, number_of.pop(frame.pts)


def _decode_span(
    video: VideoStream, packets: Iterable[av.Packet], stamps: set[int]
) -> Iterator[av.VideoFrame]:
    context = video.stream.codec_context
    left = set(stamps)
    for packet in packets:
        if not packet.size:
            break
        video.media.check_time()
        # Frames that are neither wanted nor needed by another are not decoded.
        context.skip_frame = "DEFAULT" if packet.pts in stamps else "NONREF"
        yield from packet.decode()
        left.discard(packet.pts)
        if not left:
            break
    yield from context.decode(None)


def decode_counted(
    video: VideoStream, *, strict: bool = False
) -> Iterator[tuple[av.VideoFrame, int]]:
    """Decode all frames from the start and number them as they come.

    Args:
      video: at its start, opened with `probe`.
      strict: treat a packet that the decoder refuses as an error of the video;
        otherwise it is skipped.

    Yields:
      Each frame and its number.

    Raises:
      DecodeError: no frame came, or the decoder has refused a packet.
    """
    count, path = 0, video.media.path
    refused: av.FFmpegError | None = None
    for packet in video.packets():
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            refused = error
            if strict:
                break
            continue
        for frame in frames:
            yield frame, count
            count += 1
    if refused is not None and (strict or not count):
        raise DecodeError(path, "undecodable", str(refused)) from refused
    if not count:
        raise DecodeError(path, "no_frames")
