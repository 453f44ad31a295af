"""Action recognition by frozen features: linear and attentive probes.

The protocol of V-JEPA (paper appendix D, `evals/video_classification_frozen`): a video
is some clips ("segments") spread over its time, whose tokens a head sees together; in
tests also some crops ("views") of these, whose softmax is averaged. V-JEPA trains one
head with one cross-attention block, V-JEPA 2 a grid of twenty with three self-attention
blocks before it. See docs/evaluation.md for what differs from the official code.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from scipy.stats import binomtest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
)

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.data.sources.records import Source, hold_out
from vjepa_jax.data.transforms.transforms import ClipTransform
from vjepa_jax.evals import settings
from vjepa_jax.evals.frozen import FrozenModel, beside_untrained
from vjepa_jax.evals.heads.head_grid import (
    GridTraining,
    HeadGrid,
    epochs_order,
    make_training,
    name_of,
)
from vjepa_jax.evals.labelled import Labelled, open_labelled
from vjepa_jax.evals.tokens import clip_tokens, token_cache
from vjepa_jax.evals.tokens.clip_tokens import TokenBatch, Videos
from vjepa_jax.evals.tokens.token_cache import CachedVideos
from vjepa_jax.models.functional import computation_dtype
from vjepa_jax.models.heads import AttentiveClassifier, LinearClassifier

_MAX_CLASSES = 1_000_000  # larger labels are dates or names of files

_AUGMENTATION = (
    "crop_scale",
    "crop_aspect_ratio",
    "flip_probability",
    "rand_augment",
    "erase_probability",
)


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Predicted classes of the readable videos of a source.

    Attributes:
      labels: int64 [videos].
      best: int32 [H, videos, up to 5], classes by every head, the most probable first;
        several by name where the heads give several.
    """

    labels: np.ndarray
    best: Any

    def accuracies(self) -> np.ndarray:
        """Return the share of videos that each head classifies correctly, [H]."""
        return np.array([accuracy_score(self.labels, b[:, 0]) for b in self.best])


def evaluate(model: FrozenModel, config: ConfigDict) -> dict[str, dict[str, Any]]:
    """Train heads on the videos of a data set and test them.

    Args:
      model: of the features.
      config: from `settings.classification`.

    Returns:
      {measure: {"pretrained": value}}, with `config.random_init` also `random_init`:

      `accuracy`, `top5_accuracy`, `class_mean_accuracy`: on the test videos, of the
      head that was best on the videos held out for choosing. `lower_bound_accuracy` and
      `upper_bound_accuracy` are the 95 % confidence interval of the first (Wilson).
      `held_out_accuracy`: of that head on the held-out videos.
      `official_best_on_test_accuracy`: of the head that is best on the test videos
      themselves, as reported by the official code; biased upwards.
      `chosen_head`, counted from 1, and each head's accuracy held out and in the test.
      `confusion`: test videos by true class (rows) and that head's (columns); and its
      `class_names`, if the videos have some.

    Raises:
      UserError: config, data and model do not fit.
    """
    settings.validate(config)
    keys = ["train_path", *["val_path"] * bool(config.data.val_path), "test_path"]
    videos = open_labelled(config, keys, config.num_classes)
    if not config.num_classes and videos.num_classes > _MAX_CLASSES:
        raise UserError(
            f"the largest label is {videos.num_classes - 1}: labels number the classes "
            "from 0; set config.num_classes if there are so many"
        )

    def measure(model: FrozenModel) -> dict[str, Any]:
        return _evaluate(model, config, videos)

    results = beside_untrained(measure, model, config)
    if videos.class_names is not None:
        names = [videos.name_of(label) for label in range(videos.num_classes)]
        results["confusion"]["class_names"] = names
    return results


