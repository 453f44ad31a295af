"""Read clips of uint8 frames from a record, or report why it gives none.

A record is a video or an image: a local or remote file, encoded bytes, or frames in
memory. A still image gives clips of equal frames.
"""

import dataclasses
import functools
import os
from collections.abc import Iterable, Sequence

import av
import numpy as np

from vjepa_jax.base.choices import RESIZES
from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips import packet_index, packets
from vjepa_jax.data.clips.frames import ClipWriter, Crop, as_frame
from vjepa_jax.data.clips.media import (
    DecodeError,
    Limits,
    Media,
    VideoStream,
    open_media,
    retried,
)
from vjepa_jax.data.clips.orientation import Orientation
from vjepa_jax.data.clips.sampling import LowFrameRateError, Sampling
from vjepa_jax.data.sources.records import Record, Source

_NO_LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class ClipReader:
    """How the clips of a record are read; picklable.

    Attributes:
      sampling: which frames.
      resolution: side of the square clips in pixels, S.
      resize: one of `choices.RESIZES`. "antialias" filters when it shrinks;
        "official" does not, like the official code, and takes a third longer.
      limits: of size and decoding time of one record.
    """

    sampling: Sampling
    resolution: int
    resize: str = "antialias"
    limits: Limits = _NO_LIMITS

    def __post_init__(self):
        """Refuse an unknown `resize`; the UserError names the config key."""
        if self.resize not in RESIZES:
            raise UserError(
                f"data.resize must be one of {', '.join(RESIZES)}, not {self.resize!r}"
            )

    def shape(self, num_views: int = 1) -> tuple[int, int, int, int, int]:
        """Return the shape of a record's clips, [K, T, S, S, 3]."""
        size, sampling = self.resolution, self.sampling
        num_clips = sampling.num_clips * num_views
        return num_clips, sampling.num_frames, size, size, 3

    def read(
        self,
        record: Record | str | os.PathLike,
        crop: Crop | Sequence[Crop],
        rng: np.random.Generator | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Read the clips of one record in one pass, cropped and resized to squares.

        Turns and mirroring that the file states are applied (see `Orientation`); a
        pixel aspect ratio is not. The crop is resized bilinearly. If it has the right
        size already, the pixels are those of a plain decode.

        Args:
          record: a record, or the path or URL of a file.
          crop: from the height and width of the displayed frame to a box `(top, left,
            height, width)` inside it, or to one for each frame, int [T, 4]; called once
            per clip, in the clips' order, after all starts are drawn. Each of several
            crops gives a view of every clip.
          rng: draws the clips' starts; None: the fixed starts of an evaluation.
          out: where to write the clips, such as a part of a batch; None: a new array.

        Returns:
          uint8 [K, T, S, S, 3], RGB; K counts clips and views, the views of a clip side
          by side.

        Raises:
          DecodeError: the record gives no clip; `out` is then undefined.
        """
        crops = [crop] if callable(crop) else crop
        if out is None:
            out = np.empty(self.shape(len(crops)), np.uint8)
        path, content, fps = _parts(record)
        clips = _Clips(self, path, crops, rng, out)
        if isinstance(content, np.ndarray):
            self._take_frames(content, fps, clips)
        else:
            retried(path, functools.partial(self._decode, path, content, clips))
        return out

    def _take_frames(
        self, pixels: np.ndarray, fps: float | None, clips: "_Clips"
    ) -> None:
        if not pixels.size:
            raise DecodeError(clips.path, "no_frames")
        if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
            detail = f"{pixels.dtype} {pixels.shape}, not uint8 [T, H, W, 3]"
            raise DecodeError(clips.path, "not_a_video", detail)
        for number in clips.choose(self._even_times(len(pixels), fps), fps).tolist():
            clips.put(as_frame(pixels[number]), number)

    def _decode(self, path: str, content: bytes | None, clips: "_Clips") -> None:
        with open_media(path, content, self.limits) as media:
            index = self._decode_by_time(media, clips)
            if index is None:
                return
            index = packets.settle(media, index, in_order=False)
            if not self._decode_from_keys(media, clips, index):
                self._decode_by_count(media, clips, index)

    def _decode_by_time(
        self, media: Media, clips: "_Clips"
    ) -> packet_index.Index | None:
        """Decode the frames in the order of their stamps from the key frames before.

        Returns:
          None on success; else the index of all packets, by which to count frames.
        """
        for probe in (False, True):
            with media.open(probe=probe) as video:
                window = clips.window(video.stated_fps)
                index = packet_index.read_index(video, window)
                if index.order is None or not index.is_countable:
                    break
                if window is not None and not _holds(index, window):
                    break
                is_ready = index.is_settled and not index.is_read_in_turn
                if is_ready and self._put_indexed(video, clips, index):
                    return None
            if not is_ready:
                index = packets.settle(media, index)
                with media.open(probe=probe) as video:
                    if index.order is not None and self._put_indexed(
                        video, clips, index
                    ):
                        return None
            if media.is_probed:
                break
        if window is not None:
            with media.open(probe=True) as video:
                index = packet_index.read_index(video)
        return index

    def _put_indexed(
        self, video: VideoStream, clips: "_Clips", index: packet_index.Index
    ) -> bool:
        """Return whether all frames came in the order of their stamps."""
        wanted = clips.choose(self._times(index), index.average_fps)
        return clips.put_all(packets.decode_indexed(video, index, wanted), wanted)

    def _decode_from_keys(
        self, media: Media, clips: "_Clips", index: packet_index.Index
    ) -> bool:
        """Count frames from the key frames before them; return whether all came."""
        if not index.is_numbered:
            return False
        wanted = clips.choose(self._times(index), index.average_fps)
        with media.open(probe=True) as video:
            frames = packets.decode_from_keys(video, index, wanted)
            return clips.put_all(frames, wanted)

    def _decode_by_count(
        self, media: Media, clips: "_Clips", index: packet_index.Index
    ) -> None:
        """Decode all frames from the start up to the last one wanted."""
        num_frames = index.num_frames
        while True:
            times = self._times(index)[:num_frames]
            last = int(clips.choose(times, index.average_fps)[-1])
            with media.open(probe=True) as video:
                for frame, number in packets.decode_counted(video, index):
                    clips.put(frame, number)
                    if number == last:
                        return
            # Fewer frames came than there are packets: the clips are drawn again, from
            # these frames.
            num_frames = number + 1

    def _times(self, index: packet_index.Index) -> np.ndarray:
        times = index.times
        return self._even_times(index.num_frames, index.fps) if times is None else times

    def _even_times(self, num: int, fps: float | None) -> np.ndarray:
        """Return times for frames that have none.

        At an unknown rate, the clip takes every frame.
        """
        return np.arange(num) * (1 / fps if fps else self.sampling.spacing_secs or 1.0)


def _holds(index: packet_index.Index, window: tuple[float, float]) -> bool:
    """Whether the index is not of a later part than was sought."""
    times = index.times if index.has_stamps else None
    return times is not None and times[0] <= max(window[0], 0)


class _Clips:
    """The clips of one record while they are read: their frames, boxes and output.

    Attributes:
      path: of the record, for messages.
    """

    def __init__(
        self,
        reader: ClipReader,
        path: str,
        crops: Sequence[Crop],
        rng: np.random.Generator | None,
        out: np.ndarray,
    ):
        self.path = path
        self._sampling = reader.sampling
        self._rng = rng
        # Every further attempt must draw the same clips.
        self._rng_state = None if rng is None else rng.bit_generator.state
        self._crops = crops
        self._resize = reader.resize
        self._out = out

    def window(self, stated_fps: float | None) -> tuple[float, float] | None:
        """Return the seconds of the video that hold all frames, if known."""
        try:
            return self._sampling.window(stated_fps)
        except LowFrameRateError as error:
            raise DecodeError(self.path, "low_frame_rate", str(error)) from error

    def choose(self, times: np.ndarray, average_fps: float | None) -> np.ndarray:
        """Draw the clips; return the numbers of all frames wanted, increasing."""
        if self._rng is not None and self._rng_state is not None:
            self._rng.bit_generator.state = self._rng_state
        try:
            chosen = self._sampling.frames(times, average_fps, self._rng)
        except LowFrameRateError as error:
            raise DecodeError(self.path, "low_frame_rate", str(error)) from error
        crops = self._crops
        self._is_started = False
        self._writers = [
            ClipWriter(clip, crops[i % len(crops)], self._resize)
            for i, clip in enumerate(self._out)
        ]
        # {frame: {clip: indices in the clip}}
        self._slots: dict[int, dict[int, list[int]]] = {}
        for k, numbers in enumerate(chosen.tolist()):
            for slot, number in enumerate(numbers):
                self._slots.setdefault(number, {}).setdefault(k, []).append(slot)
        return np.unique(chosen)

    def put_all(
        self, frames: Iterable[tuple[av.VideoFrame, int]], wanted: np.ndarray
    ) -> bool:
        """Write decoded frames; return whether all the wanted ones came in order."""
        missing = set(wanted.tolist())
        try:
            for frame, number in frames:
                self.put(frame, number)
                missing.discard(number)
        except (av.FFmpegError, packets.OrderError):
            return False  # the next attempt decodes another way
        return not missing

    def put(self, frame: av.VideoFrame, number: int) -> None:
        """Write a decoded frame to the clips that contain it."""
        if number not in self._slots:
            return
        if not self._is_started:
            self._is_started = True
            for writer in self._writers:
                writer.start(frame)
        num_views = len(self._crops)
        for k, slots in self._slots[number].items():
            for writer in self._writers[k * num_views : (k + 1) * num_views]:
                writer.put(frame, slots)


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """Properties of a video.

    Attributes:
      frames: frames that are shown; if `inspect` was deep, those decoded.
      width: of the displayed frame in pixels.
      height: of the displayed frame in pixels.
      fps: mean frame rate in frames per second; None if unknown.
      codec: FFmpeg's name for it, such as h264; "raw" for frames in memory.
      duration_secs: from the first frame to the end of the last; None if unknown.
    """

    frames: int
    width: int
    height: int
    fps: float | None
    codec: str
    duration_secs: float | None


def inspect(
    record: Record | str | os.PathLike,
    *,
    deep: bool = False,
    limits: Limits = _NO_LIMITS,
) -> VideoInfo:
    """Return the properties of a video, by its packets and its first frame.

    Args:
      record: see `ClipReader.read`.
      deep: decode every frame; one packet that the decoder refuses makes the video
        undecodable.
      limits: of size and decoding time; `deep` takes longer on a long video.

    Raises:
      DecodeError: why the video cannot be read.
    """
    path, content, fps = _parts(record)
    if isinstance(content, np.ndarray):
        num, height, width, _ = content.shape
        if not num:
            raise DecodeError(path, "no_frames")
        return VideoInfo(num, width, height, fps, "raw", num / fps if fps else None)
    return retried(path, functools.partial(_inspect, path, content, deep, limits))


def _inspect(path: str, content: bytes | None, deep: bool, limits: Limits) -> VideoInfo:
    with open_media(path, content, limits) as media:
        index, _ = packets.read_settled(media)
        num_decoded = 0
        with media.open(probe=True) as video:
            codec = video.stream.codec.canonical_name
            for frame, _ in packets.decode_counted(video, index, strict=deep):
                if not num_decoded:
                    shown = Orientation.of(frame).swap(frame.height, frame.width)
                num_decoded += 1
                if not deep:
                    break
    height, width = shown
    num, fps = num_decoded if deep else index.num_frames, index.fps
    return VideoInfo(num, width, height, fps, codec, num / fps if fps else None)


def take_record(source: Source, index: int) -> Record:
    """Return a record of a source; raise DecodeError if its storage fails."""
    path = source.path_of(index)
    return retried(path, functools.partial(source.__getitem__, index))


def _parts(
    record: Record | str | os.PathLike,
) -> tuple[str, bytes | np.ndarray | None, float | None]:
    if isinstance(record, str | os.PathLike):
        return os.fspath(record), None, None
    return record.path, record.media, record.fps
