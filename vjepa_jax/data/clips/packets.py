"""The packets of a video stream: when its frames are shown, and the way to each.

Frames are numbered by their order of presentation. A pass over the packets, which
decodes nothing, gives every packet's time stamp; decoding then starts at the last key
frame before a frame that is wanted, passes over frames that nothing needs, and goes on
at the next key frame that something does need. Neither the header's frame count nor a
constant frame rate is trusted.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

import av
import numpy as np

from vjepa_jax.data.clips.media import DecodeError, Media

# A 10 s clip of Kinetics has under 1 MB. Larger files are read twice instead of held.
_MAX_HELD_BYTES = 64 << 20

# Around a window: the key frame before it is found by the time of its decoding, which
# is up to some frames before that of its showing.
_MARGIN_SECS = 1.0
# More packets than these come between the first one and that of the first frame shown
# in no codec.
_MAX_REORDERED = 32

# Called with a decoded frame and its number or its time stamp.
OnFrame = Callable[[av.VideoFrame, int], None]


@dataclasses.dataclass(frozen=True)
class Index:
    """What the packets of a video stream tell, in decoding order.

    Attributes:
      num_frames: packets that stand for a frame to show.
      order: int64 `[num_frames]`, time stamps of the frames in order of presentation;
        None where packets have none, or not one each.
      times: float64 `[num_frames]`, `order` in seconds.
      fps: mean frame rate in frames per second, by the time stamps where there are any;
        None if unknown.
      average_fps: the same as the container states it, else `fps`.
      positions: int64 `[num_frames]`, place of each frame's packet among all packets.
      key_stamps: int64 `[k]`, time stamps of key frames, in decoding order.
      key_positions: int64 `[k]`, place of each of them among all packets.
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


def read_index(
    media: Media,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    window: tuple[float, float] | None = None,
) -> Index:
    """Goes over the packets once: all of them, or of a part of a long video.

    Args:
      media: what the container was opened from.
      container: the container, at its start.
      stream: its video stream.
      window: (from, to) in seconds from the first frame. The index then has only the
        frames in it and some around it, if the file can be sought in; times still count
        from the first frame of the video. None: all.

    Raises:
      DecodeError: there is no frame, or all are at the same time.
    """
    stamps, positions, key_stamps, key_positions = [], [], [], []
    packets, num_bytes = [], 0
    origin = last = None
    remaining = media.packets(container, stream)
    if window is not None:
        head = list(itertools.islice(remaining, _MAX_REORDERED))
        origin = _first_stamp(head)
        remaining = itertools.chain(head, remaining)
    if origin is not None:
        start, last = (
            max(origin, origin + round(secs / stream.time_base))
            for secs in (window[0] - _MARGIN_SECS, window[1] + _MARGIN_SECS)
        )
        container.seek(start, stream=stream)
        remaining = media.packets(container, stream)
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
        # An edit list has packets decoded but not shown.
        if not packet.is_discard:
            stamps.append(packet.pts)
            positions.append(position)
        if packet.is_keyframe and packet.pts is not None:
            key_stamps.append(packet.pts)
            key_positions.append(position)
    num_frames = len(stamps)
    if not num_frames:
        raise DecodeError(media.path, "no_frames")

    order = times = in_order = None
    fps = stated = stream.average_rate or stream.guessed_rate
    if None not in stamps:
        if num_frames > 1 and min(stamps) == max(stamps):
            raise DecodeError(media.path, "zero_duration")
        if len(set(stamps)) == num_frames:
            sorter = np.argsort(stamps)
            order = np.array(stamps)[sorter]
            in_order = np.array(positions)[sorter]
            origin = order[0] if origin is None else origin
            times = (order - origin) * float(stream.time_base)
            if num_frames > 1:
                fps = (num_frames - 1) / (times[-1] - times[0])
    return Index(
        num_frames=num_frames,
        order=order,
        times=times,
        fps=float(fps) if fps else None,
        average_fps=float(stated or fps or 0) or None,
        positions=in_order,
        key_stamps=np.array(key_stamps, np.int64),
        key_positions=np.array(key_positions, np.int64),
        packets=packets,
    )


def _first_stamp(packets: Iterable[av.Packet]) -> int | None:
    """Returns when the first of frames is shown; None where nothing tells."""
    stamps = [p.pts for p in packets if p.size and not p.is_discard]
    return None if None in stamps else min(stamps, default=None)


@dataclasses.dataclass
class _Span:
    """Packets to decode in one go, from a key frame to the last frame wanted."""

    start: int
    stop: int
    key_stamp: int
    stamps: set[int]


def _spans(index: Index, wanted: np.ndarray) -> Iterator[_Span]:
    """Yields the way to frames, given by increasing numbers."""
    span = None
    for number in wanted.tolist():
        stamp, position = int(index.order[number]), int(index.positions[number])
        # Frames shown before a key frame but stored after it may need earlier ones, so
        # a start counts only if the key frame itself is not shown after the frame.
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
    media: Media,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    index: Index,
    wanted: np.ndarray,
    on_frame: OnFrame,
) -> bool:
    """Decodes the frames wanted from the key frames before them.

    Args:
      media: what the container was opened from.
      container: the container, whose packets `index` has gone over.
      stream: its video stream.
      index: has time stamps.
      wanted: int `[k]`, increasing numbers of frames.
      on_frame: gets each of them and its number.

    Returns:
      False if a frame is missing or the decoder refuses something.
    """
    number_of = {int(index.order[number]): number for number in wanted.tolist()}
    context = stream.codec_context
    is_fresh = True
    try:
        for span in _spans(index, wanted):
            if not is_fresh:
                context.flush_buffers()
            is_fresh = False
            if index.packets is not None:
                packets = index.packets[span.start : span.stop + 1]
            else:
                container.seek(span.key_stamp, stream=stream)
                packets = media.packets(container, stream)
            for frame in _decode_span(media, context, packets, span.stamps):
                if frame.pts in number_of:
                    on_frame(frame, number_of.pop(frame.pts))
    except av.FFmpegError:
        return False
    return not number_of


def _decode_span(
    media: Media,
    context: av.VideoCodecContext,
    packets: Iterable[av.Packet],
    stamps: set[int],
) -> Iterator[av.VideoFrame]:
    left = set(stamps)
    for packet in packets:
        if not packet.size:
            break
        media.deadline.check()
        # Frames that are neither wanted nor needed by another are not decoded.
        context.skip_frame = "DEFAULT" if packet.pts in stamps else "NONREF"
        yield from packet.decode()
        left.discard(packet.pts)
        if not left:
            break
    yield from context.decode(None)


def decode_counted(
    media: Media, last: int | None, on_frame: OnFrame, *, strict: bool = False
) -> int:
    """Decodes from the start and numbers the frames that come out.

    Args:
      media: what to open.
      last: number of the frame to stop after; None for all frames.
      on_frame: gets each frame and its number.
      strict: let one packet that the decoder refuses spoil the video; otherwise it is
        passed over.

    Returns:
      How many frames came out.

    Raises:
      DecodeError: none came out, or the decoder has refused something.
    """
    count, refused = 0, None
    with media.open(probe=True) as container:
        stream = media.video_stream(container)
        for packet in media.packets(container, stream):
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                refused = error
                if strict:
                    break
                continue
            for frame in frames:
                on_frame(frame, count)
                count += 1
            if last is not None and count > last:
                return count
    if refused is not None and (strict or not count):
        raise DecodeError(media.path, "undecodable", str(refused)) from refused
    if not count:
        raise DecodeError(media.path, "no_frames")
    return count
