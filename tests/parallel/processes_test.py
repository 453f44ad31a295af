"""Several real processes on this machine: they train, stop and fail as one run.

Processes are dear, so that all tests share one story. A run is begun by four processes
and loses one; two processes continue it and are told to stop; one process, this one,
brings it to its end. Beside it stands a run of this process alone.
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
from process_group import HEARTBEAT_SECS, TIMEOUT_SECS, Group

from vjepa_jax.parallel import distributed
from vjepa_jax.run import metrics
from vjepa_jax.train import train_and_evaluate

NUM_VIDEOS = 800  # the first epoch is the last
BROKEN = range(0, NUM_VIDEOS, 20)
CHECKPOINT_STEPS = process_config.get_config("").checkpoint.every_steps


class Part(NamedTuple):
    """What one group of processes left behind."""

    codes: list[int]
    texts: list[str]
    rows: list[dict[str, float]]
    saved_step: int
    secs: float  # from the signal to the end of the last process


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


def signalled(group, workdir, rank, number):
    """Send a signal to one process of a group and wait for the end of all."""
    began = time.monotonic()
    group.processes[rank].send_signal(number)
    codes, texts = group.end()
    secs = time.monotonic() - began
    return Part(codes, texts, read(workdir), saved_steps(workdir)[-1], secs)


@pytest.fixture(scope="module")
def four(folder):
    """Four processes, parameters spread over two of them; the third is killed."""
    workdir = folder / "run"
    group = Group(folder, workdir, 4, "--config.mesh.fsdp=4")
    told = (folder / "run_4_0.stderr").read_text
    group.wait_until(lambda: "step 13/" in told() and len(saved_steps(workdir)) > 1)
    part = signalled(group, workdir, 2, signal.SIGKILL)
    for file in workdir.glob("bad_videos*"):
        shutil.copy(file, folder)
    return part


@pytest.fixture(scope="module")
def two(folder, four):
    """Two processes, which continue; the second gets a SIGTERM."""
    workdir = folder / "run"
    group = Group(folder, workdir, 2, "--config.mesh.fsdp=2")
    resumed = (folder / "run_2_0.stderr").read_text
    group.wait_until(lambda: f"step {four.saved_step + 2}/" in resumed())
    return signalled(group, workdir, 1, signal.SIGTERM)


def make_config(folder, **values):
    config = process_config.get_config(folder)
    values = {"checkpoint.every_steps": 1000} | values
    config.update_from_flattened_dict(values)
    return config


@pytest.fixture(scope="module")
def last(folder, two):
    """One process, which brings the run to its end."""
    assert train_and_evaluate(make_config(folder), str(folder / "run")) is None
    return read(folder / "run")


PROFILE = {"profile.start_step": 3, "profile.num_steps": 2}


@pytest.fixture(scope="module")
def alone(folder):
    """The same from beginning to end in one process, with a profile.

    The trace of steps 3 and 4 is not written before the watchdog has told of that.
    """
    stacks = folder / "alone/stacks_0.txt"
    write_trace = jax.profiler.stop_trace

    def write_late():
        deadline = time.monotonic() + TIMEOUT_SECS
        while not (stacks.exists() and "in write_late" in stacks.read_text()):
            assert time.monotonic() < deadline, "the watchdog is silent"
            time.sleep(0.01)
        write_trace()

    config = make_config(folder, **PROFILE, **{"log.watchdog_secs": 0.2})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.profiler, "stop_trace", write_late)
        assert train_and_evaluate(config, str(folder / "alone")) is None
    return read(folder / "alone")


def test_a_killed_process_ends_the_others_in_time(four):
    assert four.codes.pop(2) == -signal.SIGKILL
    assert four.codes == [distributed.EXIT_TRY_AGAIN] * 3
    # The rest is for a busy machine; what jax waits for by itself is 100 s.
    assert four.secs < HEARTBEAT_SECS + 40
    for text in four.texts[:2] + four.texts[3:]:
        assert "error: another process of this run has ended" in text
        assert "the same command" in text.splitlines()[-1]


def test_a_restart_loses_little(four, two):
    assert f"resumed from step {four.saved_step}" in two.texts[0]
    assert four.saved_step >= 2 * CHECKPOINT_STEPS
    # One interval, and the steps taken while the next checkpoint was being written,
    # which is waited for before the one after it.
    assert four.rows[-1]["step"] - four.saved_step <= 2 * CHECKPOINT_STEPS


def test_a_signal_to_one_makes_all_save_the_same_step_and_end(two, alone):
    assert two.codes == [distributed.EXIT_TRY_AGAIN] * 2, two.texts
    step = two.rows[-1]["step"]
    assert step < alone[-1]["step"], "the run was over before the signal came"
    assert two.saved_step == step
    assert f"stopped at step {step}, saved; the same command continues" in two.texts[0]
    assert "Traceback" not in "".join(two.texts)


def test_only_the_first_process_tells(four, two):
    for part in (four, two):
        assert "compiled the step" in part.texts[0]
        for text in part.texts[1:]:
            assert "compiled the step" not in text and "loss" not in text


def test_any_number_of_processes_has_the_losses_of_one(four, two, last, alone):
    of_one = {row["step"]: row for row in alone}
    assert [row["step"] for row in last] == list(of_one)
    # The four's own rows too: those behind their checkpoint have been written anew.
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
    """Shown by the broken videos that each has come upon."""
    before = four.rows[-1]["step"]
    names = ["bad_videos.jsonl", *(f"bad_videos_{i}.jsonl" for i in range(1, 4))]
    of_each = [bad_paths(folder / name, before) for name in names]
    of_one = bad_paths(folder / "alone/bad_videos.jsonl", before)
    assert all(of_each) and len(of_one) == sum(map(len, of_each))
    assert of_one == set().union(*of_each)


def test_what_all_processes_found_is_counted(four, alone):
    key = "data/bad_videos"
    of_one = {row["step"]: row[key] for row in alone}
    # Before a checkpoint, the batch behind it is not drawn yet.
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


def test_the_watchdog_tells_where_a_step_that_takes_long_stands(folder, alone):
    text = (folder / "alone/stacks_0.txt").read_text()
    # A busy machine may be slow at other steps too.
    dumps = [d for d in text.split("no step ended for ") if "in write_late" in d]
    assert dumps
    for dump in dumps:
        assert re.match(r"\d+ s, the last was step 3; its threads stand at\n", dump)
        assert "in train_and_evaluate" in dump
