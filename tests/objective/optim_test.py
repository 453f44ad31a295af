"""Schedules against plain formulas, AdamW against a plain loop of PyTorch's."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from step_setup import make_init_of

from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.objective import optim
from vjepa_jax.objective.state import init_shapes

VALUES = st.floats(0, 10)


# ---------------------------------------------------------------------------- schedules


def official_warmup_cosine(num_updates, start, peak, end, warmup_steps, decay_steps):
    """List the rates of the first updates; the counter is increased before its use."""
    rates = []
    for step in range(1, num_updates + 1):
        if step < warmup_steps:
            rates.append(start + step / warmup_steps * (peak - start))
        else:
            progress = (step - warmup_steps) / max(1, decay_steps - warmup_steps)
            progress = min(progress, 1)
            rates.append(end + (peak - end) * (1 + math.cos(math.pi * progress)) / 2)
    return rates


@settings(max_examples=50, deadline=None)
@given(VALUES, VALUES, VALUES, st.integers(0, 20), st.integers(1, 40))
def test_warmup_cosine_equals_the_plain_formula(start, peak, end, warmup, decay):
    schedule = optim.warmup_cosine(start, peak, end, warmup, warmup + decay)
    expected = official_warmup_cosine(70, start, peak, end, warmup, warmup + decay)
    # Single precision, where a cosine near -1 cancels.
    np.testing.assert_allclose(schedule(np.arange(70)), expected, rtol=1e-5, atol=1e-5)


def test_the_first_update_uses_step_one():
    schedule = optim.warmup_cosine(1.0, 2.0, 0.0, warmup_steps=10, decay_steps=100)
    np.testing.assert_allclose(schedule(0), 1.1, rtol=1e-6)
    np.testing.assert_allclose(schedule(9), 2.0, rtol=1e-6)
    np.testing.assert_allclose(schedule(99), 0.0, atol=1e-6)
    assert schedule(99) == schedule(500)


def test_a_schedule_longer_than_the_run_stops_midway():
    """Official: 90 000 updates of schedules of 112 500, rate 7.5e-5 at the end."""
    schedule = optim.warmup_cosine(2e-4, 6.25e-4, 1e-6, 12_000, 112_500)
    np.testing.assert_allclose(schedule(90_000 - 1), 7.5e-5, rtol=0.02)
    decay = optim.cosine(0.04, 0.4, 112_500)
    np.testing.assert_allclose(decay(90_000 - 1), 0.366, rtol=2e-3)
    momentum = optim.linear(0.998, 1.0, 112_500)
    np.testing.assert_allclose(momentum(90_000), 0.9996, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(VALUES, VALUES, st.integers(1, 40))
def test_cosine_and_linear_reach_their_ends_and_stay(start, end, decay_steps):
    steps = np.arange(60)  # one length: every other would be compiled anew
    progress = np.minimum((steps + 1) / decay_steps, 1)
    expected = end + (start - end) * (1 + np.cos(np.pi * progress)) / 2
    actual = optim.cosine(start, end, decay_steps)(steps)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    actual = optim.linear(start, end, decay_steps)(steps)
    expected = start + np.minimum(steps / decay_steps, 1) * (end - start)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(VALUES, VALUES, st.integers(1, 40))
def test_linear_decay_equals_the_plain_loop_and_stays_at_its_end(start, end, steps):
    expected = []
    for count in range(1, 61):  # increased before its use, as officially
        fallen = count / steps
        # Officially the rate goes on falling; ours stays.
        expected.append(start + fallen * (end - start) if count < steps else end)
    actual = optim.linear_decay(start, end, steps)(np.arange(60))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(VALUES, VALUES, VALUES, *[st.integers(0, 12)] * 3)
def test_warmup_stable_decay_equals_the_plain_loop(
    start, peak, end, warmup, hold, anneal
):
    total = max(warmup + hold + anneal, 1)
    expected = []
    for count in range(1, 61):
        if count < warmup:
            expected.append(start + count / warmup * (peak - start))
        elif count <= total - anneal:
            expected.append(peak)
        elif count < total:
            fallen = (count - (total - anneal)) / anneal
            expected.append(peak + fallen * (end - peak))
        else:
            expected.append(end)
    schedule = optim.warmup_stable_decay(start, peak, end, warmup, anneal, total)
    actual = schedule(np.arange(60))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_constant_schedules_are_constant():
    for schedule in (optim.cosine(0.3, 0.3, 10), optim.linear(0.3, 0.3, 10)):
        np.testing.assert_allclose(schedule(np.arange(30)), 0.3, rtol=1e-6)


# ---------------------------------------------------------------------------- optimiser


def test_all_parameters_decay_but_biases_and_norm_scales():
    encoder = VideoEncoder(2, 24, 2, 48, patch_size=4)
    predictor = Predictor(2, 12, 2, 24, out_dim=24)
    init = make_init_of(encoder, predictor, optax.identity(), (4, 8, 8, 3))
    params = nn.unbox(jax.eval_shape(init, jax.random.key(0))).params
    marked = jax.tree_util.tree_leaves_with_path(optim.is_decayed(params))
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    decayed = set()
    for (path, decays), shape in zip(marked, shapes, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # Official rule: nothing whose name holds `bias`, nothing of one dimension.
        per_layer = len(shape) - ("/blocks/" in name)
        assert decays == (per_layer > 1), name
        if decays:
            decayed.add(name.replace("/stack/blocks", ""))
    layers = ("qkv/kernel", "proj/kernel", "fc1/kernel", "fc2/kernel")
    assert decayed == {
        *(f"{model}/{x}" for model in ("encoder", "predictor") for x in layers),
        "encoder/embed/proj/kernel",
        "predictor/embed/kernel",
        "predictor/mask_tokens",
    }


def pytorch_adamw(params, grads, rates, decays, b1, b2, eps):
    """Loop as `torch.optim.AdamW` documents it: decay first, then Adam, in fp64."""
    params = {k: v.astype(np.float64) for k, v in params.items()}
    first = {k: np.zeros_like(v) for k, v in params.items()}
    second = {k: np.zeros_like(v) for k, v in params.items()}
    for t, (grad, rate, decay) in enumerate(zip(grads, rates, decays, strict=True), 1):
        for k in params:
            if k != "bias":
                params[k] = params[k] * (1 - rate * decay)
            first[k] = b1 * first[k] + (1 - b1) * grad[k]
            second[k] = b2 * second[k] + (1 - b2) * grad[k] ** 2
            step = (first[k] / (1 - b1**t)) / (np.sqrt(second[k] / (1 - b2**t)) + eps)
            params[k] = params[k] - rate * step
    return params


@pytest.mark.parametrize("b2", [0.95, 0.999])
def test_updates_are_those_of_pytorchs_adamw_under_both_schedules(b2, rng):
    steps, eps = 12, 1e-6
    shapes = {"kernel": (4, 5), "bias": (5,), "mask_tokens": (2, 3)}
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    # Gradients of one sign on the whole: no leaf may come back to where it was.
    grads = [
        {k: rng.normal(1.0, size=s).astype(np.float32) for k, s in shapes.items()}
        for _ in range(steps)
    ]
    tx = optim.make_optimizer(
        optim.warmup_cosine(0.01, 0.1, 0.0, 4, 15),
        optim.cosine(0.1, 0.9, 15),
        (0.8, b2),
        eps,
    )
    expected = pytorch_adamw(
        params,
        grads,
        official_warmup_cosine(steps, 0.01, 0.1, 0.0, 4, 15),
        official_warmup_cosine(steps, 0.1, 0.1, 0.9, 0, 15),
        0.8,
        b2,
        eps,
    )
    wrapped = {"encoder": params}
    state = tx.init(wrapped)
    update = jax.jit(tx.update)
    for step, grad in enumerate(grads):
        updates, state = update({"encoder": grad}, state, wrapped, step=step)
        wrapped = optax.apply_updates(wrapped, updates)
    for name, value in expected.items():
        actual = wrapped["encoder"][name]
        # Twelve updates of 0.1 in single precision; their sum is about one.
        np.testing.assert_allclose(actual, value, atol=1e-5, err_msg=name)
        assert np.abs(actual - params[name]).max() > 0.1


def test_each_module_is_clipped_by_its_own_norm(rng):
    grads = {
        "encoder": {"a": rng.normal(size=(6, 2)) * 50, "b": rng.normal(size=3)},
        "predictor": {"a": rng.normal(size=4) * 1e-3},
    }
    grads = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grads)
    clip = optim.clip_by_module_norm(2.0)
    clipped, _ = clip.update(grads, clip.init(grads), step=0)
    norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(grads["encoder"])))
    assert norm > 2
    for name in ("a", "b"):
        np.testing.assert_allclose(
            clipped["encoder"][name], grads["encoder"][name] * 2 / norm, rtol=1e-5
        )
    np.testing.assert_array_equal(clipped["predictor"]["a"], grads["predictor"]["a"])


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_the_optimiser_clips_only_if_asked(clip_norm, rng):
    """Epsilon is made so large that Adam's update is proportional to the gradient."""
    grads = {"encoder": {"kernel": jnp.asarray(rng.normal(size=(30, 30)), jnp.float32)}}
    params = jax.tree.map(jnp.zeros_like, grads)

    def one(step):
        del step
        return 1.0

    tx = optim.make_optimizer(one, lambda step: 0.0, eps=1e6, clip_norm=clip_norm)
    updates, _ = tx.update(grads, tx.init(params), params, step=0)
    norm = np.linalg.norm(grads["encoder"]["kernel"])
    assert norm > 10
    expected = (min(norm, clip_norm) if clip_norm else norm) / 1e6
    actual = np.linalg.norm(updates["encoder"]["kernel"])
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_clipping_starts_at_its_step(rng):
    grads = {"encoder": {"kernel": jnp.asarray(rng.normal(size=(9, 9)), jnp.float32)}}
    clip = optim.clip_by_module_norm(0.5, start_step=3)
    update = jax.jit(lambda step: clip.update(grads, clip.init(grads), step=step)[0])
    for step in range(6):
        clipped = update(step)["encoder"]["kernel"]
        if step < 3:
            np.testing.assert_array_equal(clipped, grads["encoder"]["kernel"])
        else:
            np.testing.assert_allclose(np.linalg.norm(clipped), 0.5, rtol=1e-5)


