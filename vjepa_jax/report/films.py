"""Moving pictures inside a page: the frames of a clip side by side in one image.

The page's script shows such a strip frame by frame. Every browser can decode it, it can
be paused and stepped through, several strips stay synchronous, and without a script the
first frame is visible. Animated images and videos have only some of these properties.
"""

import base64
import dataclasses
import io

import numpy as np
from PIL import Image

from vjepa_jax.evals import drawing

_MAX_SIDE = 128  # larger frames are shrunk to it
_EXACT_SIDE = 64  # frames of at most this side are stored without loss
_MAX_FRAMES = 16


@dataclasses.dataclass(frozen=True)
class Film:
    """A strip of frames.

    Attributes:
      uri: the image, as a data URI.
      num_frames: frames side by side in it.
      is_exact: whether every pixel is as in the clip and may be shown as a square.
      alt: description for readers who cannot see it.
      caption: text below it.
    """

    uri: str
    num_frames: int
    is_exact: bool
    alt: str
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class FilmRow:
    """Films that belong together, and their heading."""

    title: str
    films: list[Film]


def make_film(
    frames: np.ndarray, alt: str, caption: str = "", max_frames: int = _MAX_FRAMES
) -> Film:
    """Make the strip of a clip.

    Args:
      frames: uint8 [T, H, W, 3] or, with an opacity, [T, H, W, 4].
      alt, caption: see `Film`.
      max_frames: of a longer clip this many frames are shown, evenly spaced.
    """
    frames = frames[drawing.evenly_spaced(len(frames), max_frames)]
    height, width = frames.shape[1:3]
    strip = Image.fromarray(np.concatenate([*frames], axis=1))
    scale = _MAX_SIDE / max(height, width)
    if scale < 1:
        height, width = round(height * scale), round(width * scale)
        strip = strip.resize((width * len(frames), height), Image.Resampling.BOX)
    is_exact = max(height, width) <= _EXACT_SIDE
    buffer = io.BytesIO()
    strip.save(buffer, "WEBP", lossless=is_exact, quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Film(f"data:image/webp;base64,{data}", len(frames), is_exact, alt, caption)


def make_row(title: str, rows: drawing.Rows) -> FilmRow:
    """Make a film of each of a clip's rows."""
    films = [make_film(x, f"{title}: {name}", name) for name, x in rows.items()]
    return FilmRow(title, films)
