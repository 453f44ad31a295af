"""Heads against plain NumPy."""

import math

import jax
import numpy as np

from vjepa_jax.models.heads import AttentiveClassifier


def test_attentive_classifier_equals_plain_numpy_and_ignores_order(rng):
    head = AttentiveClassifier(num_classes=5, num_heads=2)
    tokens = rng.normal(size=(3, 7, 8)).astype(np.float32)
    shapes = jax.eval_shape(head.init, jax.random.key(0), tokens)
    params = jax.tree.map(
        lambda s: rng.normal(0, 0.4, s.shape).astype(np.float32), shapes
    )
    logits = jax.jit(head.apply)(params, tokens)
    p = jax.tree.map(lambda x: x.astype(np.float64), params)["params"]

    def linear(x, name):
        return x @ p[name]["kernel"] + p[name]["bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * p[name]["scale"] + p[name]["bias"]

    for clip, got in zip(tokens.astype(np.float64), logits, strict=True):
        q = linear(p["query"][0, 0], "q").reshape(2, 4)
        # The keys of all heads, then their values.
        kv = linear(norm(clip, "norm1"), "kv").reshape(7, 2, 2, 4)
        pooled = []
        for i in range(2):
            weights = np.exp(kv[:, 0, i] @ q[i] / 2)
            pooled.append(weights / weights.sum() @ kv[:, 1, i])
        x = p["query"][0, 0] + np.concatenate(pooled)
        y = linear(norm(x, "norm2"), "fc1")
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        # Single precision; the logits are of order one.
        np.testing.assert_allclose(
            got, linear(x + linear(y, "fc2"), "linear"), atol=1e-4
        )
    shuffled = head.apply(params, tokens[:, rng.permutation(7)])
    np.testing.assert_allclose(shuffled, logits, atol=1e-5)
