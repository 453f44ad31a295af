"""The packets of a video stream: when its frames are shown, and how to decode them.

Frames are numbered in the order of a plain decode. A pass over the packets, which
decodes nothing, gives the time stamp of every packet. Decoding then starts at the last
key frame before a wanted frame, skips frames that no other frame needs, and continues
at the next key frame if that is sooner. Neither the header's frame count nor a constant
frame rate is trusted.

Nor is the order of the stamps. Many files do not store when a frame is shown, but when
it is decoded: AVI, or raw streams that were copied into MP4, MKV or MXF. FFmpeg then
makes stamps up.
Three ways to decode therefore follow each other; each proves its numbers or gives up:

1. `decode_indexed` takes the order of the stamps, and compares it with the decoder's.
2. `decode_from_keys` counts frames from a key frame on: as many frames come before it
   as packets, and none of those after it is lost.
3. `decode_counted` counts frames from the start, as a plain decode does.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import cast

import av
import numpy as np
from av.video.frame import PictureType

from vjepa_jax.data.clips.media import DecodeError, Media, VideoStream
from vjepa_jax.data.clips.packet_index import Index, IndexCache, read_index

# Frames at the start of a file whose order is compared with that of their stamps.
_NUM_COMPARED = 64

# Sought before a key frame that is not found at its time.
_MARGIN_SECS = 1.0
# No codec delays or reorders frames by more than this.
_MAX_REORDERED = 32

# Of files that must be decoded to count their frames.
_counted_files = IndexCache()


class OrderError(Exception):
    """The decoder gives frames in another order than the one expected."""


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

    Where the container stores when frames are shown, and the stamps show it by another
    order than that of the packets, frames that nothing needs are skipped. Elsewhere all
    are decoded, until the decoder itself gives the last one, and compared.

    Args:
      video: the stream that `index` was read from.
      index: with `order`.
      wanted: int [k], increasing numbers of frames.

    Yields:
      Each frame and its number, but not those that the decoder fails to give.

    Raises:
      av.FFmpegError: the decoder refuses a packet.
      OrderError: the decoder gives frames in another order than that of their stamps.
    """
    assert index.order is not None
    number_of = {int(index.order[number]): number for number in wanted.tolist()}
    reader = _PacketReader(video, index, at_start=False)
    for span in _spans(index, wanted):
        packets = (packet for _, packet in reader.read(span.start))
        if _order_is_sure(index, span):
            frames = _decode_needed(video, packets, span.stamps)
        else:
            frames = _decode_compared(video, index, packets, span)
        for frame in frames:
            if frame.pts in number_of:
                yield frame, number_of.pop(frame.pts)


class _PacketReader:
    """Gives packets from a key frame on, with the decoder flushed."""

    def __init__(self, video: VideoStream, index: Index, *, at_start: bool):
        """Prepare to read; `at_start`: no packet of `video` has been read."""
        self._video = video
        self._index = index
        self._is_fresh = True
        self._at_start = at_start
        self._in_turn = enumerate(video.packets()) if index.is_read_in_turn else None

    def read(self, position: int) -> Iterator[tuple[int, av.Packet]]:
        """Yield positions and packets from a position on, 0 or that of a key frame.

        Raises:
          OrderError: the key frame is not found.
        """
        if not self._is_fresh:
            self._video.stream.codec_context.flush_buffers()
        self._is_fresh = False
        numbered = self._packets(position)
        number, packet = next(numbered, (-1, None))
        _compare(number == position and packet is not None and packet.size > 0)
        yield number, cast(av.Packet, packet)
        yield from numbered

    def _packets(self, position: int) -> Iterator[tuple[int, av.Packet]]:
        if self._index.packets is not None:
            held = itertools.islice(self._index.packets, position, None)
            yield from enumerate(held, position)
        elif self._in_turn is not None:
            for number, packet in self._in_turn:
                if number >= position:
                    self._index.stamp(packet, number)
                    yield number, packet
        elif not position and self._at_start:
            self._at_start = False
            yield from enumerate(self._video.packets())
        else:
            self._at_start = False
            yield from enumerate(self._sought(position), position)

    def _sought(self, position: int) -> Iterator[av.Packet]:
        container, stream = self._video.container, self._video.stream
        index = self._index
        key = int(np.searchsorted(index.key_positions, position))
        if key == len(index.key_positions) or index.key_positions[key] != position:
            assert index.order is not None
            container.seek(int(index.order[0]), stream=stream)
            return self._video.packets()
        stamp, sought_at = int(index.key_stamps[key]), int(index.key_sought_at[key])
        margin = round(_MARGIN_SECS / index.time_base)
        # What is found first may lie behind the key frame.
        for start in (sought_at, max(sought_at - margin, int(index.key_sought_at[0]))):
            container.seek(start, stream=stream)
            packets = self._video.packets()
            for packet in packets:
                if not packet.is_keyframe or packet.pts is None:
                    continue
                if packet.pts == stamp:
                    return itertools.chain([packet], packets)
                if packet.pts > stamp:
                    break
        return iter(())


