"""Processes meet, agree to stop, and do not wait for one that failed."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import distributed_program
import jax
import pytest
from distributed_program import MISSED_SECS, START_SECS, TIMEOUT_SECS
from process_group import reserve_port

from vjepa_jax.parallel import distributed


class Group:
    """Processes of the program, in one mode."""

    def __init__(self, mode, count=2, ranks=None):
        self._port_holder, port = reserve_port()
        path = [str(pathlib.Path(__file__).parents[2]), *sys.path]
        env = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(path)}
        program = [sys.executable, distributed_program.__file__, mode]
        self.processes = [
            subprocess.Popen(
                [*program, f"localhost:{port}", str(count), str(rank)],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (range(count) if ranks is None else ranks)
        ]

    def read_until(self, line):
        """Return the lines of each process's output up to this one."""
        outputs = []
        for process in self.processes:
            outputs.append([process.stdout.readline()])
            while outputs[-1][-1] not in (f"{line}\n", ""):
                outputs[-1].append(process.stdout.readline())
        return ["".join(lines).splitlines() for lines in outputs]

    def end(self):
        """Wait for all; return their exit codes, outputs and messages."""
        try:
            texts = [p.communicate(timeout=TIMEOUT_SECS) for p in self.processes]
        finally:
            for process in self.processes:
                process.kill()
            self._port_holder.close()
        outputs, messages = zip(*texts, strict=True)
        return [p.returncode for p in self.processes], outputs, messages


def assert_stopped_together(group):
    codes, outputs, messages = group.end()
    assert codes == [distributed.EXIT_TRY_AGAIN] * len(codes), messages
    assert len({output.splitlines()[-1] for output in outputs}) == 1
    assert all("Traceback" not in text for text in messages)


def test_processes_meet_name_a_missing_one_and_stop_after_the_same_step():
    group = Group("meet_and_stop", 3)
    lines = group.read_until("5")
    group.processes[1].send_signal(signal.SIGTERM)
    assert [line[1] for line in lines] == [
        f"{numbers} of 0 ['', 'of 1', 'of 0']"
        for numbers in ("[3, 30]", "[1, 10]", "[2, 10]")
    ]
    missed = f"not all 3 processes reached the barrier 'missed' within {MISSED_SECS} s"
    for line in lines[:2]:
        assert missed in line[2]
        assert re.search(r"timed out task names: *2", line[2])
    assert lines[2][2] == "1"
    assert_stopped_together(group)


def test_ctrl_c_to_one_stops_all_after_the_same_step():
    group = Group("stop")
    group.read_until("5")
    group.processes[1].send_signal(signal.SIGINT)
    assert_stopped_together(group)


def test_a_second_ctrl_c_ends_at_once():
    codes, _, messages = Group("ctrl_c_twice").end()
    assert codes == [128 + signal.SIGINT, distributed.EXIT_TRY_AGAIN], messages
    assert "interrupted again" in messages[0]


def test_errors_of_all_are_printed_by_all():
    codes, _, messages = Group("fail_all", 3).end()
    user_error = distributed_program.USER_ERROR_CODE
    assert codes == [user_error, user_error, 1], messages
    for rank, text in enumerate(messages[:2]):
        assert f"error: process {rank} cannot go on" in text
        assert "Traceback" not in text
    assert "Traceback" in messages[2] and "a mistake in the program" in messages[2]
    assert all("only this process" not in text for text in messages)


def test_one_that_fails_alone_ends_and_the_others_with_it():
    codes, outputs, messages = Group("fail_one").end()
    assert codes == [
        distributed.EXIT_TRY_AGAIN,
        distributed_program.USER_ERROR_CODE,
    ], messages
    assert all("started" in output for output in outputs)
    assert "error: process 1 cannot go on" in messages[1]
    assert "only this process failed" in messages[1]
    assert "error: another process of this run has ended" in messages[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_wait_for_missing_processes_ends(rank):
    codes, _, messages = Group("wait", ranks=[rank]).end()
    assert codes == [distributed.EXIT_TRY_AGAIN], messages
    (line,) = [x for x in messages[0].splitlines() if x.startswith("error: ")]
    assert re.search(rf"did not all reach localhost:\d+ within {START_SECS} s", line)
    assert "on every host" in line and "port" in line


def test_jax_gets_the_processes_and_the_timeouts(monkeypatch):
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **kw: given.update(kw))
    monkeypatch.setattr(distributed, "_exit_on_abort", lambda: None)
    monkeypatch.setattr(distributed, "_why_aborted", "")
    monkeypatch.setattr(distributed, "_heartbeat_timeout_secs", 0)
    distributed.initialize("host:1", 4, 2, 20, 30)
    assert given == {
        "coordinator_address": "host:1",
        "num_processes": 4,
        "process_id": 2,
        "initialization_timeout": 20,
        "heartbeat_timeout_seconds": 30,
    }


def test_one_process_waits_for_nobody(rng):
    numbers = rng.integers(0, 100, 5).tolist()
    assert distributed.sum_on_main("numbers", numbers, 0.0) == numbers
    assert distributed.from_main("text", "mine", 0.0) == "mine"
    assert distributed.first_problem("problem", "mine", 0.0) == "mine"
    distributed.barrier("alone", 0.0)
    with pytest.raises(KeyError, match="x"), distributed.exit_on_error(2):
        raise KeyError("x")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_process_stops_at_the_first_signal(number):
    with distributed.StopRequest() as request:
        assert not request.is_agreed(1)
        signal.raise_signal(number)
        assert request.is_agreed(2)
        assert request.exit_code == 128 + number
