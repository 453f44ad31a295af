"""Video files for tests, made on the spot."""

import collections
import io
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import numpy as np
from PIL import Image

CLOCKWISE = ((0, 1), (-1, 0))  # a matrix that turns a frame by 90 degrees


def moving_frames(
    num_frames: int, height: int = 48, width: int = 48, seed: int = 0
) -> np.ndarray:
    """Return uint8 `[T, H, W, 3]`, no two frames alike: a square on waves."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    frequencies = rng.uniform(1, 3, (2, 3, 1, 1))
    waves = np.sin(
        frequencies[0] * rows / height * 3 + frequencies[1] * columns / width * 3
    )
    frames = np.tile(
        np.moveaxis(110 + 60 * waves, 0, -1).astype(np.uint8), (num_frames, 1, 1, 1)
    )
    side = max(4, height // 4)
    for i, frame in enumerate(frames):
        top = (3 * i) % (height - side + 1)
        left = (5 * i + 7 * seed) % (width - side + 1)
        frame[top : top + side, left : left + side] = (200 + 2 * i % 50, 90, 40)
    return frames


def write_small_videos(folder, count: int) -> list[str]:
    """Write videos of 8 frames of 16 x 16, no two alike; return their names."""
    names = [f"small{i}.mp4" for i in range(count)]
    for i, name in enumerate(names):
        write_video(folder / name, moving_frames(8, height=16, width=16, seed=i))
    return names


def write_video(
    path,
    frames: np.ndarray,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    fps: int = 12,
    stamps: Sequence[int] | None = None,
    codec_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> str:
    """Encode uint8 `[T, H, W, 3]` and return the path as a string.

    `stamps` gives each frame's time in milliseconds, for variable frame rates and late
    starts.
    """
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=codec_options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if stamps is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def write_rotated_video(path, frames: np.ndarray, matrix=CLOCKWISE) -> str:
    """Encode frames as they are in an MP4 or MOV file, with a matrix to show them.

    A pixel stored in column x and row y is shown in column `a x + c y` and row
    `b x + d y`, where `matrix` is `((a, b), (c, d))`.
    """
    write_video(path, frames)
    (a, b), (c, d) = (np.asarray(matrix) * (1 << 16)).astype(int).tolist()
    with open(path, "r+b") as file:
        content = file.read()
        # The matrix of a version 0 track header starts 44 bytes after the box's type:
        # 16.16 and 2.30 fixed point numbers.
        file.seek(content.index(b"tkhd") + 44)
        file.write(struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))
    return str(path)


def write_animation(path, frames: np.ndarray, **options) -> str:
    """Write an animated image of ten frames per second with Pillow."""
    first, *others = map(Image.fromarray, frames)
    first.save(path, save_all=True, append_images=others, duration=100, **options)
    return str(path)


def write_trimmed_video(path, frames: np.ndarray, num_hidden: int) -> str:
    """Encode all frames, with the order not to show the first `num_hidden`."""
    write_video(path, frames, fps=12, container_options={"video_track_timescale": "12"})
    with open(path, "r+b") as file:
        content = file.read()
        # An edit list of one entry: flags, count, duration, then the starting time.
        start = content.index(b"elst") + 16
        (shown_from,) = struct.unpack_from(">i", content, start)
        file.seek(start)
        file.write(struct.pack(">i", shown_from + num_hidden))
    return str(path)


def write_sound(path) -> str:
    """Write a WAV file, whatever the path's suffix: a container without pictures."""
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 800), np.int16), format="s16", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    return str(path)


def decode_plainly(path: str | io.BytesIO) -> np.ndarray:
    """Decode every frame from the first to the last: uint8 `[T, H, W, 3]`."""
    with av.open(path) as container:
        return np.stack(
            [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        )


def decode_content(content: bytes) -> np.ndarray:
    """Decode every frame of a file in memory, see `decode_plainly`."""
    return decode_plainly(io.BytesIO(content))


def used_memory(times: int) -> Iterator[None]:
    """Go round `times`; new memory then holds what was left there, other each time."""
    junk, rng = collections.deque(maxlen=20), np.random.default_rng(0)
    for _ in range(times):
        junk.append(rng.integers(0, 256, rng.integers(100, 200_000), np.uint8))
        yield


def psnr(pixels: np.ndarray, others: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of bytes in dB; infinite where equal."""
    error = np.mean((pixels.astype(np.float64) - others) ** 2)
    return 10 * np.log10(255**2 / error) if error else np.inf
