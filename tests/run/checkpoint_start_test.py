"""A new run starts from another's checkpoint; converted weights are a checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_test import (
    DATA,
    META,
    assert_identical,
    make_abstract,
    make_mesh,
    make_state,
    to_host,
)

from vjepa_jax.base.errors import UserError
from vjepa_jax.run import checkpoint
from vjepa_jax.run.checkpoint import (
    Checkpointer,
    restore_models,
    restore_start,
    restore_target,
    save_converted,
)
from vjepa_jax.run.checkpoint_step import FORMAT_VERSION


@pytest.fixture(scope="module")
def abstract():
    return make_abstract(make_mesh(2, 4))


@pytest.fixture(scope="module")
def run(tmp_path_factory, abstract):
    """Make a workdir with the checkpoints 2 and 4; return it and the last state."""
    workdir = tmp_path_factory.mktemp("run")
    with Checkpointer(workdir, every_steps=2, keep=3) as checkpointer:
        for step in (2, 4):
            state = make_state(abstract, seed=step)
            # Moments other than those of a new optimiser.
            moments = jax.tree.map(lambda x: x + 1, state.opt_state)
            state = state.replace(opt_state=moments)
            checkpointer.save(step, state, DATA, META)
    return workdir, to_host(state)


@pytest.fixture(scope="module")
def converted(tmp_path_factory, run):
    """Save converted weights of a complete model, and of its encoder alone."""
    folder, state = tmp_path_factory.mktemp("converted"), run[1]
    save_converted(folder / "whole", state.target, state.params, META)
    save_converted(folder / "encoder", state.target, None, META)
    return folder


@pytest.mark.parametrize("keep_moments", [True, False])
@pytest.mark.parametrize("mesh_shape", [(2, 4), (1, 1)])
def test_a_start_takes_parameters_and_target_and_moments_if_asked(
    run, keep_moments, mesh_shape
):
    abstract = make_abstract(make_mesh(*mesh_shape))
    step, fields = restore_start(run[0], abstract, keep_moments)
    assert step == 4
    names = {"params", "target"} | ({"opt_state"} if keep_moments else set())
    assert fields.keys() == names  # neither step nor guard
    for name in names:
        assert_identical(to_host(fields[name]), getattr(run[1], name))
        wanted = jax.tree.map(lambda leaf: leaf.sharding, getattr(abstract, name))
        assert jax.tree.map(lambda leaf: leaf.sharding, fields[name]) == wanted


def test_another_optimiser_may_start_without_moments_only(run, abstract):
    opt_state = jax.eval_shape(optax.sgd(0.1, momentum=0.9).init, abstract.params)
    other = abstract.replace(opt_state=opt_state)
    _, fields = restore_start(run[0], other, keep_moments=False)
    assert_identical(to_host(fields["params"]), run[1].params)
    with pytest.raises(UserError, match="does not fit this model") as error:
        restore_start(run[0], other, keep_moments=True)
    assert "opt_state/0/trace/encoder/fc/bias: in checkpoint missing" in str(
        error.value
    )


def test_a_start_of_another_model_lists_what_differs(run):
    abstract = make_abstract(make_mesh(2, 4), width=512)
    for keep_moments in (True, False):
        with pytest.raises(UserError, match="does not fit this model") as error:
            restore_start(run[0], abstract, keep_moments)
        message = str(error.value)
        assert str(run[0] / checkpoint.FOLDER / "4") in message
        assert (
            "params/encoder/fc/kernel: in checkpoint float32[1024,256], in model "
            "float32[1024,512]"
        ) in message
        assert ("opt_state" in message) == keep_moments


def test_a_start_that_is_not_there_is_named(tmp_path, abstract):
    with pytest.raises(UserError, match=r"no such folder: .*/nowhere"):
        restore_start(str(tmp_path / "nowhere"), abstract, True)
    with pytest.raises(UserError, match="no checkpoint in"):
        restore_start(str(tmp_path), abstract, True)


def test_all_models_of_a_run_are_restored(run):
    models, meta = restore_models(run[0])
    assert models.keys() == {"encoder", "predictor", "target"}
    state = run[1]
    assert_identical(to_host(models), state.params | {"target": state.target})
    assert meta["config"] == META["config"]
    for leaf in jax.tree.leaves(models):
        assert leaf.devices() == {jax.local_devices()[0]}
    earlier, _ = restore_models(run[0] / checkpoint.FOLDER, step=2)
    kernel = earlier["encoder"]["fc"]["kernel"]
    assert (np.asarray(kernel) != state.params["encoder"]["fc"]["kernel"]).any()


def test_converted_weights_are_a_checkpoint_of_step_zero(run, converted, abstract):
    models, meta = restore_models(converted / "whole")
    assert_identical(to_host(models), run[1].params | {"target": run[1].target})
    assert meta["config"] == META["config"]
    assert meta["format_version"] == FORMAT_VERSION
    models, _ = restore_models(converted / "encoder")
    assert models.keys() == {"target"}
    for name in ("whole", "encoder"):
        target, _ = restore_target(converted / name)
        assert_identical(to_host(target), run[1].target)
    step, fields = restore_start(converted / "whole", abstract, keep_moments=False)
    assert step == 0
    assert_identical(to_host(fields["params"]), run[1].params)
    assert_identical(to_host(fields["target"]), run[1].target)


@pytest.mark.parametrize("name", ["whole", "encoder"])
def test_converted_weights_have_no_moments(converted, abstract, name):
    with pytest.raises(UserError, match=r"config\.init\.keep_moments=False"):
        restore_start(converted / name, abstract, keep_moments=True)


def test_a_converted_encoder_is_not_a_complete_model(converted, abstract):
    with pytest.raises(UserError, match="does not fit this model") as error:
        restore_start(converted / "encoder", abstract, keep_moments=False)
    assert "params/encoder/fc/bias: in checkpoint missing" in str(error.value)


@pytest.mark.parametrize("name", ["whole", "encoder"])
def test_converted_weights_cannot_be_resumed(converted, abstract, name):
    with (
        Checkpointer(converted / name, every_steps=1, keep=1) as checkpointer,
        pytest.raises(UserError, match=r"config\.init\.path") as error,
    ):
        checkpointer.restore(checkpointer.latest_step(), abstract)
    assert str(converted / name) in str(error.value)


def test_converted_weights_overwrite_no_checkpoint(run, converted):
    for folder in (run[0], converted / "whole"):
        before = sorted(p.name for p in (folder / checkpoint.FOLDER).iterdir())
        with pytest.raises(UserError, match="is not empty: give another folder"):
            save_converted(folder, {"w": jnp.zeros(2)}, None, META)
        after = sorted(p.name for p in (folder / checkpoint.FOLDER).iterdir())
        assert before == after