def _order_is_sure(index: Index, span: _Span) -> bool:
    """Whether the stamps of a span need not be compared with the decoder's order."""
    if not index.can_reorder:
        return True
    first, last = np.searchsorted(
        index.key_positions, (span.start, span.stop), side="right"
    )
    reorders = index.key_reorders[max(0, first - 1) : last]
    return index.has_times and len(reorders) > 0 and bool(reorders.all())


def _decode_needed(
    video: VideoStream, packets: Iterable[av.Packet], stamps: set[int]
) -> Iterator[av.VideoFrame]:
    """Decode up to the last of the wanted stamps; skip frames that nothing needs."""
    context = video.stream.codec_context
    left = set(stamps)
    last: int | None = None
    for packet in packets:
        if not packet.size:
            break
        video.media.check_time()
        # Frames that are neither wanted nor needed by another are not decoded.
        context.skip_frame = "DEFAULT" if packet.pts in stamps else "NONREF"
        depth = context.reorder_depth
        for frame in video.stream.decode(packet):
            # A decoder that has not yet seen how far frames are reordered gives some
            # too early.
            if last is not None and depth == context.reorder_depth > 0:
                _compare(frame.pts is not None and frame.pts > last)
            last = frame.pts
            yield frame
        left.discard(packet.pts)
        if not left:
            break
    yield from context.decode(None)


def _decode_compared(
    video: VideoStream, index: Index, packets: Iterable[av.Packet], span: _Span
) -> Iterator[av.VideoFrame]:
    """Decode all frames from the key frame of a span up to the last one wanted."""
    assert index.order is not None
    first = number = int(np.searchsorted(index.order, span.key_stamp))
    context = video.stream.codec_context
    left = set(span.stamps)
    num_read = 0
    for packet, frames in _decode_all(video, packets):
        if packet is not None and not packet.is_discard:
            num_read += cast(int, packet.pts) >= span.key_stamp
        for frame in frames:
            # Frames before the key frame may have lost those that they need.
            if frame.pts is not None and frame.pts < span.key_stamp:
                _compare(number == first)
                continue
            # Without the beginning decoded, the decoder may not know that it must wait.
            _compare(
                video.media.is_probed
                or frame.pict_type != PictureType.B
                or context.reorder_depth > 0
            )
            _compare(number < index.num_frames and frame.pts == index.order[number])
            number += 1
            yield frame
            left.discard(cast(int, frame.pts))
        # The decoder holds back no more frames than it says, or has lost some.
        delay = 0 if packet is None else context.reorder_depth
        _compare(not frames or num_read - (number - first) <= delay)
        if not left:
            return


def _decode_all(
    video: VideoStream, packets: Iterable[av.Packet]
) -> Iterator[tuple[av.Packet | None, list[av.VideoFrame]]]:
    """Yield each packet and the frames that it brings out; None at the end."""
    video.stream.codec_context.skip_frame = "DEFAULT"
    for packet in packets:
        if not packet.size:
            break
        video.media.check_time()
        yield packet, video.stream.decode(packet)
    yield None, video.stream.codec_context.decode(None)


def _compare(is_equal: bool) -> None:
    if not is_equal:
        raise OrderError


