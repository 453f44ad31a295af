"""Runs in separate processes: killed and interrupted ones end like unbroken ones.

Processes are slow (each imports, compiles and starts workers), so one pair of workdirs
serves all tests: an unbroken run, and one that is killed, continued, interrupted and
continued again. Both read a list with a broken video.
"""

import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import chex
import jax
import pytest
from step_setup import abstract_of

from vjepa_jax.config import saved as saved_config
from vjepa_jax.run import checkpoint, cli, metrics, workdirs
from vjepa_jax.world import render

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = ROOT / "configs/world_tiny.py"
TOTAL_STEPS = 30
NUM_VIDEOS = 40
TIMEOUT_SECS = 300

OVERRIDES = {
    "total_steps": TOTAL_STEPS,
    "batch_size": 4,
    "world.pretrain_videos": NUM_VIDEOS,
    "world.probe_train_videos": 1,
    "world.probe_test_videos": 1,
    "world.hidden_train_videos": 1,
    "world.hidden_test_videos": 1,
    "world.physics_pairs": 0,
    "data.num_workers": 2,
    "model.scan_layers": True,
    "model.predictor.depth": 1,
    "optim.warmup_steps": 3,
    "checkpoint.every_steps": 6,
    "log.every_steps": 1,
}


class Ended(NamedTuple):
    code: int
    stderr: str


