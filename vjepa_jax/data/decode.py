"""One video file becomes one clip of uint8 frames; the only file that touches PyAV.

Frames are numbered by their order of presentation. A pass over the packets, which
decodes nothing, gives every packet's time stamp; decoding then starts at the last key
frame before the clip and passes over frames that nothing needs. Neither the header's
frame count nor a constant frame rate is trusted. Files whose packets do not tell where
their frames belong are decoded from the start and counted.

PyAV's log level is never set: its log callback can deadlock with codec threads.
"""

import dataclasses
import errno
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from vjepa_jax.default_config import UserError

REASONS = (
    "missing",  # no such file
    "empty",  # a file of no bytes
    "unreadable",  # the file system refuses: permissions, I/O errors
    "not_a_video",  # no known container
    "no_video_stream",  # a container without moving pictures, or of an unknown codec
    "no_frames",  # a video stream that yields no frame
    "undecodable",  # the decoder refuses what the stream holds
    "not_a_file",  # a pipe, a socket or a device, which could block for ever
    "too_large",  # frames of more than the pixels allowed
    "too_slow",  # decoding took longer than allowed
    "zero_duration",  # frames, all at the same time
)

MAX_PIXELS = 1 << 26  # of a frame: 8192 x 8192
TIME_LIMIT_SECS = 60.0  # for one record, of processor time

# A 10 s clip of Kinetics has under 1 MB. Larger files are read twice instead of held.
_MAX_HELD_BYTES = 64 << 20

# What network file systems answer for a moment: worth another try, whereas replacing
# the video would make the data stream depend on the state of the network.
_TRANSIENT_ERRORS = (errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT)
_RETRY_WAITS_SECS = (0.5, 2.0, 8.0)

# What PyAV raises on damaged input; its own base class derives from Exception alone.
_AV_ERRORS = (
    av.FFmpegError,
    ArithmeticError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    ValueError,
)


class DecodeError(Exception):
    """A file that gives no clip.

    Attributes:
      path: the file.
      reason: one of `REASONS`.
    """

    def __init__(self, path: str, reason: str, detail: str = ""):
        super().__init__(f"{path}: {reason}{detail and f' ({detail})'}")
        self.path = path
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a video turned out to be.

    Attributes:
      frames: frames that are shown; where `inspect` was deep, those decoded.
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
    record,
    *,
    deep: bool = False,
    max_pixels: int = MAX_PIXELS,
    time_limit_secs: float = TIME_LIMIT_SECS,
) -> VideoInfo:
    """Says what a video is, from its packets and its first frame.

    Args:
      record: a `Record`, or a path.
      deep: decode every frame; one that is refused makes the video undecodable.
      max_pixels: refuse larger frames.
      time_limit_secs: give up after so much processor time.

    Raises:
      DecodeError: why the video cannot be read.
    """
    path = record if isinstance(record, str) else record.path
    deadline = time.thread_time() + time_limit_secs
    count, refused, first = 0, None, None
    try:
        with _open(path) as container:
            stream = _video_stream(path, container)
            if stream.codec_context.width * stream.codec_context.height > max_pixels:
                raise DecodeError(path, "too_large")
            index = _index(container, stream)
        with _open(path) as container:
            stream = _video_stream(path, container)
            for packet in _packets(container, stream):
                if time.thread_time() > deadline:
                    raise DecodeError(path, "too_slow", f"over {time_limit_secs} s")
                try:
                    frames = packet.decode()
                except av.FFmpegError as error:
                    refused = error
                    continue
                count += len(frames)
                first = first or next(iter(frames), None)
                if first and not deep:
                    break
            codec = stream.codec_context.name
    except _AV_ERRORS as error:
        raise DecodeError(path, "undecodable", str(error)) from error
    if refused is not None and (deep or not first):
        raise DecodeError(path, "undecodable", str(refused)) from refused
    if not first:
        raise DecodeError(path, "no_frames")
    height, width = first.height, first.width
    if round(first.rotation / 90) % 2:
        height, width = width, height
    frames = count if deep else index.num_frames
    return VideoInfo(
        frames=frames,
        width=width,
        height=height,
        fps=index.fps,
        codec=codec,
        duration_secs=frames / index.fps if index.fps else None,
    )


