"""The packets of a video stream: which there are, and when their frames are shown.

A pass over the packets, which decodes nothing, reads their time stamps. Neither the
header's frame count nor a constant frame rate is trusted. Whether the decoder gives the
frames in the order of their stamps is another question; see `packets`.
"""

import collections
import dataclasses
import itertools
from array import array
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import cast

import av
import numpy as np

from vjepa_jax.data.clips.clock import Clock, make_clock, spread
from vjepa_jax.data.clips.media import DecodeError, Media, VideoStream

# A 10 s clip of Kinetics has under 1 MB. Larger files are read twice instead of held.
_MAX_HELD_BYTES = 64 << 20
# What a packet takes beside its content, measured with PyAV 18.
_PACKET_BYTES = 1800

# Indices of long files, and of those that must be decoded to count their frames. That
# of 12 hours has 16 MB.
_MAX_CACHED_BYTES = 64 << 20

# Added before and after a window: the key frame before it is found by its decoding
# time, which is some frames before its presentation time.
_MARGIN_SECS = 1.0
# No codec has more packets than this before that of the first frame shown.
_MAX_REORDERED = 32
# Containers that store when each frame is shown. The stamps of others may be made up
# by FFmpeg, or a clock that is set back hides behind them.
_FORMATS_WITH_TIMES = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# Have one clock. Where an edit list shows a part, its packets are read once more from a
# key frame on, and their decoding times go back.
_FORMATS_OF_ONE_CLOCK = ("mov,mp4,m4a,3gp,3g2,mj2",)
# Their decoding times are made up, and depend on what FFmpeg knows of the stream.
_FORMATS_WITHOUT_DTS = ("matroska,webm", "nut")
# Store when packets are decoded. Frames are shown as far apart, in their own order; the
# stamps that FFmpeg makes up are not.
_FORMATS_OF_PLACES = ("avi", "asf")

_NO_STAMP = np.iinfo(np.int64).min
# After such a pause in a stream without an index, another recording may have begun.
_PAUSE_SECS = 1.0
# A picture of MPEG-4 that repeats the one before it is no longer.
_MAX_REPEAT_BYTES = 10
_PICTURE_START = b"\0\0\1\xb6"