class Process:
    """The training command in a new process group, like a job of a shell."""

    def __init__(self, data, workdir, **changes):
        values = OVERRIDES | {
            "world.path": data / "world",
            "data.path": data / "list.csv",
        }
        values |= changes
        # One device, whatever this process has.
        env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        env["JAX_PLATFORMS"] = "cpu"
        self._stderr = open(workdir.with_suffix(".stderr"), "w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vjepa_jax.train",
                f"--config={CONFIG}",
                f"--workdir={workdir}",
                *(f"--config.{key}={value}" for key, value in values.items()),
            ],
            cwd=ROOT,
            env=env,
            stderr=self._stderr,
            start_new_session=True,
        )

    def wait_until(self, happened):
        """Wait for `happened()` while the process runs."""
        deadline = time.monotonic() + TIMEOUT_SECS
        while not happened():
            assert self._process.poll() is None, self.end().stderr
            assert time.monotonic() < deadline, "took too long"
            time.sleep(0.005)

    def send(self, number):
        """Send a signal to the process and its workers, as a terminal does."""
        os.killpg(self._process.pid, number)

    def end(self) -> Ended:
        try:
            code = self._process.wait(TIMEOUT_SECS)
        finally:
            if self._process.poll() is None:
                self.send(signal.SIGKILL)
        self._stderr.seek(0)
        text = self._stderr.read()
        self._stderr.close()
        return Ended(code, text)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Render a small world; write a list of it with a broken video."""
    folder = tmp_path_factory.mktemp("data")
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.update_from_flattened_dict(
        {k: v for k, v in OVERRIDES.items() if k.startswith("world.")}
    )
    config.world.path = str(folder / "world")
    render.render_world(config.world)
    (folder / "broken.mp4").write_text("not a video")
    lines = (folder / "world/pretrain.csv").read_text().splitlines()
    entries = [f"world/{line}\n" for line in lines]
    entries.insert(NUM_VIDEOS // 2, "broken.mp4 0\n")
    (folder / "list.csv").write_text("".join(entries))
    return folder


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    return workdir, Process(data, workdir).end()


class Broken(NamedTuple):
    workdir: pathlib.Path
    killed: Ended
    interrupted: Ended
    interrupted_steps: list[int]  # in metrics.jsonl after the interruption
    saved_step: int  # the latest checkpoint after the interruption
    finished: Ended


@pytest.fixture(scope="module")
def broken(data, unbroken, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "broken"
    process = Process(data, workdir)
    process.wait_until((workdir / "checkpoints/6").exists)
    process.send(signal.SIGKILL)
    killed = process.end()

    process = Process(data, workdir)
    process.wait_until((workdir / "checkpoints/18").exists)
    process.send(signal.SIGINT)
    interrupted = process.end()
    steps = steps_of(workdir)
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    finished = Process(data, workdir).end()
    return Broken(workdir, killed, interrupted, steps, saved, finished)


def steps_of(workdir):
    return [row["step"] for row in metrics.read_metrics(str(workdir))]


def restore(workdir, step):
    """Return the state of a checkpoint as NumPy arrays."""
    config = saved_config.restored(json.loads((workdir / "config.json").read_text()))
    abstract = abstract_of(config)
    with checkpoint.Checkpointer(str(workdir), every_steps=1, keep=9) as checkpointer:
        assert checkpointer.latest_step() == step
        state = checkpointer.restore(step, abstract).state
    return jax.device_get(state)


def test_an_unbroken_run_reports_every_step_and_ends_well(unbroken):
    workdir, ended = unbroken
    assert ended.code == 0, ended.stderr
    assert "Traceback" not in ended.stderr and "error" not in ended.stderr
    assert f"finished at step {TOTAL_STEPS}" in ended.stderr
    assert steps_of(workdir) == [*range(1, TOTAL_STEPS + 1)]
    losses = [row["train/loss"] for row in metrics.read_metrics(str(workdir))]
    # Targets have unit variance: predicting zero costs about 0.8.
    assert 0.5 < losses[0] < 1.5 and len(set(losses)) == TOTAL_STEPS
    assert (workdir / "config.json").exists() and (workdir / "tensorboard").is_dir()


def test_an_interrupted_run_saves_and_reports_it(broken):
    assert broken.interrupted.code == 128 + signal.SIGINT, broken.interrupted.stderr
    assert "Traceback" not in broken.interrupted.stderr
    last = broken.interrupted_steps[-1]
    assert 18 <= last < TOTAL_STEPS, "the run was over before the signal came"
    assert broken.saved_step == last
    assert f"stopped at step {last}, saved" in broken.interrupted.stderr


def test_the_same_command_continues_a_broken_run(broken):
    assert broken.killed.code == -signal.SIGKILL
    assert "resumed from step" in broken.interrupted.stderr
    assert f"resumed from step {broken.saved_step}" in broken.finished.stderr
    assert broken.finished.code == 0, broken.finished.stderr
    assert "Traceback" not in broken.finished.stderr
    lines = (broken.workdir / workdirs.STARTS_FILE).read_text().splitlines()
    starts = [json.loads(line) for line in lines]
    assert starts[0]["step"] == 0 and starts[2]["step"] == broken.saved_step
    assert len(starts) == 3 and starts[0]["step"] < starts[1]["step"]
    assert starts[0]["num_devices"] >= 1 and starts[0]["versions"]["jax"]


def test_a_broken_run_repeats_the_unbroken_one_bit_for_bit(broken, unbroken):
    ours, theirs = (
        metrics.read_metrics(str(workdir)) for workdir in (broken.workdir, unbroken[0])
    )
    assert [row["step"] for row in ours] == [*range(1, TOTAL_STEPS + 1)]
    kept = ("step", "train/", "repr/", "optim/")
    for a, b in zip(ours, theirs, strict=True):
        assert {k: v for k, v in a.items() if k.startswith(kept)} == {
            k: v for k, v in b.items() if k.startswith(kept)
        }
    states = [restore(w, TOTAL_STEPS) for w in (broken.workdir, unbroken[0])]
    chex.assert_trees_all_equal(*states)
    assert int(states[0].step) == TOTAL_STEPS


def test_a_broken_video_is_replaced_and_listed_once(broken, unbroken, data):
    for workdir in (broken.workdir, unbroken[0]):
        lines = (workdir / "bad_videos.jsonl").read_text().splitlines()
        assert [json.loads(line)["path"] for line in lines] == [
            str(data / "broken.mp4")
        ]
        assert metrics.read_metrics(str(workdir))[-1]["data/bad_videos"] == 1


def test_a_run_that_is_no_longer_finite_ends_with_one_line_and_saves_nothing(
    data, tmp_path
):
    """The first update is so large that all later losses are NaN."""
    changes = {
        "optim.start_learning_rate": 1e38,
        "optim.learning_rate": 1e38,
        "optim.max_skipped_in_row": 3,
        "checkpoint.every_steps": 4,
        "data.num_workers": 0,
    }
    ended = Process(data, tmp_path / "run", **changes).end()
    assert ended.code == cli.EXIT_USER_ERROR, ended.stderr
    assert "Traceback" not in ended.stderr
    (line,) = [x for x in ended.stderr.splitlines() if x.startswith("error: ")]
    assert "not finite" in line and "3 steps in a row, up to step 4" in line
    assert "nothing was saved" in line and "config.optim.learning_rate" in line
    # Every skipped update was reported.
    assert "skipped updates: 1 more up to step 2, 1 in a row now" in ended.stderr
    assert "skipped updates: 1 more up to step 3, 2 in a row now" in ended.stderr
    assert steps_of(tmp_path / "run") == [1, 2, 3]
    rows = metrics.read_metrics(str(tmp_path / "run"))
    assert [row["optim/skipped"] for row in rows] == [0, 1, 2]
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_the_start_reports_memory_and_shardings(unbroken):
    workdir, ended = unbroken
    assert "GiB at its peak on each device" in ended.stderr
    lines = (workdir / workdirs.SHARDINGS_FILE).read_text().splitlines()
    assert any(line.startswith("params/encoder/stack/blocks/qkv") for line in lines)
    assert all(line.split(" #")[0].endswith(" MiB") for line in lines)