def clip_indices(
    num_video_frames: int,
    video_fps: float | None,
    *,
    num_frames: int,
    frame_step: int = 0,
    fps: float = 0.0,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Chooses which frames of a video make the clip.

    With `frame_step`, frames are exactly that far apart. The official code
    (`src/datasets/video_dataset.py`) instead rounds down `linspace(start, start +
    num_frames * frame_step, num_frames)`, whose mean step is a little larger: 4.27 for
    16 frames with step 4. With `fps`, frame `i` is the one nearest to `start +
    i * video_fps / fps`, halves rounded up, so that 30 to 4 frames per second takes
    steps of 7 and 8; the official code takes the whole step `ceil(video_fps) // fps`.

    A video shorter than the clip's window is taken from its start and its last frame is
    repeated.

    Args:
      num_video_frames: frames in the video, at least 1.
      video_fps: mean frame rate of the video in frames per second; None if unknown,
        then `fps` takes every frame.
      num_frames: frames in the clip.
      frame_step: distance of the clip's frames in video frames; 0 to use `fps`.
      fps: frame rate of the clip in frames per second; 0 to use `frame_step`.
      rng: draws the start of the window, uniformly among all that fit; None takes the
        centred window.

    Returns:
      int64 `[num_frames]`, not decreasing, in `[0, num_video_frames)`.
    """
    check_sampling(num_frames, frame_step, fps)
    step = frame_step or (video_fps or fps) / fps
    offsets = np.floor(np.arange(num_frames) * step + 0.5).astype(np.int64)
    spare = max(0, num_video_frames - 1 - int(offsets[-1]))
    start = spare // 2 if rng is None else int(rng.integers(spare + 1))
    return np.minimum(start + offsets, num_video_frames - 1)


def check_sampling(num_frames: int, frame_step: int, fps: float) -> None:
    """Raises UserError unless the numbers tell how to sample a clip."""
    if num_frames < 1:
        raise UserError(f"data.num_frames must be at least 1, not {num_frames}")
    if min(frame_step, fps) < 0 or bool(frame_step) == bool(fps):
        raise UserError(
            "one of data.frame_step and data.fps must be positive and the other 0, not "
            f"{frame_step} and {fps}"
        )


def read_clip(
    path: str,
    *,
    num_frames: int,
    frame_step: int = 0,
    fps: float = 0.0,
    rng: np.random.Generator | None = None,
    size: int,
    crop: Callable[[int, int], tuple[int, int, int, int]],
) -> np.ndarray:
    """Reads one clip, cropped and resized to a square.

    Rotation given in the container is applied; a pixel aspect ratio is not.
    The crop is cut out of the RGB frame and resized bilinearly, antialiased where it
    shrinks; at `size` already, pixels are those of a plain decode.

    Args:
      path: a video file.
      num_frames: frames in the clip, T.
      frame_step: see `clip_indices`.
      fps: see `clip_indices`.
      rng: draws the window; None takes the centred one.
      size: side of the output in pixels, S.
      crop: from the height and width of the displayed frame to a box `(top, left,
        height, width)` inside it; called once per clip, after the window is drawn.

    Returns:
      uint8 `[T, S, S, 3]`, RGB.

    Raises:
      DecodeError: the file gives no clip.
    """
    check_sampling(num_frames, frame_step, fps)
    sampling = {"num_frames": num_frames, "frame_step": frame_step, "fps": fps}
    # Further attempts must draw the same clip.
    rng_state = None if rng is None else rng.bit_generator.state
    long_waits_secs, short_waits_secs = [*_RETRY_WAITS_SECS], [0]
    while True:
        clip = _Clip(num_frames, size, crop)
        try:
            _fill(clip, path, rng, sampling)
            return clip.frames
        except _AV_ERRORS as error:
            reason = "undecodable"
            if getattr(error, "errno", None) in _TRANSIENT_ERRORS:
                # Demuxers say EIO of damaged files as well: only the file system is
                # worth waiting for, though its trouble may just have passed.
                waits_secs = short_waits_secs
                if _fails_to_read(path):
                    reason, waits_secs = "unreadable", long_waits_secs
                if waits_secs:
                    time.sleep(waits_secs.pop(0))
                    if rng is not None:
                        rng.bit_generator.state = rng_state
                    continue
            raise DecodeError(path, reason, str(error)) from error


def _fails_to_read(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            while file.read(1 << 20):
                pass
    except OSError:
        return True
    return False


def _fill(
    clip: "_Clip", path: str, rng: np.random.Generator | None, sampling: dict
) -> None:
    with _open(path) as container:
        stream = _video_stream(path, container)
        index = _index(container, stream)
        if not index.num_frames:
            raise DecodeError(path, "no_frames")
        wanted = clip_indices(index.num_frames, index.fps, rng=rng, **sampling)
        if index.order is not None and _decode_indexed(
            clip, container, stream, index, wanted
        ):
            return
    num_decoded = _decode_counted(clip, path, wanted)
    if num_decoded <= wanted[-1]:
        # Fewer frames came out than packets went in: the clip is drawn once more, from
        # the frames that there are.
        wanted = clip_indices(num_decoded, index.fps, rng=rng, **sampling)
        _decode_counted(clip, path, wanted)


def _open(path: str) -> av.container.InputContainer:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise DecodeError(path, "not_a_file")
        if not status.st_size:
            raise DecodeError(path, "empty")
        # Metadata is of no interest, least of all in a broken encoding.
        return av.open(path, metadata_errors="ignore")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DecodeError(path, "missing") from error
    except (PermissionError, IsADirectoryError) as error:
        raise DecodeError(path, "unreadable", str(error)) from error
    except av.InvalidDataError as error:
        raise DecodeError(path, "not_a_video") from error


def _video_stream(path: str, container: av.container.InputContainer) -> av.VideoStream:
    stream = container.streams.best("video")
    if (
        stream is None
        or stream.codec_context is None
        or stream.disposition & av.stream.Disposition.attached_pic  # cover art
    ):
        raise DecodeError(path, "no_video_stream")
    for other in container.streams:
        if other is not stream:
            other.discard = av.stream.Discard.all
    # Threads cost more than they give while each core has its own clip to decode.
    stream.thread_type = "NONE"
    return stream


def _packets(
    container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[av.Packet]:
    """Yields the packets to decode and, last, the one that flushes the decoder."""
    for packet in container.demux(stream):
        if not packet.size:
            # In the middle of a stream it would flush too early.
            flush = packet
        elif not packet.is_corrupt:  # such as the half packet where a file breaks off
            yield packet
    yield flush


@dataclasses.dataclass(frozen=True)
class _Index:
    """What the packets of a video stream tell, in decoding order.

    Attributes:
      num_frames: packets that stand for a frame to show.
      fps: mean frame rate in frames per second; None if unknown.
      order: time stamps of the frames in order of presentation; None where packets have
        none, or not one each.
      key_stamps: time stamps of key frames, in decoding order.
      key_positions: place of each of them among all packets.
      packets: all packets and the final flushing one; None if they are too large to
        hold.
    """

    num_frames: int
    fps: float | None
    order: list[int] | None
    key_stamps: list[int]
    key_positions: list[int]
    packets: list[av.Packet] | None


def _index(container: av.container.InputContainer, stream: av.VideoStream) -> _Index:
    stamps, key_stamps, key_positions, packets = [], [], [], []
    num_frames = num_bytes = 0
    for position, packet in enumerate(_packets(container, stream)):
        if packets is not None:
            packets.append(packet)
            num_bytes += packet.size
            if num_bytes > _MAX_HELD_BYTES:
                packets = None
        if not packet.size:
            break
        # An edit list has packets decoded but not shown.
        if not packet.is_discard:
            num_frames += 1
            stamps.append(packet.pts)
        if packet.is_keyframe and packet.pts is not None:
            key_stamps.append(packet.pts)
            key_positions.append(position)

    order, fps = None, stream.average_rate or stream.guessed_rate
    if None not in stamps and len(set(stamps)) == num_frames:
        order = sorted(stamps)
        if num_frames > 1:
            fps = (num_frames - 1) / ((order[-1] - order[0]) * stream.time_base)
    return _Index(
        num_frames=num_frames,
        fps=float(fps) if fps else None,
        order=order,
        key_stamps=key_stamps,
        key_positions=key_positions,
        packets=packets,
    )


def _decode_indexed(
    clip: "_Clip",
    container: av.container.InputContainer,
    stream: av.VideoStream,
    index: _Index,
    wanted: np.ndarray,
) -> bool:
    """Fills the clip from the last key frame before it; False if a frame is missing."""
    slots = {}
    for slot, position in enumerate(wanted.tolist()):
        slots.setdefault(index.order[position], []).append(slot)
    first = index.order[wanted[0]]

    # Frames shown before a key frame but stored after it may need earlier ones, so a
    # start counts only if the key frame itself is not shown after the clip's first.
    start, start_stamp = 0, None
    for stamp, position in zip(index.key_stamps, index.key_positions, strict=True):
        if stamp <= first:
            start, start_stamp = position, stamp
    if index.packets is not None:
        packets = index.packets[start:]
    else:
        container.seek(
            index.order[0] if start_stamp is None else start_stamp, stream=stream
        )
        packets = _packets(container, stream)

    context = stream.codec_context
    try:
        for packet in packets:
            # Frames that neither the clip nor another frame needs are not decoded.
            context.skip_frame = "DEFAULT" if packet.pts in slots else "NONREF"
            for frame in packet.decode():
                if frame.pts in slots:
                    clip.put(frame, slots.pop(frame.pts))
            if not slots:
                return True
    except av.FFmpegError:
        return False
    return False


def _decode_counted(clip: "_Clip", path: str, wanted: np.ndarray) -> int:
    """Fills the clip by decoding from the start; returns how many frames it went over.

    Packets that the decoder refuses are passed over.
    """
    slots = {}
    for slot, position in enumerate(wanted.tolist()):
        slots.setdefault(position, []).append(slot)
    last = int(wanted[-1])
    count, refused = 0, None
    with _open(path) as container:
        stream = _video_stream(path, container)
        for packet in _packets(container, stream):
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                refused = error
                continue
            for frame in frames:
                if count in slots:
                    clip.put(frame, slots[count])
                count += 1
            if count > last:
                return count
    if not count:
        if refused is not None:
            raise DecodeError(path, "undecodable", str(refused)) from refused
        raise DecodeError(path, "no_frames")
    return count


class _Clip:
    """Where frames are converted, cropped, resized and collected."""

    def __init__(
        self,
        num_frames: int,
        size: int,
        crop: Callable[[int, int], tuple[int, int, int, int]],
    ):
        self.frames = np.empty((num_frames, size, size, 3), np.uint8)
        self._size = size
        self._crop = crop
        self._box = None
        self._to_rgb = VideoReformatter()
        self._resize = VideoReformatter()

    def put(self, frame: av.VideoFrame, slots: Iterable[int]) -> None:
        """Writes a decoded frame into the given places of the clip."""
        if self._box is None:
            self._stored_size = frame.height, frame.width
            self._turns = round(frame.rotation / 90) % 4
            height, width = self._stored_size[:: -1 if self._turns % 2 else 1]
            self._box = self._crop(height, width)
        # A stream that changes its frame size keeps to that of the clip's first frame.
        height, width = self._stored_size
        # One thread: a pool of them costs more than the conversion of a small frame.
        frame = self._to_rgb.reformat(
            frame, width=width, height=height, format="rgb24", threads=1
        )
        pixels = _pixels(frame)
        if self._turns:
            pixels = np.rot90(pixels, self._turns)
        top, left, height, width = self._box
        pixels = pixels[top : top + height, left : left + width]
        if (height, width) != (self._size, self._size):
            if self._turns:
                pixels = np.ascontiguousarray(pixels)
            pixels = _pixels(
                self._resize.reformat(
                    av.VideoFrame.from_numpy_buffer(pixels, format="rgb24"),
                    width=self._size,
                    height=self._size,
                    interpolation=Interpolation.BILINEAR,
                    threads=1,
                )
            )
        for slot in slots:
            self.frames[slot] = pixels


def _pixels(frame: av.VideoFrame) -> np.ndarray:
    """Views an rgb24 frame as `[H, W, 3]`; rows may be padded."""
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(frame.height, plane.line_size)
    return rows[:, : 3 * frame.width].reshape(frame.height, frame.width, 3)
