"""Evaluations during a run evaluate its weights and do not affect the run.

One run has three evaluations, two of which always fail; another run has none.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import shutil

import event_files
import jax
import numpy as np
import process_config
import pytest
import video_files
from process_group import Group
from step_setup import abstract_of

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import evaluation, get_config
from vjepa_jax.evals import frozen, hook, registry
from vjepa_jax.run import checkpoint, metrics
from vjepa_jax.run.watch import Watchdog
from vjepa_jax.train import train_and_evaluate

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
BROKEN = ROOT / "tests" / "helpers" / "broken_evaluation.py"
STEPS = 6
HEALTH = "num_videos=5 data.num_clips=1 data.num_workers=0"


@pytest.fixture(scope="module", autouse=True)
def own_evaluations():
    """Use a copy of the table of evaluations, to which config files add theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "EVALUATIONS", dict(registry.EVALUATIONS))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hook")
    for i in range(7):
        frames = video_files.moving_frames(8, height=16, width=16, seed=i)
        video_files.write_video(folder / f"{i}.mp4", frames)
    (folder / "bad.mp4").write_text("not a video")
    names = ["bad", *range(7)]  # the first clip that would be drawn
    (folder / "list.csv").write_text("".join(f"{i}.mp4 0\n" for i in names))
    return folder


def make_config(folder, **values):
    config = process_config.get_config(folder)
    config.total_steps = STEPS
    config.checkpoint.every_steps, config.checkpoint.keep = 3, 9
    config.update_from_flattened_dict(values)
    return config


def add_evaluations(config):
    """Evaluate every second or fourth step, and after the last one."""
    with config.unlocked():
        config.evals.health = evaluation(
            str(CONFIGS / "probe_health.py"), every_steps=4, overrides=HEALTH
        )
        config.evals.broken = evaluation(str(BROKEN), every_steps=2)
        config.evals.user = evaluation(f"{BROKEN}:user", every_steps=4)
    config.log.image_clips = 2
    return config


class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        if record.levelno >= logging.ERROR:
            self.texts.append((record.getMessage(), record.exc_info))


@pytest.fixture(scope="module")
def plain(folder):
    assert train_and_evaluate(make_config(folder), str(folder / "plain")) is None
    return metrics.read_metrics(str(folder / "plain"))


@pytest.fixture(scope="module")
def hooked(folder):
    """(rows of metrics, errors logged, calls) of the run with evaluations."""
    config, records, calls = add_evaluations(make_config(folder)), Records(), []
    run, logger = hook.EvaluationHook.run, logging.getLogger("absl")

    @contextlib.contextmanager
    def paused(_):
        calls.append("pause")
        yield
        calls.append("resume")

    logger.addHandler(records)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watchdog, "paused", paused)
        patch.setattr(
            hook.EvaluationHook, "run", lambda *a: calls.append("run") or run(*a)
        )
        assert train_and_evaluate(config, str(folder / "hooked")) is None
    logger.removeHandler(records)
    return metrics.read_metrics(str(folder / "hooked")), records.texts, calls


def of_training(rows):
    """Return the metrics of the training itself, by step."""
    kept = ("train/", "repr/", "optim/", "data/bad")
    return {
        row["step"]: {k: v for k, v in row.items() if k.startswith(kept)}
        for row in rows
        if "train/loss" in row
    }


def of_evaluations(rows):
    return [row for row in rows if any(k.startswith("eval/") for k in row)]


def state_of(config, workdir):
    abstract = abstract_of(config)
    step, fields = checkpoint.restore_start(str(workdir), abstract, True)
    assert step == STEPS
    return jax.device_get(fields)


def test_the_run_equals_one_without_evaluations_bit_for_bit(folder, plain, hooked):
    assert of_training(hooked[0]) == of_training(plain)
    assert len(of_training(plain)) == STEPS
    config = make_config(folder)
    states = [state_of(config, folder / name) for name in ("plain", "hooked")]
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(a, b)


