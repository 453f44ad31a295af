"""Linear and attentive probes of frozen features: classes and values.

Features of a clip are tokens [T', S, D]: T' time steps of S positions each. The linear
probes see averages over tokens, on which untrained features are poor; the attentive
probe pools with a learned query, as V-JEPA does (paper §4.2).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vjepa_jax.evals.frozen import fill_up
from vjepa_jax.evals.heads.head_grid import GridTraining, HeadGrid, Loss, Schedules
from vjepa_jax.models.heads import AttentiveClassifier, AttentiveRegressor


def linear_classes(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    regularisation: float = 1e-2,
) -> np.ndarray:
    """Fit a logistic regression on standardised features; classify the test samples.

    Args:
      train, test: float [N, D], one vector per clip.
      train_labels: int [N].
      regularisation: L2 penalty per sample.

    Returns:
      int [N], predicted classes.
    """
    c = 1 / (regularisation * len(train))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
    return model.fit(train, train_labels).predict(test)


def linear_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    regularisation: float = 1e-2,
) -> float:
    """Return the test accuracy of `linear_classes`."""
    predicted = linear_classes(train, train_labels, test, regularisation)
    return float(np.mean(predicted == test_labels))


def draw_per_class(
    labels: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw the indices of `count` samples of every class of labels [N]."""
    return np.concatenate(
        [
            rng.choice(np.flatnonzero(labels == label), count, replace=False)
            for label in np.unique(labels)
        ]
    )


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
    scores = []
    for _ in range(draws):
        chosen = draw_per_class(train_labels, labels_per_class, rng)
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


@dataclasses.dataclass(frozen=True)
class ProbeTraining:
    """How attentive probes are trained: several learning rates side by side.

    Attributes:
      num_heads: of the cross-attention; divides the tokens' channels.
      epochs: passes over the samples.
      batch_size: samples per update.
      learning_rates: peaks of cosine schedules, one probe each.
      weight_decay: of AdamW.
      seed: of initialisation and order.
      mesh: devices that share every batch.
    """

    num_heads: int
    epochs: int
    batch_size: int
    learning_rates: tuple[float, ...]
    weight_decay: float
    seed: int
    mesh: Mesh

    def fit(
        self,
        head: nn.Module,
        loss_fn: Loss,
        tokens: np.ndarray,
        labels: np.ndarray,
        rows: np.ndarray,
        rng: np.random.Generator,
    ) -> HeadGrid:
        """Train heads on some rows of tokens [N, K, D] and labels [N, ...]."""
        per_epoch = max(1, len(rows) // self.batch_size)
        training = GridTraining(
            (Schedules(self.learning_rates, (self.weight_decay,)),),
            self.epochs * per_epoch,
            loss_fn=loss_fn,
        )
        grid = HeadGrid(
            head, training, tokens.shape[1:], seed=self.seed, mesh=self.mesh
        )

        def batches():
            for _ in range(self.epochs):
                shuffled = rng.permutation(rows)[: per_epoch * self.batch_size]
                for chosen in np.split(shuffled, per_epoch):
                    yield tokens[chosen], labels[chosen], np.ones(len(chosen))

        grid.fit(batches(), per_epoch)
        return grid

    def in_batches(
        self, function: Callable[..., Any], tokens: np.ndarray
    ) -> np.ndarray:
        """Call a function from tokens [B, ...] to [H, B, ...] on all of [N, ...]."""
        (filled,) = fill_up([tokens], self.batch_size)  # one shape, one compilation
        parts = np.split(filled, len(filled) // self.batch_size)
        return np.concatenate([*map(function, parts)], axis=1)[:, : len(tokens)]


def _standardised(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale the channels of tokens [N, K, D] to mean 0 and deviation 1 in training."""
    mean, std = train.mean((0, 1)), train.std((0, 1)) + 1e-6
    return (train - mean) / std, (test - mean) / std


def attentive_classes(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    training: ProbeTraining,
) -> np.ndarray:
    """Train attentive probes at several learning rates and classify with the best.

    The best one is chosen on a held-out tenth of the training clips.

    Args:
      train, test: float [N, T' * S, D], tokens.
      train_labels: int [N].
      training: of the probes.

    Returns:
      int32 [N], predicted classes of the test clips.
    """
    train, test = _standardised(train, test)
    rng = np.random.default_rng(training.seed)
    held_out, fit = np.split(rng.permutation(len(train)), [len(train) // 10])
    head = AttentiveClassifier(int(train_labels.max()) + 1, training.num_heads)
    loss_fn = optax.softmax_cross_entropy_with_integer_labels
    grid = training.fit(head, loss_fn, train, train_labels, fit, rng)

    def classes(tokens):
        return training.in_batches(grid.classify, tokens[:, None])[..., 0]

    right = classes(train[held_out]) == train_labels[held_out]
    return classes(test)[int(np.argmax(right.mean(1)))]


def attentive_r2(
    train: np.ndarray,
    train_values: Mapping[str, np.ndarray],
    train_clips: np.ndarray,
    test: np.ndarray,
    test_values: Mapping[str, np.ndarray],
    training: ProbeTraining,
) -> dict[str, float]:
    """Train attentive probes to predict quantities; return the test R² of each.

    The probe is that of `attentive_classes`, but with a query for each quantity and the
    squared error as loss. The learning rate is chosen for each quantity on a held-out
    tenth of the training clips.

    Args:
      train, test: float [N, S, D], tokens.
      train_values, test_values: by name, float [N, K]; rows of NaN are left out of
        training and R². R² is averaged over the K values.
      train_clips: int [N], the clip of the tokens; tokens of one clip are held out
        together.
      training: of the probes.
    """
    train, test = _standardised(train, test)
    rng = np.random.default_rng(training.seed)
    clips = rng.permutation(np.unique(train_clips))
    is_held_out = np.isin(train_clips, clips[: len(clips) // 10])
    sizes = tuple((name, values.shape[1]) for name, values in train_values.items())
    wanted = np.concatenate([*train_values.values()], axis=1)
    mean, std = np.nanmean(wanted, 0), np.nanstd(wanted, 0) + 1e-6
    grid = training.fit(
        AttentiveRegressor(sizes, training.num_heads),
        squared_error,
        train,
        (wanted - mean) / std,
        np.flatnonzero(~is_held_out),
        rng,
    )
    ends = np.cumsum([size for _, size in sizes])

    def scores(tokens, values):
        """R² of every head, [H], by quantity."""
        predicted = training.in_batches(grid.predict, tokens) * std + mean
        r2 = {}
        for end, (name, size) in zip(ends, sizes, strict=True):
            known = ~np.isnan(values[name]).any(1)
            true, of_heads = values[name][known], predicted[:, known, end - size : end]
            r2[name] = np.array([r2_score(true, one) for one in of_heads])
        return r2

    held_out_values = {k: values[is_held_out] for k, values in train_values.items()}
    chosen_by = scores(train[is_held_out], held_out_values)
    tested = scores(test, test_values)
    return {k: float(tested[k][np.argmax(chosen_by[k])]) for k in tested}


def squared_error(predicted: jax.Array, wanted: jax.Array) -> jax.Array:
    """Return the mean squared error [B] of values [B, K]; NaN is an unknown value."""
    known = ~jnp.isnan(wanted)
    error = jnp.where(known, predicted - jnp.where(known, wanted, 0.0), 0.0)
    return (error**2).mean(-1)