def _evaluate(
    model: FrozenModel, config: ConfigDict, videos: Labelled
) -> dict[str, Any]:
    data = config.data
    test, num_classes = videos["test_path"], videos.num_classes
    fit, held_out = divide_training(config, videos)
    is_pooled = config.head.kind == "linear"

    def make_videos(source, num_views):
        return clip_tokens.make_videos(model, config, source, is_pooled, num_views)

    prepare = Preparation(model, config, make_videos)
    per_epoch = len(fit) // config.batch_size
    batches = prepare.training_batches(fit, config.epochs * per_epoch, config.seed)
    head = make_head(config, model, num_classes)
    training = make_training(config, per_epoch)
    grid = train(head, training, batches, per_epoch, seed=config.seed, mesh=model.mesh)
    # The test videos are not used before all heads are trained and one is chosen.
    chosen_by = predict(grid, prepare(held_out, data.num_views), config.test_batch_size)
    held_out_accuracies = chosen_by.accuracies()
    chosen = int(np.argmax(held_out_accuracies))
    tested = predict(grid, prepare(test, data.num_views), config.test_batch_size)
    accuracies = tested.accuracies()
    labels, best = tested.labels, tested.best[chosen]
    num_right = int((labels == best[:, 0]).sum())
    interval = binomtest(num_right, len(labels)).proportion_ci(method="wilson")
    results = {
        "accuracy": float(accuracies[chosen]),
        "lower_bound_accuracy": interval.low,
        "upper_bound_accuracy": interval.high,
        "top5_accuracy": float((best == labels[:, None]).any(1).mean()),
        "class_mean_accuracy": balanced_accuracy_score(labels, best[:, 0]),
        "held_out_accuracy": float(held_out_accuracies[chosen]),
        "official_best_on_test_accuracy": float(accuracies.max()),
        "chosen_head": chosen + 1,
        "videos_fitted": len(fit),
        "videos_held_out": len(chosen_by.labels),
        "videos_tested": len(labels),
        "videos_unreadable": len(held_out)
        - len(chosen_by.labels)
        + len(test)
        - len(labels),
    }
    for number, pair in enumerate(grid.heads):
        prefix = f"head {number + 1}: {name_of(pair)}"
        results[f"{prefix}, held-out accuracy"] = float(held_out_accuracies[number])
        results[f"{prefix}, test accuracy"] = float(accuracies[number])
    classes = range(num_classes)
    matrix = confusion_matrix(labels, best[:, 0], labels=classes)
    return results | {"confusion": matrix.tolist()}


def divide_training(config: ConfigDict, videos: Labelled) -> tuple[Source, Source]:
    """Return the videos to train heads on and those to choose a head.

    Raises:
      UserError: there are too few videos, or too few classes.
    """
    fit, held_out = videos["train_path"], videos.sources.get("val_path")
    if held_out is None:
        fit, held_out = hold_out(fit, config.data.held_out_share, config.seed)
        if len(np.unique(fit.labels)) < 2:
            raise UserError(
                f"the {len(fit)} videos that are left to train on are of one class: "
                "give more videos, or config.data.val_path"
            )
    require_batch(config, len(fit))
    return fit, held_out


def require_batch(config: ConfigDict, count: int) -> None:
    """Raise UserError unless `count` videos fill a batch."""
    if count < config.batch_size:
        raise UserError(
            f"config.batch_size={config.batch_size} exceeds the {count} videos to "
            "train on: lower it"
        )


