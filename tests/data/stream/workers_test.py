"""Decoding processes that die or hang, by real ones that do."""

import json
import multiprocessing
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from unittest import mock

import faulty_sources
import numpy as np
import pytest
from faulty_sources import FaultySource, take

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.sources.records import Mixture
from vjepa_jax.data.stream import pipeline, workers
from vjepa_jax.data.stream.bad_videos import CODES, BadVideoLimits, BadVideos

NUM_RECORDS = 12


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Six batches of the stream without faults."""
    source = FaultySource(NUM_RECORDS, {}, tmp_path_factory.mktemp("plain"))
    return take(6, source, count=0)


def read_list(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_process_that_dies_once_costs_no_batch(tmp_path, plain):
    source = FaultySource(NUM_RECORDS, {5: "kill"}, tmp_path, times=1)
    listing = tmp_path / "bad_videos.jsonl"
    with mock.patch.object(workers.logging, "error") as error:
        # One process: of two, the other may come to the record first, in a batch that
        # nobody asks for.
        batches = take(6, source, path=str(listing), count=1)
    np.testing.assert_array_equal(batches, plain)
    assert (tmp_path / "times-5").read_text() == "x"
    ((message, *arguments),) = (call.args for call in error.call_args_list)
    assert "crashed on 'record-5' (Worker process" in message % tuple(arguments)
    assert "exit code -9)" in message % tuple(arguments)
    assert not listing.exists()


def test_shared_memory_of_a_dead_process_is_removed():
    log = workers.WorkLog(has_workers=True)
    process = multiprocessing.get_context("spawn").Process(
        target=faulty_sources.die_filling, args=(log,)
    )
    process.start()
    process.join()
    (work,) = log.read()
    left = pathlib.Path("/dev/shm") / work.array
    assert work.pid == process.pid and left.stat().st_size >= 1000
    log.remove_arrays()
    assert not left.exists()
    log.remove_arrays()  # of one that another has removed nothing is left to do
    log.remove()


@pytest.mark.parametrize(("fault", "reason"), [("kill", "crashed"), ("hang", "hung")])
def test_record_that_fails_again_is_quarantined(tmp_path, plain, fault, reason):
    source = FaultySource(NUM_RECORDS, {5: fault}, tmp_path)
    listing = tmp_path / "bad_videos.jsonl"
    settings = {"path": str(listing), "timeout_secs": 2.0}
    batches = take(6, source, **settings)
    # Twice, by as many of the two processes as came to it.
    harm = (tmp_path / "times-5").read_text()
    assert 2 <= len(harm) <= 4
    (entry,) = read_list(listing)
    assert (entry["path"], entry["reason"]) == ("record-5", reason)
    # Two epochs had the record, one clip each; all else is as without harm.
    differs = (batches != plain).any(axis=(2, 3, 4, 5))
    assert differs.sum() == 2

    # The same run, continued, knows of it and delivers the same batches.
    with faulty_sources.make_iterator(source, start_step=3, **settings) as again:
        assert again.bad_counts == {reason: 1}
        for step in (3, 4, 5):
            np.testing.assert_array_equal(next(again)["video"], batches[step])
    assert (tmp_path / "times-5").read_text() == harm
    assert len(read_list(listing)) == 1


def test_a_process_killed_from_outside_costs_no_batch(tmp_path, plain):
    source = FaultySource(NUM_RECORDS, {}, tmp_path)
    with faulty_sources.make_iterator(source) as batches:
        for step in range(6):
            if step == 2:
                multiprocessing.active_children()[0].kill()
            np.testing.assert_array_equal(next(batches)["video"], plain[step])


def test_processes_that_die_again_and_again_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_MAX_RESTARTS", 1)
    source = FaultySource(NUM_RECORDS, {}, tmp_path, start_fault=True)
    with (
        faulty_sources.make_iterator(source, count=1) as batches,
        pytest.raises(UserError, match=r"while it read no video .*2 times in a row"),
    ):
        next(batches)


@pytest.mark.parametrize(
    ("fault", "error"), [("error", ZeroDivisionError), ("runtime", NotImplementedError)]
)
def test_an_error_in_the_code_is_not_a_crash(tmp_path, fault, error):
    source = FaultySource(NUM_RECORDS, {5: fault}, tmp_path)
    with pytest.raises(error, match="a bug in a reader"):
        take(6, source, count=1)


def test_closing_does_not_wait_for_a_process_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_END_SECS", 2)
    faults = dict.fromkeys(range(NUM_RECORDS), "hang")
    source = FaultySource(NUM_RECORDS, faults, tmp_path)
    batches = faulty_sources.make_iterator(source, count=1)
    supervised = batches._batches
    # Starts the process, as `next` would.
    arguments = supervised._batches, queue.SimpleQueue()
    threading.Thread(target=workers._put_next, args=arguments, daemon=True).start()
    wait_until(lambda: any(work.record >= 0 for work in supervised._log.read()))
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 30
    wait_until(lambda: not multiprocessing.active_children())


def test_no_record_is_blamed_if_all_processes_hang(tmp_path, plain):
    source = FaultySource(NUM_RECORDS, dict.fromkeys((1, 4), "hang"), tmp_path)
    log = workers.WorkLog(has_workers=True)
    works = [workers.Work(1, 1, 9.0), workers.Work(2, 4, 9.0)]
    quarantined = []
    supervised = workers.SupervisedBatches(
        lambda step, since: HangingBatches(),
        log,
        start_step=0,
        timeout_secs=5.0,
        name_of=source.path_of,
        on_quarantine=lambda *args: quarantined.append(args),
    )
    for records, pids in (
        ({1, 4}, works),
        ({1}, [works[0], works[1]._replace(secs=1)]),
    ):
        with (
            mock.patch.object(log, "read", lambda pids=pids: pids),
            pytest.raises(workers._Failure) as caught,
        ):
            supervised._draw()
        assert caught.value.records == (set() if len(records) > 1 else records)
    supervised.close()


def test_rare_failures_at_one_record_do_not_quarantine_it():
    opened, quarantined = [], []

    def open_batches(step, since):
        opened.append((step, since))
        return mock.Mock(close=mock.Mock())

    supervised = workers.SupervisedBatches(
        open_batches,
        workers.WorkLog(has_workers=True),
        start_step=7,
        timeout_secs=5.0,
        name_of=str,
        on_quarantine=lambda *args: quarantined.append(args),
    )
    limit = workers._FAILS_AGAIN_WITHIN_STEPS
    try:
        for record, steps in ((3, 0), (4, limit), (3, 1), (3, limit), (4, 2)):
            supervised._step += steps
            supervised._restart_workers(workers._Failure("crashed", {record}, "died"))
    finally:
        supervised.close()
    third = 7 + limit + 1 + limit
    assert quarantined == [(3, "crashed", third)]
    assert opened[-2:] == [(third, {3: "crashed"}), (third + 2, {3: "crashed"})]


def test_every_process_reads_the_quarantine_of_all(tmp_path):
    source = Mixture([(FaultySource(NUM_RECORDS, {}, tmp_path), 1.0)])
    limits = BadVideoLimits(1.0, str(tmp_path / "bad_videos.jsonl"))
    for process in range(3):
        account = BadVideos(source, limits, process)
        account.add(process, "missing", 0)
        account.add(process + 3, "hung" if process else "crashed", 0)
        account.add(process, "hung", 4)  # known as missing, but no less dangerous
        account.add(process, "empty", 5)
        assert account.counts == Counter(hung=1 + (process > 0), crashed=process == 0)
    (tmp_path / "bad_videos_1.jsonl").chmod(0o400)
    with open(tmp_path / "bad_videos_2.jsonl", "a") as file:
        file.write('{"path": "rec')
    half = (tmp_path / "bad_videos_2.jsonl").read_bytes()
    for process in range(4):
        quarantined = BadVideos(source, limits, process).quarantined()
        assert set(quarantined) == {0, 1, 2, 3, 4, 5}
        assert quarantined[3] == CODES["crashed"] and quarantined[4] == CODES["hung"]
        mine = (tmp_path / "bad_videos_2.jsonl").read_bytes()
        assert mine == (half if process < 2 else half + b"\n")


def test_too_little_shared_memory_is_reported_before_the_start(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"MB free .*--shm-size.*prefetch_megabytes"):
        workers.require_shared_memory(1 << 60, str(tmp_path))
    workers.require_shared_memory(1 << 60, str(tmp_path / "a system without it"))
    asked = []
    monkeypatch.setattr(pipeline, "require_shared_memory", asked.append)
    source = FaultySource(NUM_RECORDS, {}, tmp_path)
    clip_bytes = 4 * 16 * 16 * 3
    # Two processes, each with as many batches again in a thread of this one.
    for megabytes, ahead in ((1e-9, 1), (5 * 4 * 4 * clip_bytes / 1e6, 5), (1e3, 8)):
        with faulty_sources.make_iterator(source, prefetch_megabytes=megabytes):
            assert asked.pop() == (4 * (ahead + 1) + 1) * 4 * clip_bytes


class HangingBatches:
    """An iterator that waits for its end."""

    def __init__(self):
        self.is_closed = threading.Event()

    def __next__(self):
        self.is_closed.wait()

    def close(self):
        self.is_closed.set()


def wait_until(condition, timeout_secs=60.0):
    end = time.monotonic() + timeout_secs
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)


def members(group):
    """Return the processes of a process group that still run."""
    found = []
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def start_program(folder, ending):
    """Return a process that draws batches, and the prefix of its shared memory."""
    prefix = f"vj{uuid.uuid4().hex[:6]}"
    paths = [str(pathlib.Path(faulty_sources.__file__).parent), *sys.path]
    process = subprocess.Popen(
        [sys.executable, faulty_sources.__file__, ending, str(folder)],
        env={
            **os.environ,
            "SHM_PREFIX": prefix,
            "PYTHONPATH": os.pathsep.join(paths),
            "TMPDIR": str(folder),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return process, prefix


def test_batches_take_the_expected_memory(tmp_path):
    process, _ = start_program(tmp_path, "full")
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr
    found, foreseen = map(float, stdout.split())
    assert foreseen - 4 <= found <= foreseen


@pytest.mark.parametrize("ending", ["close", "return", "error", "wait"])
def test_nothing_is_left_behind(tmp_path, ending):
    process, prefix = start_program(tmp_path, ending)
    assert process.stdout.readline() == "drawn\n", process.stderr.read()
    if ending == "wait":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends Ctrl-C
    _, stderr = process.communicate(timeout=60)
    code = {"error": 1, "wait": -signal.SIGINT}.get(ending, 0)
    assert process.returncode == code, stderr
    wait_until(lambda: not members(process.pid))
    assert not list(pathlib.Path("/dev/shm").glob(f"{prefix}*")), stderr
    assert not list(tmp_path.glob("vjepa_workers_*"))
    if ending == "close":
        assert "leaked" not in stderr and "Traceback" not in stderr


def test_workers_outlive_a_sigterm_but_not_their_parent(tmp_path):
    """A scheduler signals all processes of a job; the run then saves with its data."""
    process, _ = start_program(tmp_path, "wait")
    try:
        assert process.stdout.readline() == "drawn\n", process.stderr.read()
        workers = set(members(process.pid)) - {process.pid}
        decoding = {int(note.name) for note in tmp_path.glob("vjepa_workers_*/*")}
        assert decoding and decoding <= workers
        for worker in decoding:
            os.kill(worker, signal.SIGTERM)
        time.sleep(0.5)  # the time in which they would die of it
        assert decoding <= set(members(process.pid))
        process.kill()
        wait_until(lambda: not members(process.pid))
    finally:
        if members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
