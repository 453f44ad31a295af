"""Action recognition by frozen features: linear and attentive probes.

The protocol of V-JEPA (paper appendix D, `evals/video_classification_frozen`): a video
is some clips ("segments") far apart in time, whose tokens a head sees together; in
tests also some crops ("views") of these, whose softmax is averaged. V-JEPA trains one
head with one cross-attention block, V-JEPA 2 a grid of twenty with three self-attention
blocks before it. See docs/evaluation.md for what differs from the official code.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging
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
from vjepa_jax.evals.heads.head_grid import HeadGrid, Schedules, describe, lowest
from vjepa_jax.evals.tokens import clip_tokens, token_cache
from vjepa_jax.evals.tokens.clip_tokens import TokenBatch, Videos
from vjepa_jax.evals.tokens.token_cache import CachedVideos
from vjepa_jax.models.heads import AttentiveClassifier, LinearClassifier

_AUGMENTATION = (
    "crop_scale",
    "crop_aspect_ratio",
    "flip_probability",
    "rand_augment",
    "erase_probability",
)


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What heads say of the readable videos of a source.

    Attributes:
      labels: int64 [videos].
      best: int32 [H, videos, up to 5], classes, the most probable first; several by
        name where the heads give several.
    """

    labels: np.ndarray
    best: Any

    def accuracies(self) -> np.ndarray:
        """Share of videos that each head puts into the right class, [H]."""
        return np.array([accuracy_score(self.labels, b[:, 0]) for b in self.best])


def evaluate(frozen: FrozenModel, config: ConfigDict) -> dict[str, dict[str, Any]]:
    """Train heads on a data set's videos and judge them.

    Args:
      frozen: the model.
      config: from `settings.classification`.

    Returns:
      {measure: {"pretrained": value}}, with `config.random_init` also `random_init`:

      `accuracy`, `top5_accuracy`, `class_mean_accuracy`: on the test videos, of the
      head that was best on the videos held out for choosing. `lower_bound_accuracy` and
      `upper_bound_accuracy` bound the first with 95 % confidence (Wilson).
      `held_out_accuracy`: of that head on the videos it was chosen by.
      `official_best_on_test_accuracy`: of the head that is best on the test videos
      themselves, which is what the official code reports; flattering.
      `chosen_head`, counted from 1, and each head's accuracy held out and in the test.
      `confusion`: test videos by true class (rows) and that head's (columns).

    Raises:
      UserError: config, data and model do not fit.
    """
    settings.validate(config)
    return beside_untrained(lambda model: _evaluate(model, config), frozen, config)


def _evaluate(frozen: FrozenModel, config: ConfigDict) -> dict[str, Any]:
    data = config.data
    test = clip_tokens.open_source(config, "test_path")
    fit, held_out = open_training(config)
    largest = max(int(np.max(source.labels)) for source in (fit, held_out))
    num_classes = config.num_classes or largest + 1
    for source in (fit, held_out, test):
        clip_tokens.require_labels(source, num_classes)
    is_pooled = config.head.kind == "linear"

    def make_videos(source, num_views):
        return clip_tokens.make_videos(frozen, config, source, is_pooled, num_views)

    prepare = Preparation(frozen, config, make_videos)
    per_epoch = len(fit) // config.batch_size
    batches = prepare.training_batches(fit, config.epochs * per_epoch, config.seed)
    head = make_head(config, frozen, num_classes)
    grid = train(frozen, config, head, batches, per_epoch)
    # The test videos are not looked at before all heads are trained and one is chosen.
    chosen_by = predict(grid, prepare(held_out, data.num_views), config.test_batch_size)
    held_out_accuracies = chosen_by.accuracies()
    chosen = int(np.argmax(held_out_accuracies))
    judged = predict(grid, prepare(test, data.num_views), config.test_batch_size)
    accuracies = judged.accuracies()
    labels, best = judged.labels, judged.best[chosen]
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
    for number, head in enumerate(grid.heads):
        prefix = f"head {number + 1}: {describe(head)}"
        results[f"{prefix}, held-out accuracy"] = float(held_out_accuracies[number])
        results[f"{prefix}, test accuracy"] = float(accuracies[number])
    classes = range(num_classes)
    matrix = confusion_matrix(labels, best[:, 0], labels=classes)
    return results | {"confusion": matrix.tolist()}


def open_training(config: ConfigDict) -> tuple[Source, Source]:
    """Open the videos to train heads on and those to choose one by.

    Raises:
      UserError: a source cannot be opened, or there are too few videos.
    """
    data = config.data
    train_source = clip_tokens.open_source(config, "train_path")
    if data.val_path:
        fit, held_out = train_source, clip_tokens.open_source(config, "val_path")
    else:
        fit, held_out = hold_out(train_source, data.held_out_share, config.seed)
    require_batch(config, len(fit))
    return fit, held_out


def require_batch(config: ConfigDict, count: int) -> None:
    """Raise UserError where there are fewer than a batch to train on."""
    if count < config.batch_size:
        raise UserError(
            f"config.batch_size={config.batch_size} exceeds the {count} videos to "
            "train on: lower it"
        )


