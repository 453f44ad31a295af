"""Decoded frames are turned, cropped, resized and collected as RGB."""

import functools
from collections.abc import Callable, Iterable
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import VideoReformatter

Box = tuple[int, int, int, int]
# From the height and width of the displayed frame to one box inside it for all frames
# of a clip, or to one for each: int [T, 4].
Crop = Callable[[int, int], Box | np.ndarray]

RESIZES = ("antialias", "official")

# Colours, mostly stored at half the resolution, are brought straight to the size of the
# output. Without these flags the scaler halves them once more and rounds darker.
_SCALER_FLAGS = "bilinear+accurate_rnd+full_chroma_int+full_chroma_inp"


class ClipWriter:
    """Collects the frames of one clip.

    Attributes:
      frames: uint8 `[T, S, S, 3]`, RGB, where they are written.
    """

    def __init__(self, frames: np.ndarray, crop: Crop, resize: str):
        """Takes where to write, and the arguments of `decode.read_clips`."""
        self.frames = frames
        self._crop = crop
        self._resize = resize

    def put(self, frame: av.VideoFrame, slots: Iterable[int]) -> None:
        """Writes a decoded frame into the given places of the clip."""
        width, height, pixel_format = self._layout
        if (frame.width, frame.height, frame.format.name) != self._layout:
            # A stream that changes its frames keeps to the first.
            frame = self._to_layout.reformat(
                frame, width=width, height=height, format=pixel_format, threads=1
            )
        done: dict[Box, int] = {}
        for slot in slots:
            box = self._boxes[slot]
            if box in done:
                self.frames[slot] = self.frames[done[box]]
                continue
            if box not in self._converters:
                self._converters[box] = self._make_converter(frame, box)
            self._converters[box](frame, self.frames[slot])
            done[box] = slot

    def start(self, frame: av.VideoFrame) -> None:
        """Settles boxes and layout by the first frame of any clip."""
        self._layout = frame.width, frame.height, frame.format.name
        self._to_layout = VideoReformatter()
        self._turns = round(frame.rotation / 90) % 4
        shape = frame.height, frame.width
        boxes = self._crop(*shape[:: -1 if self._turns % 2 else 1])
        boxes = np.broadcast_to(boxes, (len(self.frames), 4)).tolist()
        self._boxes = [_stored_box(tuple(b), *shape, self._turns) for b in boxes]
        self._to_rgb = VideoReformatter()
        self._converters: dict[Box, Callable[[av.VideoFrame, np.ndarray], None]] = {}

    def _make_converter(self, frame: av.VideoFrame, box: Box):
        size = self.frames.shape[1]
        if box[2:] == (size, size) or self._resize == "official":
            return functools.partial(self._convert_whole, box)
        return functools.partial(
            self._convert_cropped, _crop_and_scale(frame, box, size)
        )

    def _convert_whole(self, box: Box, frame: av.VideoFrame, out: np.ndarray) -> None:
        """Cuts the crop out of the RGB frame, pixels being those of a plain decode."""
        # One thread: a pool of them costs more than the conversion of a small frame.
        frame = self._to_rgb.reformat(frame, format="rgb24", threads=1)
        pixels = _plane(frame.planes[0], frame.height, 3 * frame.width)
        pixels = pixels.reshape(frame.height, frame.width, 3)
        top, left, height, width = box
        pixels = np.rot90(pixels[top : top + height, left : left + width], self._turns)
        if pixels.shape != out.shape:
            pixels = resize_bilinear(pixels, len(out))
        out[:] = pixels

    def _convert_cropped(
        self, graph: av.filter.Graph, frame: av.VideoFrame, out: np.ndarray
    ) -> None:
        graph.vpush(frame)
        frame = graph.vpull()
        for channel, plane in zip((1, 2, 0), frame.planes, strict=True):  # G, B, R
            pixels = _plane(plane, frame.height, frame.width)
            out[..., channel] = np.rot90(pixels, self._turns)


