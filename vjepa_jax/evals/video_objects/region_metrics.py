"""How DAVIS judges masks: region similarity J, boundary accuracy F, their statistics.

Definitions: Perazzi et al., "A benchmark dataset and evaluation methodology for video
object segmentation" (CVPR 2016), and Pont-Tuset et al., arXiv 1704.00675.
"""

import math

import numpy as np
from scipy.spatial import cKDTree

# Of the frame's diagonal: how far apart boundaries may be.
_TOLERANCE = 0.008
_RECALL_ABOVE = 0.5
_BINS = 4  # parts of a video, of which the decay compares the first and the last


def region_similarity(truth: np.ndarray, found: np.ndarray) -> float:
    """Return the intersection over union of two masks, bool [H, W]; 1 if both empty."""
    union = (truth | found).sum()
    return float((truth & found).sum() / union) if union else 1.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Return the pixels that differ from the one to the right, below, or both.

    Args:
      mask: bool [H, W].

    Returns:
      bool [H, W]. Outside the frame everything is as at its edge.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask != right) | (mask != below) | (mask != diagonal)


def boundary_accuracy(truth: np.ndarray, found: np.ndarray) -> float:
    """Return the harmonic mean of precision and recall of the boundary's pixels.

    A pixel is right where the other boundary has one within 0.008 of the diagonal,
    rounded up to whole pixels.

    Args:
      truth, found: bool [H, W].

    Returns:
      From 0 to 1; 1 where neither has a boundary, 0 where one has none.
    """
    radius = math.ceil(_TOLERANCE * math.hypot(*truth.shape))
    true_pixels, pixels = (np.argwhere(boundary(mask)) for mask in (truth, found))
    if not len(true_pixels) or not len(pixels):
        return float(len(true_pixels) == len(pixels))
    precision = _share_near(pixels, true_pixels, radius)
    recall = _share_near(true_pixels, pixels, radius)
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0


def _share_near(pixels: np.ndarray, others: np.ndarray, radius: int) -> float:
    distance, _ = cKDTree(others).query(pixels)
    return float((distance <= radius).mean())


def statistics(values: np.ndarray) -> tuple[float, float, float]:
    """Summarise a measure of one object over the frames of a video.

    Args:
      values: float [T].

    Returns:
      mean; recall, the share of frames above 0.5; decay, the mean of the first quarter
      less that of the last one. Quarters share the frames where they meet.
    """
    ends = np.floor(np.linspace(1, len(values), _BINS + 1) + 0.5).astype(int) - 1
    first, last = values[: ends[1] + 1], values[ends[-2] :]
    recall = (values > _RECALL_ABOVE).mean()
    return float(values.mean()), float(recall), float(first.mean() - last.mean())