class Preparation:
    """Turns sources into tokens, encoded anew or from the disk."""

    def __init__(
        self,
        model: FrozenModel,
        config: ConfigDict,
        make_videos: Callable[[Source, int], Videos],
        with_predictor: bool = False,
    ):
        """Compute the digest of the weights, if tokens are kept on disk.

        Args:
          model: of the features.
          config: of the evaluation.
          make_videos: from a source and the number of views of each clip.
          with_predictor: whether the tokens depend on the predictor's weights.
        """
        self.config = config
        self._make_videos = make_videos
        self._digest = ""
        if config.cache.path:
            self._digest = token_cache.weights_digest(model, with_predictor)

    def __call__(self, source: Source, num_views: int) -> Videos | CachedVideos:
        """Return the tokens of a source's videos."""
        cache, videos = self.config.cache, self._make_videos(source, num_views)
        if not cache.path:
            return videos
        return token_cache.cached(
            videos, cache.path, cache.dtype, self.config.test_batch_size, self._digest
        )

    def training_batches(
        self, source: Source, steps: int, seed: int
    ) -> Iterator[TokenBatch]:
        """Yield the batches of a training, one view of each video.

        Args:
          source: the videos.
          steps: batches.
          seed: of order, windows and augmentation.
        """
        data, size = self.config.data, self.config.batch_size
        if data.augment:
            videos = self._make_videos(source, 1)
            fields = {key: data[key] for key in _AUGMENTATION}
            batches = clip_tokens.augmented_batches(
                videos,
                ClipTransform(videos.reader.resolution, **fields),
                batch_size=size,
                seed=seed,
                prefetch_megabytes=data.prefetch_megabytes,
                max_bad_fraction=data.max_bad_fraction,
            )
        else:
            order = epochs_order(len(source), size, steps, seed)
            batches = self(source, num_views=1).batches(size, order)
        with contextlib.closing(batches):
            yield from itertools.islice(batches, steps)


def train(
    head: nn.Module,
    training: GridTraining,
    batches: Iterator[TokenBatch],
    steps_per_epoch: int,
    *,
    seed: int,
    mesh: Mesh,
) -> HeadGrid:
    """Train a grid of heads on the first view of each video.

    Args:
      head: module of each head.
      training: of the grid.
      batches: of all epochs.
      steps_per_epoch: batches of one.
      seed: of the heads' initialisation.
      mesh: devices that share every batch.

    Raises:
      UserError: no head has a finite loss.
    """
    first = next(batches)
    grid = HeadGrid(head, training, first.tokens.shape[2:], seed=seed, mesh=mesh)
    rows = (
        (batch.tokens[:, 0], batch.labels, batch.valid)
        for batch in itertools.chain([first], batches)
    )
    grid.fit(rows, steps_per_epoch)
    return grid


def make_head(
    config: ConfigDict, model: FrozenModel, num_classes: int
) -> AttentiveClassifier | LinearClassifier:
    """Make the head that the config describes, see `make_attentive_head`."""
    if config.head.kind == "linear":
        return LinearClassifier(num_classes)
    width = model.encoder.width if config.out_layers else model.encoder.out_dim
    return make_attentive_head(config, model, width, num_classes)


def make_attentive_head(
    config: ConfigDict,
    model: FrozenModel,
    width: int,
    num_classes: int = 0,
    outputs: tuple[tuple[str, int], ...] = (),
) -> AttentiveClassifier:
    """Make an attentive head of the size in the config.

    Args:
      config: of the evaluation.
      model: of the features.
      width: channels of its input tokens.
      num_classes, outputs: see `AttentiveClassifier`; one of them.

    Raises:
      UserError: the heads of the attention do not divide the tokens' channels.
    """
    num_heads = config.head.num_heads or model.encoder.num_heads
    if width % num_heads:
        raise UserError(
            f"config.head.num_heads={num_heads} does not divide the {width} channels "
            "of the tokens: set a divisor, or 0 for the encoder's"
        )
    return AttentiveClassifier(
        num_classes,
        num_heads,
        config.head.depth,
        outputs=outputs,
        remat=config.head.remat,
        dtype=computation_dtype(config.head.dtype, model.mesh.devices.flat[0].platform),
    )


def predict(
    grid: HeadGrid, videos: Videos | CachedVideos, batch_size: int
) -> Predictions:
    """Classify every video with every head.

    Raises:
      UserError: none of the videos can be read.
    """
    labels, best = [], []
    for batch in videos.batches(batch_size):
        classes = grid.classify(batch.tokens, num_best=5)
        labels.append(batch.labels[batch.valid])
        best.append(jax.tree.map(lambda x, rows=batch.valid: x[:, rows], classes))
    if not sum(len(part) for part in labels):
        raise UserError("none of the videos to evaluate on can be read")
    joined = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *best)
    return Predictions(np.concatenate(labels), joined)
