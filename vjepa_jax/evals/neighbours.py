"""What pooled features tell without training: nearest neighbours and a few labels.

A video is one vector, the mean of its tokens over clips and views, of unit length.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.metrics import accuracy_score, pairwise_distances_argmin
from sklearn.preprocessing import normalize

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.evals import settings
from vjepa_jax.evals.frozen import FrozenModel, beside_untrained
from vjepa_jax.evals.heads import probes
from vjepa_jax.evals.tokens import clip_tokens

_LINEAR_PENALTY = 2e-2  # L2 per sample


def evaluate(frozen: FrozenModel, config: ConfigDict) -> dict[str, dict[str, Any]]:
    """Classify the test videos by the training videos that are nearest to them.

    Args:
      frozen: the model.
      config: from `settings.neighbours`.

    Returns:
      {measure: {"pretrained": value}}, with `config.random_init` also `random_init`:
      `knn_K_accuracy`, and of N labelled videos per class `few_shot_N_nearest_mean_
      accuracy` and `few_shot_N_linear_accuracy`, means over draws with their standard
      deviations under the same names without `accuracy` and with `spread`; and
      `videos_tested`, those that could be read.

    Raises:
      UserError: config, data and model do not fit.
    """
    settings.validate(config)
    sources = [
        clip_tokens.open_source(config, key) for key in ("train_path", "test_path")
    ]
    num_classes = 1 + max(int(np.max(source.labels)) for source in sources)
    for source in sources:
        clip_tokens.require_labels(source, num_classes)
    require_shots(sources[0].labels, tuple(config.shots))

    def measure(model: FrozenModel) -> dict[str, float]:
        train, test = (
            pooled_features(
                clip_tokens.make_videos(model, config, source, True), config
            )
            for source in sources
        )
        nearest = knn_accuracies(*train, *test, tuple(config.k), config.temperature)
        few = few_shot_accuracies(
            *train, *test, tuple(config.shots), config.draws, config.seed
        )
        return nearest | few | {"videos_tested": len(test[1])}

    return beside_untrained(measure, frozen, config)


def pooled_features(
    videos: clip_tokens.Videos, config: ConfigDict
) -> tuple[np.ndarray, np.ndarray]:
    """Return vectors [N, D] and labels [N] of the readable videos of a source.

    Raises:
      UserError: there are none.
    """
    per_video = videos.encoder.num_clips * videos.num_views
    features, labels = [], []
    for batch in videos.batches(max(1, config.clips_per_call // per_video)):
        features.append(batch.tokens[batch.valid].mean((1, 2)))
        labels.append(batch.labels[batch.valid])
    if not sum(map(len, labels)):
        raise UserError(f"none of the videos of {videos.source.name!r} can be read")
    return np.concatenate(features), np.concatenate(labels)


def knn_accuracies(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    ks: tuple[int, ...],
    temperature: float,
    queries_at_once: int = 1024,
) -> dict[str, float]:
    """Let the nearest training videos vote, by weights exp(cosine / temperature).

    Args:
      train, test: float [N, D].
      train_labels, test_labels: int [N], from 0.
      ks: neighbours that vote; those above the number of training videos are left out.
      temperature: of the weights.
      queries_at_once: test videos compared at once.

    Returns:
      {"knn_K_accuracy": share of the test videos that are put into the right class}.
    """
    ks = tuple(k for k in ks if k <= len(train)) or (len(train),)
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1

    @functools.partial(jax.jit, static_argnames="ks")
    def vote(queries, train, labels, ks):
        cosine, nearest = jax.lax.top_k(queries @ train.T, max(ks))
        # The nearest one has weight 1, so that nothing overflows.
        weights = jnp.exp((cosine - cosine[:, :1]) / temperature)
        rows = jnp.arange(len(queries))[:, None]
        votes = jnp.zeros((len(queries), num_classes))
        return [
            votes.at[rows, labels[nearest[:, :k]]].add(weights[:, :k]).argmax(-1)
            for k in ks
        ]

    train, test = jnp.asarray(normalize(train)), normalize(test)
    labels = jnp.asarray(train_labels, jnp.int32)
    starts = range(0, len(test), queries_at_once)
    found = [
        np.asarray(vote(test[i : i + queries_at_once], train, labels, ks=ks))
        for i in starts
    ]
    said = np.concatenate(found, axis=1)
    return {
        f"knn_{k}_accuracy": float(accuracy_score(test_labels, labels))
        for k, labels in zip(ks, said, strict=True)
    }


def require_shots(labels: np.ndarray, shots: tuple[int, ...]) -> None:
    """Raise UserError unless every class has as many videos as are asked for."""
    classes, counts = np.unique(labels, return_counts=True)
    if max(shots) > counts.min():
        raise UserError(
            f"config.shots={shots}: class {classes[counts.argmin()]} has "
            f"{counts.min()} videos in data.train_path; ask for at most so many"
        )


def few_shot_accuracies(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    shots: tuple[int, ...],
    draws: int,
    seed: int,
) -> dict[str, float]:
    """Learn from a few labelled videos per class, by nearest mean and linearly.

    Args:
      train, test: float [N, D].
      train_labels, test_labels: int [N].
      shots: labelled videos per class.
      draws: training sets of each size.
      seed: of the draws.

    Raises:
      UserError: a class has too few videos.
    """
    require_shots(train_labels, shots)
    classes = np.unique(train_labels)
    rng = np.random.default_rng(seed)
    results: dict[str, float] = {}
    for shot in shots:
        nearest, linear = [], []
        for _ in range(draws):
            of_class = [
                rng.choice(np.flatnonzero(train_labels == c), shot, replace=False)
                for c in classes
            ]
            means = [normalize(train[chosen]).mean(0) for chosen in of_class]
            said = classes[pairwise_distances_argmin(normalize(test), means)]
            nearest.append(accuracy_score(test_labels, said))
            chosen = np.concatenate(of_class)
            fit = train[chosen], train_labels[chosen]
            linear.append(
                probes.linear_accuracy(*fit, test, test_labels, _LINEAR_PENALTY)
            )
        for name, scores in (("nearest_mean", nearest), ("linear", linear)):
            results[f"few_shot_{shot}_{name}_accuracy"] = float(np.mean(scores))
            results[f"few_shot_{shot}_{name}_spread"] = float(np.std(scores))
    return results
