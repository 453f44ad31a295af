"""Linear read-outs and attentive probes of frozen features.

Features of a clip are tokens [T', S, D]: T' time steps of S places each. The linear
read-outs see averages over tokens, on which untrained features are poor; the attentive
probe pools with a learned query, as V-JEPA does (paper §4.2).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

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


def attentive_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_heads: int,
    epochs: int,
    batch_size: int,
    learning_rates: Sequence[float],
    weight_decay: float,
    seed: int = 0,
) -> float:
    """Train attentive probes at several learning rates side by side.

    The rate is chosen on a tenth of the training clips held out, not on the test set.

    Args:
      train, test: float [N, T' * S, D], tokens.
      train_labels, test_labels: int [N].
      num_heads: of the cross-attention; divides D.
      epochs: passes over the training clips.
      batch_size: clips per update.
      learning_rates: peaks of cosine schedules, one probe each.
      weight_decay: of AdamW.
      seed: of initialisation and order.

    Returns:
      Test accuracy of the probe that was best on the held-out clips.
    """
    mean, std = train.mean((0, 1)), train.std((0, 1)) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(train))
    held_out, fit = np.split(order, [len(train) // 10])
    head = AttentiveClassifier(int(train_labels.max()) + 1, num_heads)
    steps = epochs * (len(fit) // batch_size)
    tx = optax.inject_hyperparams(optax.adamw)(
        learning_rate=0.0, weight_decay=weight_decay
    )

    def init(key):
        params = head.init(key, jnp.asarray(train[:1]))["params"]
        return params, tx.init(params)

    def update(params, opt_state, rate, tokens, labels):
        def loss_fn(params):
            logits = head.apply({"params": params}, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, labels
            ).mean()

        opt_state.hyperparams["learning_rate"] = rate
        updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update_all(params, opt_state, rates, tokens, labels):
        each = jax.vmap(update, in_axes=(0, 0, 0, None, None))
        return each(params, opt_state, rates, tokens, labels)

    @jax.jit
    def predict_all(params, tokens):
        return jax.vmap(lambda p: head.apply({"params": p}, tokens).argmax(-1))(params)

    peaks = np.asarray(learning_rates, np.float32)
    keys = jax.random.split(jax.random.key(seed), len(peaks))
    params, opt_state = jax.vmap(init)(keys)
    for step in range(steps):
        position = step % (len(fit) // batch_size)
        if position == 0:
            shuffled = rng.permutation(fit)
        chosen = shuffled[position * batch_size : (position + 1) * batch_size]
        rates = peaks * 0.5 * (1 + np.cos(np.pi * step / steps))
        params, opt_state = update_all(
            params, opt_state, rates, train[chosen], train_labels[chosen]
        )

    def accuracies(tokens, labels):
        parts = [
            np.asarray(predict_all(params, tokens[i : i + batch_size]))
            for i in range(0, len(tokens), batch_size)
        ]
        return (np.concatenate(parts, axis=1) == labels).mean(1)

    best = int(np.argmax(accuracies(train[held_out], train_labels[held_out])))
    return float(accuracies(test, test_labels)[best])
