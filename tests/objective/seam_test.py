"""Another objective, without masks or target, uses the same step and checkpoints."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from step_setup import batch_of, videos

from vjepa_jax.objective import optim
from vjepa_jax.objective.state import init_shapes, make_init, unbox
from vjepa_jax.objective.step import SpikeGuard, make_train_step
from vjepa_jax.parallel import sharding
from vjepa_jax.run import checkpoint

BATCH, SHAPE = 8, (2, 4, 4, 3)
STEPS, WINDOW = 20, 3
SCHEDULES = {
    "learning_rate": optim.linear(1e-2, 1e-2, STEPS),
    "weight_decay": optim.linear(0.0, 0.0, STEPS),
}


def pixels(clips):
    """Return each clip as a vector in [-1, 1]."""
    return clips.reshape(len(clips), -1) / 127.5 - 1.0


@dataclasses.dataclass(frozen=True)
class DenoisingAutoencoder:
    """Reconstruct all pixels of a clip from a random half; see `Objective`."""

    model: nn.Module
    probe_item: str = "autoencoder"

    @property
    def modules(self):
        return (self.model,)

    def init(self, key, batch):
        clips = jnp.zeros((1, *batch["video"].shape[1:]))
        return {"autoencoder": self.model.init(key, pixels(clips))["params"]}, None

    def sample(self, key, batch):
        return jax.random.bernoulli(key, 0.5, pixels(batch["video"]).shape)

    def loss(self, params, target, batch, sampled, key, step):
        assert target is None
        wanted = pixels(batch["video"])
        variables = {"params": params["autoencoder"]}
        error = self.model.apply(variables, jnp.where(sampled, wanted, 0.0)) - wanted
        loss = jnp.square(error).mean()
        return loss, {"train/total_loss": loss}

    def update_target(self, params, target, step):
        return target


@dataclasses.dataclass
class Run:
    """The parts of a run, made as for every objective."""

    accumulate_steps: int = 1

    def __post_init__(self):
        self.mesh = sharding.make_mesh(2, 4)
        self.objective = DenoisingAutoencoder(nn.Dense(int(np.prod(SHAPE))))
        tx = optim.make_optimizer(SCHEDULES["learning_rate"], SCHEDULES["weight_decay"])
        init = make_init(self.objective, tx, batch_of(BATCH, SHAPE), WINDOW)
        shardings = sharding.state_shardings(init, self.mesh)
        self.abstract = jax.tree.map(
            lambda x, s: x.update(sharding=s), init_shapes(init), shardings
        )
        step = make_train_step(
            self.objective,
            tx,
            SCHEDULES,
            seed=0,
            accumulate_steps=self.accumulate_steps,
            spike_guard=SpikeGuard(WINDOW, 100.0),
        )
        self.step = jax.jit(step, out_shardings=(shardings, None))
        self.start = unbox(jax.jit(init, out_shardings=shardings)(jax.random.key(1)))

    def train(self, state, batch, count):
        """Return the state after `count` updates on one batch, and the losses."""
        losses = []
        with sharding.use(self.mesh):
            for _ in range(count):
                state, metrics = self.step(
                    state, sharding.shard_batch(batch, self.mesh)
                )
                losses.append(float(metrics["train/total_loss"]))
        return state, losses


@pytest.fixture(scope="module")
def run():
    return Run(accumulate_steps=1)


@pytest.fixture
def batch(rng):
    return {"video": videos(rng, BATCH, SHAPE)}


def test_its_loss_falls(run, batch):
    state, losses = run.train(run.start, batch, STEPS)
    assert state.target is None and int(state.step) == STEPS
    assert int(state.guard.skipped) == 0
    assert losses[-1] < 0.5 * losses[0]


def test_accumulation_does_not_change_it(run, batch):
    whole, losses = run.train(run.start, batch, 3)
    parts, others = Run(accumulate_steps=2).train(run.start, batch, 3)
    np.testing.assert_allclose(losses, others, rtol=1e-5)
    chex.assert_trees_all_close(whole.params, parts.params, atol=1e-5)


def test_its_checkpoints_restore_and_have_no_target(run, batch, tmp_path):
    state, _ = run.train(run.start, batch, 2)
    item = run.objective.probe_item
    position = {"step": 2, "fingerprint": "of videos"}
    meta = {"probe_item": item}
    with checkpoint.Checkpointer(str(tmp_path), every_steps=1, keep=1) as checkpointer:
        assert checkpointer.save(2, state, position, meta)
        checkpointer.wait()
        _, restored, data, _ = checkpointer.restore(2, run.abstract)
    chex.assert_trees_all_equal(restored, state)
    assert restored.target is None and data == position
    assert optax.tree.norm(restored.params) > 0
    folder = tmp_path / checkpoint.FOLDER / "2"
    assert (folder / "state").is_dir() and not (folder / "target").exists()

    params, meta = checkpoint.restore_target(str(tmp_path))
    assert meta["probe_item"] == item
    chex.assert_trees_all_equal(params, jax.device_get(state.params[item]))
    step, fields = checkpoint.restore_start(str(tmp_path), run.abstract, True)
    assert step == 2 and fields.keys() == {"params", "opt_state"}
    chex.assert_trees_all_equal(fields["opt_state"], state.opt_state)

    # The restored run continues like the original one.
    chex.assert_trees_all_equal(
        run.train(restored, batch, 2), run.train(state, batch, 2)
    )
