"""A record becomes clips of uint8 frames, or a reason why not.

A record is a video or an image, as a local or remote file, as bytes, or as frames in
memory. A still image gives clips of equal frames.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import av
import numpy as np

from vjepa_jax.data.clips import packets
from vjepa_jax.data.clips.frames import RESIZES, ClipWriter, Crop, as_frame
from vjepa_jax.data.clips.media import (
    MAX_PIXELS,
    REASONS,
    TIME_LIMIT_SECS,
    DecodeError,
    Media,
    read_media,
)
from vjepa_jax.data.clips.sampling import LowFrameRateError, Sampling

__all__ = [
    "MAX_PIXELS",
    "REASONS",
    "RESIZES",
    "TIME_LIMIT_SECS",
    "DecodeError",
    "VideoInfo",
    "inspect",
    "read_clip",
    "read_clips",
]


def read_clips(
    record: Any,
    *,
    sampling: Sampling,
    rng: np.random.Generator | None = None,
    size: int,
    crop: Crop | Sequence[Crop],
    resize: str = "antialias",
    max_pixels: int = MAX_PIXELS,
    time_limit_secs: float = TIME_LIMIT_SECS,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Reads the clips of one record in one pass, cropped and resized to squares.

    Rotation given in the container is applied; a pixel aspect ratio is not. The crop is
    resized bilinearly; at `size` already, pixels are those of a plain decode.

    Args:
      record: a `Record`, or the path of a local file or the URL of a remote one. A
        record with `media` is decoded from these bytes, or its frames, uint8
        `[n, H, W, 3]` and `fps` a second, are taken as they are.
      sampling: which frames.
      rng: draws the clips' starts; None takes those of an evaluation.
      size: side of the output in pixels, S.
      crop: from the height and width of the displayed frame to a box `(top, left,
        height, width)` inside it, or to one for each frame, int `[T, 4]`; called once
        per clip, in the clips' order, after all starts are drawn. Of several, each
        gives a view of every clip.
      resize: "antialias" filters where it shrinks; "official" does not, as the official
        code, and takes a third longer.
      max_pixels: larger frames are refused before memory is taken for them.
      time_limit_secs: limit of processor time; a read that blocks is not noticed.
      out: where to write the clips, such as a place in a batch; None: to a new array.

    Returns:
      uint8 `[K, T, S, S, 3]`, RGB; K counts the views of a clip, side by side.

    Raises:
      DecodeError: the record gives no clip; `out` then holds anything.
    """
    crops = [crop] if callable(crop) else crop
    if out is None:
        num_clips = sampling.num_clips * len(crops)
        out = np.empty((num_clips, sampling.num_frames, size, size, 3), np.uint8)
    if resize not in RESIZES:
        raise ValueError(f"resize must be one of {RESIZES}, not {resize!r}")
    # Further attempts must draw the same clips.
    state = None if rng is None else rng.bit_generator.state

    def make_writers() -> list[ClipWriter]:
        if rng is not None:
            rng.bit_generator.state = state
        return [
            ClipWriter(out[number], crops[number % len(crops)], resize)
            for number in range(len(out))
        ]

    path, content, fps = _parts(record)
    if isinstance(content, np.ndarray):
        writers = make_writers()
        _fill_from_frames(path, content, fps, writers, sampling, rng)
    else:
        read_media(
            path,
            content,
            lambda media: _fill(media, make_writers, sampling, rng),
            max_pixels=max_pixels,
            time_limit_secs=time_limit_secs,
        )
    return out


def read_clip(
    record: Any,
    *,
    num_frames: int,
    frame_step: int = 0,
    fps: float = 0.0,
    duration_secs: float = 0.0,
    **options,
) -> np.ndarray:
    """Reads one clip by the rule "exact": uint8 `[T, S, S, 3]`.

    See `Sampling` for the first arguments and `read_clips` for the others.
    """
    sampling = Sampling(num_frames, frame_step, fps, duration_secs)
    return read_clips(record, sampling=sampling, **options)[0]


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
    record: Any,
    *,
    deep: bool = False,
    max_pixels: int = MAX_PIXELS,
    time_limit_secs: float = TIME_LIMIT_SECS,
) -> VideoInfo:
    """Says what a video is, by its packets and its first frame.

    Args:
      record: see `read_clips`.
      deep: decode every frame; a packet that is refused makes the video undecodable.
      max_pixels: see `read_clips`.
      time_limit_secs: see `read_clips`; a deep look at a long video takes more.

    Raises:
      DecodeError: why the video cannot be read.
    """
    path, content, fps = _parts(record)
    if isinstance(content, np.ndarray):
        num, height, width, _ = content.shape
        if not num:
            raise DecodeError(path, "no_frames")
        return VideoInfo(num, width, height, fps, "raw", num / fps if fps else None)

    def look(media: Media) -> VideoInfo:
        with media.open() as container:
            stream = media.video_stream(container)
            index = packets.read_index(media, container, stream)
            codec = stream.codec.canonical_name
        shapes = []

        def on_frame(frame, number):
            if not number:
                is_upright = round(frame.rotation / 90) % 2 == 0
                shape = frame.width, frame.height
                shapes.append(shape if is_upright else shape[::-1])

        last = None if deep else 0
        count = packets.decode_counted(media, last, on_frame, strict=deep)
        num, rate = count if deep else index.num_frames, index.fps
        return VideoInfo(num, *shapes[0], rate, codec, num / rate if rate else None)

    return read_media(
        path, content, look, max_pixels=max_pixels, time_limit_secs=time_limit_secs
    )


