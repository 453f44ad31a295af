"""How often each class is taken for each other one, and the intersection over union."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

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
    """Count what heads find in images, by patches and by pixels.

    A patch has the class of its largest logit. Logits are upsampled bilinearly to the
    mask's own resolution, and a pixel has the class of its largest one.

    Args:
      grid: heads from one token to logits.
      features: float32 [B, h, w, D].
      patch_labels: uint8 [B, h, w]; `IGNORED` counts nowhere.
      labels: uint8 [B, H, W], masks filled up with `IGNORED`.
      shapes: int32 [B, 2], their heights and widths without the filling.
      batch_size: to which the arrays are filled up, for one compilation.

    Returns:
      int64 [heads, 2, classes, classes], of patches and of pixels: how often a true
      class (row) is taken for one (column).
    """
    missing = -len(features) % batch_size + -batch_size % grid.mesh.size

    def filled(array, value):
        widths = [(0, missing)] + [(0, 0)] * (array.ndim - 1)
        return np.pad(array, widths, constant_values=value)

    arrays = (
        filled(features, 0),
        filled(patch_labels, IGNORED),
        filled(labels, IGNORED),
        filled(shapes, 1),
    )
    placed = jax.device_put(arrays, sharding.batch_sharding(grid.mesh))
    counts = _count(grid.state[0], *placed, head=grid.head, mesh=grid.mesh)
    return np.asarray(counts).astype(np.int64)


@functools.partial(jax.jit, static_argnames=("head", "mesh"))
def _count(params, features, patch_labels, labels, shapes, *, head, mesh):
    def of_image(params, features, patch_labels, labels, shape):
        rows = features.reshape(-1, 1, features.shape[-1])
        logits = head.apply({"params": params}, rows)
        logits = logits.reshape(*features.shape[:2], -1)
        upsampled = _upsample(logits, labels.shape, shape)
        return jnp.stack(
            [_confusion(patch_labels, logits), _confusion(labels, upsampled)]
        )

    def of_share(params, *images):
        # One image and head after the other: logits of many classes in full resolution
        # are large.
        def of_head(params):
            return jax.lax.map(lambda image: of_image(params, *image), images).sum(0)

        return jax.lax.psum(jax.lax.map(of_head, params), sharding.AXES)

    over_devices = PartitionSpec(sharding.AXES)
    return jax.shard_map(
        of_share,
        mesh=mesh,
        in_specs=(PartitionSpec(), *(over_devices,) * 4),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(params, features, patch_labels, labels, shapes)


def _upsample(logits: jax.Array, size: tuple[int, int], shape: jax.Array) -> jax.Array:
    """Resize logits [h, w, C] to `shape` bilinearly, in the corner of `size`."""
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
    """Count pairs of true and found classes: int32 [C, C]."""
    classes = logits.shape[-1]
    truth, found = labels.astype(jnp.int32).ravel(), logits.argmax(-1).ravel()
    # What is ignored falls outside and is dropped.
    pair = jnp.where(truth < classes, truth * classes + found, classes**2)
    counts = jnp.zeros(classes**2, jnp.int32).at[pair].add(1, mode="drop")
    return counts.reshape(classes, classes)


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """Return the intersection over union of every class, float [C].

    Args:
      confusion: int [C, C], true classes by rows.

    Returns:
      NaN for a class that is neither true nor found anywhere.
    """
    both = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - both
    return np.divide(both, union, out=np.full(len(both), np.nan), where=union > 0)


def mean_iou(confusion: np.ndarray) -> float:
    """Return the mean of `class_iou` over the classes that have one."""
    return float(np.nanmean(class_iou(confusion)))
