"""Read a whole video, frame after frame, in one pass and with bounded memory.

Clips are drawn by `reader`, which looks for frames by their numbers and times. Here
every frame is decoded in order, after a pass over the packets for their times.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import av
import numpy as np

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips import packets
from vjepa_jax.data.clips.frames import ClipWriter, Crop, as_frame
from vjepa_jax.data.clips.media import Limits, open_media, retried
from vjepa_jax.data.clips.sampling import TIE_SECS
from vjepa_jax.data.sources.records import Record
from vjepa_jax.data.transforms.transforms import Box

# Seconds from the first frame of the video, and uint8 [S, S, 3].
TimedFrame = tuple[float, np.ndarray]

_NO_TIME_LIMIT = Limits(time_limit_secs=math.inf)

# A longer pause between two frames, unless all are that far apart, is a new clock.
_MAX_GAP_SECS, _MAX_GAP_FRAMES = 60.0, 10


def whole_frame(height: int, width: int) -> Box:
    """Return the box of a whole frame, which is then resized to a square."""
    return 0, 0, height, width


@dataclasses.dataclass(frozen=True)
class FrameStream:
    """How the frames of a video are read one after the other.

    Exactly one of `frame_step` and `fps` is positive; the rules are those of clips, see
    `sampling.Sampling`.

    Attributes:
      resolution: side of the square frames in pixels, S.
      frame_step: one of so many frames is kept, starting with the first.
      fps: frames kept per second, by the time stamps of the video.
      crop: from the height and width of a displayed frame to the box that is kept.
      resize: see `ClipReader`.
      limits: of the size of a frame, and of the decoding time.
    """

    resolution: int
    frame_step: int = 0
    fps: float = 0.0
    crop: Crop = whole_frame
    resize: str = "antialias"
    limits: Limits = _NO_TIME_LIMIT

    def __post_init__(self):
        """Refuse values out of range."""
        if self.resolution < 1:
            raise UserError(f"resolution={self.resolution}: give 1 or more")
        given = [v for v in (self.frame_step, self.fps) if v]
        if len(given) != 1 or not 0 < given[0] < math.inf:
            raise UserError(
                f"frame_step={self.frame_step}, fps={self.fps:g}: give one of them, a "
                "positive number"
            )

    def read(self, record: Record) -> Iterator[TimedFrame]:
        """Yield the chosen frames of a video, cropped and resized to squares.

        A read that fails for a passing reason is repeated from the start of the file;
        no frame is yielded twice.

        Raises:
          DecodeError: the video cannot be read, at the start or later.
        """
        num_read = 0
        chosen = self._choose(record)

        def following() -> TimedFrame | None:
            nonlocal chosen
            try:
                return next(chosen, None)
            except OSError:
                chosen = itertools.islice(self._choose(record), num_read, None)
                raise

        while (item := retried(record.path, following)) is not None:
            num_read += 1
            yield item

    def _choose(self, record: Record) -> Iterator[TimedFrame]:
        picture = np.empty((1, self.resolution, self.resolution, 3), np.uint8)
        writer = ClipWriter(picture, self.crop, self.resize)
        is_started = False
        frames = self._by_step(record) if self.frame_step else self._by_time(record)
        for time, frame in frames:
            if not is_started:
                writer.start(frame)
                is_started = True
            writer.put(frame, (0,))
            yield time, picture[0].copy()

    def _by_step(self, record: Record) -> Iterator[tuple[float, av.VideoFrame]]:
        return itertools.islice(
            _timed_frames(record, self.limits), 0, None, self.frame_step
        )

    def _by_time(self, record: Record) -> Iterator[tuple[float, av.VideoFrame]]:
        """Yield the frame shown nearest to each multiple of `1 / fps` seconds."""
        count, number = 0, 0
        before: tuple[float, av.VideoFrame] | None = None
        for time, frame in _timed_frames(record, self.limits):
            if before is not None:
                between = (before[0] + time) / 2
                while count / self.fps + TIE_SECS < between:
                    yield before
                    count += 1
            before, number = (time, frame), number + 1
        if before is None:
            return
        # The last frame is shown as long as the others are on average.
        end = before[0] * (1 + 0.5 / (number - 1)) if number > 1 else 0.0
        while count == 0 or count / self.fps + TIE_SECS < end:
            yield before
            count += 1


def _timed_frames(
    record: Record, limits: Limits
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yield all frames in the order in which they are shown, and their seconds.

    Raises:
      DecodeError: the video cannot be read.
      OSError: the storage failed.
    """
    if isinstance(record.media, np.ndarray):
        for number, pixels in enumerate(record.media):
            yield number / (record.fps or 1.0), as_frame(pixels)
        return
    with open_media(record.path, record.media, limits) as media:
        index, in_order = packets.read_settled(media)
        with media.open(probe=True) as video:
            clock = _Clock(1 / (video.stated_fps or 1.0))
            for time, frame in packets.decode_stated(video, index, in_order):
                yield clock.advance(None if time is None else float(time)), frame


class _Clock:
    """The time of frames that come in order, whatever their time stamps are.

    A frame without a time stamp, or with one that does not rise or leaps, such as where
    the clock was put forward in a joined recording, follows the one before it at the
    stated frame rate.
    """

    def __init__(self, step: float):
        self._step = step
        self._max_gap = max(_MAX_GAP_SECS, _MAX_GAP_FRAMES * step)
        self._origin: float | None = None
        self._last = -step

    def advance(self, stamp: float | None) -> float:
        """Return the seconds of the next frame from the first one."""
        time = self._last + self._step
        if stamp is not None:
            passed = None if self._origin is None else stamp - self._origin - self._last
            if passed is not None and 0 < passed <= self._max_gap:
                time = self._last + passed
            else:
                self._origin = stamp - time
        self._last = time
        return time
