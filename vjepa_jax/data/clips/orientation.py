"""How a stored frame is turned and mirrored to be shown.

Containers and EXIF data state it, and FFmpeg's decoders pass it on as a matrix of every
frame. `ffmpeg` applies it, and so does Pillow's `ImageOps.exif_transpose`.
"""

import dataclasses
from collections.abc import Iterable
from typing import cast

import av
import numpy as np
from av.sidedata.sidedata import SideData, Type

from vjepa_jax.data.transforms.transforms import Box

# PyAV 18 reads no side data of a frame that has a kind it cannot name, such as EXIF.
_UNNAMED = sorted(set(range(32)) - {kind.value for kind in Type})


@dataclasses.dataclass(frozen=True)
class Orientation:
    """One of the eight ways to show a stored frame.

    Attributes:
      is_transposed: rows and columns are exchanged, before anything is mirrored.
      flips_rows: the result is turned upside down.
      flips_columns: its left and right are exchanged.
    """

    is_transposed: bool = False
    flips_rows: bool = False
    flips_columns: bool = False

    @classmethod
    def of(cls, frame: av.VideoFrame) -> "Orientation":
        """Return the orientation of a decoded frame; other angles are rounded."""
        matrix = _display_matrix(frame)
        if matrix is None:
            return cls()
        # Columns and rows where a pixel is shown, by those where it is stored:
        # x' = a x + c y and y' = b x + d y.
        (a, b), (c, d) = matrix[:2, :2].tolist()
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(is_transposed=True, flips_rows=b < 0, flips_columns=c < 0)
        return cls(flips_rows=d < 0, flips_columns=a < 0)

    def swap(self, height: int, width: int) -> tuple[int, int]:
        """Return the shown size for a stored one, and the stored one for a shown."""
        return (width, height) if self.is_transposed else (height, width)

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Return a view of stored pixels [H, W, ...] as they are shown."""
        if self.is_transposed:
            pixels = pixels.swapaxes(0, 1)
        rows, columns = (
            slice(None, None, -1 if flips else 1)
            for flips in (self.flips_rows, self.flips_columns)
        )
        return pixels[rows, columns]

    def stored_box(self, box: Box, shown: tuple[int, int]) -> Box:
        """Return where a box of the shown frame lies in the stored one.

        Args:
          box: (top, left, height, width).
          shown: (height, width) of the shown frame.
        """
        top, left, height, width = box
        if self.flips_rows:
            top = shown[0] - top - height
        if self.flips_columns:
            left = shown[1] - left - width
        return (
            (left, top, width, height) if self.is_transposed else (top, left, *box[2:])
        )


def _display_matrix(frame: av.VideoFrame) -> np.ndarray | None:
    """Return the matrix that a frame is shown with, int32 [3, 3]; None without one."""
    try:
        side_data = frame.side_data
    except ValueError:
        side_data = _with_named_data(frame).side_data
    for data in cast("Iterable[SideData]", side_data):  # PyAV's hint is wrong
        if data.type is Type.DISPLAYMATRIX:  # `ffmpeg` takes the first one, too
            return np.frombuffer(bytes(data), np.int32).reshape(3, 3)
    return None


def _with_named_data(frame: av.VideoFrame) -> av.VideoFrame:
    """Return the frame without the side data that PyAV cannot name."""
    graph = av.filter.Graph()
    graph.threads = 1
    nodes = [
        graph.add(
            "buffer",
            f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:"
            "time_base=1/1",
        ),
        *(graph.add("sidedata", f"delete:type={kind}") for kind in _UNNAMED),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*nodes).configure()
    graph.vpush(frame)
    return graph.vpull()