def test_evaluations_run_at_their_steps_and_after_the_last(hooked):
    rows = of_evaluations(hooked[0])
    assert [row["step"] for row in rows] == [2, 4, 6]
    names = [{k.split("/")[1] for k in row if k.startswith("eval/")} for row in rows]
    assert names == [
        {"broken", "images"},
        {"broken", "health", "user", "images"},
        {"broken", "health", "user", "images"},
    ]
    # Results that are the same at every step are left out.
    assert not any("random_init" in key for key in rows[-1])


def test_failures_are_logged_once_each_and_counted(hooked):
    rows, errors, _ = hooked
    counted = [row["eval/broken/failed"] for row in of_evaluations(rows)]
    assert counted == [1, 2, 3]
    assert of_evaluations(rows)[-1]["eval/user/failed"] == 2
    assert of_evaluations(rows)[-1]["eval/health/failed"] == 0
    text = "evaluation '{}' failed after step {}; the run continues: {}"
    program = "RuntimeError: no such luck"
    user = "UserError: the list is empty: give another"
    assert [message for message, _ in errors] == [
        text.format("broken", 2, program),
        text.format("broken", 4, program),
        text.format("user", 4, user),
        text.format("broken", 6, program),
        text.format("user", 6, user),
    ]
    # A bug is logged with its traceback, a user's error without.
    assert [bool(exc_info) for _, exc_info in errors] == [1, 1, 0, 1, 0]


def test_numbers_equal_those_of_probe_on_the_checkpoint(folder, hooked):
    model = frozen.load(str(folder / "hooked"), STEPS)
    entry = evaluation(str(CONFIGS / "probe_health.py"), overrides=HEALTH)
    wanted = registry.evaluate(model, hook.load("health", entry))
    row = of_evaluations(hooked[0])[-1]
    assert set(wanted) >= {"token_std", "pooled_effective_rank"}
    for measure, found in wanted.items():
        assert row[f"eval/health/{measure}"] == pytest.approx(found["pretrained"])
    # They are of the moving average, which is not the encoder that is trained.
    online = jax.tree.map(lambda x: x, model.params) | {
        "target": model.params["encoder"]
    }
    model = dataclasses.replace(model, params=online)
    other = registry.evaluate(model, hook.load("health", entry))["token_std"]
    assert row["eval/health/token_std"] != pytest.approx(other["pretrained"])


def test_pictures_of_some_clips_go_to_tensorboard(folder, hooked):
    found = event_files.images(folder / "hooked")
    names = ["features/0", "features/1", "masks/0", "masks/1"]
    of_steps = [(s, sorted(n for t, n, _ in found if t == s)) for s in (2, 4, 6)]
    assert of_steps == [(step, names) for step in (2, 4, 6)]
    for _, _, pixels in found:
        assert max(pixels.shape) < 1500 and pixels.std() > 10
    by_name = {(step, name): pixels for step, name, pixels in found}
    for name in names[:2]:  # the features of the same clip, learned further
        assert by_name[2, name].shape == by_name[6, name].shape
        assert np.any(by_name[2, name] != by_name[6, name])
    for kind in ("features", "masks"):
        assert np.any(by_name[6, f"{kind}/0"] != by_name[6, f"{kind}/1"])


def test_their_time_is_accounted_for_and_the_watchdog_pauses(hooked, plain):
    rows, _, calls = hooked
    assert calls == ["pause", "run", "resume"] * 3
    for row in rows:
        shares = [v for k, v in row.items() if k.startswith("goodput/")]
        assert sum(shares) == pytest.approx(1)
    assert plain[-1]["goodput/evaluation"] == 0
    last = rows[-1]
    spent = last["goodput/evaluation"] * last["perf/wall_seconds"]
    seconds = [
        sum(v for k, v in row.items() if k.endswith("/seconds") and k[:4] == "eval")
        for row in of_evaluations(rows)
    ]
    assert 0 < sum(seconds) <= spent <= sum(seconds) + 1