def _stored_box(box: Box, height: int, width: int, turns: int) -> Box:
    """Where a box of the frame as displayed, turned `turns` times, lies as stored."""
    for turn in range(turns, 0, -1):
        # Undoes one turn to the left: rows were columns, counted from the right.
        top, left, box_height, box_width = box
        across = width if turn % 2 else height
        box = left, across - top - box_height, box_width, box_height
    return box


def _crop_and_scale(frame: av.VideoFrame, box: Box, size: int) -> av.filter.Graph:
    """Makes the scaler work on the crop alone, from the stored pixels to planes of RGB.

    Where colours are stored at half the resolution, a crop at an odd place has its
    first colours half outside; the scaler is told so. At an odd width or height it
    stretches them over one pixel more; half a pixel's shift spreads this error over
    both edges.
    """
    top, left, height, width = box
    layout = frame.format
    steps = [
        max(1, round(1024 / chroma(1024)))
        for chroma in (layout.chroma_width, layout.chroma_height)
    ]
    graph = av.filter.Graph()
    graph.threads = 1
    nodes = [
        graph.add(
            "buffer",
            f"video_size={frame.width}x{frame.height}:pix_fmt={layout.name}:"
            f"time_base=1/1:colorspace={int(frame.colorspace)}:"
            f"range={int(frame.color_range)}",
        )
    ]
    if max(steps) > 1 and (
        len(frame.planes) < 3 or (left % steps[0] and layout.components[0].bits > 8)
    ):
        # The crop filter counts bytes and would cut colours in the middle.
        nodes += [graph.add("scale", f"flags={_SCALER_FLAGS}"), _as_planes(graph)]
        steps = [1, 1]
    nodes += [
        graph.add("crop", f"{width}:{height}:{left}:{top}:exact=1"),
        graph.add(
            "scale",
            f"{size}:{size}:flags={_SCALER_FLAGS}:"
            f"in_h_chr_pos={_chroma_position(0, steps[0], left, width)}:"
            f"in_v_chr_pos={_chroma_position(128, steps[1], top, height)}",
        ),
        _as_planes(graph),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*nodes).configure()
    return graph


def _as_planes(graph: av.filter.Graph) -> av.filter.context.FilterContext:
    return graph.add("format", "gbrp")


def _chroma_position(base: int, step: int, start: int, length: int) -> int:
    """Where the first colour of a crop lies, in 1/256 pixels.

    `base` is its place in a whole frame with a colour for every two pixels: at the left
    one, and between the upper and the lower, as H.264 and its kin have it.
    """
    if step == 1:
        return 0
    return max(-512, base - 256 * (start % step) + 128 * (length % 2))


def _plane(plane: av.video.plane.VideoPlane, height: int, row_bytes: int) -> np.ndarray:
    """Views a plane as `[height, row_bytes]`; rows may be padded."""
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return rows[:height, :row_bytes]


def resize_bilinear(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resizes by bilinear interpolation without antialiasing.

    What the official code does (`src/datasets/utils/video/functional.py`), PyTorch's
    `interpolate(mode="bilinear", align_corners=False)`, but rounded to whole numbers.

    Args:
      pixels: uint8 `[H, W, C]`.
      size: side of the output in pixels, S.

    Returns:
      uint8 `[S, S, C]`.
    """
    values = pixels.astype(np.float32)
    for axis in (0, 1):
        num = values.shape[axis]
        place = np.maximum((np.arange(size) + 0.5) * (num / size) - 0.5, 0)
        low = np.minimum(place.astype(np.int64), num - 1)
        high = np.minimum(low + 1, num - 1)
        share = (place - low).astype(np.float32)
        share = share.reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        values = values.take(low, axis) * (1 - share) + values.take(high, axis) * share
    return np.rint(values).astype(np.uint8)


def as_frame(pixels: np.ndarray) -> av.VideoFrame:
    """Wraps a frame that is in memory already: uint8 `[H, W, 3]`, RGB."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    frame.pts, frame.time_base = 0, Fraction(1)
    return frame
