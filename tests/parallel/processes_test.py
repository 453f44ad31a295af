"""Several real processes on this machine: they train, stop and fail as one run.

Processes are expensive, so all tests share one story. Four processes begin a run, and
one of them is killed; two processes continue it, and one of them gets a SIGTERM; one
process, this one, finishes it. This process also does the whole run alone.
"""

import json
import os
import re
import shutil
import signal
import time
from typing import NamedTuple

import jax
import process_config
import pytest
import video_files
from damaged_files import damage, halve, largest
from process_group import HEARTBEAT_SECS, TIMEOUT_SECS, Group

from vjepa_jax.parallel import distributed
from vjepa_jax.run import metrics
from vjepa_jax.train import train_and_evaluate

NUM_VIDEOS = 800  # the first epoch is the last
BROKEN = range(0, NUM_VIDEOS, 20)
CHECKPOINT_STEPS = process_config.get_config("").checkpoint.every_steps
DAMAGED_STEP = "18"
HELD_STEP = 19  # in which a process waits until it gets a signal


class Part(NamedTuple):
    """What one group of processes left behind."""

    codes: list[int]
    texts: list[str]
    rows: list[dict[str, float]]
    saved_step: int


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Many videos, all of them links to a few, and some of them broken."""
    folder = tmp_path_factory.mktemp("processes")
    good = video_files.write_small_videos(folder, 4)
    (folder / "broken.mp4").write_text("not a video")
    for i in range(NUM_VIDEOS):
        of = "broken.mp4" if i in BROKEN else good[i % 4]
        os.link(folder / of, folder / f"{i}.mp4")
    lines = (f"{i}.mp4 0\n" for i in range(NUM_VIDEOS))
    (folder / "list.csv").write_text("".join(lines))
    return folder


def read(workdir):
    return metrics.read_metrics(str(workdir))


def saved_steps(workdir):
    names = [p.name for p in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdecimal())


def end(group, workdir):
    """Wait for the end of a group."""
    codes, texts = group.end()
    return Part(codes, texts, read(workdir), saved_steps(workdir)[-1])


@pytest.fixture(scope="module")
def four(folder):
    """Four processes, parameters sharded over two of them; the third is killed."""
    workdir = folder / "run"
    hold = 2, HELD_STEP, folder / "never"
    group = Group(folder, workdir, 4, "--config.mesh.fsdp=4", hold=hold)
    group.wait_until(
        lambda: (
            f"step {HELD_STEP - 2}/" in group.text(0)
            and HELD_STEP // CHECKPOINT_STEPS * CHECKPOINT_STEPS in saved_steps(workdir)
        )
    )
    group.processes[2].kill()
    part = end(group, workdir)
    for file in workdir.glob("bad_videos*"):
        shutil.copy(file, folder)
    return part


@pytest.fixture(scope="module")
def two(folder, four):
    """Two processes, which continue; the second gets a SIGTERM.

    They find a later step that is damaged.
    """
    workdir, released = folder / "run", folder / "released"
    steps = workdir / "checkpoints"
    later = shutil.copytree(steps / str(four.saved_step), steps / DAMAGED_STEP)
    damage(largest(later / "state"), halve)
    hold = 1, HELD_STEP, released
    flags = "--config.mesh.fsdp=2", "--config.checkpoint.skip_damaged=True"
    group = Group(folder, workdir, 2, *flags, hold=hold)
    group.wait_until(lambda: f"step {HELD_STEP - 2}/" in group.text(0))
    assert four.saved_step < HELD_STEP - 2
    group.processes[1].terminate()
    # jax looks for the signal once a second: more steps than there are may fit in.
    group.wait_until(lambda: "SIGTERM caught" in group.text(1))
    released.touch()
    return end(group, workdir)


def make_config(folder, **values):
    config = process_config.get_config(folder)
    values = {"checkpoint.every_steps": 1000} | values
    config.update_from_flattened_dict(values)
    return config


@pytest.fixture(scope="module")
def last(folder, two):
    """One process, which finishes the run."""
    assert train_and_evaluate(make_config(folder), str(folder / "run")) is None
    return read(folder / "run")


PROFILE = {"profile.start_step": 3, "profile.num_steps": 2}


@pytest.fixture(scope="module")
def alone(folder):
    """Train the same from beginning to end in one process, with a profile.

    The trace of steps 3 and 4 is written only after the watchdog has reported the wait.
    """
    stacks = folder / "alone/stacks_0.txt"
    write_trace = jax.profiler.stop_trace

    def write_late():
        deadline = time.monotonic() + TIMEOUT_SECS
        while not (stacks.exists() and "in write_late" in stacks.read_text()):
            assert time.monotonic() < deadline, "the watchdog reports nothing"
            time.sleep(0.01)
        write_trace()

    config = make_config(folder, **PROFILE, **{"log.watchdog_secs": 0.2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.profiler, "stop_trace", write_late)
        assert train_and_evaluate(config, str(folder / "alone")) is None
    return read(folder / "alone")


def test_a_killed_process_ends_the_others(four):
    again = distributed.EXIT_TRY_AGAIN
    assert four.codes == [again, again, -signal.SIGKILL, again]
    for text in four.texts[:2] + four.texts[3:]:
        last = [line for line in text.splitlines() if line.strip()][-1]
        assert last.startswith("error: another process of this run has ended"), text
        assert f"no heartbeat for {HEARTBEAT_SECS} s" in last
        assert "the same command" in last


def test_a_restart_loses_little(four, two):
    assert f"resumed from step {four.saved_step}" in two.texts[0]
    assert four.saved_step >= 2 * CHECKPOINT_STEPS
    # One interval, and the steps during the next save, which ends before the one after.
    assert four.rows[-1]["step"] - four.saved_step <= 2 * CHECKPOINT_STEPS


def test_all_processes_skip_a_step_that_is_damaged(folder, two):
    assert f"checkpoints/{DAMAGED_STEP} is damaged (state: " in two.texts[0]
    assert f"it is kept as {DAMAGED_STEP}.damaged" in two.texts[0]
    assert (folder / f"run/checkpoints/{DAMAGED_STEP}.damaged/meta").is_dir()
    assert "is damaged" not in two.texts[1]


def test_a_signal_to_one_makes_all_save_the_same_step_and_end(two, alone):
    assert two.codes == [distributed.EXIT_TRY_AGAIN] * 2, two.texts
    step = two.rows[-1]["step"]
    assert step < alone[-1]["step"], "the run was over before the signal came"
    assert two.saved_step == step
    assert f"stopped at step {step}, saved; the same command continues" in two.texts[0]
    assert "Traceback" not in "".join(two.texts)


def test_only_the_first_process_logs(four, two):
    for part in (four, two):
        assert "compiled the step" in part.texts[0]
        for text in part.texts[1:]:
            assert "compiled the step" not in text and "loss" not in text


def test_any_number_of_processes_has_the_losses_of_one(four, two, last, alone):
    of_one = {row["step"]: row for row in alone}
    assert [row["step"] for row in last] == list(of_one)
    # Also the rows of the four, since those after their checkpoint were replaced.
    for row in four.rows + last:
        for key in ("train/loss", "train/total_loss"):
            expected = of_one[row["step"]][key]
            # Sums in another order, by other compiled code, over all steps so far.
            assert row[key] == pytest.approx(expected, rel=1e-5), (row["step"], key)
    assert two.saved_step > four.saved_step


def bad_paths(file, before):
    entries = map(json.loads, file.read_text().splitlines())
    return {entry["path"] for entry in entries if entry["step"] < before}


def test_each_process_reads_its_share_only(folder, four, alone):
    """Shown by the broken videos that each process has tried to read."""
    before = four.rows[-1]["step"]
    names = ["bad_videos.jsonl", *(f"bad_videos_{i}.jsonl" for i in range(1, 4))]
    of_each = [bad_paths(folder / name, before) for name in names]
    of_one = bad_paths(folder / "alone/bad_videos.jsonl", before)
    assert all(of_each) and len(of_one) == sum(map(len, of_each))
    assert of_one == set().union(*of_each)


def test_what_all_processes_found_is_counted(four, alone):
    key = "data/bad_videos"
    of_one = {row["step"]: row[key] for row in alone}
    # A checkpoint's row is written before the next batch is drawn.
    rows = [row for row in four.rows if row["step"] % CHECKPOINT_STEPS]
    assert [row[key] for row in rows] == [of_one[row["step"]] for row in rows]
    assert rows[-1][key] == rows[-1]["data/bad_not_a_video"] > 1


def test_the_wall_time_is_accounted_for_over_all_restarts(four, two, last):
    for rows in (four.rows, two.rows, last):
        for row in rows:
            shares = [v for k, v in row.items() if k.startswith("goodput/")]
            assert sum(shares) == pytest.approx(1) and min(shares) >= 0
    seconds = [row["perf/wall_seconds"] for row in last]
    assert seconds == sorted(seconds)
    assert four.rows[-1]["goodput/lost"] == 0 < last[-1]["goodput/lost"]
    startup = [
        r[-1]["goodput/startup"] * r[-1]["perf/wall_seconds"]
        for r in (four.rows, two.rows, last)
    ]
    assert startup[0] < startup[1] < startup[2]
    assert "of wall time: " in two.texts[0]


def test_a_profile_holds_the_steps_and_the_names_of_their_parts(folder, alone):
    (file,) = (folder / "alone/profile").rglob("*.xplane.pb")
    content = file.read_bytes()
    for scope in ("target", "encoder", "predictor", "loss", "optimiser", "ema"):
        assert re.search(rb"[/(]%s[)/]" % scope.encode(), content), scope
    steps = [
        value
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
        for name, value in event.stats
        if name == "step_num"
    ]
    assert steps == [3, 4]


def test_the_watchdog_writes_the_stacks_of_a_slow_step(folder, alone):
    text = (folder / "alone/stacks_0.txt").read_text()
    # A busy machine may be slow at other steps too.
    dumps = [d for d in text.split("no step ended for ") if "in write_late" in d]
    assert dumps
    for dump in dumps:
        assert re.match(r"\d+ s, the last was step 3; stacks of its threads:\n", dump)
        assert "in train_and_evaluate" in dump
