"""Semantic segmentation by frozen features: a linear probe of patches.

A grid of linear heads is trained on standardised features of single patches; the head
is chosen on held-out images. The loss is the cross-entropy of all pixels, each with the
logits of its patch; in tests the logits are upsampled to the resolution of the labels.
See docs/segmentation.md.
"""

import collections
import concurrent.futures
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import optax
from sklearn.preprocessing import StandardScaler

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.data.clips import label_images
from vjepa_jax.data.sources.records import evenly_spread
from vjepa_jax.evals import settings
from vjepa_jax.evals.frozen import FrozenModel, beside_untrained
from vjepa_jax.evals.heads.head_grid import (
    HeadGrid,
    epochs_order,
    make_training,
    name_of,
)
from vjepa_jax.evals.segmentation.confusion import class_iou, confusions, mean_iou
from vjepa_jax.evals.segmentation.images import (
    ImageReader,
    LabelledImage,
    Sample,
    open_images,
)
from vjepa_jax.evals.tokens.frame_features import FrameEncoder
from vjepa_jax.models.heads import LinearClassifier

_BATCHES_AHEAD = 2
_STANDARDISED_BY = 256  # images from which mean and standard deviation are computed
_SHAPE_UNIT = 128  # label images are padded to multiples, for few compilations


def evaluate(model: FrozenModel, config: ConfigDict) -> dict[str, dict[str, Any]]:
    """Train linear heads on the patches of images and test them.

    Args:
      model: of the features.
      config: from `settings.segmentation`.

    Returns:
      {measure: {"pretrained": value}}, with `config.random_init` also `random_init`:

      `miou`: mean over classes of the intersection over union of their pixels in the
      test images, in full resolution, of the head that was best on the held-out images;
      over classes that are true or predicted anywhere.
      `patch_miou`: the same of patches, each with its most frequent class.
      `pixel_accuracy`: share of correctly classified pixels.
      `held_out_miou`: `miou` of the chosen head on the held-out images.
      `best_on_test_miou`: of the head that is best on the test images; biased upwards.
      `chosen_head`, counted from 1, each head's `miou`, and the IoU of every class with
      the chosen head.

    Raises:
      UserError: config, data and model do not fit.
    """
    settings.validate(config)
    if not 2 <= config.num_classes < label_images.IGNORED:
        raise UserError(
            f"config.num_classes={config.num_classes} is out of range: give 2 to "
            f"{label_images.IGNORED - 1}"
        )
    images = open_images(model, config)
    return beside_untrained(
        lambda network: _evaluate(network, config, *images), model, config
    )


def _evaluate(
    model: FrozenModel,
    config: ConfigDict,
    fit: list[LabelledImage],
    held_out: list[LabelledImage],
    test: list[LabelledImage],
) -> dict[str, Any]:
    data = config.data
    encoder = FrameEncoder(
        model,
        data.num_frames or model.video_shape[0],
        min(config.clips_per_call, config.batch_size, config.test_batch_size),
        tuple(config.out_layers),
    )
    reader = ImageReader(
        encoder,
        tuple(data.size) or model.video_shape[1:3],
        config.num_classes,
        data.first_class,
        tuple(data.crop_scale),
        data.flip_probability,
    )
    encoder.grid(reader.size)
    with concurrent.futures.ThreadPoolExecutor(max(1, data.num_workers)) as pool:
        probe = Probe(reader, config, pool)
        probe.train(fit)
        of_held_out = [mean_iou(part[1]) for part in probe.confusions(held_out)]
        chosen = int(np.argmax(of_held_out))
        confusions = probe.confusions(test)
    of_test = [mean_iou(pixels) for _, pixels in confusions]
    patches, pixels = confusions[chosen]
    results = {
        "miou": of_test[chosen],
        "patch_miou": mean_iou(patches),
        "pixel_accuracy": float(np.trace(pixels) / pixels.sum()),
        "held_out_miou": of_held_out[chosen],
        "best_on_test_miou": max(of_test),
        "chosen_head": chosen + 1,
        "images_fitted": len(fit),
        "images_held_out": len(held_out),
        "images_tested": len(test),
    }
    for number, head in enumerate(probe.grid.heads):
        prefix = f"head {number + 1}: {name_of(head)}"
        results[f"{prefix}, held-out miou"] = of_held_out[number]
        results[f"{prefix}, test miou"] = of_test[number]
    for number, value in enumerate(class_iou(pixels)):
        if np.isfinite(value):
            results[f"class {number}, iou"] = float(value)
    return results


