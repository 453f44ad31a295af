"""The processes of a run: start, barriers, exchange of small data, stop, failure.

All processes run the same command with the same config. With a single process nothing
here waits.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax
from absl import logging
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

from vjepa_jax.base.errors import UserError
from vjepa_jax.parallel import cluster

# EX_TEMPFAIL of sysexits.h: the same command, on all processes, continues the run.
EXIT_TRY_AGAIN = 75
# Longest delay between processes at the same point of the program.
WAIT_SECS = 600

_LOG_WAITING_SECS = 30
# How long a failed process waits for the others to fail with the same error.
_FAIL_TOGETHER_SECS = 10

_heartbeat_timeout_secs = 0
_why_aborted = ""
_abort_handler = None  # referenced here, because C code holds its address
_end_lock = threading.Lock()  # jax may abort in several threads; only one prints why


class LostProcess(Exception):
    """Another process of the run has ended or does not respond."""


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    start_timeout_secs: int = 300,
    heartbeat_timeout_secs: int = 100,
) -> None:
    """Connect to the other processes of the run; call it before any computation.

    A single process, and a second call, do nothing. If the others do not start in time,
    or if one of them ends or stops sending heartbeats later, this process exits with
    `EXIT_TRY_AGAIN` and a message.

    Args:
      coordinator_address, num_processes, process_id: see `cluster.detect`.
      start_timeout_secs: longest wait for all processes to start.
      heartbeat_timeout_secs: time without heartbeats after which a process counts as
        dead.

    Raises:
      UserError: the flags or the environment are incomplete or inconsistent.
    """
    global _heartbeat_timeout_secs
    if jax.distributed.is_initialized():
        return
    arguments = cluster.detect(
        os.environ, coordinator_address, num_processes, process_id
    )
    if arguments is None:
        return
    _heartbeat_timeout_secs = heartbeat_timeout_secs
    _exit_on_abort()
    address = arguments.get("coordinator_address", "the first process")
    _set_reason(
        f"the processes of this run did not all reach {address} within "
        f"{start_timeout_secs} s: check that the same command runs on every host, with "
        "the same number of processes and a different process id, that the first "
        "host's name and port can be reached from the others, and that no process of "
        "an earlier run is left there"
    )
    with _log_while_waiting(f"waiting for all processes of the run at {address}"):
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=start_timeout_secs,
            heartbeat_timeout_seconds=heartbeat_timeout_secs,
        )
    _set_reason(
        "another process of this run has ended or sent no heartbeat for "
        f"{heartbeat_timeout_secs} s (jax names it above): see its output; the same "
        "command on all of them continues from the latest checkpoint"
    )


def _set_reason(message: str) -> None:
    global _why_aborted
    _why_aborted = message


def _exit_on_abort() -> None:
    """Print the reason and set the exit code when jax aborts after losing a process.

    jax's client calls abort() in its own thread. Python cannot catch that: there is no
    exception, and a Python signal handler would only run after the process has ended.
    """
    global _abort_handler

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(_):
        _end(EXIT_TRY_AGAIN, _why_aborted)

    _abort_handler = handler
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)


def _end(code: int, message: str) -> NoReturn:
    """Print the reason and exit at once: exit handlers would wait for the others."""
    _end_lock.acquire()
    print(f"error: {message}", file=sys.stderr)
    _exit(code)


def _exit(code: int) -> NoReturn:
    """Exit without running exit handlers."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def _log_while_waiting(message: str) -> Iterator[None]:
    done = threading.Event()

    def log():
        while not done.wait(_LOG_WAITING_SECS):
            print(message, file=sys.stderr, flush=True)

    thread = threading.Thread(target=log, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def process_index() -> int:
    """Return the rank of this process, from 0."""
    return jax.process_index()


def process_count() -> int:
    """Return the number of processes of the run."""
    return jax.process_count()


def is_main() -> bool:
    """Return whether this process has rank 0, which writes files and logs."""
    return process_index() == 0


def print_on_main(message: str) -> None:
    """Print a message to the standard error output of process 0."""
    if is_main():
        print(message, file=sys.stderr, flush=True)


def _client():
    # jax has no public access to it; Orbax uses this one too.
    return jax_distributed.global_state.client


def barrier(name: str, timeout_secs: float) -> None:
    """Wait until every process of the run has reached the barrier of this name.

    Raises:
      LostProcess: a timeout; the message names the processes that are missing.
    """
    if process_count() == 1:
        return
    try:
        _client().wait_at_barrier(name, int(timeout_secs * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise _lost(
            error,
            f"not all {process_count()} processes reached the barrier '{name}' within "
            f"{timeout_secs:g} s: see the output of those that are missing ({error})",
        ) from None


def from_main(name: str, text: str, timeout_secs: float) -> str:
    """Broadcast a text from the main process; use each name once per run.

    Raises:
      LostProcess: a timeout.
    """
    if process_count() == 1:
        return text
    key = f"vjepa_jax/{name}"
    if is_main():
        _client().key_value_set(key, text)
        return text
    return _value_of(key, timeout_secs, "the first process")


def sum_on_main(name: str, values: Sequence[int], timeout_secs: float) -> Sequence[int]:
    """Return the sums of numbers over all processes, on the main process only.

    The devices are not used, so that no process waits for the step in progress.

    Args:
      name: the same on all processes, and different in every call.
      values: numbers of this process, equally many on every process.
      timeout_secs: longest wait for the other processes.

    Returns:
      The sums on the main process, `values` on the others.

    Raises:
      LostProcess: a timeout, on the main process.
    """
    if process_count() == 1:
        return values
    folder = f"vjepa_jax/{name}/"
    if not is_main():
        text = ",".join(map(str, values))
        _client().key_value_set(f"{folder}{process_index()}", text)
        return values
    total = list(values)
    for other in range(1, process_count()):
        text = _value_of(f"{folder}{other}", timeout_secs, f"process {other}")
        total = [a + int(b) for a, b in zip(total, text.split(","), strict=True)]
    _client().key_value_delete(folder)
    return total


def first_problem(name: str, problem: str, timeout_secs: float) -> str:
    """Exchange what failed on each process; every process calls it.

    The devices are not used: after a failure their arrays may be incomplete.

    Args:
      name: the same on all processes, and different in every call.
      problem: of this process; "": none.
      timeout_secs: longest wait for the other processes.

    Returns:
      On all processes the problem of the lowest rank that has one; "": none has.

    Raises:
      LostProcess: a timeout.
    """
    if process_count() == 1:
        return problem
    if not is_main():
        _client().key_value_set(f"vjepa_jax/{name}/{process_index()}", problem or "-")
    else:
        for other in range(1, process_count()):
            text = _value_of(
                f"vjepa_jax/{name}/{other}", timeout_secs, f"process {other}"
            )
            problem = problem or text.removeprefix("-")
    return from_main(f"{name}/first", problem or "-", timeout_secs).removeprefix("-")


def _value_of(key: str, timeout_secs: float, whose: str) -> str:
    try:
        return _client().blocking_key_value_get(key, int(timeout_secs * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise _lost(
            error,
            f"{whose} of this run did not send '{key}' within {timeout_secs:g} s: see "
            f"its output ({error})",
        ) from None


def _lost(error: jax.errors.JaxRuntimeError, timeout_message: str) -> LostProcess:
    """Return what to raise after a failed wait."""
    if _is_timeout(error):
        return LostProcess(timeout_message)
    logging.warning("%s", error)  # jax found the loss before the wait was over
    return LostProcess(_why_aborted)


def _is_timeout(error: jax.errors.JaxRuntimeError) -> bool:
    return "DEADLINE_EXCEEDED" in str(error)


class StopRequest:
    """Context manager that turns Ctrl-C or SIGTERM into an orderly stop.

    A single process stops after the current step; a second signal ends it at once.
    Several processes agree on a step, no matter which of them got the signal: jax's
    preemption service, which receives SIGTERM, chooses a step that none has started.
    """

    def __init__(self) -> None:
        """Create a request; enter the context to install the signal handlers."""
        self._is_alone = process_count() == 1
        self._signal: int | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        numbers = [signal.SIGINT]
        if self._is_alone:
            numbers.append(signal.SIGTERM)
        self._old = {number: signal.signal(number, self._record) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _record(self, number, _) -> None:
        self._signal = number
        signal.signal(number, self._old[number])
        if not self._is_alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def is_agreed(self, step: int) -> bool:
        """Return whether to stop after this step; every process calls at every step."""
        if self._is_alone:
            return self._signal is not None
        return multihost_utils.reached_preemption_sync_point(step)

    @property
    def exit_code(self) -> int:
        """The exit code of a stopped process."""
        if self._is_alone and self._signal is not None:
            return 128 + self._signal
        return EXIT_TRY_AGAIN


@contextlib.contextmanager
def exit_on_error(user_error_code: int) -> Iterator[None]:
    """End this process on an error without waiting for the other processes.

    Put it around the whole run. If only one process fails, the others would wait for it
    in a collective that never ends, and its own exit handlers would wait for them. Here
    the failed process prints its error at once, gives the others a moment to fail with
    the same error (e.g. a mistake in the config), and exits. The others then exit by
    `initialize`'s rule.

    Args:
      user_error_code: exit code after a UserError.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, LostProcess):
            _end(EXIT_TRY_AGAIN, str(error))
        if isinstance(error, KeyboardInterrupt):
            _end(128 + signal.SIGINT, "interrupted again before a checkpoint was saved")
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr, flush=True)
            _leave(user_error_code, _FAIL_TOGETHER_SECS)
        traceback.print_exc()
        wait_secs = _FAIL_TOGETHER_SECS
        if isinstance(error, jax.errors.JaxRuntimeError):
            # Usually another process left a collective; missing heartbeats show which.
            wait_secs += _heartbeat_timeout_secs
        _leave(1, wait_secs)


def _leave(code: int, wait_secs: float) -> NoReturn:
    """Exit after a failure; shut jax down if all processes get here."""
    try:
        _client().wait_at_barrier("vjepa_jax/failed", int(wait_secs * 1000))
    except jax.errors.JaxRuntimeError as error:
        if not _is_timeout(error):
            _end(EXIT_TRY_AGAIN, _why_aborted)
        _end(code, "only this process failed; the others will end after it")
    jax.distributed.shutdown()
    _exit(code)
