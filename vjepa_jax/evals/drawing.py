"""Pictures of clips (token masks, features as colours) and curves of a run's metrics.

The pictures are `Rows`, frames with captions. `make_picture` puts rows into one image,
for files and TensorBoard; the report page plays them.
"""

import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vjepa_jax.base.extras import imports_of
from vjepa_jax.objective import masking

# {caption: uint8 [T, H, W, 3], or [T, H, W, 4] with an opacity}. Rows that belong
# together show the same time span; a picture stands for one frame or for one tubelet.
Rows = dict[str, np.ndarray]

_CURVES = (
    ("train/loss", "loss (L1 to target features)"),
    ("repr/target_std", "target: std over tokens"),
    ("repr/target_effective_rank", "target: effective rank"),
    ("repr/predictor_std_ratio", "std of prediction / target"),
    ("optim/learning_rate", "learning rate"),
    ("optim/ema_momentum", "EMA momentum"),
)
_DIMMED = 20  # opacity, of 255, of tokens outside a mask
# Of `make_picture`, in pixels.
_MAX_COLUMNS = 8
_SIDE = 128  # longer side of a frame
_GAP, _MARGIN, _CAPTION_HEIGHT, _FONT_SIZE = 2, 8, 32, 15


def draw_curves(metrics: Sequence[dict[str, float]], path: pathlib.Path) -> None:
    """Draw loss, feature health and schedules over steps into a PNG file.

    Args:
      metrics: a row per log step, from `metrics.read_metrics`.
      path: file to write.

    Raises:
      UserError: matplotlib is not installed.
    """
    with imports_of("report"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 3).flat, _CURVES, strict=True):
        points = [(row["step"], row[key]) for row in metrics if key in row]
        axes.plot(*zip(*points, strict=True), linewidth=1.2)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def mask_rows(
    clip: np.ndarray,
    grid: masking.Grid,
    masks: Mapping[str, masking.MaskSpec],
    key: jax.Array,
) -> Rows:
    """Sample every mask type, and show a clip's context tokens and target tokens.

    Args:
      clip: uint8 [T, H, W, 3].
      grid: (T', H', W') of its tokens.
      masks: mask types by name.
      key: of the random masks.

    Returns:
      The clip, then two rows [T, H, W, 4] per mask type, in which tokens outside the
      context or outside the targets are nearly transparent.
    """
    rows = {"clip": clip}
    for number, (name, spec) in enumerate(masks.items()):
        sampled = masking.sample(jax.random.fold_in(key, number), key, 1, grid, spec)
        for part, idx in zip(("context", "targets"), sampled, strict=True):
            is_in = np.zeros(grid, bool)
            is_in.reshape(-1)[np.asarray(idx)[0]] = True
            for axis in range(3):
                is_in = is_in.repeat(clip.shape[axis] // grid[axis], axis)
            opacity = np.where(is_in, 255, _DIMMED).astype(np.uint8)
            caption = f"{name}: {part} {idx.shape[1] / np.prod(grid):.0%}"
            rows[caption] = np.concatenate([clip, opacity[..., None]], axis=-1)
    return rows


def principal_colours(tokens: np.ndarray, grid: masking.Grid) -> np.ndarray:
    """Return features' first three principal components as red, green and blue.

    Args:
      tokens: float [N, T', H' * W', D]; the components and the range of the colours,
        from the 2nd to the 98th percentile, are those of all N clips.
      grid: (T', H', W').

    Returns:
      uint8 [N, T', H', W', 3].

    Raises:
      UserError: scikit-learn is not installed.
    """
    with imports_of("report"):
        from sklearn.decomposition import PCA

    components = PCA(3, random_state=0).fit_transform(
        tokens.reshape(-1, tokens.shape[-1])
    )
    low, high = np.percentile(components, (2, 98), axis=0)
    colours = np.clip((components - low) / (high - low + 1e-9), 0, 1)
    return np.round(255 * colours).astype(np.uint8).reshape(len(tokens), *grid, 3)


def make_picture(rows: Rows) -> Image.Image:
    """Draw rows into one RGB image, up to 8 frames of each side by side."""
    columns = min([_MAX_COLUMNS, *map(len, rows.values())])
    height, width = next(iter(rows.values())).shape[1:3]
    scale = _SIDE / max(height, width)
    width, height = round(scale * width), round(scale * height)
    picture = Image.new(
        "RGB",
        (
            2 * _MARGIN + columns * (width + _GAP) - _GAP,
            2 * _MARGIN + len(rows) * (_CAPTION_HEIGHT + height),
        ),
        "white",
    )
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT_SIZE)
    top = _MARGIN
    for caption, frames in rows.items():
        top += _CAPTION_HEIGHT
        draw.text((_MARGIN, top - 4), caption, "black", font, anchor="ld")
        for column, frame in enumerate(frames[evenly_spaced(len(frames), columns)]):
            image = Image.fromarray(frame)
            is_larger = image.height > height  # then pixels are averaged
            resampling = Image.Resampling.BOX if is_larger else Image.Resampling.NEAREST
            image = image.resize((width, height), resampling)
            left = _MARGIN + column * (width + _GAP)
            picture.paste(image, (left, top), image if image.mode == "RGBA" else None)
        top += height
    return picture


def evenly_spaced(length: int, count: int) -> np.ndarray:
    """Return `count` indices below `length` (all, if fewer), evenly spaced from 0.

    Frames and tubelets of one clip chosen by this rule show the same times.
    """
    count = min(length, count)
    return np.arange(count) * length // max(count, 1)
