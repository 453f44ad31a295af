"""Checkpoints restore bit for bit, survive kills, and name arrays that do not fit."""

import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vjepa_jax.base.errors import UserError
from vjepa_jax.run import checkpoint
from vjepa_jax.run.checkpoint import Checkpointer, restore_target
from vjepa_jax.run.checkpoint_step import FORMAT_VERSION

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
DATA = {"step": 3, "fingerprint": "abc"}
META = {
    "config": {"betas": [0.9, 0.95], "path": None},
    "video_shape": [4, 16, 16, 3],
}


class TrainState(flax.struct.PyTreeNode):
    step: jax.Array
    params: dict
    target: dict
    opt_state: optax.OptState
    guard: dict


def init(key, width=256):
    # A kernel of 1 MiB: large and small buffers are handled differently.
    encoder = {
        "fc": {
            "kernel": jax.random.normal(key, (1024, width)),
            "bias": jnp.zeros(width, jnp.bfloat16),
        }
    }
    params = {"encoder": encoder, "predictor": {"proj": jnp.ones((width, 8))}}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        target=jax.tree.map(jnp.copy, encoder),
        opt_state=OPTIMIZER.init(params),
        guard={"losses": jnp.full(3, jnp.nan)},
    )


def step_fn(state, batch):
    def loss_fn(params):
        fc = params["encoder"]["fc"]
        return jnp.square(batch @ fc["kernel"] + fc["bias"]).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    target = optax.incremental_update(params["encoder"], state.target, 0.1)
    return TrainState(state.step + 1, params, target, opt_state, state.guard), loss


def make_mesh(data, fsdp):
    devices = jax.devices()[: data * fsdp]
    return jax.make_mesh(
        (data, fsdp), ("data", "fsdp"), (AxisType.Auto,) * 2, devices=devices
    )


def make_abstract(mesh, width=256):
    def with_sharding(leaf):
        spec = PartitionSpec("fsdp") if leaf.ndim == 2 else PartitionSpec()
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(
        with_sharding, jax.eval_shape(lambda: init(jax.random.key(0), width))
    )


def make_state(abstract, seed=0):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    make = jax.jit(init, static_argnums=1, out_shardings=shardings)
    return make(jax.random.key(seed), abstract.target["fc"]["bias"].size)


def make_step(abstract):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    replicated = jax.tree.leaves(shardings)[0].mesh
    replicated = NamedSharding(replicated, PartitionSpec())
    return jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, replicated))


def batch(step):
    return np.asarray(jax.random.normal(jax.random.key(100 + step), (16, 1024)))


def to_host(tree):
    """Copy, so that later donation cannot change the values."""
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


