"""Clips as pictures inside a page: their frames side by side in one image.

Such a strip is shown frame by frame by a few lines of script. It can be paused and
stepped through, several strips keep the same time, no browser lacks the decoder, and
without a script the first frame is there; of an animated image or a video that is true
only in part.
"""

import base64
import dataclasses
import io

import numpy as np
from PIL import Image

# Larger frames are made smaller; those of at most `_EXACT_SIDE` keep every pixel.
_LARGEST_SIDE = 128
_EXACT_SIDE = 64
_MAX_FRAMES = 16


@dataclasses.dataclass(frozen=True)
class Film:
    """A strip and what is said about it.

    Attributes:
      uri: the image, as a data URI.
      num_frames: side by side in it.
      is_exact: every pixel is that of the clip, and may be shown as a square.
      alt: what is to be seen, for those who do not see it.
      caption: below it.
    """

    uri: str
    num_frames: int
    is_exact: bool
    alt: str
    caption: str = ""


def film(
    frames: np.ndarray, alt: str, caption: str = "", max_frames: int = _MAX_FRAMES
) -> Film:
    """Make a strip of a clip.

    Args:
      frames: uint8 [T, H, W, C], RGB or RGBA.
      alt, caption: see `Film`.
      max_frames: of longer clips so many are shown, evenly spaced.
    """
    frames = frames[_evenly(len(frames), max_frames)]
    height, width = frames.shape[1:3]
    strip = Image.fromarray(np.concatenate([*frames], axis=1))
    shrink = _LARGEST_SIDE / max(height, width)
    if shrink < 1:
        height, width = round(height * shrink), round(width * shrink)
        strip = strip.resize((width * len(frames), height), Image.Resampling.BOX)
    is_exact = max(height, width) <= _EXACT_SIDE
    buffer = io.BytesIO()
    strip.save(buffer, "WEBP", lossless=is_exact, quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Film(f"data:image/webp;base64,{data}", len(frames), is_exact, alt, caption)


def _evenly(count: int, most: int) -> np.ndarray:
    """Return at most `most` places out of `count`, evenly spaced, the first among them.

    Strips of one clip at several rates (frames, tubelets) stay together in time.
    """
    if count <= most:
        return np.arange(count)
    return np.arange(most) * count // most
