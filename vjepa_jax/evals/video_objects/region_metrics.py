"""The measures of DAVIS: region similarity J, boundary accuracy F, their statistics.

Definitions: Perazzi et al., "A benchmark dataset and evaluation methodology for video
object segmentation" (CVPR 2016), and Pont-Tuset et al., arXiv 1704.00675.
"""

import math

import numpy as np
from scipy.spatial import cKDTree

_TOLERANCE = 0.008  # distance of matching boundary pixels, per frame diagonal
_RECALL_ABOVE = 0.5
_BINS = 4  # parts of a video; the decay compares the first and the last


def region_similarity(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Return the IoU of two regions, bool [H, W]; 1 if both are empty."""
    union = (truth | predicted).sum()
    return float((truth & predicted).sum() / union) if union else 1.0


def boundary(region: np.ndarray) -> np.ndarray:
    """Return the pixels that differ from the one to the right, below, or both.

    Args:
      region: bool [H, W]; the values at the edge continue outside the frame.

    Returns:
      bool [H, W].
    """
    padded = np.pad(region, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (region != right) | (region != below) | (region != diagonal)


def boundary_accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Return the harmonic mean of precision and recall of boundary pixels.

    A pixel is correct if the other boundary has one within 0.008 of the diagonal,
    rounded up to whole pixels.

    Args:
      truth, predicted: bool [H, W].

    Returns:
      A number from 0 to 1: 1 where neither has a boundary, 0 where only one has.
    """
    radius = math.ceil(_TOLERANCE * math.hypot(*truth.shape))
    true_pixels, pixels = (np.argwhere(boundary(r)) for r in (truth, predicted))
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
    """Return mean, recall and decay of a measure of one object.

    Args:
      values: float [T], of the frames of a video.

    Returns:
      The mean; the recall, which is the share of frames above 0.5; the decay, which is
      the mean of the first quarter of the frames minus that of the last quarter.
      Neighbouring quarters share a frame.
    """
    ends = np.floor(np.linspace(1, len(values), _BINS + 1) + 0.5).astype(int) - 1
    first, last = values[: ends[1] + 1], values[ends[-2] :]
    recall = (values > _RECALL_ABOVE).mean()
    return float(values.mean()), float(recall), float(first.mean() - last.mean())
