"""Confusion matrices of patches and pixels, and intersection over union (IoU)."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from vjepa_jax.data.clips.label_images import IGNORED
from vjepa_jax.evals.heads.head_grid import HeadGrid
from vjepa_jax.parallel import sharding


def confusions(
    grid: HeadGrid,
    features: np.ndarray,
    patch_labels: np.ndarray,
    labels: np.ndarray,
    shapes: np.ndarray,
    *,
    batch_size: int,
) -> np.ndarray:
    """Count true and predicted classes of patches and pixels.

    The class of a patch is that of its largest logit. For pixels, the logits are
    upsampled bilinearly to the resolution of the labels.

    Args:
      grid: heads from one token to logits.
      features: float32 [B, h, w, D].
      patch_labels: uint8 [B, h, w]; `IGNORED` is not counted.
      labels: uint8 [B, H, W], label images padded with `IGNORED`.
      shapes: int32 [B, 2], their heights and widths without the padding.
      batch_size: to which the arrays are padded, for a single compilation.

    Returns:
      int64 [heads, 2, classes, classes], of patches and of pixels: counts of true
      classes (rows) and predicted ones (columns).
    """
    missing = -len(features) % batch_size + -batch_size % grid.mesh.size

    def padded(array, value):
        widths = [(0, missing)] + [(0, 0)] * (array.ndim - 1)
        return np.pad(array, widths, constant_values=value)

    arrays = (
        padded(features, 0),
        padded(patch_labels, IGNORED),
        padded(labels, IGNORED),
        padded(shapes, 1),
    )
    placed = jax.device_put(arrays, sharding.batch_sharding(grid.mesh))
    counts = _count(grid.state[0], *placed, head=grid.head, mesh=grid.mesh)
    return np.asarray(counts).astype(np.int64)


@functools.partial(jax.jit, static_argnames=("head", "mesh"))
def _count(
    params: Any,
    features: jax.Array,
    patch_labels: jax.Array,
    labels: jax.Array,
    shapes: jax.Array,
    *,
    head: nn.Module,
    mesh: Mesh,
) -> jax.Array:
    """Compute `confusions` of padded arrays, int32."""

    def of_image(params, features, patch_labels, labels, shape):
        rows = features.reshape(-1, 1, features.shape[-1])
        of_rows: Any = head.apply({"params": params}, rows)
        logits = of_rows.reshape(*features.shape[:2], -1)
        upsampled = _upsample(logits, labels.shape, shape)
        return jnp.stack(
            [_confusion(patch_labels, logits), _confusion(labels, upsampled)]
        )

    def of_shard(params, *images):
        # Images and heads one by one: logits of many classes in full resolution are
        # large.
        def of_head(params):
            return jax.lax.map(lambda image: of_image(params, *image), images).sum(0)

        return jax.lax.psum(jax.lax.map(of_head, params), sharding.AXES)

    over_devices = PartitionSpec(sharding.AXES)
    return jax.shard_map(
        of_shard,
        mesh=mesh,
        in_specs=(PartitionSpec(), *(over_devices,) * 4),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(params, features, patch_labels, labels, shapes)


def _upsample(logits: jax.Array, size: tuple[int, int], shape: jax.Array) -> jax.Array:
    """Resize logits [h, w, C] bilinearly to `shape`, padded to `size`."""
    scale = shape / jnp.asarray(logits.shape[:2], jnp.float32)
    return jax.image.scale_and_translate(
        logits,
        (*size, logits.shape[-1]),
        (0, 1),
        scale,
        jnp.zeros(2),
        "linear",
        antialias=False,
    )


def _confusion(labels: jax.Array, logits: jax.Array) -> jax.Array:
    """Count true and predicted classes: int32 [C, C]."""
    classes = logits.shape[-1]
    truth, predicted = labels.astype(jnp.int32).ravel(), logits.argmax(-1).ravel()
    # The index of ignored labels is out of range, so that they are dropped.
    pair = jnp.where(truth < classes, truth * classes + predicted, classes**2)
    counts = jnp.zeros(classes**2, jnp.int32).at[pair].add(1, mode="drop")
    return counts.reshape(classes, classes)


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """Return the intersection over union of every class, float [C].

    Args:
      confusion: int [C, C], true classes by rows.

    Returns:
      The values; NaN for a class that is neither true nor predicted anywhere.
    """
    both = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - both
    return np.divide(both, union, out=np.full(len(both), np.nan), where=union > 0)


def mean_iou(confusion: np.ndarray) -> float:
    """Return the mean of `class_iou`, without NaN."""
    return float(np.nanmean(class_iou(confusion)))