class Probe:
    """Linear heads on the patches of images.

    Attributes:
      grid: the heads, once they are trained.
    """

    grid: HeadGrid

    def __init__(
        self,
        reader: ImageReader,
        config: ConfigDict,
        pool: concurrent.futures.Executor,
    ):
        """Store the reader of images, the evaluation's config, and the reading pool."""
        self._reader, self._config, self._pool = reader, config, pool
        self._scaler = StandardScaler()

    def train(self, images: Sequence[LabelledImage]) -> None:
        """Train all heads of the config.

        Raises:
          UserError: all pixels are of one class.
        """
        config = self._config
        classes = self._standardise(images)
        self._require_classes(images, classes)
        steps_per_epoch = len(images) // config.batch_size
        training = make_training(config, steps_per_epoch, optax.softmax_cross_entropy)
        self.grid = HeadGrid(
            LinearClassifier(config.num_classes),
            training,
            (1, len(self._scaler.mean_)),
            seed=config.seed,
            mesh=self._reader.encoder.model.mesh,
        )
        self.grid.fit(self._batches(images, training.total_steps), steps_per_epoch)

    def _batches(
        self, images: Sequence[LabelledImage], steps: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield patches of drawn images, as arguments of `HeadGrid.update`."""
        config = self._config
        order = epochs_order(len(images), config.batch_size, steps, config.seed)
        drawn = ((images[i], (config.seed, n)) for n, i in enumerate(order))
        for batch in self._read(drawn, config.batch_size):
            rows = self._encode(batch)
            rows = rows.reshape(-1, 1, rows.shape[-1])
            shares = np.stack([sample.shares for sample in batch])
            shares = shares.reshape(len(rows), -1)
            weights = shares.sum(1)
            shares /= np.maximum(weights, 1e-9)[:, None]
            yield rows, shares, weights

    def confusions(self, images: Sequence[LabelledImage]) -> np.ndarray:
        """Add up the confusion matrices of images, see `confusion.confusions`.

        Returns:
          int64 [heads, 2, classes, classes], of patches and of pixels.
        """
        total: Any = 0
        size = self._config.test_batch_size
        for batch in self._read(((image, None) for image in images), size):
            features = self._encode(batch)
            shares = np.stack([sample.shares for sample in batch])
            frequent = shares.argmax(-1).astype(np.uint8)
            frequent[shares.sum(-1) == 0] = label_images.IGNORED
            labels, shapes = _stack_padded([sample.labels for sample in batch])
            total = total + confusions(
                self.grid, features, frequent, labels, shapes, batch_size=size
            )
        if not total[:, 1].any():
            raise UserError(
                f"no pixel of {len(images)} images to evaluate on has a class, such as "
                f"in {images[0].labels}"
            )
        return total

    def _read(
        self,
        items: Iterator[tuple[LabelledImage, tuple[int, int] | None]],
        batch_size: int,
    ) -> Iterator[list[Sample]]:
        """Yield batches in order, some of them prefetched; the last may be smaller."""
        waiting: collections.deque[list[concurrent.futures.Future]]
        waiting = collections.deque()
        while part := list(itertools.islice(items, batch_size)):
            waiting.append([self._pool.submit(self._reader, *item) for item in part])
            if len(waiting) > _BATCHES_AHEAD:
                yield [sample.result() for sample in waiting.popleft()]
        for batch in waiting:
            yield [sample.result() for sample in batch]

    def _encode(self, batch: Sequence[Sample]) -> np.ndarray:
        """Return standardised features, float32 [B, h, w, D]."""
        features = self._features(batch)
        rows = features.reshape(-1, features.shape[-1])
        return self._scaler.transform(rows).reshape(features.shape)

    def _features(self, batch: Sequence[Sample]) -> np.ndarray:
        return self._reader.encoder(np.stack([sample.window for sample in batch]))

    def _standardise(self, images: Sequence[LabelledImage]) -> set[int]:
        """Compute mean and deviation of channels from some images; return classes."""
        classes: set[int] = set()
        chosen = evenly_spread(len(images), _STANDARDISED_BY)
        items = ((images[i], None) for i in chosen)
        for batch in self._read(items, self._config.test_batch_size):
            features = self._features(batch)
            self._scaler.partial_fit(features.reshape(-1, features.shape[-1]))
            for sample in batch:
                classes |= _classes_in(sample.labels)
        return classes

    def _require_classes(
        self, images: Sequence[LabelledImage], found: set[int]
    ) -> None:
        """Raise UserError unless two classes are found, or others are in the images."""
        for image in images:
            if len(found) > 1:
                return
            found |= _classes_in(self._reader.read_classes(image.labels))
        if len(found) < 2:
            raise UserError(
                f"the label images of {len(images)} images, such as "
                f"{images[0].labels}, hold "
                + (f"one class, {min(found)}" if found else "no class")
                + f": {label_images.IGNORED} and numbers below config.data.first_class="
                f"{self._config.data.first_class} are not counted"
            )


def _classes_in(labels: np.ndarray) -> set[int]:
    counts = np.bincount(labels.ravel(), minlength=label_images.IGNORED + 1)
    return set(np.flatnonzero(counts[: label_images.IGNORED]).tolist())


def _stack_padded(labels: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return label images padded to one size [B, H, W], and their sizes [B, 2]."""
    shapes = np.array([image.shape for image in labels], np.int32)
    size = -(-shapes.max(0) // _SHAPE_UNIT) * _SHAPE_UNIT
    stacked = np.full((len(labels), *size), label_images.IGNORED, np.uint8)
    for padded, image in zip(stacked, labels, strict=True):
        padded[: image.shape[0], : image.shape[1]] = image
    return stacked, shapes
