"""Pictures of a run: curves, masks as they fall on a clip, features as colours."""

import io
import pathlib
from collections.abc import Callable
from typing import Any, BinaryIO

import jax
import matplotlib
import matplotlib.image
import numpy as np
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from vjepa_jax.objective import masking

matplotlib.use("Agg")  # no display on servers

_CURVES = (
    ("train/loss", "loss (L1 to target features)"),
    ("repr/target_std", "target: std over tokens"),
    ("repr/target_effective_rank", "target: effective rank"),
    ("repr/predictor_std_ratio", "std of prediction / target"),
    ("optim/learning_rate", "learning rate"),
    ("optim/ema_momentum", "EMA momentum"),
)


def draw_curves(rows: list[dict[str, float]], path: pathlib.Path) -> None:
    """Draw loss, feature health and schedules over steps from a run's metrics."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 3).flat, _CURVES, strict=True):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points, strict=True), linewidth=1.2)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def per_pixel(marked: np.ndarray, clip_shape: tuple[int, ...]) -> np.ndarray:
    """Repeat a value per token [T', H', W', ...] over its pixels [T, H, W, ...]."""
    for axis in range(3):
        times = clip_shape[axis] // marked.shape[axis]
        marked = np.repeat(marked, times, axis=axis)
    return marked


def _strip(axes, images: np.ndarray, title: str) -> None:
    """Show images [K, H, W, 3] (0..1) side by side with a white gap."""
    gap = np.ones((images.shape[1], 1, 3))
    parts = [part for image in images for part in (image, gap)]
    axes.imshow(np.concatenate(parts[:-1], axis=1), interpolation="nearest")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_axis_off()


def _figure(rows: int, images: int):
    width = 1.35 * images
    figure = Figure(
        figsize=(width, rows * (width / images + 0.3)), layout="constrained"
    )
    return figure, np.atleast_1d(figure.subplots(rows, 1))


def as_array(draw: Callable[..., None], *args: Any, **kwargs: Any) -> np.ndarray:
    """Return what a function of this file draws, uint8 [H, W, 3], instead of a PNG."""
    file = io.BytesIO()
    draw(*args, path=file, **kwargs)
    file.seek(0)
    return np.round(255 * matplotlib.image.imread(file)[..., :3]).astype(np.uint8)


def draw_masks(
    clip: np.ndarray,
    grid: masking.Grid,
    masks: dict[str, masking.MaskSpec],
    path: pathlib.Path | BinaryIO,
    seed: int = 0,
) -> None:
    """Draw a clip, and per mask type its context and its targets (others dimmed).

    Args:
      clip: uint8 [T, H, W, 3].
      grid: its tokens.
      masks: mask types by name.
      path: PNG to write, or an open file.
      seed: of the masks.
    """
    shown = slice(0, None, max(1, clip.shape[0] // 8))
    pixels = clip / 255.0
    figure, axes = _figure(1 + 2 * len(masks), len(range(*shown.indices(len(clip)))))
    _strip(axes[0], pixels[shown], "clip")
    key = jax.random.key(seed)
    for row, (name, spec) in enumerate(masks.items()):
        ctx_idx, tgt_idx = masking.sample(
            jax.random.fold_in(key, row), key, 1, grid, spec
        )
        for part, (label, idx) in enumerate(
            (("context, what the encoder sees", ctx_idx), ("targets", tgt_idx))
        ):
            marked = np.zeros(grid, bool)
            marked.reshape(-1)[np.asarray(idx)[0]] = True
            bright = per_pixel(marked, clip.shape)[..., None]
            _strip(
                axes[1 + 2 * row + part],
                np.where(bright, pixels, 0.9 + 0.1 * pixels)[shown],
                f"mask '{name}': {label} ({idx.shape[1]} of {marked.size} tokens)",
            )
    figure.savefig(path, dpi=110)


def principal_colours(tokens: np.ndarray, grid: masking.Grid) -> np.ndarray:
    """Return features' first three principal components as red, green and blue.

    Args:
      tokens: float [clips, T', H' * W', D]; components and the range of the colours,
        from the 2nd to the 98th percentile, are those of all of them.
      grid: (T', H', W').

    Returns:
      float [clips, T', H', W', 3], 0 to 1.
    """
    flat = tokens.reshape(-1, tokens.shape[-1])
    colours = PCA(3, random_state=0).fit_transform(flat)
    low, high = np.percentile(colours, (2, 98), axis=0)
    colours = np.clip((colours - low) / (high - low + 1e-9), 0, 1)
    return colours.reshape(len(tokens), *grid, 3)


def draw_principal_components(
    clip: np.ndarray,
    grid: masking.Grid,
    tokens: dict[str, np.ndarray],
    path: pathlib.Path | BinaryIO,
) -> None:
    """Draw a clip and its features' first three principal components as RGB.

    Args:
      clip: uint8 [T, H, W, 3], the first of the clips that `tokens` are of.
      grid: its tokens.
      tokens: by name, float [clips, T', H' * W', D]; components are fitted on all.
      path: PNG to write, or an open file.
    """
    step = max(1, clip.shape[0] // 8)
    figure, axes = _figure(1 + len(tokens), len(range(0, clip.shape[0], step)))
    _strip(axes[0], clip[::step] / 255.0, "clip")
    for row, (name, values) in zip(axes[1:], tokens.items(), strict=True):
        _strip(
            row,
            per_pixel(principal_colours(values, grid)[0], clip.shape)[::step],
            f"{name.replace('_', '-')}: principal components 1-3 as red, green, blue",
        )
    figure.savefig(path, dpi=110)