def decode_from_keys(
    video: VideoStream, index: Index, wanted: np.ndarray
) -> Iterator[tuple[av.VideoFrame, int]]:
    """Decode frames from the key frames before them, and count them from there.

    All frames in front of a key frame are shown before those that follow it. Its number
    is therefore known if every packet gives one frame.

    Args:
      video: at its start, opened with `probe`.
      index: settled, of all packets, with `order`, and countable.
      wanted: int [k], increasing numbers of frames.

    Yields:
      Each frame and its number; a number may come twice, the second time with the right
      frame.

    Raises:
      av.FFmpegError: the decoder refuses a packet.
      OrderError: frames are lost, and it is not certain which.
    """
    reader = _PacketReader(video, index, at_start=True)
    # Packets in front of the first key frame are a group as well.
    starts = np.union1d([0], index.key_positions).tolist()
    places = wanted + index.num_lost
    groups = np.searchsorted(starts, places, "right") - 1
    breaks = np.flatnonzero(np.diff(groups) > 1) + 1
    for run in np.split(np.arange(len(places)), breaks):
        first, last = int(groups[run[0]]), int(groups[run[-1]])
        end = [*starts, index.num_packets][last + 1]
        num_lost = 0
        while True:
            start = starts[first]
            if not start:
                num_lost = index.num_lost
            group = _Group(video, reader, index, (start, end), int(places[run[-1]]))
            for count, frame in enumerate(group.decode(), start + num_lost):
                yield frame, count - index.num_lost
            if len(group.lost) == num_lost:
                break
            _compare(start > 0 and not index.is_read_in_turn)
            # The first frames after a key frame need those in front of it, and are
            # decoded from the key frame before it if they are wanted.
            num_lost = len(group.lost)
            if places[run[0]] < start + num_lost:
                first, num_lost = first - 1, 0


class _Group:
    """The frames from a key frame on, up to another one.

    Attributes:
      lost: after `decode`: positions of the packets at the start that gave no frame.
    """

    def __init__(
        self,
        video: VideoStream,
        reader: _PacketReader,
        index: Index,
        bounds: tuple[int, int],
        last: int,
    ):
        """Prepare to decode packets from one position to another.

        Args:
          video: the stream.
          reader: of its packets.
          index: of them.
          bounds: positions (from, to) of key frames.
          last: position up to which frames are wanted.
        """
        self._video = video
        self._index = index
        self._reader = reader
        self._start, self._end = bounds
        self._last = last
        self._position_of: dict[int | None, int] = {}
        self.lost: list[int] = []

    def decode(self) -> Iterator[av.VideoFrame]:
        """Yield the frames; raise OrderError if others are lost than the first ones."""
        start, first = self._start, -1
        came: set[int] = set()
        frames = itertools.chain.from_iterable(
            frames for _, frames in _decode_all(self._video, self._packets())
        )
        for count, frame in enumerate(frames, start + 1):
            position = self._position_of.get(frame.pts, -1)
            _compare(position >= 0 and position not in came)
            came.add(position)
            first = position if len(came) == 1 else first
            yield frame
            # What is lost is known when the decoder can no longer have it.
            end = start + len(self._position_of) - _MAX_REORDERED
            if count > self._last and end > first + _MAX_REORDERED:
                break
        else:
            end = start + len(self._position_of)
        self.lost = [place for place in range(start, end) if place not in came]
        # In front of the first frame, and frames after it that need those in front.
        _compare(not start or first == start)
        _compare(not self.lost or self.lost[-1] < first + _MAX_REORDERED)

    def _packets(self) -> Iterator[av.Packet]:
        for position, packet in self._reader.read(self._start):
            if position == self._end or not packet.size:
                return
            self._position_of[packet.pts] = position
            yield packet


def decode_counted(
    video: VideoStream, index: Index, *, strict: bool = False
) -> Iterator[tuple[av.VideoFrame, int]]:
    """Decode all frames from the start and number them as they come.

    Args:
      video: at its start, opened with `probe`.
      index: of all packets; frames have its stamps.
      strict: treat a packet that the decoder refuses as an error of the video;
        otherwise it is skipped.

    Yields:
      Each frame and its number.

    Raises:
      DecodeError: no frame came, or the decoder has refused a packet.
    """
    count, path = 0, video.media.path
    refused: av.FFmpegError | None = None
    for position, packet in enumerate(video.packets()):
        index.stamp(packet, position)
        try:
            frames = video.stream.decode(packet)
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