def assert_identical(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for one, two in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert one.dtype == two.dtype
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


@pytest.fixture(scope="module")
def abstract():
    return make_abstract(make_mesh(2, 4))


@pytest.fixture(scope="module")
def run(tmp_path_factory, abstract):
    """Make a workdir with the checkpoints 2 and 4; return it and both states."""
    workdir = tmp_path_factory.mktemp("run")
    states = {}
    with Checkpointer(workdir, every_steps=2, keep=3) as checkpointer:
        for step in (2, 4):
            state = make_state(abstract, seed=step)
            checkpointer.save(step, state, DATA | {"step": step}, META)
            states[step] = to_host(state)
    return workdir, states


def test_restored_state_is_identical(run, abstract):
    workdir, states = run
    with Checkpointer(workdir, every_steps=2, keep=3) as checkpointer:
        assert checkpointer.latest_step() == 4
        _, state, data, meta = checkpointer.restore(2, abstract)
    assert_identical(to_host(state), states[2])
    assert data == {"step": 2, "fingerprint": "abc"}
    assert meta["config"] == META["config"]
    assert meta["format_version"] == FORMAT_VERSION
    assert meta["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize("mesh_shape", [(4, 2), (1, 1)])
def test_state_is_restored_on_another_mesh(run, mesh_shape):
    workdir, states = run
    abstract = make_abstract(make_mesh(*mesh_shape))
    with Checkpointer(workdir, every_steps=2, keep=3) as checkpointer:
        state = checkpointer.restore(4, abstract).state
    assert_identical(to_host(state), states[4])
    got = jax.tree.map(lambda leaf: leaf.sharding, state)
    assert got == jax.tree.map(lambda leaf: leaf.sharding, abstract)


def test_state_may_be_donated_right_after_save(tmp_path, abstract):
    step = make_step(abstract)
    # Compile first, so that the donation happens during the save.
    state, _ = step(make_state(abstract), batch(0))
    saved = to_host(state)
    with Checkpointer(tmp_path, every_steps=1, keep=1) as checkpointer:
        checkpointer.save(1, state, DATA, META)
        for i in range(1, 4):
            donated = state
            state, _ = step(state, batch(i))
        jax.block_until_ready(state)
        assert donated.params["encoder"]["fc"]["kernel"].is_deleted()
        checkpointer.wait()
        restored = checkpointer.restore(1, abstract).state
    assert_identical(to_host(restored), saved)


@pytest.mark.parametrize("mesh_shape", [(2, 4), (1, 1)])
def test_resumed_run_equals_the_unbroken_one(tmp_path, mesh_shape):
    abstract = make_abstract(make_mesh(*mesh_shape))
    step = make_step(abstract)
    losses, state = [], make_state(abstract)
    with Checkpointer(tmp_path, every_steps=3, keep=1) as checkpointer:
        for i in range(8):
            if i == 3:
                assert checkpointer.save(i, state, DATA, META)
            state, loss = step(state, batch(i))
            losses.append(loss)

    with Checkpointer(tmp_path, every_steps=3, keep=1) as checkpointer:
        resumed = checkpointer.restore(3, abstract).state
        assert int(resumed.step) == 3
    for i in range(3, 8):
        donated = resumed
        resumed, loss = step(resumed, batch(i))
        assert donated.params["encoder"]["fc"]["kernel"].is_deleted()
        assert loss == losses[i]
    assert_identical(to_host(resumed), to_host(state))


def test_checkpoints_follow_the_interval(tmp_path, abstract):
    state = make_state(abstract)
    with Checkpointer(tmp_path, every_steps=2, keep=2) as checkpointer:
        assert checkpointer.latest_step() is None
        assert [checkpointer.should_save(s) for s in range(4)] == [True, False] * 2
        saved = [s for s in range(7) if checkpointer.save(s, state, DATA, META)]
        assert saved == [0, 2, 4, 6]
        assert checkpointer.save(7, state, DATA, META, force=True)
        assert not checkpointer.save(7, state, DATA, META, force=True)
    folders = {p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()}
    assert folders == {"6", "7"}


def test_dictionaries_may_change_after_save(tmp_path, abstract):
    data = dict(DATA)
    with Checkpointer(tmp_path, every_steps=1, keep=1) as checkpointer:
        checkpointer.save(1, make_state(abstract), data, META)
        data["step"] = 99
        checkpointer.wait()
        assert checkpointer.restore(1, abstract).data == DATA


def test_what_is_not_json_fails_at_save(tmp_path, abstract):
    with Checkpointer(tmp_path, every_steps=1, keep=1) as checkpointer:
        with pytest.raises(TypeError, match="JSON"):
            checkpointer.save(1, make_state(abstract), DATA, {"config": object()})
        assert checkpointer.latest_step() is None


def test_relative_workdir_is_accepted(tmp_path, abstract, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpointer("run", every_steps=1, keep=1) as checkpointer:
        assert checkpointer.save(1, make_state(abstract), DATA, META)
    assert restore_target("run")[1]["config"] == META["config"]


def restore_error(workdir, step, abstract):
    with (
        Checkpointer(workdir, every_steps=2, keep=3) as checkpointer,
        pytest.raises(UserError) as error,
    ):
        checkpointer.restore(step, abstract)
    return str(error.value)


def test_other_shapes_are_listed(run):
    message = restore_error(run[0], 4, make_abstract(make_mesh(2, 4), width=512))
    assert f"{run[0] / checkpoint.FOLDER / '4'} does not fit this model" in message
    assert "choose a new workdir" in message
    name = "params/encoder/fc/kernel"
    assert (
        f"{name}: in checkpoint float32[1024,256], in model float32[1024,512]"
    ) in message
    # 3 in params, the same in each Adam moment, 2 in the target: 11.
    assert "(11 arrays differ)" in message
    assert message.count("in model") == 10
    assert message.endswith("and 1 more")


def test_missing_and_extra_arrays_are_listed(run, abstract):
    leaf = abstract.step
    wanted = abstract.replace(
        params={**abstract.params, "predictor": {"bias": leaf}},
    )
    message = restore_error(run[0], 4, wanted)
    assert "params/predictor/bias: in checkpoint missing, in model int32[]" in message
    assert (
        "params/predictor/proj: in checkpoint float32[256,8], in model missing"
    ) in message
    assert "(2 arrays differ)" in message


def test_another_optimizer_is_listed(run, abstract):
    opt_state = jax.eval_shape(optax.sgd(0.1, momentum=0.9).init, abstract.params)
    message = restore_error(run[0], 4, abstract.replace(opt_state=opt_state))
    assert "opt_state/0/trace/encoder/fc/bias: in checkpoint missing" in message


def test_target_and_dtypes_are_compared_too(run, abstract):
    fc = abstract.target["fc"]
    bias = jax.ShapeDtypeStruct(fc["bias"].shape, jnp.float32)
    wanted = abstract.replace(target={"fc": fc | {"bias": bias}})
    assert (
        "target/fc/bias: in checkpoint bfloat16[256], in model float32[256]"
    ) in restore_error(run[0], 4, wanted)


def test_step_that_is_not_there_is_refused(run, abstract):
    message = restore_error(run[0], 3, abstract)
    assert "no checkpoint of step 3" in message
    assert "saved steps: 2, 4" in message


def test_newer_format_is_refused(run, abstract, tmp_path):
    workdir = shutil.copytree(run[0], tmp_path / "run")
    meta_file = workdir / checkpoint.FOLDER / "4" / "meta" / "metadata"
    meta = json.loads(meta_file.read_text())
    meta_file.write_text(json.dumps(meta | {"format_version": 99}))
    assert "format 99" in restore_error(workdir, 4, abstract)
    with pytest.raises(UserError, match="format 99"):
        restore_target(workdir)


@pytest.mark.parametrize("folder", ["", checkpoint.FOLDER])
@pytest.mark.parametrize("step", [None, 2])
def test_target_is_restored_alone(run, folder, step):
    workdir, states = run
    target, meta = restore_target(workdir / folder, step)
    assert_identical(to_host(target), states[step or 4].target)
    assert meta["config"] == META["config"]
    for leaf in jax.tree.leaves(target):
        assert leaf.devices() == {jax.local_devices()[0]}


def test_target_needs_no_other_array(run, tmp_path):
    workdir = shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(workdir / checkpoint.FOLDER / "4" / "state")
    target, _ = restore_target(workdir)
    assert_identical(to_host(target), run[1][4].target)


def test_restoring_a_target_changes_nothing(run, tmp_path):
    workdir = shutil.copytree(run[0], tmp_path / "run")
    unfinished = workdir / checkpoint.FOLDER / "6.orbax-checkpoint-tmp"
    unfinished.mkdir()
    restore_target(workdir)
    # A probe may run during the training that writes this.
    assert unfinished.is_dir()


def test_target_errors_name_the_fix(run, tmp_path):
    with pytest.raises(UserError, match=r"no such folder: .*/nowhere; give"):
        restore_target(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no checkpoint in"):
        restore_target(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint of step 9 .* steps: 2, 4"):
        restore_target(run[0], 9)
    workdir = shutil.copytree(run[0], tmp_path / "run")
    shutil.rmtree(workdir / checkpoint.FOLDER / "4" / "target")
    with pytest.raises(UserError, match=r"4 is damaged \(target: .*step 2 is intact"):
        restore_target(workdir)


KILLED_RUN = """
import asyncio, os, signal, sys, time
from tests.run import checkpoint_test
from vjepa_jax.run import checkpoint

async def hang(*args):
    await asyncio.sleep(600)

state = checkpoint_test.make_state(
    checkpoint_test.make_abstract(checkpoint_test.make_mesh(1, 1))
)
checkpointer = checkpoint.Checkpointer(sys.argv[1], every_steps=1, keep=5)
checkpointer.save(1, state, checkpoint_test.DATA, checkpoint_test.META)
checkpointer.wait()
checkpoint.ocp.JsonCheckpointHandler._save_fn = hang
checkpointer.save(2, state, {}, {})
while len(os.listdir(os.path.join(sys.argv[1], checkpoint.FOLDER))) < 2:
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_save_that_was_killed_is_ignored(tmp_path):
    root = pathlib.Path(__file__).parents[2]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(tmp_path)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    folder = tmp_path / checkpoint.FOLDER
    assert len(list(folder.iterdir())) == 2

    abstract = make_abstract(make_mesh(1, 1))
    assert_identical(restore_target(tmp_path)[0], make_state(abstract).target)
    with Checkpointer(tmp_path, every_steps=1, keep=5) as checkpointer:
        assert checkpointer.latest_step() == 1
        state = checkpointer.restore(1, abstract).state
        assert_identical(state, make_state(abstract))
        assert checkpointer.save(2, state, DATA, META)
        checkpointer.wait()
        assert checkpointer.latest_step() == 2
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("look", [Checkpointer.wait, Checkpointer.check_errors])
def test_background_failure_surfaces(tmp_path, abstract, monkeypatch, look):
    folder = tmp_path / checkpoint.FOLDER
    write = checkpoint.ocp.JsonCheckpointHandler._save_fn

    async def write_and_obstruct(*args):
        await write(*args)
        # The renaming at the end of a save does not replace a folder.
        (folder / "1").mkdir(exist_ok=True)

    monkeypatch.setattr(
        checkpoint.ocp.JsonCheckpointHandler, "_save_fn", write_and_obstruct
    )
    checkpointer = Checkpointer(tmp_path, every_steps=1, keep=1)
    checkpointer.save(1, make_state(abstract), DATA, META)
    deadline = time.monotonic() + 30
    with pytest.raises(OSError, match="already exists") as error:
        while time.monotonic() < deadline:
            look(checkpointer)
    assert str(folder) in error.value.__notes__[0]
    checkpointer.close()


@pytest.fixture
def absl_records():
    """Collect what the process logs through absl at verbosity INFO."""
    logger, records = logging.getLogger("absl"), []
    handler, level = logging.Handler(), logger.level
    handler.emit = records.append
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)
    logger.filters.clear()


def test_orbax_progress_is_dropped_and_nothing_else(tmp_path, abstract, absl_records):
    logger = logging.getLogger("absl")
    checkpoint.quiet_orbax()
    with Checkpointer(tmp_path, every_steps=1, keep=1) as checkpointer:
        checkpointer.save(1, make_state(abstract), DATA, META)
    logger.info("ours")
    orbax_file = checkpoint.ocp.__file__
    logger.handle(
        logging.LogRecord("absl", logging.WARNING, orbax_file, 1, "slow", (), None)
    )
    progress = [r.getMessage() for r in absl_records if r.levelno < logging.WARNING]
    assert progress == ["ours"]
    assert "slow" in [r.getMessage() for r in absl_records]


@pytest.mark.parametrize("name", ["lr=[1e-3]", "run\\1"])
def test_folders_that_checkpoints_cannot_be_read_from_are_refused(tmp_path, name):
    """Orbax takes them for patterns and leaves its arrays unfinished."""
    for workdir in (tmp_path / name, tmp_path / name / "run"):
        with pytest.raises(UserError, match="give a folder without"):
            Checkpointer(str(workdir), every_steps=1, keep=1)
        with pytest.raises(UserError, match="give a folder without"):
            checkpoint.save_converted(str(workdir), {}, None, {})
    assert not list(tmp_path.iterdir())


def test_other_signs_in_names_are_no_patterns(tmp_path):
    abstract = make_abstract(make_mesh(1, 1))
    state = make_state(abstract)
    workdir = str(tmp_path / "a run, 100% #2 {x}? * ~ ü日")
    with Checkpointer(workdir, every_steps=1, keep=1) as checkpointer:
        checkpointer.save(1, state, DATA, META)
    with Checkpointer(workdir, every_steps=1, keep=1) as checkpointer:
        _, restored, *_ = checkpointer.restore(1, abstract)
    assert_identical(to_host(restored), to_host(state))
