"""Attentive probes find values that tokens hold, and none where they hold none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vjepa_jax.evals.heads import probes
from vjepa_jax.evals.heads.head_grid import GridTraining, HeadGrid, Schedules
from vjepa_jax.evals.heads.probes import ProbeTraining
from vjepa_jax.models.heads import AttentiveRegressor
from vjepa_jax.parallel import sharding

TOKENS, WIDTH = 6, 8


@pytest.fixture(scope="module")
def training():
    return ProbeTraining(
        num_heads=2,
        epochs=20,
        batch_size=64,
        learning_rates=(1e-2, 1e-9),
        weight_decay=0.0,
        seed=0,
        mesh=sharding.make_mesh(devices=jax.devices()[:1]),
    )


def make_data(rng, count):
    """One token of each sample is marked, and holds the values; the others hide it.

    Of `late`, which three samples of four lack, the sum over tokens is known.
    """
    tokens = rng.normal(0, 1, (count, TOKENS, WIDTH)).astype(np.float32)
    tokens[..., 0] = 0.0
    marked = np.arange(count), rng.integers(0, TOKENS, count)
    tokens[(*marked, 0)] = 4.0
    values = {
        "marked": 100 + 20 * tokens[marked][:, 1:3],
        "late": tokens[..., 3].sum(1, keepdims=True),
        "noise": rng.normal(0, 1, (count, 1)),
    }
    values["late"][np.arange(count) % 4 > 0] = np.nan
    return tokens, values


def test_values_are_found_where_a_mean_does_not_show_them(rng, training):
    train, test = make_data(rng, 1200), make_data(rng, 400)
    clips = np.arange(1200) // 2
    found = probes.attentive_r2(*train, clips, *test, training)
    assert set(found) == {"marked", "late", "noise"}
    assert found["marked"] > 0.6 and found["late"] > 0.5
    assert found["noise"] < 0.1
    linear = probes.linear_r2(
        train[0].mean(1), train[1]["marked"], test[0].mean(1), test[1]["marked"]
    )
    assert linear < 0.35  # one token of six


class Enough(Exception):
    """Ends a training that the test does not need."""


def test_tokens_of_a_clip_are_held_out_together(rng, training, monkeypatch):
    seen = []

    def spy(self, head, loss_fn, tokens, labels, rows, generator):
        seen.append(rows)
        raise Enough

    monkeypatch.setattr(ProbeTraining, "fit", spy)
    tokens, values = make_data(rng, 200)
    clips = rng.permutation(np.repeat(np.arange(50), 4))
    with pytest.raises(Enough):
        probes.attentive_r2(tokens, values, clips, tokens, values, training)
    (rows,) = seen
    held_out = np.setdiff1d(np.arange(200), rows)
    assert len(held_out) == 20
    assert not set(clips[held_out]) & set(clips[rows])


@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_squared_error_leaves_out_unknown_values(seed, share):
    rng = np.random.default_rng(seed)
    found, wanted = rng.normal(size=(2, 5, 3)).astype(np.float32)
    wanted[rng.uniform(size=wanted.shape) < share] = np.nan
    expected = np.nansum((found - wanted) ** 2, axis=1) / 3
    result = probes.squared_error(jnp.asarray(found), jnp.asarray(wanted))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_heads_of_values_follow_their_loss(rng):
    """One update of plain arithmetic: Adam's first step has the gradient's sign."""
    head = AttentiveRegressor((("a", 2), ("b", 1)), num_heads=2)
    grid = HeadGrid(
        head,
        GridTraining(
            (Schedules((1e-3, 3e-3), (0.0,)),),
            total_steps=100,
            loss_fn=probes.squared_error,
        ),
        (TOKENS, WIDTH),
        seed=3,
        mesh=sharding.make_mesh(devices=jax.devices()[:1]),
    )
    tokens = rng.normal(size=(11, TOKENS, WIDTH)).astype(np.float32)
    wanted = np.full((11, 3), np.nan, np.float32)
    wanted[:, 2] = 5.0
    before = grid.predict(tokens)
    assert before.shape == (2, 11, 3)
    first = jax.tree.map(lambda x: x[0], grid.state[0])
    np.testing.assert_allclose(
        before[0], head.apply({"params": first}, tokens), rtol=1e-4, atol=1e-6
    )
    losses = np.asarray(grid.update(tokens, wanted, np.ones(11)))
    np.testing.assert_allclose(
        losses, ((before[..., 2] - 5) ** 2).mean(1) / 3, rtol=1e-4
    )
    bias = grid.state[0]["pool"]["b_linear"]["bias"]
    # Too small: both heads move up by their rate; unknown values change nothing.
    np.testing.assert_allclose(bias[:, 0], (1e-3, 3e-3), rtol=1e-3)
    assert not np.any(grid.state[0]["pool"]["a_linear"]["bias"])
