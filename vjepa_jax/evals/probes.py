"""Linear read-outs and attentive probes of frozen features.

Features of a clip are tokens [T', S, D]: T' time steps of S places each. The linear
read-outs see averages over tokens, on which untrained features are poor; the attentive
probe pools with a learned query, as V-JEPA does (paper §4.2).
"""

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vjepa_jax import sharding
from vjepa_jax.evals.head_grid import HeadGrid, Schedules
from vjepa_jax.models.heads import AttentiveClassifier


def linear_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    regularisation: float = 1e-2,
) -> float:
    """Fit a logistic regression on standardised features; return test accuracy.

    Args:
      train, test: float [N, D], one vector per clip.
      train_labels, test_labels: int [N].
      regularisation: L2 penalty per sample.
    """
    c = 1 / (regularisation * len(train))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
    return float(model.fit(train, train_labels).score(test, test_labels))


def few_label_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    labels_per_class: int = 16,
    draws: int = 10,
    regularisation: float = 2e-2,
    seed: int = 0,
) -> float:
    """Return the mean linear accuracy over draws of a few labelled clips per class."""
    rng = np.random.default_rng(seed)
    classes = np.unique(train_labels)
    scores = []
    for _ in range(draws):
        chosen = np.concatenate(
            [
                rng.choice(
                    np.flatnonzero(train_labels == k), labels_per_class, replace=False
                )
                for k in classes
            ]
        )
        scores.append(
            linear_accuracy(
                train[chosen], train_labels[chosen], test, test_labels, regularisation
            )
        )
    return float(np.mean(scores))


def linear_r2(
    train: np.ndarray,
    train_values: np.ndarray,
    test: np.ndarray,
    test_values: np.ndarray,
    alphas: Sequence[float] = tuple(np.logspace(0, 5, 6)),
) -> float:
    """Fit a ridge regression (penalty by leave-one-out); return test R².

    Args:
      train, test: float [N, D].
      train_values, test_values: float [N, K]; R² is averaged over the K values.
    """
    model = make_pipeline(StandardScaler(), RidgeCV(alphas))
    return float(model.fit(train, train_values).score(test, test_values))


def attentive_classes(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    *,
    num_heads: int,
    epochs: int,
    batch_size: int,
    learning_rates: Sequence[float],
    weight_decay: float,
    seed: int = 0,
) -> np.ndarray:
    """Train attentive probes at several learning rates side by side.

    The rate is chosen on a tenth of the training clips held out, not on the test set.

    Args:
      train, test: float [N, T' * S, D], tokens.
      train_labels: int [N].
      num_heads: of the cross-attention; divides D.
      epochs: passes over the training clips.
      batch_size: clips per update.
      learning_rates: peaks of cosine schedules, one probe each.
      weight_decay: of AdamW.
      seed: of initialisation and order.

    Returns:
      int32 [N], what the probe that was best on the held-out clips takes the test
      clips for.
    """
    mean, std = train.mean((0, 1)), train.std((0, 1)) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    rng = np.random.default_rng(seed)
    held_out, fit = np.split(rng.permutation(len(train)), [len(train) // 10])
    batches = max(1, len(fit) // batch_size)
    grid = HeadGrid(
        AttentiveClassifier(int(train_labels.max()) + 1, num_heads),
        [Schedules(tuple(learning_rates), (weight_decay,))],
        total_steps=epochs * batches,
        token_shape=train.shape[1:],
        seed=seed,
        mesh=sharding.make_mesh(),
    )
    for _ in range(epochs):
        shuffled = rng.permutation(fit)[: batches * batch_size]
        for chosen in np.split(shuffled, batches):
            grid.update(train[chosen], train_labels[chosen], np.ones(len(chosen)))

    def classes(tokens):
        parts = [
            grid.classify(tokens[i : i + batch_size, None])
            for i in range(0, len(tokens), batch_size)
        ]
        return np.concatenate(parts, axis=1)[..., 0]

    right = classes(train[held_out]) == train_labels[held_out]
    return classes(test)[int(np.argmax(right.mean(1)))]
