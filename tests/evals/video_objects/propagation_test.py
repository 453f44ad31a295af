"""Labels are propagated as by a plain loop over tokens, on any mesh."""

import dataclasses

import numpy as np
import pytest
from step_setup import one_device

from vjepa_jax.evals.video_objects.propagation import Propagation
from vjepa_jax.parallel import sharding

H, W, D, K = 5, 7, 6, 3


def plain(features, first, propagation):
    """Propagate labels token by token."""
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    labels = [first]
    for t in range(1, len(unit)):
        # The first frame, and the last ones that are not it.
        seen = [0, *range(max(1, t - propagation.last_frames), t)]
        found = np.zeros_like(first)
        for y in range(H):
            for x in range(W):
                scores = []
                for s in seen:
                    for v in range(H):
                        for u in range(W):
                            if (y - v) ** 2 + (x - u) ** 2 <= propagation.radius**2:
                                cosine = unit[t, y, x] @ unit[s, v, u]
                                scores.append((cosine, labels[s][v, u]))
                scores.sort(key=lambda pair: -pair[0])
                best = scores[: propagation.top_k]
                weights = np.exp(
                    [cosine / propagation.temperature for cosine, _ in best]
                )
                weights /= weights.sum()
                found[y, x] = sum(
                    w * of for w, (_, of) in zip(weights, best, strict=True)
                )
        labels.append(found)
    return np.stack(labels[1:])


PROPAGATIONS = [
    Propagation(2, radius=2, top_k=4, temperature=0.1, tokens_at_once=3),
    Propagation(0, radius=1.5, top_k=1, temperature=0.2),
    Propagation(9, radius=99, top_k=5, temperature=0.5, tokens_at_once=35),
    # Fewer tokens than top_k are near.
    Propagation(1, radius=0, top_k=7, temperature=0.3, tokens_at_once=8),
]


@pytest.mark.parametrize("propagation", PROPAGATIONS, ids=str)
def test_agrees_with_a_plain_loop(rng, propagation):
    features = rng.normal(size=(6, H, W, D))
    first = rng.dirichlet(np.ones(K), (H, W))
    wanted = plain(features, first, propagation)
    for mesh in (one_device(), sharding.make_mesh(4, 2)):
        found = [*propagation(iter(features), first.astype(np.float32), mesh)]
        np.testing.assert_allclose(np.stack(found), wanted, atol=2e-5)


def test_labels_follow_what_moves(rng):
    """A token with features of its own is followed as far as the radius reaches."""
    background = rng.normal(size=D)
    features = np.tile(background, (4, H, W, 1))
    thing = rng.normal(size=D)
    thing -= background * (thing @ background) / (background @ background)
    path = [(1, 0), (2, 1), (2, 3), (4, 4)]
    for frame, place in enumerate(path):
        features[(frame, *place)] = thing
    features += rng.normal(0, 1e-3, features.shape)
    first = np.zeros((H, W, 2), np.float32)
    first[..., 0] = 1
    first[1, 0] = 0, 1
    propagation = Propagation(2, radius=2.3, top_k=1, temperature=0.1)
    mesh = one_device()
    found = np.stack([*propagation(iter(features), first, mesh)])
    for frame, place in enumerate(path[1:]):
        assert found[(frame, *place, 1)] == pytest.approx(1)
        assert found[frame, ..., 1].sum() == pytest.approx(1)
    # From the first frame alone, the last position is out of reach.
    alone = dataclasses.replace(propagation, last_frames=0)
    found = np.stack([*alone(iter(features), first, mesh)])
    assert found[-1, ..., 1].sum() == pytest.approx(0)
