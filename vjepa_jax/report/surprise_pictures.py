"""The surprise of videos as curves, and as a film with heat maps."""

import dataclasses
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from fractions import Fraction

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vjepa_jax.base.extras import imports_of
from vjepa_jax.data.clips.frame_stream import FrameStream
from vjepa_jax.data.sources.records import Record
from vjepa_jax.data.transforms.transforms import Box
from vjepa_jax.report.figures import thinned
from vjepa_jax.world.render import write_video

_MAX_CURVES = 10
_COLOURS = "inferno"
_HEAT = 0.65  # opacity of the heat map over the grey frame
# Of a film, in pixels.
_HEIGHT, _MAX_WIDTH, _CURVE_HEIGHT, _TEXT_HEIGHT, _GAP = 320, 640, 72, 26, 4

Curve = tuple[np.ndarray, np.ndarray]  # times in seconds, and the surprise then


def draw_curves(curves: Mapping[str, Curve], path: pathlib.Path) -> None:
    """Draw the surprise of videos over time into a PNG file; maxima are marked.

    Args:
      curves: {video: its curve}, the most surprising one first; of more than ten videos
        the first ten are drawn.
      path: file to write.

    Raises:
      UserError: matplotlib is not installed.
    """
    with imports_of("report"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    drawn = list(curves.items())[:_MAX_CURVES]
    for rank, (name, (times, values)) in enumerate(drawn, start=1):
        label = f"{rank}. {name if len(name) <= 40 else name[:37] + '...'}"
        colour = f"C{(rank - 1) % 10}"
        top = values.argmax()
        # The points of a short curve are visible.
        marker = "." if len(times) <= 60 else ""
        x, y = thinned(times, values)
        axes.plot(x, y, color=colour, marker=marker, linewidth=1.3, label=label)
        axes.plot(times[top], values[top], "v", color=colour, markersize=9)
        axes.annotate(
            f"{times[top]:.2f} s",
            (times[top], values[top]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=colour,
        )
    axes.set_xlabel("middle of the predicted frames (s)")
    axes.set_ylabel("surprise (L1)")
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    if len(curves) > len(drawn):
        axes.set_title(
            f"the {len(drawn)} most surprising of {len(curves)} videos", fontsize=10
        )
    with warnings.catch_warnings():  # about names in scripts that the font lacks
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(path, dpi=110)


@dataclasses.dataclass(frozen=True)
class FrameMaps:
    """The errors of windows, looked up by frame.

    Attributes:
      maps: float32 [n, T', H', W'], the errors of each window's predicted tokens.
      stride: frames from the start of one window to the next.
      context_frames: first frames of a window, which are not predicted.
      tubelet_size: frames of a time step.
    """

    maps: np.ndarray
    stride: int
    context_frames: int
    tubelet_size: int

    def at(self, frame: int) -> np.ndarray | None:
        """Return a frame's errors: the mean over the windows that predict it.

        Returns:
          float32 [H', W']; None if no window predicts the frame.
        """
        num_windows, time_steps = self.maps.shape[:2]
        span = time_steps * self.tubelet_size
        since = frame - self.context_frames  # of a window that starts with the video
        first = max(0, -(-(since - span + 1) // self.stride))
        last = min(num_windows - 1, since // self.stride)
        if first > last:
            return None
        windows = np.arange(first, last + 1)
        steps = (since - windows * self.stride) // self.tubelet_size
        return self.maps[windows, steps].mean(0)


def write_film(
    path: pathlib.Path,
    record: Record,
    stream: FrameStream,
    maps: FrameMaps,
    curve: Curve,
    scale: tuple[float, float],
) -> None:
    """Write an .mp4 of a video beside its surprise in space, above that in time.

    Args:
      path: file to write; it appears when it is complete.
      record: the video.
      stream: how its frames were read for `maps`.
      maps: errors by frame.
      curve: the surprise of the windows.
      scale: errors that get the darkest and the brightest colour.

    Raises:
      DecodeError: the video cannot be read.
      UserError: matplotlib is not installed.
    """

    def pictures() -> Iterator[np.ndarray]:
        canvas: _Canvas | None = None
        aspects: list[float] = []

        def crop(height: int, width: int) -> Box | np.ndarray:
            box = stream.crop(height, width)
            aspects.append(float(box[3] / box[2]))
            return box

        larger = dataclasses.replace(stream, resolution=_HEIGHT, crop=crop)
        for number, (time, frame) in enumerate(larger.read(record)):
            if canvas is None:
                canvas = _Canvas(aspects[0], curve, scale)
            yield canvas.draw(time, frame, maps.at(number))

    write_video(path, pictures(), _frame_rate(curve, maps.stride))


def _frame_rate(curve: Curve, stride: int) -> Fraction:
    """Return frames per second by which a film takes as long as its video."""
    times = curve[0]
    if len(times) < 2:
        return Fraction(8)
    rate = stride * (len(times) - 1) / (times[-1] - times[0])
    return Fraction(float(np.clip(rate, 0.5, 120))).limit_denominator(1001)


class _Canvas:
    """Draws the frames of a film."""

    def __init__(self, aspect: float, curve: Curve, scale: tuple[float, float]):
        with imports_of("report"):
            import matplotlib

        self._scale = scale
        steps = np.linspace(0, 1, 256)
        self._colours = np.array(matplotlib.colormaps[_COLOURS](steps))[:, :3] * 255
        width = min(_MAX_WIDTH, max(64, round(_HEIGHT * aspect)))
        self._panel = width + width % 2, _HEIGHT
        self._font = ImageFont.load_default(14)
        self._curve = curve
        self._empty = self._draw_curve()

    def _draw_curve(self) -> Image.Image:
        """Draw what is the same in all frames: the curve of the surprise."""
        width = 2 * self._panel[0] + _GAP
        height = _HEIGHT + _TEXT_HEIGHT + _CURVE_HEIGHT
        canvas = Image.new("RGB", (width, height), "white")
        times, values = thinned(*(np.asarray(v, float) for v in self._curve))
        self._start, self._end = float(times[0]), float(times[-1])
        low, high = float(values.min()), float(values.max())
        across = (height - 8) - (values - low) / (high - low or 1.0) * (
            _CURVE_HEIGHT - 16
        )
        points = [*zip(map(self._column, times), across.tolist(), strict=True)]
        draw = ImageDraw.Draw(canvas)
        if len(points) > 1:
            draw.line(points, "#1f5fa8", 2)
        top = points[int(np.argmax(values))]
        draw.ellipse([top[0] - 4, top[1] - 4, top[0] + 4, top[1] + 4], "#c0392b")
        return canvas

    def _column(self, time: float) -> float:
        """Return the horizontal position of a time in the curve."""
        share = (time - self._start) / (self._end - self._start or 1.0)
        return 6 + min(max(share, 0.0), 1.0) * (2 * self._panel[0] + _GAP - 12)

    def draw(
        self, time: float, frame: np.ndarray, errors: np.ndarray | None
    ) -> np.ndarray:
        """Return a frame of the film: uint8 [H, W, 3].

        Args:
          time: of the frame in seconds.
          frame: uint8 [S, S, 3].
          errors: float [H', W'], or None.
        """
        canvas = self._empty.copy()
        picture = Image.fromarray(frame)
        canvas.paste(picture.resize(self._panel), (0, 0))
        grey = picture.convert("L").convert("RGB")
        text = f"{time:.2f} s   not predicted"
        if errors is not None:
            low, high = self._scale
            shares = np.clip((errors - low) / (high - low or 1.0), 0, 1)
            heat = Image.fromarray(shares.astype(np.float32))
            heat = heat.resize(picture.size, Image.Resampling.BICUBIC)
            index = np.clip(np.asarray(heat) * 255, 0, 255).astype(np.uint8)
            colours = Image.fromarray(self._colours[index].astype(np.uint8))
            grey = Image.blend(grey, colours, _HEAT)
            text = f"{time:.2f} s   surprise {errors.mean():.3f}"
        canvas.paste(grey.resize(self._panel), (self._panel[0] + _GAP, 0))
        draw = ImageDraw.Draw(canvas)
        draw.text((6, _HEIGHT + 5), text, "black", self._font)
        legend = f"dark {self._scale[0]:.2f}, bright {self._scale[1]:.2f}"
        draw.text((canvas.width - 6, _HEIGHT + 5), legend, "black", self._font, "ra")
        if self._start <= time <= self._end:
            column = self._column(time)
            top = _HEIGHT + _TEXT_HEIGHT
            draw.line([column, top, column, canvas.height], "#888888", 1)
        return np.asarray(canvas)
