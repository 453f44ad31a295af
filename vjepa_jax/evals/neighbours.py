"""Classification by pooled features: nearest neighbours, and a few labels per class.

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
from vjepa_jax.evals.labelled import open_labelled, require_per_class
from vjepa_jax.evals.tokens import clip_tokens

_LINEAR_PENALTY = 2e-2  # L2 per sample


def evaluate(model: FrozenModel, config: ConfigDict) -> dict[str, dict[str, Any]]:
    """Classify the test videos by the training videos nearest to them.

    Args:
      model: of the features.
      config: from `settings.neighbours`.

    Returns:
      {measure: {"pretrained": value}}, with `config.random_init` also `random_init`:
      `knn_K_accuracy`; for N labelled videos per class, means over draws,
      `few_shot_N_nearest_mean_accuracy` and `few_shot_N_linear_accuracy`, and their
      standard deviations (`spread` instead of `accuracy`); and `videos_tested`, the
      number of readable test videos.

    Raises:
      UserError: config, data and model do not fit.
    """
    settings.validate(config)
    keys = "train_path", "test_path"
    videos = open_labelled(config, keys)
    most, name_of = max(config.shots, default=0), videos.name_of
    require_per_class(videos["train_path"].labels, most, "config.shots", name_of)

    def measure(model: FrozenModel) -> dict[str, float]:
        train, test = (
            pooled_features(
                clip_tokens.make_videos(model, config, videos[key], True), config
            )
            for key in keys
        )
        # Some are unreadable.
        require_per_class(train[1], most, "config.shots", name_of)
        nearest = knn_accuracies(*train, *test, tuple(config.k), config.temperature)
        few = few_shot_accuracies(
            *train, *test, tuple(config.shots), config.draws, config.seed
        )
        return nearest | few | {"videos_tested": len(test[1])}

    return beside_untrained(measure, model, config)


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
        name = videos.source.name
        raise UserError(f"none of the videos of {name!r} can be read")
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
    """Classify by vote of the nearest videos, weighted by exp(cosine / temperature).

    Args:
      train, test: float [N, D].
      train_labels, test_labels: int [N].
      ks: numbers of neighbours that vote; those above the number of training videos
        are left out.
      temperature: of the weights.
      queries_at_once: test videos compared at once.

    Returns:
      {"knn_K_accuracy": share of the test videos that are classified correctly}.
    """
    ks = tuple(k for k in ks if k <= len(train)) or (len(train),)
    classes, indices = np.unique(train_labels, return_inverse=True)

    unit_train, test = jnp.asarray(normalize(train)), normalize(test)
    labels = jnp.asarray(indices, jnp.int32)
    vote = functools.partial(
        _vote, ks=ks, num_classes=len(classes), temperature=temperature
    )
    parts = [
        np.asarray(vote(test[i : i + queries_at_once], unit_train, labels))
        for i in range(0, len(test), queries_at_once)
    ]
    predicted = classes[np.concatenate(parts, axis=1)]
    return {
        f"knn_{k}_accuracy": float(accuracy_score(test_labels, of_k))
        for k, of_k in zip(ks, predicted, strict=True)
    }


@functools.partial(jax.jit, static_argnames=("ks", "num_classes", "temperature"))
def _vote(queries, train, labels, *, ks, num_classes, temperature):
    """Return the classes of queries [N, D] for each of `ks`: list of int [N]."""
    cosine, nearest = jax.lax.top_k(queries @ train.T, max(ks))
    # The nearest one has weight 1, so that nothing overflows.
    weights = jnp.exp((cosine - cosine[:, :1]) / temperature)
    rows = jnp.arange(len(queries))[:, None]
    votes = jnp.zeros((len(queries), num_classes))
    return [
        votes.at[rows, labels[nearest[:, :k]]].add(weights[:, :k]).argmax(-1)
        for k in ks
    ]


def few_shot_accuracies(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    shots: tuple[int, ...],
    draws: int,
    seed: int,
) -> dict[str, float]:
    """Learn from a few labelled videos per class: nearest mean and linear probe.

    Args:
      train, test: float [N, D].
      train_labels, test_labels: int [N].
      shots: labelled videos per class.
      draws: training sets of each size.
      seed: of the draws.

    Each class has enough videos for all `shots`.
    """
    classes = np.unique(train_labels)
    rng = np.random.default_rng(seed)
    results: dict[str, float] = {}
    for shot in shots:
        nearest, linear = [], []
        for _ in range(draws):
            of_class = probes.draw_per_class(train_labels, shot, rng).reshape(-1, shot)
            means = [normalize(train[rows]).mean(0) for rows in of_class]
            predicted = classes[pairwise_distances_argmin(normalize(test), means)]
            nearest.append(accuracy_score(test_labels, predicted))
            chosen = of_class.ravel()
            fit = train[chosen], train_labels[chosen]
            linear.append(
                probes.linear_accuracy(*fit, test, test_labels, _LINEAR_PENALTY)
            )
        for name, scores in (("nearest_mean", nearest), ("linear", linear)):
            results[f"few_shot_{shot}_{name}_accuracy"] = float(np.mean(scores))
            results[f"few_shot_{shot}_{name}_spread"] = float(np.std(scores))
    return results
