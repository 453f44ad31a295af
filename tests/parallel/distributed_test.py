"""Processes meet, agree to stop, and do not wait for one that failed."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import distributed_program
import pytest

from vjepa_jax.parallel import distributed

TIMEOUT_SECS = 120


class Group:
    """Processes of the program, in one mode."""

    def __init__(self, mode, count=2, ranks=None):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        path = [str(pathlib.Path(__file__).parents[2]), *sys.path]
        env = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(path)}
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    distributed_program.__file__,
                    mode,
                    address,
                    str(count),
                    str(rank),
                ],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (range(count) if ranks is None else ranks)
        ]

    def read_line(self, text):
        for process in self.processes:
            while process.stdout.readline() not in (text + "\n", ""):
                pass

    def end(self):
        """Wait for all; return their exit codes, outputs and messages."""
        try:
            texts = [p.communicate(timeout=TIMEOUT_SECS) for p in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        outputs, messages = zip(*texts, strict=True)
        return [p.returncode for p in self.processes], outputs, messages


def test_processes_meet_and_a_missing_one_is_named():
    codes, outputs, messages = Group("meet", 3).end()
    assert codes == [0, 0, 0], messages
    lines = [output.splitlines() for output in outputs]
    assert [line[1] for line in lines] == [
        "[3, 30] of 0",
        "[1, 10] of 0",
        "[2, 10] of 0",
    ]
    for line in lines[:2]:
        assert "not all 3 processes came to the point 'missed' within 0.5 s" in line[2]
        assert re.search(r"timed out task names: *2", line[2])
    assert len(lines[2]) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_stops_all_after_the_same_step(number):
    group = Group("stop")
    group.read_line("5")
    group.processes[1].send_signal(number)
    codes, outputs, messages = group.end()
    assert codes == [distributed.EXIT_TRY_AGAIN] * 2, messages
    last, other_last = (output.splitlines()[-1] for output in outputs)
    assert last == other_last
    assert all("Traceback" not in text for text in messages)


def test_a_second_ctrl_c_ends_at_once():
    codes, _, messages = Group("ctrl_c_twice").end()
    assert codes == [128 + signal.SIGINT, distributed.EXIT_TRY_AGAIN], messages
    assert "interrupted again" in messages[0]


def test_what_is_wrong_for_all_is_told_by_all():
    codes, _, messages = Group("fail_all").end()
    assert codes == [distributed_program.USER_ERROR_CODE] * 2, messages
    for rank, text in enumerate(messages):
        assert f"error: process {rank} cannot go on" in text
        assert "Traceback" not in text and "alone" not in text


def test_one_that_fails_alone_ends_and_the_others_with_it():
    group = Group("fail_one")
    group.read_line("started")
    began = time.monotonic()
    codes, _, messages = group.end()
    assert codes == [
        distributed.EXIT_TRY_AGAIN,
        distributed_program.USER_ERROR_CODE,
    ], messages
    assert "error: process 1 cannot go on" in messages[1]
    assert "failed alone" in messages[1]
    assert "error: another process of this run has ended" in messages[0]
    assert time.monotonic() - began < 100


def test_a_mistake_shows_its_traceback():
    codes, _, messages = Group("raise").end()
    assert codes == [1, 1], messages
    for text in messages:
        assert "Traceback" in text and "a mistake in the program" in text


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_do_not_come_are_waited_for_in_vain(rank):
    codes, _, messages = Group("wait", ranks=[rank]).end()
    assert codes == [distributed.EXIT_TRY_AGAIN], messages
    (line,) = [x for x in messages[0].splitlines() if x.startswith("error: ")]
    assert re.search(r"did not all reach localhost:\d+ within 2 s", line)
    assert "on every host" in line and "port" in line


def test_one_process_waits_for_nobody(rng):
    numbers = rng.integers(0, 100, 5).tolist()
    assert distributed.sum_on_main("numbers", numbers, 0.0) == numbers
    assert distributed.from_main("text", "mine", 0.0) == "mine"
    distributed.barrier("alone", 0.0)
    with pytest.raises(KeyError, match="x"), distributed.ending_together(2):
        raise KeyError("x")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_process_stops_at_the_first_signal(number):
    with distributed.StopRequest() as request:
        assert not request.is_agreed(1)
        os.kill(os.getpid(), number)
        assert request.is_agreed(2)
        assert request.exit_code == 128 + number
