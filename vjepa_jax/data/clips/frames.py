"""Write decoded frames into a clip: upright, cropped and resized, as RGB."""

from collections.abc import Callable, Iterable
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from vjepa_jax.data.clips.orientation import Orientation
from vjepa_jax.data.transforms.transforms import Box

# Takes the height and the width of the displayed frame. Returns a box inside it for all
# frames of a clip, or one box for each frame, int [T, 4].
Crop = Callable[[int, int], Box | np.ndarray]

# Colours are mostly stored at half the resolution and are scaled directly to the size
# of the output. Without these flags the scaler first halves them again and rounds down.
_SCALER_FLAGS = "bilinear+accurate_rnd+full_chroma_int+full_chroma_inp"


class ClipWriter:
    """Writes the frames of one clip.

    Attributes:
      frames: uint8 [T, S, S, 3], RGB, the output.
    """

    def __init__(self, frames: np.ndarray, crop: Crop, resize: str):
        """Prepare to write to `frames`; see `ClipReader` for the arguments."""
        self.frames = frames
        self._crop = crop
        self._resize = resize

    def start(self, frame: av.VideoFrame) -> None:
        """Choose the boxes and the layout by the first decoded frame of the clips."""
        self._format = frame.format.name
        self._shown = Orientation.of(frame).swap(frame.height, frame.width)
        self._to_layout = VideoReformatter()
        self._to_rgb = VideoReformatter()
        self._scalers: dict[tuple[int, Box], av.filter.Graph] = {}
        boxes = self._crop(*self._shown)
        boxes = np.broadcast_to(boxes, (len(self.frames), 4)).tolist()
        self._boxes = [tuple(box) for box in boxes]

    def put(self, frame: av.VideoFrame, slots: Iterable[int]) -> None:
        """Write a decoded frame as the clip's frames with the indices `slots`."""
        orientation = Orientation.of(frame)
        # All may change within a stream; what the first frame shows keeps its size.
        height, width = orientation.swap(*self._shown)
        layout = height, width, self._format
        if (frame.height, frame.width, frame.format.name) != layout:
            frame = self._to_layout.reformat(
                frame, width=width, height=height, format=self._format, threads=1
            )
        written: dict[Box, int] = {}
        for slot in slots:
            box, out = self._boxes[slot], self.frames[slot]
            if box in written:
                out[:] = self.frames[written[box]]
                continue
            written[box] = slot
            if box[2:] == out.shape[:2] or self._resize == "official":
                self._convert_then_crop(frame, orientation, box, out)
            else:
                self._crop_then_scale(frame, orientation, box, out)

    def _convert_then_crop(
        self, frame: av.VideoFrame, orientation: Orientation, box: Box, out: np.ndarray
    ) -> None:
        """Crop the RGB frame, whose pixels are those of a plain decode."""
        # One thread: a pool of them costs more than the conversion of a small frame.
        frame = self._to_rgb.reformat(frame, format="rgb24", threads=1)
        pixels = view_plane(frame.planes[0], frame.height, 3 * frame.width)
        pixels = orientation.apply(pixels.reshape(frame.height, frame.width, 3))
        top, left, height, width = box
        pixels = pixels[top : top + height, left : left + width]
        if pixels.shape != out.shape:
            pixels = resize_bilinear(pixels, len(out))
        out[:] = pixels

    def _crop_then_scale(
        self, frame: av.VideoFrame, orientation: Orientation, box: Box, out: np.ndarray
    ) -> None:
        """Scale the stored pixels of the box only, with antialiasing."""
        box = orientation.stored_box(box, self._shown)
        key = frame.width, box
        if key not in self._scalers:
            self._scalers[key] = _make_scaler(frame, box, len(out))
        self._scalers[key].vpush(frame)
        frame = self._scalers[key].vpull()
        for channel, plane in zip((1, 2, 0), frame.planes, strict=True):  # G, B, R
            pixels = view_plane(plane, frame.height, frame.width)
            out[..., channel] = orientation.apply(pixels)


def _make_scaler(frame: av.VideoFrame, box: Box, size: int) -> av.filter.Graph:
    """Make the filters that crop stored pixels and scale them to planes of RGB.

    If colours are stored at half the resolution, the first colours of a crop at an odd
    position lie half outside of it, which is passed to the scaler. At an odd width or
    height the scaler stretches the colours over one pixel more; a shift by half a pixel
    spreads this error over both edges.
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
        # The crop filter counts bytes and would cut within a colour.
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
    """Return where the first colour of a crop lies, in 1/256 pixels.

    `base` is its position in a whole frame with one colour per two pixels: at the left
    pixel, and between the upper and the lower one, as in H.264 and similar codecs.
    """
    if step == 1:
        return 0
    return max(-512, base - 256 * (start % step) + 128 * (length % 2))


def view_plane(
    plane: av.video.plane.VideoPlane, height: int, row_bytes: int
) -> np.ndarray:
    """View a plane, whose rows may be padded, as uint8 [height, row_bytes]."""
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
    return rows[:height, :row_bytes]


def resize_bilinear(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize by bilinear interpolation without antialiasing.

    As in the official code (`src/datasets/utils/video/functional.py`), this is
    PyTorch's `interpolate(mode="bilinear", align_corners=False)`, rounded to integers.

    Args:
      pixels: uint8 [H, W, C].
      size: side of the output in pixels, S.

    Returns:
      uint8 [S, S, C].
    """
    values = pixels.astype(np.float32)
    for axis in (0, 1):
        num = values.shape[axis]
        position = np.maximum((np.arange(size) + 0.5) * (num / size) - 0.5, 0)
        low = np.minimum(position.astype(np.int64), num - 1)
        high = np.minimum(low + 1, num - 1)
        share = (position - low).astype(np.float32)
        share = share.reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        values = values.take(low, axis) * (1 - share) + values.take(high, axis) * share
    return np.rint(values).astype(np.uint8)


def as_frame(pixels: np.ndarray) -> av.VideoFrame:
    """Wrap an RGB frame in memory, uint8 [H, W, 3]."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    frame.pts, frame.time_base = 0, Fraction(1)
    return frame
