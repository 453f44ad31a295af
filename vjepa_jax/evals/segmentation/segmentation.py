"""Semantic segmentation by frozen features: a linear probe of every patch.

A grid of linear heads is trained on standardised features of single patches, whose
logits are upsampled to the image; the head is chosen on images held out. The loss is
the cross-entropy of all pixels, each taking the logits of its patch. See
docs/segmentation.md.
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
from vjepa_jax.evals.frozen import FrozenModel, random_init
from vjepa_jax.evals.heads.head_grid import (
    HeadGrid,
    epochs_order,
    make_training,
    name_of,
)
from vjepa_jax.evals.segmentation.confusion import class_iou, confusions, mean_iou
from vjepa_jax.evals.segmentation.images import Reader, Sample, open_images
from vjepa_jax.evals.segmentation.pairs import Pair
from vjepa_jax.evals.tokens.frame_features import FrameEncoder
from vjepa_jax.models.heads import LinearClassifier

_BATCHES_AHEAD = 2
_STANDARDISED_BY = 256  # images whose features give mean and deviation
_SHAPE_UNIT = 128  # masks are filled up to multiples, for few compilations


def evaluate(frozen: FrozenModel, config: ConfigDict) -> dict[str, dict[str, Any]]:
    """Train linear heads on the patches of images and judge them.

    Args:
      frozen: the model.
      config: from `settings.segmentation`.

    Returns:
      {measure: {"pretrained": value}}, with `config.random_init` also `random_init`:

      `miou`: mean over classes of the intersection over union of their pixels in the
      test images, in full resolution, of the head that was best on the images held out;
      a class counts where it is in the masks or was found.
      `patch_miou`: the same of patches, each with its most frequent class.
      `pixel_accuracy`: share of pixels in the right class.
      `held_out_miou`: `miou` on the images that the head was chosen by.
      `best_on_test_miou`: of the head that is best on the test images; flattering.
      `chosen_head`, counted from 1, each head's `miou`, and the chosen one's of every
      class.

    Raises:
      UserError: config, data and model do not fit.
    """
    settings.validate(config)
    if not 1 <= config.num_classes < label_images.IGNORED:
        raise UserError(
            f"config.num_classes={config.num_classes} is out of range: give 1 to "
            f"{label_images.IGNORED - 1}"
        )
    models = {"pretrained": frozen}
    if config.random_init:
        models["random_init"] = random_init(frozen, config.seed)
    fit, held_out, test = open_images(frozen, config)
    columns = {
        name: _evaluate(model, config, fit, held_out, test)
        for name, model in models.items()
    }
    measures = columns["pretrained"]
    return {m: {n: column.get(m) for n, column in columns.items()} for m in measures}


def _evaluate(
    frozen: FrozenModel,
    config: ConfigDict,
    fit: list[Pair],
    held_out: list[Pair],
    test: list[Pair],
) -> dict[str, Any]:
    data = config.data
    encoder = FrameEncoder(
        frozen,
        data.num_frames or frozen.video_shape[0],
        min(config.clips_per_call, config.batch_size, config.test_batch_size),
        tuple(config.out_layers),
    )
    reader = Reader(
        encoder,
        tuple(data.size) or frozen.video_shape[1:3],
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
        self, reader: Reader, config: ConfigDict, pool: concurrent.futures.Executor
    ):
        """Takes how images are read, the evaluation's config, and who reads."""
        self._reader, self._config, self._pool = reader, config, pool
        self._scaler = StandardScaler()

    def train(self, pairs: Sequence[Pair]) -> None:
        """Train all heads of the config on images."""
        config = self._config
        self._standardise(pairs)
        steps_per_epoch = len(pairs) // config.batch_size
        training = make_training(config, steps_per_epoch, optax.softmax_cross_entropy)
        self.grid = HeadGrid(
            LinearClassifier(config.num_classes),
            training,
            (1, len(self._scaler.mean_)),
            seed=config.seed,
            mesh=self._reader.encoder.model.mesh,
        )
        self.grid.fit(self._batches(pairs, training.total_steps), steps_per_epoch)

    def _batches(
        self, pairs: Sequence[Pair], steps: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield patches of drawn images as `HeadGrid.update` takes them."""
        config = self._config
        order = epochs_order(len(pairs), config.batch_size, steps, config.seed)
        drawn = ((pairs[i], (config.seed, n)) for n, i in enumerate(order))
        for batch in self._read(drawn, config.batch_size):
            rows = self._encode(batch)
            rows = rows.reshape(-1, 1, rows.shape[-1])
            shares = np.stack([sample.shares for sample in batch])
            shares = shares.reshape(len(rows), -1)
            weights = shares.sum(1)
            shares /= np.maximum(weights, 1e-9)[:, None]
            yield rows, shares, weights

    def confusions(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Count what every head finds in images: see `confusion.confusions`.

        Returns:
          int64 [heads, 2, classes, classes]: of patches and of pixels.
        """
        total: np.ndarray | int = 0
        size = self._config.test_batch_size
        for batch in self._read(((pair, None) for pair in pairs), size):
            features = self._encode(batch)
            shares = np.stack([sample.shares for sample in batch])
            frequent = shares.argmax(-1).astype(np.uint8)
            frequent[shares.sum(-1) == 0] = label_images.IGNORED
            labels, shapes = _stacked([sample.labels for sample in batch])
            found = confusions(
                self.grid, features, frequent, labels, shapes, batch_size=size
            )
            total = total + found
        return total

    def _read(
        self, items: Iterator[tuple[Pair, tuple[int, int] | None]], batch_size: int
    ) -> Iterator[list[Sample]]:
        """Yield batches in order, some of them read ahead; the last may be smaller."""
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

    def _standardise(self, pairs: Sequence[Pair]) -> None:
        """Take mean and deviation of the features' channels from some images."""
        chosen = evenly_spread(len(pairs), _STANDARDISED_BY)
        items = ((pairs[i], None) for i in chosen)
        for batch in self._read(items, self._config.test_batch_size):
            features = self._features(batch)
            self._scaler.partial_fit(features.reshape(-1, features.shape[-1]))


def _stacked(labels: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return masks of several sizes filled up to one, and the sizes, int32 [B, 2]."""
    shapes = np.array([mask.shape for mask in labels], np.int32)
    size = -(-shapes.max(0) // _SHAPE_UNIT) * _SHAPE_UNIT
    stacked = np.full((len(labels), *size), label_images.IGNORED, np.uint8)
    for filled, mask in zip(stacked, labels, strict=True):
        filled[: mask.shape[0], : mask.shape[1]] = mask
    return stacked, shapes
