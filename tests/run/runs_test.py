"""Runs of two updates in this process: from another run, of streams, with a teacher."""

import json
import shutil

import chex
import jax
import numpy as np
import process_config
import pytest
import video_files
from step_setup import abstract_of

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import mask, stream
from vjepa_jax.models import registry
from vjepa_jax.program import compilation
from vjepa_jax.run import checkpoint, metrics
from vjepa_jax.train import train_and_evaluate

RATE, DECAY_STEPS, EPS = 1e-3, 2, 1e-8
WIDTHS = {"pico": 12, "nano_wide": 16}


@pytest.fixture(scope="module")
def sizes():
    """Name models that are too small for the registry."""
    with pytest.MonkeyPatch.context() as patch:
        for name, width in WIDTHS.items():
            size = registry.Size(1, width, 2, 2 * width)
            patch.setitem(registry.SIZES, name, size)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Make a folder of three videos and of the runs."""
    folder = tmp_path_factory.mktemp("runs")
    names = video_files.write_small_videos(folder, 3)
    (folder / "list.csv").write_text("".join(f"{name} 0\n" for name in names))
    return folder


def make_config(folder, **values):
    config = process_config.make_small(folder, "pico", predictor_width=12)
    config.total_steps = 1
    config.model.image_embed = True
    config.optim.learning_rate, config.optim.warmup_steps = RATE, 0
    config.optim.weight_decay = config.optim.final_weight_decay = 0.0
    config.optim.final_learning_rate = 0.0
    config.ema.start = config.ema.end = 0.5
    config.update_from_flattened_dict(values)
    return config


def read_state(config, workdir):
    """Return (step, what a run would start from) of a workdir's latest checkpoint."""
    abstract = abstract_of(config)
    step, fields = checkpoint.restore_start(str(workdir), abstract, True)
    return step, jax.device_get(fields)


def adam_of(fields):
    return next(s for s in fields["opt_state"] if hasattr(s, "mu"))


@pytest.fixture(scope="module")
def first(folder, sizes):
    """Run two updates; return the config and the last state."""
    config = make_config(folder, total_steps=2)
    assert train_and_evaluate(config, str(folder / "first")) is None
    step, fields = read_state(config, folder / "first")
    assert step == 2
    return config, fields


def make_cooldown(folder, **values):
    """Return the config of one update from the first run, with an image stream."""
    cooldown = {
        "init.path": str(folder / "first"),
        "optim.schedule": "linear",
        "optim.schedule_scale": float(DECAY_STEPS),
        "weight": 3.0,
    }
    config = make_config(folder, **cooldown | values)
    with config.unlocked():
        config.streams.image = stream(
            path=str(folder),
            num_frames=1,
            frame_step=1,
            resolution=16,
            masks={"whole": mask(num_context=1, num_target=3, mode="unbiased")},
        )
    return config


@pytest.fixture(scope="module")
def cooldowns(folder, first):
    """Return {keep_moments: last state} of two runs that differ only in that."""
    states = {}
    for keep in (True, False):
        config = make_cooldown(folder, **{"init.keep_moments": keep})
        workdir = folder / f"cooldown_{keep}"
        assert train_and_evaluate(config, str(workdir)) is None
        step, states[keep] = read_state(config, workdir)
        assert step == 1
    return states


@pytest.mark.parametrize("keep", [True, False])
def test_a_cooldown_starts_from_another_run_at_step_zero(
    folder, first, cooldowns, keep
):
    """The update, recomputed from its moments, began at the first run's end."""
    start, end = first[1], cooldowns[keep]
    adam = adam_of(end)
    assert int(adam.count) == (3 if keep else 1)
    rate = RATE * (1 - 1 / DECAY_STEPS)
    (row,) = metrics.read_metrics(str(folder / f"cooldown_{keep}"))
    assert row["step"] == 1
    np.testing.assert_allclose(row["optim/learning_rate"], rate, rtol=1e-6)
    moved = []
    for old, new, mean, square in zip(
        *map(jax.tree.leaves, (start["params"], end["params"], adam.mu, adam.nu)),
        strict=True,
    ):
        count = int(adam.count)
        mean = mean / (1 - 0.9**count)
        direction = mean / (np.sqrt(square / (1 - 0.999**count)) + EPS)
        np.testing.assert_allclose(new, old - rate * direction, atol=2e-6)
        moved.append(np.abs(new - old).max())
    assert np.median(moved) > 1e-4
    expected = jax.tree.map(
        lambda old, online: (old + online) / 2,
        start["target"],
        end["params"]["encoder"],
    )
    chex.assert_trees_all_close(end["target"], expected, rtol=1e-7, atol=1e-6)


def test_a_cooldown_keeps_or_zeroes_the_moments(first, cooldowns):
    """Both got the same gradient; only the initial moments differ."""
    old, kept, zeroed = map(adam_of, (first[1], cooldowns[True], cooldowns[False]))
    for name, share in (("mu", 0.9), ("nu", 0.999)):
        largest = 0.0
        for before, a, b in zip(
            *(jax.tree.leaves(getattr(adam, name)) for adam in (old, kept, zeroed)),
            strict=True,
        ):
            np.testing.assert_allclose(a - b, share * before, atol=1e-6)
            largest = max(largest, np.abs(before).max())
        assert largest > 1e-5


