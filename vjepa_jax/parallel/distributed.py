"""The processes of a run: how they start, wait, agree to stop, and fail.

Every process runs the same command on the same config. On one process nothing here
waits for anything.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

import jax
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

from vjepa_jax.base.errors import UserError
from vjepa_jax.parallel import cluster

# EX_TEMPFAIL: the same command, on all processes, continues the run.
EXIT_TRY_AGAIN = 75
# Longest delay between processes at the same point of the program.
WAIT_SECS = 600

_WAITING_EVERY_SECS = 30
# How long a process that failed waits for the others to fail likewise.
_FAIL_TOGETHER_SECS = 10

_heartbeat_timeout_secs = 0
_why_aborted = ""
_abort_handler = None  # kept, since C has its address


class LostProcess(Exception):
    """Another process of the run has ended, or does not answer."""


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    start_timeout_secs: int = 300,
    heartbeat_timeout_secs: int = 100,
) -> None:
    """Join the processes of the run; call it before any computation.

    Does nothing where there is one process only, or when called again.

    Where the others do not come up in time, or one of them ends or falls silent later,
    this process ends with `EXIT_TRY_AGAIN` and a message.

    Args:
      coordinator_address, num_processes, process_id: see `cluster.describe`.
      start_timeout_secs: longest wait for all processes to be there.
      heartbeat_timeout_secs: silence after which a process counts as dead.

    Raises:
      UserError: the flags or the environment describe no cluster.
    """
    global _heartbeat_timeout_secs
    if jax.distributed.is_initialized():
        return
    found = cluster.describe(os.environ, coordinator_address, num_processes, process_id)
    if found is None:
        return
    _heartbeat_timeout_secs = heartbeat_timeout_secs
    _exit_on_abort()
    where = found.get("coordinator_address", "the first process")
    _set_reason(
        f"the processes of this run did not all reach {where} within "
        f"{start_timeout_secs} s: check that the same command runs on every host, with "
        "the number of processes and an index of its own, that the first host's name "
        "and port can be reached from the others, and that nothing is left of an "
        "earlier run there"
    )
    with _tell_while_waiting(f"waiting for all processes of the run at {where}"):
        jax.distributed.initialize(
            **found,
            initialization_timeout=start_timeout_secs,
            heartbeat_timeout_seconds=heartbeat_timeout_secs,
        )
    _set_reason(
        "another process of this run has ended or was silent for "
        f"{heartbeat_timeout_secs} s (jax names it above): see its output; the same "
        "command on all of them continues from the latest checkpoint"
    )


def _set_reason(message: str) -> None:
    global _why_aborted
    _why_aborted = message


def _exit_on_abort() -> None:
    """Give the end that jax prepares for a process that lost the others a name.

    Its client calls abort() in a thread of its own, which no Python code can catch:
    exceptions do not reach it, and a Python signal handler would run after the end.
    """
    global _abort_handler

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(_):
        _end(EXIT_TRY_AGAIN, _why_aborted)

    _abort_handler = handler
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)


def _end(code: int, message: str) -> NoReturn:
    """Tell why, and end at once: what runs at exit would wait for the others."""
    print(f"error: {message}", file=sys.stderr)
    _exit(code)


def _exit(code: int) -> NoReturn:
    """End this process without what runs at exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def _tell_while_waiting(message: str) -> Iterator[None]:
    done = threading.Event()

    def tell():
        while not done.wait(_WAITING_EVERY_SECS):
            print(message, file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def process_index() -> int:
    """Rank of this process, from 0."""
    return jax.process_index()


def process_count() -> int:
    """Number of processes of the run."""
    return jax.process_count()


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return process_index() == 0


def print_on_main(message: str) -> None:
    """Print a message to the standard error output of process 0."""
    if is_main():
        print(message, file=sys.stderr, flush=True)


def _client():
    # There is no public way to it; Orbax takes this one too.
    return jax_distributed.global_state.client


def barrier(name: str, timeout_secs: float) -> None:
    """Wait until every process of the run has come to the barrier of this name.

    Raises:
      LostProcess: not all of them came in time; the message names those that did not.
    """
    if process_count() == 1:
        return
    try:
        _client().wait_at_barrier(name, int(timeout_secs * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise LostProcess(
            f"not all {process_count()} processes came to the point '{name}' within "
            f"{timeout_secs:g} s: see the output of those that are missing ({error})"
        ) from None


def from_main(name: str, text: str, timeout_secs: float) -> str:
    """Return the text that the main process gave under this name, once per run.

    Raises:
      LostProcess: there was none in time.
    """
    if process_count() == 1:
        return text
    key = f"vjepa_jax/{name}"
    if is_main():
        _client().key_value_set(key, text)
        return text
    return _value_of(key, timeout_secs, "the first process")


def sum_on_main(name: str, values: Sequence[int], timeout_secs: float) -> Sequence[int]:
    """Sum numbers over all processes, on the main one; the others get their own back.

    The devices have no part in it, so that nobody waits for the step under way.

    Args:
      name: never given before; all processes call with the same.
      values: as many on every process.
      timeout_secs: longest wait for the others.

    Raises:
      LostProcess: on the main process, not all came in time.
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


def _value_of(key: str, timeout_secs: float, whose: str) -> str:
    try:
        return _client().blocking_key_value_get(key, int(timeout_secs * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise LostProcess(
            f"{whose} of this run did not give '{key}' within {timeout_secs:g} s: see "
            f"its output ({error})"
        ) from None


class StopRequest:
    """Turns a Ctrl-C or SIGTERM into a checkpoint; a context manager.

    One process stops after the step that is under way, and a second signal ends it at
    once. Several agree on a step, whichever of them the signal reached: jax's
    preemption service, which hears SIGTERM, takes one that none of them has begun.
    """

    def __init__(self):
        """Looks how many processes there are."""
        self._is_alone = process_count() == 1
        self._signal: int | None = None
        self._old: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        heard = (signal.SIGINT, signal.SIGTERM) if self._is_alone else (signal.SIGINT,)
        self._old = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number, _) -> None:
        self._signal = number
        signal.signal(number, self._old[number])
        if not self._is_alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def is_agreed(self, step: int) -> bool:
        """Whether the run stops after this step; every process asks at every step."""
        if self._is_alone:
            return self._signal is not None
        return multihost_utils.reached_preemption_sync_point(step)

    @property
    def exit_code(self) -> int:
        """What a stopped process ends with."""
        if self._is_alone and self._signal is not None:
            return 128 + self._signal
        return EXIT_TRY_AGAIN


@contextlib.contextmanager
def ending_together(user_error_code: int) -> Iterator[None]:
    """Lets no process wait for one that failed; around everything that may fail.

    What fails in one process only leaves the others in a computation that never ends,
    and the failed one, at its exit, in a wait for them. Here it tells why at once,
    gives the others a moment to fail likewise (a mistake in the config is everyone's),
    and ends.

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
            # Mostly another process broke off a computation; who, the heartbeats tell.
            wait_secs += _heartbeat_timeout_secs
        _leave(1, wait_secs)


def _leave(code: int, wait_secs: float) -> NoReturn:
    """End after a failure, in order if all processes come here."""
    try:
        _client().wait_at_barrier("vjepa_jax/failed", int(wait_secs * 1000))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            _end(EXIT_TRY_AGAIN, _why_aborted)
        _end(code, "this process failed alone; the others will end after it")
    jax.distributed.shutdown()
    _exit(code)