class Preparation:
    """Makes sources into tokens as the config says."""

    def __init__(
        self,
        frozen: FrozenModel,
        config: ConfigDict,
        make_videos: Callable[[Source, int], Videos],
        with_predictor: bool = False,
    ):
        """Digests the weights where tokens are kept on disk.

        Args:
          frozen: the model.
          config: of the evaluation.
          make_videos: from a source and the views of each clip.
          with_predictor: whether the tokens depend on the predictor's weights.
        """
        self.config = config
        self._make_videos = make_videos
        self._digest = ""
        if config.cache.path:
            self._digest = token_cache.weights_digest(frozen, with_predictor)

    def __call__(self, source: Source, num_views: int) -> Videos | CachedVideos:
        """Return the tokens of a source's videos, from the disk if the config says."""
        cache, videos = self.config.cache, self._make_videos(source, num_views)
        if not cache.path:
            return videos
        return token_cache.cached(
            videos, cache.path, cache.dtype, self.config.test_batch_size, self._digest
        )

    def training_batches(
        self, source: Source, steps: int, seed: int
    ) -> Iterator[TokenBatch]:
        """Yield so many batches of a training, one view of each video.

        Args:
          source: the videos.
          steps: batches.
          seed: of order, windows and augmentation.
        """
        config, videos = self.config, self(source, num_views=1)
        data, size = config.data, config.batch_size
        if data.augment:
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
            batches = videos.batches(size, order)
        with contextlib.closing(batches):
            yield from itertools.islice(batches, steps)


def epochs_order(count: int, batch_size: int, steps: int, seed: int) -> np.ndarray:
    """Return the videos of `steps` batches: epochs, each in a new order, whole batches.

    Args:
      count: videos.
      batch_size: videos per batch, at most `count`; an epoch's last ones that make no
        whole batch are left out.
      steps: batches.
      seed: of the orders.
    """
    rng = np.random.default_rng(seed)
    per_epoch = count // batch_size
    epochs = [
        rng.permutation(count)[: per_epoch * batch_size]
        for _ in range(-(-steps // per_epoch))
    ]
    return np.concatenate(epochs)[: steps * batch_size]


def train(
    frozen: FrozenModel,
    config: ConfigDict,
    head: nn.Module,
    batches: Iterator[TokenBatch],
    steps_per_epoch: int,
    **options: Any,
) -> HeadGrid:
    """Train all heads of the config.

    Args:
      frozen: the model.
      config: of the evaluation.
      head: module of each head.
      batches: of all epochs.
      steps_per_epoch: batches of one.
      options: see `HeadGrid`.

    Raises:
      UserError: no head has a finite loss.
    """
    grid, began = None, time.perf_counter()
    for step, batch in enumerate(batches, start=1):
        tokens = batch.tokens[:, 0]
        if grid is None:
            grid = HeadGrid(
                head,
                make_schedules(config, steps_per_epoch),
                total_steps=config.epochs * steps_per_epoch,
                token_shape=tokens.shape[1:],
                seed=config.seed,
                mesh=frozen.mesh,
                clip_norm=config.clip_norm,
                heads_at_once=config.heads_at_once,
                **options,
            )
        losses = grid.update(tokens, batch.labels, batch.valid)
        if step % steps_per_epoch == 0:
            logging.info(
                "epoch %d of %d: lowest loss of %d heads %.4f after %.0f s",
                step // steps_per_epoch,
                config.epochs,
                len(grid.heads),
                lowest(losses),
                time.perf_counter() - began,
            )
    return grid


def make_head(
    config: ConfigDict, frozen: FrozenModel, num_classes: int
) -> AttentiveClassifier | LinearClassifier:
    """Make the head of the config, see `make_attentive_head`."""
    if config.head.kind == "linear":
        return LinearClassifier(num_classes)
    width = frozen.encoder.width if config.out_layers else frozen.encoder.out_dim
    return make_attentive_head(config, frozen, width, num_classes)


def make_attentive_head(
    config: ConfigDict,
    frozen: FrozenModel,
    width: int,
    num_classes: int = 0,
    outputs: tuple[tuple[str, int], ...] = (),
) -> AttentiveClassifier:
    """Make an attentive head of the config's size.

    Args:
      config: of the evaluation.
      frozen: the model.
      width: channels of the tokens that it sees.
      num_classes, outputs: see `AttentiveClassifier`; one of them.

    Raises:
      UserError: the heads of the attention do not divide the tokens' channels.
    """
    num_heads = config.head.num_heads or frozen.encoder.num_heads
    if width % num_heads:
        raise UserError(
            f"config.head.num_heads={num_heads} does not divide the {width} channels "
            "of the tokens: take a divisor, or 0 for the encoder's"
        )
    return AttentiveClassifier(
        num_classes,
        num_heads,
        config.head.depth,
        outputs=outputs,
        remat=config.head.remat,
        dtype=config.head.dtype,
    )


def make_schedules(config: ConfigDict, steps_per_epoch: int) -> list[Schedules]:
    """Make the rates and decays of all grids of the config."""
    return [
        Schedules(
            tuple(fields.learning_rates),
            tuple(fields.weight_decays),
            fields.start_learning_rate,
            fields.warmup_epochs * steps_per_epoch,
            fields.final_weight_decay_share,
        )
        for fields in config.grids.values()
    ]


def predict(
    grid: HeadGrid, videos: Videos | CachedVideos, batch_size: int
) -> Predictions:
    """Classify every video with every head.

    Raises:
      UserError: none of the videos can be read.
    """
    labels, best = [], []
    for batch in videos.batches(batch_size):
        found = grid.classify(batch.tokens, num_best=5)
        labels.append(batch.labels[batch.valid])
        best.append(jax.tree.map(lambda x, rows=batch.valid: x[:, rows], found))
    if not sum(len(part) for part in labels):
        raise UserError("none of the videos to judge by can be read")
    joined = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *best)
    return Predictions(np.concatenate(labels), joined)