def _parts(record: Any) -> tuple[str, bytes | np.ndarray | None, float | None]:
    if isinstance(record, str | os.PathLike):
        return os.fspath(record), None, None
    return record.path, record.media, record.fps


def _choose(
    path: str,
    sampling: Sampling,
    rng: np.random.Generator | None,
    times: np.ndarray,
    average_fps: float | None,
) -> np.ndarray:
    try:
        return sampling.frames(times, average_fps, rng)
    except LowFrameRateError as error:
        raise DecodeError(path, "low_frame_rate", str(error)) from error


def _window(
    path: str, sampling: Sampling, stream: av.VideoStream
) -> tuple[float, float] | None:
    stated = stream.average_rate or stream.guessed_rate
    try:
        return sampling.window(float(stated or 0) or None)
    except LowFrameRateError as error:
        raise DecodeError(path, "low_frame_rate", str(error)) from error


def _even_times(num: int, fps: float | None, sampling: Sampling) -> np.ndarray:
    """When frames are shown whose time nobody knows; at an unknown rate, every frame
    makes one of the clip.
    """
    return np.arange(num) * (1 / fps if fps else sampling.spacing_secs or 1.0)


def _fill_from_frames(
    path: str,
    pixels: np.ndarray,
    fps: float | None,
    writers: list[ClipWriter],
    sampling: Sampling,
    rng: np.random.Generator | None,
) -> None:
    if not pixels.size:
        raise DecodeError(path, "no_frames")
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        detail = f"{pixels.dtype} {pixels.shape}, not uint8 [T, H, W, 3]"
        raise DecodeError(path, "not_a_video", detail)
    times = _even_times(len(pixels), fps, sampling)
    chosen = _choose(path, sampling, rng, times, fps)
    on_frame = _collector(writers, chosen)
    for number in np.unique(chosen).tolist():
        on_frame(as_frame(pixels[number]), number)


def _fill(
    media: Media,
    make_writers: Callable[[], list[ClipWriter]],
    sampling: Sampling,
    rng: np.random.Generator | None,
) -> None:
    """Decodes by the time stamps if it can, else from the start, counting."""
    for probe in (False, True):
        with media.open(probe=probe) as container:
            stream = media.video_stream(container)
            window = _window(media.path, sampling, stream)
            index = packets.read_index(media, container, stream, window)
            if index.order is None:
                break
            if window is not None and index.times[0] > max(window[0], 0):
                break  # sought too far
            writers = make_writers()
            chosen = _choose(media.path, sampling, rng, index.times, index.average_fps)
            if packets.decode_indexed(
                media,
                container,
                stream,
                index,
                np.unique(chosen),
                _collector(writers, chosen),
            ):
                return
        if media.probed:
            break

    if window is not None:
        with media.open(probe=True) as container:
            index = packets.read_index(media, container, media.video_stream(container))
    num_frames = index.num_frames
    while True:
        times = index.times
        if times is None:
            times = _even_times(num_frames, index.fps, sampling)
        writers = make_writers()
        chosen = _choose(
            media.path, sampling, rng, times[:num_frames], index.average_fps
        )
        last = int(chosen.max())
        num_decoded = packets.decode_counted(media, last, _collector(writers, chosen))
        if num_decoded > last:
            return
        # Fewer frames came out than packets went in: clips are drawn once more, from
        # the frames that there are.
        num_frames = num_decoded


def _collector(writers: list[ClipWriter], chosen: np.ndarray) -> packets.OnFrame:
    """Makes the function that takes a frame to its places in the clips `[K, T]`."""
    num_views = len(writers) // len(chosen)
    places = {}
    for k, numbers in enumerate(chosen.tolist()):
        for slot, number in enumerate(numbers):
            places.setdefault(number, {}).setdefault(k, []).append(slot)
    is_started = False

    def on_frame(frame: av.VideoFrame, number: int) -> None:
        nonlocal is_started
        if number not in places:
            return
        if not is_started:
            is_started = True
            for writer in writers:
                writer.start(frame)
        for k, slots in places[number].items():
            for writer in writers[k * num_views : (k + 1) * num_views]:
                writer.put(frame, slots)

    return on_frame