def test_an_interrupted_run_repeats_its_evaluations(folder, hooked):
    """The last checkpoint is deleted, as if the run had been killed before it."""
    workdir = folder / "broken"
    shutil.copytree(folder / "hooked", workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    config = add_evaluations(make_config(folder))
    with config.unlocked():  # what is evaluated may change when a run continues
        del config.evals.user
    assert train_and_evaluate(config, str(workdir)) is None
    rows = metrics.read_metrics(str(workdir))
    assert of_training(rows) == of_training(hooked[0])
    ours, theirs = (of_evaluations(r) for r in (rows, hooked[0]))
    assert [row["step"] for row in ours] == [2, 4, 6]
    for a, b in zip(ours, theirs, strict=True):
        for key, value in a.items():
            is_timed = key.startswith(("goodput", "perf")) or "seconds" in key
            assert is_timed or value == b[key], key
    assert ours[-1]["eval/broken/failed"] == 3
    assert "user" not in json.loads((workdir / "config.json").read_text())["evals"]


def test_failures_in_several_processes_do_not_block_the_run(folder, plain):
    """Two processes of two devices; the weights are sharded over all of them."""
    workdir = folder / "two"
    flags = {
        "total_steps": STEPS,
        "mesh.fsdp": 4,
        "evals.health.every_steps": 4,
        "evals.health.overrides": HEALTH,
        "evals.neighbours.every_steps": 2,  # stands for one that fails
        "evals.neighbours.file": str(BROKEN),
    }
    flags = [f"--config.{key}={value}" for key, value in flags.items()]
    codes, texts = Group(folder, workdir, 2, *flags).end()
    assert codes == [0, 0], texts
    rows = metrics.read_metrics(str(workdir))
    losses = of_training(rows)
    for step, wanted in of_training(plain).items():
        assert losses[step]["train/loss"] == pytest.approx(
            wanted["train/loss"], rel=1e-5
        )
    found = of_evaluations(rows)
    assert [row["step"] for row in found] == [2, 4, 6]
    assert [row["eval/neighbours/failed"] for row in found] == [1, 2, 3]
    model = frozen.load(str(workdir), STEPS)
    entry = evaluation(str(CONFIGS / "probe_health.py"), overrides=HEALTH)
    wanted = registry.evaluate(model, hook.load("health", entry))
    for measure, value in wanted.items():
        assert found[-1][f"eval/health/{measure}"] == pytest.approx(
            value["pretrained"], rel=1e-4
        )
    assert texts[0].count("evaluation 'neighbours' failed after step") == 3
    assert "failed" not in texts[1]


def load(name="x", **fields):
    fields = {"file": str(CONFIGS / "probe_health.py")} | fields
    return hook.load(name, evaluation(**fields))


def test_overrides_change_the_file_s_values():
    config = load(overrides="num_videos=7 data.test_path='my videos' out_layers=(1,2)")
    assert (config.num_videos, config.data.test_path) == (7, "my videos")
    assert config.out_layers == (1, 2) and not config.random_init
    assert load(overrides="random_init=True").random_init
    physics = load(file=f"{CONFIGS / 'probe_physics.py'}:intphys")
    assert physics.dataset == "intphys" and physics.null_seeds == 0


def test_defaults_are_found_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, entry in get_config().evals.items():
        assert hook.load(name, entry).evaluation == name
    config = load(file="physics:intphys", overrides="num_workers=0")
    assert (config.dataset, config.num_workers) == ("intphys", 0)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"file": "nowhere.py"}, ["file='nowhere.py'", "No such file"]),
        ({"file": str(CONFIGS / "vjepa.py")}, ["vjepa.py", "evaluation"]),
        ({"overrides": "num_video=7"}, ["num_video", "num_videos"]),
        ({"overrides": "num_videos"}, ["'num_videos'", "key=value"]),
        ({"overrides": "num_videos=many"}, ["num_videos=many"]),
        ({"overrides": "name='a"}, ["No closing quotation"]),
    ],
)
def test_wrong_entries_are_refused_before_the_run(fields, parts):
    with pytest.raises(UserError) as error:
        load("mine", **fields)
    message = str(error.value)
    assert message.startswith("config.evals.mine.") and "\n" not in message
    for part in parts:
        assert part in message


def test_results_become_names_of_metrics():
    results = {
        "std": {"pretrained": 0.5, "random_init": np.float32(0.25)},
        "head 1: rate 0.1": 3,
        "mean": {"accuracy": 0.75, "of": "all"},
    }
    assert hook.flatten_results(results) == {
        "std": 0.5,
        "std/random_init": 0.25,
        "head_1_rate_0.1": 3.0,
        "mean/accuracy": 0.75,
    }