def decode_stated(
    video: VideoStream, index: Index, in_order: bool
) -> Iterator[tuple[Fraction | float | None, av.VideoFrame]]:
    """Decode all frames from the start, with the times that the index has for them.

    Args:
      video: at its start, opened with `probe`.
      index: of all frames, from `read_settled`.
      in_order: the same; whether stamps identify frames, or else their numbers.

    Yields:
      seconds from the first frame, None if they are not known, and the frame. After
      damage, times may not increase.

    Raises:
      DecodeError: no frame came.
    """
    at, order, times = index.shown_at, index.order, index.times
    for frame, number in decode_counted(video, index):
        if in_order:
            assert order is not None
            stamp = index.origin if frame.pts is None else frame.pts
            number = int(np.searchsorted(order, stamp))
            if frame.pts is None or number == len(order) or order[number] != stamp:
                number = len(order)
        if at is None or times is None or number >= len(at):
            yield None, frame
        elif number and at[number] == at[number - 1]:
            yield float(times[number]), frame
        else:
            yield (int(at[number]) - index.origin) * index.time_base, frame


def settle(media: Media, index: Index, *, in_order: bool = True) -> Index:
    """Return the index of the frames that a plain decode gives.

    Frames are taken out that the decoder cannot give at the start, as where a recording
    begins between two key frames. Where packets of MPEG-4 have several pictures, or
    none, frames are counted once by decoding them all.

    Args:
      media: what `index` was read from; no stream of it is open.
      index: of all packets.
      in_order: whether the decoder's order may be that of the stamps.

    Raises:
      DecodeError: there is no frame.
    """
    if not index.is_countable:
        return _count(media, index)
    if index.order is None or index.num_lost or (in_order and index.is_settled):
        return index
    with media.open(probe=True) as video:
        reader = _PacketReader(video, index, at_start=True)
        group = _Group(video, reader, index, (0, index.num_packets), 0)
        try:
            collections.deque(group.decode(), maxlen=0)
            return _without(index, group.lost)
        except (av.FFmpegError, OrderError):
            pass
    return _count(media, index)


def _without(index: Index, lost: list[int]) -> Index:
    """Take out the frames of the packets at some of the first positions."""
    if not lost or len(lost) == index.num_frames:
        return dataclasses.replace(index, is_settled=True)
    assert index.order is not None and index.positions is not None
    is_kept = ~np.isin(index.positions, lost)
    order = index.order[is_kept]
    is_shared = index.shown_at is index.order
    shown_at = order if is_shared else cast(np.ndarray, index.shown_at)[len(lost) :]
    return dataclasses.replace(
        index,
        num_frames=len(order),
        order=order,
        positions=index.positions[is_kept],
        shown_at=shown_at,
        origin=int(shown_at[0]),
        num_lost=len(lost),
        is_settled=True,
    )


def _count(media: Media, index: Index) -> Index:
    """Return the index of the frames that decoding all packets gives, as they come."""
    with media.open(probe=True) as video:
        counted = _counted_files.get(media)
        if counted is not None:
            return counted
        stamps = [frame.pts for frame, _ in decode_counted(video, index)]
    at = index.shown_at
    if len(stamps) != index.num_frames:
        at = None
        if index.has_stamps and len(stamps) == len({*stamps} - {None}):
            at = np.sort(np.array(stamps, np.int64))
    elif at is not None and len(at) > 2 and not index.clock.is_set_back:
        # An encoder that packs B-frames waits for them after the first frame.
        at = at.copy()
        at[0] = max(at[0], at[1] - np.diff(at[1:]).min())
    counted = dataclasses.replace(
        index,
        num_frames=len(stamps),
        order=None,
        positions=None,
        shown_at=at,
        origin=0 if at is None else int(at[0]),
        is_countable=True,
        is_settled=True,
    )
    _counted_files.put(media, counted)
    return counted


def read_settled(media: Media) -> tuple[Index, bool]:
    """Read the index of all frames that a plain decode gives.

    Returns:
      the index, and whether the decoder gives frames in the order of their stamps, as
      the first of them show. If not, the frame with number `n` is the one that comes
      after `n` others.

    Raises:
      DecodeError: there is no frame, or all are at the same time.
    """
    with media.open(probe=True) as video:
        index = read_index(video)
    index = settle(media, index)
    if _is_in_order(media, index):
        return index, True
    return settle(media, index, in_order=False), False


def _is_in_order(media: Media, index: Index) -> bool:
    if index.order is None:
        return False
    if index.is_order_sure:
        return True
    wanted = np.arange(min(index.num_frames, _NUM_COMPARED))
    with media.open(probe=True) as video:
        try:
            frames = decode_indexed(video, index, wanted)
            return sum(1 for _ in frames) == len(wanted)
        except (av.FFmpegError, OrderError):
            return False
