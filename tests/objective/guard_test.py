"""A step skips updates that are not finite, and spikes of the loss.

In most tests loss and gradient are injected, so that they are known.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from step_setup import Setup, as_batch, copy_to_host, one_device, videos
from step_setup import batch_of as shapes_of

from vjepa_jax.objective import optim
from vjepa_jax.objective.masked import LossTerms
from vjepa_jax.objective.state import Guard, TrainState, make_init
from vjepa_jax.objective.step import SpikeGuard, make_train_step
from vjepa_jax.parallel import sharding

BATCH = 8
SCHEDULES = {
    "learning_rate": optim.warmup_cosine(0.0, 0.1, 0.01, 3, 40),
    "weight_decay": optim.cosine(0.1, 0.4, 40),
    "ema_momentum": optim.linear(0.5, 1.0, 40),
}


class Injected:
    """An objective whose loss and gradient are in the batch."""

    def sample(self, key, batch):
        return {}

    def loss(self, params, target, batch, sampled, key, step):
        loss, slope = batch["loss"].mean(), batch["slope"].mean()
        value = sum(tree["w"].sum() for tree in params.values()) * slope
        return value, {"train/total_loss": loss}

    def update_target(self, params, target, step):
        momentum = SCHEDULES["ema_momentum"](step)
        return optax.incremental_update(params["encoder"], target, 1 - momentum)


def make_toy(spike_guard=None):
    """Make a step of the injected loss, and its state before the first one."""
    tx = optim.make_optimizer(SCHEDULES["learning_rate"], SCHEDULES["weight_decay"])
    step = make_train_step(Injected(), tx, SCHEDULES, 0, spike_guard=spike_guard)
    params = {"encoder": {"w": jnp.arange(1.0, 4)}, "predictor": {"w": jnp.ones(2)}}
    window = spike_guard.window if spike_guard else 1
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(
        step=zero,
        params=params,
        target={"w": jnp.zeros(3)},
        opt_state=tx.init(params),
        guard=Guard(zero, zero, zero, jnp.full(window, jnp.inf)),
    )
    return jax.jit(step), state


def batch_of(loss, slope=1.0):
    """Make a batch whose means are a loss and a slope."""
    noise = np.linspace(-1, 1, BATCH) * 0.1
    values = {"loss": loss + noise, "slope": slope + noise}
    return {k: v.astype(np.float32) for k, v in values.items()}


def changes(state):
    """Return the arrays that a skipped update must not change."""
    return jax.tree.leaves((state.params, state.target, state.opt_state))


def assert_identical(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


NOT_FINITE = [
    (np.nan, 1.0),
    (np.inf, 1.0),
    (1.0, np.nan),
    (1.0, -np.inf),
    (np.nan, np.nan),
]


def test_updates_that_are_not_finite_are_skipped():
    step, state = make_toy()
    state, _ = step(state, batch_of(1.0))
    before = changes(copy_to_host(state))
    for count, (loss, slope) in enumerate(NOT_FINITE, start=1):
        state, metrics = step(state, batch_of(loss, slope))
        assert_identical(changes(state), before)
        assert int(state.step) == 1 + count
        assert int(state.guard.skipped) == int(state.guard.skipped_in_row) == count
        assert metrics["optim/skipped"] == metrics["optim/skipped_in_row"] == count
        # Schedules depend on the step, although nothing was updated.
        for name, schedule in SCHEDULES.items():
            np.testing.assert_allclose(
                metrics[f"optim/{name}"], schedule(count), rtol=1e-6
            )
    # The next update is that of a run without these batches, at this step.
    zero = jnp.zeros((), jnp.int32)
    unharmed = state.replace(guard=Guard(zero, zero, zero, jnp.full(1, jnp.inf)))
    expected, _ = step(unharmed, batch_of(0.9, 2.0))
    state, metrics = step(state, batch_of(0.9, 2.0))
    assert_identical(changes(state), changes(expected))
    assert int(state.step) == 2 + len(NOT_FINITE)
    assert metrics["optim/skipped"] == len(NOT_FINITE)
    assert metrics["optim/skipped_in_row"] == 0
    moved = [np.abs(a - b).max() for a, b in zip(changes(state), before, strict=True)]
    assert min(moved) > 0


def test_a_model_that_is_not_finite_is_left_as_it_is(rng):
    """The same with a real model that has a NaN among its weights."""
    setup = Setup(encoder={"depth": 1}, terms=LossTerms())
    state = setup.random_state(rng)
    poisoned = state.params["encoder"]["norm"]["scale"].copy()
    poisoned[3] = np.nan
    state.params["encoder"]["norm"]["scale"] = poisoned
    before = changes(copy_to_host(state))
    after, metrics = jax.jit(setup.step)(state, as_batch(videos(rng, 4)))
    assert np.isnan(metrics["train/total_loss"])
    assert_identical(changes(after), before)
    assert int(after.step) == 1 and int(after.guard.skipped) == 1


def decide(losses, window, deviations):
    """Decide with a plain rule which losses are accepted."""
    recent, taken = [], []
    for loss in losses:
        is_spike = len(recent) == window and loss > (
            np.mean(recent) + deviations * np.std(recent)
        )
        taken.append(bool(np.isfinite(loss) and not is_spike))
        if taken[-1]:
            recent = [*recent, loss][-window:]
    return taken


def spiky_losses(rng, count, window, deviations):
    """Draw losses around the threshold, but never on it."""
    losses, recent = [], []
    for _ in range(count):
        if len(recent) < window:
            loss = rng.choice([rng.uniform(1, 2), rng.uniform(50, 90), np.nan])
        else:
            off = rng.choice([-4.0, -2.0, -0.5, 0.5, 3.0])
            spread = max(np.std(recent), 0.05)
            loss = np.mean(recent) + deviations * np.std(recent) + off * spread
            loss = rng.choice([loss, np.nan], p=[0.9, 0.1])
        losses.append(float(loss))
        if decide([*recent, loss], window, deviations)[-1]:
            recent = [*recent, loss][-window:]
    return losses


def run(step, state, losses, mesh=None):
    """Return which updates were taken, and the last state."""
    taken = []
    for loss in losses:
        batch = batch_of(loss)
        if mesh is not None:
            batch = sharding.shard_batch(batch, mesh)
        new, metrics = step(state, batch)
        taken.append(int(new.guard.skipped) == int(state.guard.skipped))
        assert taken[-1] == (float(metrics["optim/skipped_in_row"]) == 0)
        moved = (new.params["encoder"]["w"] != state.params["encoder"]["w"]).any()
        assert bool(moved) == taken[-1]
        state = new
    return taken, state


def test_spikes_are_those_of_the_plain_rule_and_do_not_enter_the_window(
    monkeypatch, rng
):
    window, deviations = 5, 2.5
    step, state = make_toy(SpikeGuard(window, deviations))
    losses = spiky_losses(rng, 60, window, deviations)
    expected = decide(losses, window, deviations)
    taken, state = run(step, state, losses)
    assert taken == expected
    kept = [loss for loss, is_taken in zip(losses, expected, strict=True) if is_taken]
    np.testing.assert_allclose(state.guard.losses, kept[-window:], rtol=1e-5)
    # Before the window is full no loss is a spike.
    first = next(i for i in range(60) if sum(expected[:i]) == window)
    assert expected[:first] == np.isfinite(losses[:first]).tolist()


def test_without_a_guard_no_loss_is_too_large():
    step, state = make_toy()
    taken, _ = run(step, state, [1.0, 1.0, 1.0, 1e6, 1.0])
    assert all(taken)


def test_all_devices_decide_equally(rng):
    losses = spiky_losses(rng, 25, 3, 2.0)
    runs = []
    for mesh in (one_device(), sharding.make_mesh(4, 2)):
        with sharding.use(mesh):
            step, state = make_toy(SpikeGuard(3, 2.0))
            state = jax.device_put(state, sharding.replicated(mesh))
            runs.append(run(step, state, losses, mesh))
    (taken, state), (again, spread) = runs
    assert taken == again == decide(losses, 3, 2.0)
    assert 3 < sum(taken) < len(taken)
    np.testing.assert_allclose(state.guard.losses, spread.guard.losses, rtol=1e-6)
    assert len(spread.guard.skipped.sharding.device_set) == 8
    np.testing.assert_allclose(
        state.params["encoder"]["w"], spread.params["encoder"]["w"], rtol=1e-5
    )


@pytest.mark.parametrize(("window", "remembered"), [(0, 1), (7, 7)])
def test_a_new_state_has_skipped_nothing_and_holds_no_empty_array(window, remembered):
    setup = Setup()
    init = make_init(setup.objective, setup.tx, shapes_of(1), window)
    state = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
    assert state.guard.losses.shape == (remembered,)
    # Orbax does not store empty arrays.
    assert all(leaf.size for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("guard", [None, SpikeGuard(3, 2.0)])
def test_jax_debug_nans_finds_nothing_in_a_sound_run(guard):
    step, state = make_toy(guard)
    with jax.debug_nans(True):
        init = make_init(Setup().objective, Setup().tx, shapes_of(1), 3)
        nn.unbox(jax.jit(init)(jax.random.key(0)))
        for _ in range(4):
            state, _ = step(state, batch_of(1.0))
        with pytest.raises(FloatingPointError):
            step(state, batch_of(np.nan))