def test_schedules_follow_the_steps_of_the_run_and_not_the_updates_taken(rng):
    """A skipped update leaves the optimiser's own count behind the run's."""
    params = {"encoder": {"kernel": jnp.asarray(rng.normal(size=5), jnp.float32)}}
    grads = jax.tree.map(lambda x: x * 2, params)
    rate = optim.warmup_cosine(0.1, 1.0, 0.0, 5, 20)
    decay = optim.cosine(0.1, 0.5, 20)
    tx = optim.make_optimizer(rate, decay, eps=1e-30)
    update = jax.jit(tx.update)
    for step in (0, 2, 9, 30):
        updates, _ = update(grads, tx.init(params), params, step=step)
        # Adam's first direction is the gradient's sign.
        kernel = np.asarray(params["encoder"]["kernel"])
        expected = -rate(step) * (np.sign(kernel) + decay(step) * kernel)
        actual = updates["encoder"]["kernel"]
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


def test_decay_moves_what_it_should_from_the_state_that_a_run_starts_with(rng):
    """A run's optimiser state is made from boxed parameters."""
    tx = optim.make_optimizer(lambda _: 0.1, lambda _: 0.5, clip_norm=1.0)
    encoder = VideoEncoder(2, 24, num_heads=2, mlp_dim=40, patch_size=4)
    predictor = Predictor(2, 16, num_heads=2, mlp_dim=32, out_dim=24)
    state = init_shapes(make_init_of(encoder, predictor, tx, (2, 8, 8, 3)))
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), state.params
    )
    opt_state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state.opt_state)
    # Zero gradients: clipping must not divide by their norm either.
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, new_state = jax.jit(tx.update)(zeros, opt_state, params, step=0)
    assert jax.tree.structure(new_state) == jax.tree.structure(opt_state)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    leaves = zip(paths, jax.tree.leaves(params), jax.tree.leaves(updates), strict=True)
    for path, leaf, update in leaves:
        name = jax.tree_util.keystr(path)
        decays = "bias" not in name and leaf.ndim - ("stack" in name) > 1
        share = -0.1 * 0.5 if decays else 0.0
        np.testing.assert_allclose(update, share * leaf, rtol=1e-5, err_msg=name)
