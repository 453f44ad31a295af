"""Generated videos for `data.py`: moving textures with grain."""

import dataclasses
import pathlib
import sys
from collections.abc import Iterator

import av
import numpy as np

FPS = 30

# Amplitudes fall with this power of the frequency. Files are then as large as those of
# Kinetics, 0.7 to 0.9 MB; photographs have 1 to 1.3, before cameras and codecs.
SLOPE = 1.4


@dataclasses.dataclass(frozen=True)
class VideoSet:
    """A set of similar videos.

    Attributes:
      name: for tables.
      width, height: in pixels.
      codec: FFmpeg's name of the encoder.
      options: options of the encoder.
      num_videos: number of videos.
    """

    name: str
    width: int
    height: int
    codec: str
    options: tuple[tuple[str, str], ...]
    num_videos: int

    @property
    def suffix(self) -> str:
        """Return the file name extension of the codec's container."""
        return ".webm" if "vp9" in self.codec else ".mp4"


def _h264(gop: int) -> tuple[tuple[str, str], ...]:
    return ("crf", "23"), ("g", str(gop))


KINETICS = VideoSet("340x256 H.264, GOP 12", 340, 256, "libx264", _h264(12), 8)
LONG_GOP = VideoSet("340x256 H.264, GOP 250", 340, 256, "libx264", _h264(250), 8)
HD = VideoSet("1280x720 H.264, GOP 250", 1280, 720, "libx264", _h264(250), 2)
_VP9 = ("deadline", "realtime"), ("cpu-used", "6"), ("crf", "33"), ("b", "0")
VP9 = VideoSet("480x270 VP9", 480, 270, "libvpx-vp9", _VP9, 6)
SETS = (KINETICS, LONG_GOP, VP9, HD)


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a random periodic texture with amplitudes like those of photographs.

    Returns:
      float32 [height, width, 3], mean 120, standard deviation 50.
    """
    rows, columns = np.fft.fftfreq(height), np.fft.rfftfreq(width)
    frequency = np.hypot(rows[:, None], columns)
    frequency[0, 0] = np.inf
    layers = rng.standard_normal((4, height, width))
    layers = np.fft.irfft2(np.fft.rfft2(layers) / frequency**SLOPE, s=(height, width))
    layers /= layers.std((1, 2), keepdims=True)
    colours = layers[0] + 0.35 * layers[1:]  # channels differ little
    colours = 120 + 50 * colours / colours.std()
    return np.ascontiguousarray(np.moveaxis(colours, 0, -1), np.float32)


def _moving_frames(
    num_frames: int, height: int, width: int, seed: int
) -> Iterator[np.ndarray]:
    """Yield uint8 [height, width, 3]: a pan, islands that move over it, and grain."""
    rng = np.random.default_rng(seed)
    back, front = (_texture(rng, 2 * height, 2 * width) for _ in range(2))
    shape = _texture(rng, 2 * height, 2 * width)[..., :1]
    opacity = np.clip((shape - 150) / 10, 0, 1)  # soft-edged islands
    speeds = rng.normal(0, 0.003 * width, (2, 2))
    phases = rng.uniform(0, 2 * np.pi, (2, 2))
    grain = rng.normal(0, 1, (4, height, width, 1)).astype(np.float32)

    def view(texture, layer, i):
        position = i * speeds[layer] + 0.03 * width * np.sin(i / 25 + phases[layer])
        whole = np.floor(position).astype(int)
        top, left = whole % (height, width)
        part = np.float32(position - whole)
        area = texture[top : top + height + 1, left : left + width + 1]
        area = area[:-1] * (1 - part[0]) + area[1:] * part[0]
        return area[:, :-1] * (1 - part[1]) + area[:, 1:] * part[1]

    for i in range(num_frames):
        alpha = view(opacity, 1, i)
        frame = view(back, 0, i) * (1 - alpha) + view(front, 1, i) * alpha
        frame += np.roll(grain[i % 4], rng.integers(height), 0)
        yield np.clip(frame, 0, 255).astype(np.uint8)


def _make_video(path: pathlib.Path, of: VideoSet, seed: int, num_frames: int) -> None:
    temporary = path.with_stem("unfinished")
    with av.open(str(temporary), "w") as container:
        stream = container.add_stream(of.codec, rate=FPS, options=dict(of.options))
        stream.width, stream.height, stream.pix_fmt = of.width, of.height, "yuv420p"
        for pixels in _moving_frames(num_frames, of.height, of.width, seed):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    temporary.replace(path)


def make_set(folder: pathlib.Path, of: VideoSet, secs: float) -> list[str]:
    """Make the videos that do not exist yet; return the paths of all."""
    name = f"{of.codec}_{of.width}x{of.height}_g{dict(of.options).get('g', '')}"
    paths = []
    for i in range(of.num_videos):
        path = folder / f"{name}_{secs:g}s" / f"{i}{of.suffix}"
        paths.append(str(path))
        if not path.exists():
            print(f"making {path}", file=sys.stderr)
            path.parent.mkdir(parents=True, exist_ok=True)
            _make_video(path, of, i, round(secs * FPS))
    return paths