@dataclasses.dataclass(frozen=True)
class Index:
    """The packets of a video stream.

    Attributes:
      num_frames: packets of frames that are shown.
      order: int64 [num_frames], the frames' stamps in increasing order; they identify
        packets and frames. None if frames are known by their number only.
      has_stamps: stamps are those of the file, of the one clock; otherwise packets have
        none there, or share one, and their position stands for it.
      shown_at: int64 [num_frames], stamps at which the frames are shown, not
        decreasing; None if unknown.
      origin: stamp at time 0.
      time_base: seconds per unit of the stamps.
      stated_fps: mean frame rate as the container states it; None if it does not.
      positions: int32 [num_frames], position of each frame's packet among all packets.
      num_packets: all packets.
      num_lost: packets at the start whose frames the decoder cannot give.
      key_stamps: int64 [k], time stamps of key frames, in decoding order.
      key_positions: int32 [k], position of each of them among all packets.
      key_sought_at: int64 [k], stamps by which key frames are found in the file.
      key_reorders: bool [k], whether stamps do not increase from this key frame to the
        next one.
      clock: what is added to the stamps of recordings that were joined.
      has_times: the container stores when frames are shown.
      can_reorder: the codec may show frames in another order than it decodes them.
      is_countable: as far as can be seen, every packet gives one frame, but for some at
        the start of the file.
      is_settled: the decoder gives the first frames, as far as their packets show, or
        the index is of a part of the video; see `settle`.
      packets: all packets and the final flushing one; None if they are too large to
        hold.
    """

    num_frames: int
    order: np.ndarray | None
    has_stamps: bool
    shown_at: np.ndarray | None
    origin: int
    time_base: Fraction
    stated_fps: float | None
    positions: np.ndarray | None
    num_packets: int
    num_lost: int
    key_stamps: np.ndarray
    key_positions: np.ndarray
    key_sought_at: np.ndarray
    key_reorders: np.ndarray
    clock: Clock
    has_times: bool
    can_reorder: bool
    is_countable: bool
    is_settled: bool
    packets: list[av.Packet] | None

    @property
    def times(self) -> np.ndarray | None:
        """When frames are shown: float64 [num_frames] seconds, increasing."""
        if self.shown_at is None:
            return None
        return spread((self.shown_at - self.origin) * float(self.time_base))

    @property
    def fps(self) -> float | None:
        """Mean frames per second, by the stamps if there are any; None if unknown."""
        if self.shown_at is None or self.num_frames < 2:
            return self.stated_fps
        duration = int(self.shown_at[-1]) - int(self.shown_at[0])
        return float((self.num_frames - 1) / (duration * self.time_base))

    @property
    def average_fps(self) -> float | None:
        """The mean rate that the container states, else `fps`."""
        return self.stated_fps or self.fps

    @property
    def is_order_sure(self) -> bool:
        """Whether no stamp needs to be compared with the decoder's order."""
        return not self.can_reorder or (
            self.has_times
            and len(self.key_reorders) > 0
            and bool(self.key_reorders.all())
        )

    @property
    def is_numbered(self) -> bool:
        """Whether the number of frames in front of a packet is known."""
        num_known = self.num_frames + self.num_lost
        return self.order is not None and num_known == self.num_packets

    @property
    def is_read_in_turn(self) -> bool:
        """Whether packets are neither held nor found by seeking."""
        is_sought = self.has_stamps and not self.clock.is_set_back
        return self.packets is None and not is_sought

    def stamp(self, packet: av.Packet, position: int) -> None:
        """Give a packet of the file its stamp."""
        if not packet.size:
            return
        if self.has_stamps:
            self.clock.shift_packet(packet, position)
        else:
            packet.pts = position

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays."""
        arrays = [value for value in vars(self).values() if hasattr(value, "nbytes")]
        return sum({id(value): value.nbytes for value in arrays}.values())


class IndexCache:
    """Indices by file and its version, the least recently used ones removed."""

    def __init__(self) -> None:
        self._indices: collections.OrderedDict[tuple, Index] = collections.OrderedDict()

    def get(self, media: Media) -> Index | None:
        """Return the index of a file that has not changed."""
        name = self._name(media)
        # The version of a remote file takes a request.
        if name not in {key[0] for key in self._indices}:
            return None
        key = name, media.version
        if key not in self._indices:
            return None
        self._indices.move_to_end(key)
        return self._indices[key]

    def put(self, media: Media, index: Index) -> None:
        """Keep an index, without its packets."""
        version = media.version
        if version is None:
            return
        kept = dataclasses.replace(index, packets=None)
        self._indices[self._name(media), version] = kept
        while (
            len(self._indices) > 1
            and sum(i.num_bytes for i in self._indices.values()) > _MAX_CACHED_BYTES
        ):
            self._indices.popitem(last=False)

    def _name(self, media: Media) -> tuple:
        # FFmpeg may give other stamps after it has decoded the beginning.
        return media.path, media.is_probed


_long_files = IndexCache()


def read_index(video: VideoStream, window: tuple[float, float] | None = None) -> Index:
    """Read all packets once, or those of a part of a long video.

    The index of a file that is too large to hold is kept by this process for the next
    clip.

    Args:
      video: at its start.
      window: (from, to) in seconds from the first frame. If the container stores when
        frames are shown and the file can be sought in, the index has only the frames
        of the window and some around it; times still count from the first frame of the
        video. None: all frames.

    Raises:
      DecodeError: there is no frame, or all are at the same time.
    """
    # Elsewhere a clock may be set back, and what is sought found in the wrong place.
    if window is not None and _has_times(video):
        head = list(itertools.islice(video.packets(), _MAX_REORDERED))
        origin = _first_stamp(head)
        if origin is not None and head[0].is_keyframe and head[0].pts == origin:
            start, end = (
                max(
                    origin,
                    origin + round(secs / cast(Fraction, video.stream.time_base)),
                )
                for secs in (window[0] - _MARGIN_SECS, window[1] + _MARGIN_SECS)
            )
            video.container.seek(start, stream=video.stream)
            return _read_index(video, video.packets(), origin, end)
        return _read_index(video, itertools.chain(head, video.packets()))
    index = _long_files.get(video.media)
    if index is None:
        index = _read_index(video, video.packets())
        if index.packets is None:
            _long_files.put(video.media, index)
    return index


def _has_times(video: VideoStream) -> bool:
    return video.container.format.name in _FORMATS_WITH_TIMES


def _first_stamp(packets: Iterable[av.Packet]) -> int | None:
    """Return when the first frame is shown; None if a packet has no time stamp."""
    stamps = [p.pts for p in packets if p.size and not p.is_discard]
    known = [stamp for stamp in stamps if stamp is not None]
    return min(known, default=None) if len(known) == len(stamps) else None


def _read_index(
    video: VideoStream,
    remaining: Iterator[av.Packet],
    origin: int | None = None,
    end: int | None = None,
) -> Index:
    """Read packets up to the decoding time `end`; `origin` is the stamp at time 0."""
    # Typed arrays: lists of numbers would take a hundred bytes for each packet.
    stamps, decoding = array("q"), array("q")
    keys, hidden = array("q"), array("q")
    packets: list[av.Packet] | None = []
    num_bytes = 0
    has_pictures = video.stream.codec.canonical_name == "mpeg4"
    is_countable = True
    for packet in remaining:
        # A frame is never decoded after it is shown.
        if end is not None and packet.dts is not None and packet.dts > end:
            break
        if packets is not None:
            packets.append(packet)
            num_bytes += packet.size + _PACKET_BYTES
            if num_bytes > _MAX_HELD_BYTES:
                packets = None
        if not packet.size:
            break
        # An edit list has packets that are decoded but not shown.
        if packet.is_discard:
            hidden.append(len(stamps))
        if packet.is_keyframe:
            keys.append(len(stamps))
        stamps.append(_NO_STAMP if packet.pts is None else packet.pts)
        decoding.append(_NO_STAMP if packet.dts is None else packet.dts)
        is_countable = is_countable and not (has_pictures and _is_packed(packet))
    if len(hidden) == len(stamps):
        raise DecodeError(video.media.path, "no_frames")
    pts, dts = np.frombuffer(stamps, np.int64), np.frombuffer(decoding, np.int64)
    if video.container.format.name in _FORMATS_WITHOUT_DTS:
        dts[:] = _NO_STAMP
    key_positions = np.array(keys, np.int32)
    num_packets = len(pts)
    shown: np.ndarray | slice = slice(None)  # takes no memory
    if hidden:
        shown = np.delete(np.arange(num_packets, dtype=np.int32), hidden)
    time_base, fps = cast(Fraction, video.stream.time_base), video.stated_fps
    interval = round(1 / (fps * time_base)) if fps else 1
    clock = Clock.one()
    if video.container.format.name not in _FORMATS_OF_ONE_CLOCK:
        clock = make_clock(pts, dts, key_positions, interval, _NO_STAMP)
    for values in (pts, dts):
        clock.shift(values, _NO_STAMP)
    has_times, can_reorder = _has_times(video), _can_reorder(video)
    shown_at = _shown_at(video, pts[shown], dts[shown])
    sought_at = pts[key_positions]
    if not has_times:
        # Other containers may be sought in by when packets are decoded.
        sought_at = np.minimum(sought_at, dts[key_positions])
        sought_at = np.where(sought_at == _NO_STAMP, pts[key_positions], sought_at)
    starts = clock.starts
    if not has_times and dts.min() != _NO_STAMP:
        later = np.flatnonzero(np.diff(dts) > round(_PAUSE_SECS / time_base)) + 1
        starts = np.append(starts, later)
    is_countable = is_countable and _start_whole(pts, starts, key_positions)
    # The decoder may treat the first frames of another recording in its own way.
    is_countable = is_countable and (packets is None or not clock.is_set_back)
    del dts, decoding
    has_stamps = pts.min() != _NO_STAMP and bool((np.diff(np.sort(pts)) > 0).all())
    if not has_stamps:
        pts = np.arange(num_packets)
    sorter = np.argsort(pts[shown]).astype(np.int32)
    order = pts[shown][sorter]
    positions = sorter if isinstance(shown, slice) else shown[sorter]
    if shown_at is not None and (shown_at == order).all():
        shown_at = order
    if origin is None:
        origin = 0 if shown_at is None else int(shown_at[0])
    index = Index(
        num_frames=len(order),
        order=order,
        has_stamps=has_stamps,
        shown_at=shown_at,
        origin=origin,
        time_base=time_base,
        stated_fps=fps,
        positions=positions,
        num_packets=num_packets,
        num_lost=0,
        key_stamps=pts[key_positions],
        key_positions=key_positions,
        key_sought_at=sought_at,
        key_reorders=_reorders(pts, key_positions),
        clock=clock,
        has_times=has_times,
        can_reorder=can_reorder,
        is_countable=is_countable,
        # Frames in front of the first key frame may be lost.
        is_settled=end is not None
        or (0 in key_positions[:1] and bool(pts[0] <= order[0])),
        packets=packets,
    )
    if packets is not None and (clock.is_set_back or not has_stamps):
        for position, packet in enumerate(packets):
            index.stamp(packet, position)
    return index


def _shown_at(
    video: VideoStream, pts: np.ndarray, dts: np.ndarray
) -> np.ndarray | None:
    """Return the stamps at which frames are shown; None if they are not known."""
    kinds = [values for values in (pts, dts) if values.min() != _NO_STAMP]
    if video.container.format.name in _FORMATS_OF_PLACES:
        kinds.reverse()
    for values in kinds:
        if len(values) == 1 or values.min() < values.max():
            return np.sort(values)
    if kinds:
        raise DecodeError(video.media.path, "zero_duration")
    return None


def _is_packed(packet: av.Packet) -> bool:
    """Whether a packet of MPEG-4 has several pictures, or may have none of its own.

    XviD and DivX put a B-frame into the packet of the frame before it, and an empty
    picture into the packet where it belongs.
    """
    content = bytes(packet)
    return len(content) <= _MAX_REPEAT_BYTES or content.count(_PICTURE_START) != 1


def _start_whole(pts: np.ndarray, starts: np.ndarray, keys: np.ndarray) -> bool:
    """Whether joined recordings lose no frame: each starts with a key frame."""
    return all(
        start in keys and pts[start] <= pts[start : start + _MAX_REORDERED].min()
        for start in starts.tolist()
    )


def _can_reorder(video: VideoStream) -> bool:
    return bool(video.stream.codec.reorder)


def _reorders(pts: np.ndarray, key_positions: np.ndarray) -> np.ndarray:
    """Return whether stamps do not increase from each key frame to the next."""
    if not len(key_positions):
        return np.zeros(0, bool)
    falls = np.zeros(len(pts), bool)
    falls[1:] = np.diff(pts) < 0
    # A key frame that is shown before the frames in front of it tells nothing.
    falls[key_positions] = False
    return np.logical_or.reduceat(falls, key_positions)