def test_two_streams_run_together(folder, cooldowns):
    (row,) = metrics.read_metrics(str(folder / "cooldown_True"))
    losses = row["train/loss_of_video"], row["train/loss_of_image"]
    assert all(0.3 < loss < 3 for loss in losses)
    expected = 0.75 * losses[0] + 0.25 * losses[1]
    np.testing.assert_allclose(row["train/loss"], expected, rtol=1e-5)
    # Only images train the image's embedding.
    of_image = adam_of(cooldowns[False]).mu["encoder"]["image_embed"]["proj"]["kernel"]
    assert np.abs(of_image).max() > 0


def run_out_of_memory(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too large")


def test_a_start_that_fails_leaves_the_workdir_free(folder, first, monkeypatch):
    workdir = str(folder / "failed")
    config = make_config(folder, **{"init.path": str(folder / "nowhere")})
    with pytest.raises(UserError, match="no such folder"):
        train_and_evaluate(config, workdir)
    config = make_config(
        folder,
        **{"init.path": str(folder / "first"), "model.encoder.size": "nano_wide"},
    )
    # Not "a run of another config": no run has begun.
    with pytest.raises(UserError, match="does not fit this model"):
        train_and_evaluate(config, workdir)
    monkeypatch.setattr(compilation, "compile_step", run_out_of_memory)
    with pytest.raises(UserError, match="a smaller batch_size than 8"):
        train_and_evaluate(make_config(folder), workdir)
    assert not (folder / "failed" / "config.json").exists()


def test_a_teacher_must_fit_the_student(folder, first):
    path = {"teacher.path": str(folder / "first")}
    config = make_config(folder, **path, **{"model.encoder.size": "nano_wide"})
    with pytest.raises(UserError, match=r"out_dim=0.*12 channels; set it to that"):
        train_and_evaluate(config, str(folder / "never"))
    config = make_config(folder, **path, **{"model.encoder.patch_size": 4})
    with pytest.raises(UserError, match=r"\(2, 2, 2\).*\(2, 4, 4\)"):
        train_and_evaluate(config, str(folder / "never"))
    assert not (folder / "never").exists()


def test_a_student_of_a_frozen_teacher(folder, first):
    before = checkpoint.restore_target(str(folder / "first"))[0]
    config = make_config(
        folder,
        **{
            "teacher.path": str(folder / "first"),
            "model.encoder.size": "nano_wide",
            "model.predictor.out_dim": WIDTHS["pico"],
        },
    )
    workdir = folder / "student"
    assert train_and_evaluate(config, str(workdir)) is None
    (row,) = metrics.read_metrics(str(workdir))
    assert 0.3 < row["train/loss"] < 3
    models, meta = checkpoint.restore_models(str(workdir))
    assert meta["config"]["teacher"]["path"] == str(folder / "first")
    # The target is the student's average; the teacher is not part of the state.
    assert models["target"]["norm"]["scale"].shape == (WIDTHS["nano_wide"],)
    assert models["predictor"]["proj"]["bias"].shape == (WIDTHS["pico"],)
    after = checkpoint.restore_target(str(folder / "first"))[0]
    chex.assert_trees_all_equal(before, after)
    assert json.loads((workdir / "config.json").read_text())["teacher"]["path"]


def test_a_student_continues_with_the_step_of_its_teacher(folder, first):
    teacher = folder / "teacher"
    shutil.copytree(folder / "first", teacher)
    config = make_config(
        folder,
        **{"teacher.path": str(teacher), "model.predictor.out_dim": WIDTHS["pico"]},
    )
    workdir = folder / "second_student"
    assert train_and_evaluate(config, str(workdir)) is None
    step = checkpoint.restore_target(str(workdir))[1]["teacher_step"]
    assert step == checkpoint.restore_target(str(teacher))[1]["step"] > 0
    steps = teacher / checkpoint.FOLDER
    shutil.copytree(steps / str(step), steps / str(step + 1))
    with pytest.raises(UserError, match=rf"set config.teacher.step={step}$"):
        train_and_evaluate(config, str(workdir))
    config.teacher.step = step
    assert train_and_evaluate(config, str(workdir)) is None


def test_other_videos_than_before_are_refused_or_accepted(folder, first, capsys):
    workdir = folder / "moved"
    shutil.copytree(folder / "first", workdir)
    (folder / "fewer.csv").write_text("small0.mp4 0\nsmall1.mp4 0\n")
    config = make_config(folder, total_steps=2)
    config.data.path = str(folder / "fewer.csv")
    with pytest.raises(UserError, match=r"restore them.*data.accept_change=True"):
        train_and_evaluate(config, str(workdir))
    config.data.accept_change = True
    assert train_and_evaluate(config, str(workdir)) is None
    assert "other videos than before, from step 2 on" in capsys.readouterr().err


@pytest.mark.parametrize("names", [("list.csv",), ("list.csv", "list.csv")])
def test_other_shares_than_before_are_refused_or_accepted(folder, first, names, capsys):
    workdir = folder / f"shares_{len(names)}"
    shutil.copytree(folder / "first", workdir)
    config = make_config(folder, total_steps=2)
    config.data.path = ",".join(str(folder / name) for name in names)
    config.data.mix_weights = (0.25, 0.75)[: len(names)]
    with pytest.raises(UserError, match=r"shares in a mixture, differ from those"):
        train_and_evaluate(config, str(workdir))
    config.data.accept_change = True
    assert train_and_evaluate(config, str(workdir)) is None
    assert "other videos than before, from step 2 on" in capsys.readouterr().err
