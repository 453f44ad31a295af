"""Decoding processes that may hang or die without ending the run.

Every process notes which record it works on. When one dies or takes too long, the note
names the record; the processes are started again at the step that is due, which gives
the same batches, since the stream is a pure function of (seed, step). A record that
does it again soon is quarantined.
"""

import atexit
import contextlib
import gc
import math
import multiprocessing
import multiprocessing.util
import os
import queue
import shutil
import signal
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from multiprocessing.shared_memory import SharedMemory
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from grain.multiprocessing import SharedMemoryArray

from vjepa_jax.base.errors import UserError

# How often a wait for a batch looks after the processes.
_POLL_SECS = 0.5
# Processes that do not end by themselves within this time are killed.
_END_SECS = 10
# Importing everything takes a new process seconds, minutes on a very busy machine.
_START_SECS = 120
# Restarts without a batch in between that end the run.
_MAX_RESTARTS = 6
# A record may fail once for reasons of the machine, such as another program that took
# the memory. One that is to blame fails again at once, its batch being due still; what
# comes after more steps than are decoded ahead is another accident.
_FAILS_AGAIN_WITHIN_STEPS = 1000

# What a process writes of itself; `array` is the name of shared memory.
_NOTE = np.dtype([("record", "i8"), ("began", "i8"), ("array", "S64")])


class Work(NamedTuple):
    """What a process is at.

    Attributes:
      pid: of the process.
      record: -1 for none.
      secs: for how long.
      array: name of the shared memory that it fills, empty for none.
    """

    pid: int
    record: int
    secs: float
    array: str = ""


class WorkLog:
    """A folder in which every process keeps one note, in memory that outlives it.

    Picklable: a process that gets a copy keeps its own note.
    """

    def __init__(self, has_workers: bool):
        """Makes the folder."""
        self._has_workers = has_workers
        self._folder = tempfile.mkdtemp(prefix="vjepa_workers_")
        self._notes: dict[int, np.ndarray] = {}
        # At the latest when this process ends; a copy in another one does not remove.
        self._remove = weakref.finalize(self, shutil.rmtree, self._folder, True)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the notes, which belong to this process."""
        return self.__dict__ | {"_notes": {}, "_remove": None}

    def begin(self) -> None:
        """Makes this process known, at no record."""
        self._note(-1)

    @contextlib.contextmanager
    def at(self, record: int) -> Iterator[None]:
        """Notes that this process is at a record; one at a time."""
        self._note(record)
        try:
            yield
        finally:
            self._note(-1)

    def _own_note(self) -> np.ndarray:
        if os.getpid() not in self._notes:
            path = os.path.join(self._folder, str(os.getpid()))
            self._notes = {os.getpid(): np.memmap(path, _NOTE, "w+", shape=())}
            self._note(-1)
        return self._notes[os.getpid()]

    def _note(self, record: int) -> None:
        note = self._own_note()
        # The time first: a reader in between must not find the record with an old one.
        note["began"] = time.monotonic_ns()
        note["record"] = record

    @contextlib.contextmanager
    def array(self, shape: Sequence[int]) -> Iterator[np.ndarray]:
        """Gives a uint8 array to fill, from which nothing is copied on the way.

        That of a worker is shared memory, removed by whoever gets it from the queue;
        of a worker that dies while it fills one, `remove_arrays` does.
        """
        if not self._has_workers:
            yield np.empty(shape, np.uint8)
            return
        array = SharedMemoryArray(shape, np.uint8)
        note = self._own_note()
        note["array"] = array.metadata.name
        yield array
        note["array"] = ""

    def read(self) -> list[Work]:
        """Returns what every process is at."""
        works = []
        # At the end of the program the folder may be gone before the processes are.
        names = os.listdir(self._folder) if os.path.isdir(self._folder) else []
        for name in names:
            notes = np.fromfile(os.path.join(self._folder, name), _NOTE)
            for record, began, array in notes.tolist():
                secs = (time.monotonic_ns() - began) / 1e9
                works.append(Work(int(name), record, secs, array.decode()))
        return works

    def remove_arrays(self) -> None:
        """Removes what processes that have ended left half filled."""
        for work in self.read():
            with contextlib.suppress(FileNotFoundError):
                if work.array:
                    left = SharedMemory(work.array)
                    left.close()
                    left.unlink()

    def clear(self) -> None:
        """Forgets the processes, which have ended."""
        for name in os.listdir(self._folder):
            os.remove(os.path.join(self._folder, name))

    def remove(self) -> None:
        """Removes the folder."""
        self._remove()


class _Failure(Exception):
    """Processes died or hung: `how`, while at `records`."""

    def __init__(self, how: str, records: set[int], detail: str):
        super().__init__(detail)
        self.how, self.records = how, records


class _Puller:
    """Draws from an iterator in a thread, so that a wait for it can end."""

    def __init__(self, batches: Iterator):
        self._batches = batches
        self._wanted, self._drawn = queue.SimpleQueue(), queue.SimpleQueue()
        # A daemon: a thread that waits for a process that hangs must not keep the
        # program from ending.
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while self._wanted.get():
            try:
                self._drawn.put((next(self._batches), None))
            except BaseException as error:
                self._drawn.put((None, error))

    def ask(self) -> None:
        self._wanted.put(True)

    def wait(self, timeout_secs: float) -> Any:
        batch, error = self._drawn.get(timeout=timeout_secs)
        if error is not None:
            raise error
        return batch

    def end(self) -> None:
        self._wanted.put(False)


# Those not closed yet. Their threads must not run on while the interpreter ends, even
# where the program has forgotten them.
_open: set["SupervisedBatches"] = set()


class SupervisedBatches(Iterator):
    """The batches of processes, which are started again when one of them fails.

    Raises (from `next`):
      UserError: they fail again and again, and no single record is to blame.
    """

    def __init__(
        self,
        open_batches: Callable[[int, dict[int, str]], Iterator],
        work_log: WorkLog,
        *,
        start_step: int,
        timeout_secs: float,
        name_of: Callable[[int], str],
        on_quarantine: Callable[[int, str, int], None],
    ):
        """Starts the processes.

        Args:
          open_batches: from a step and the records quarantined, with the reason, to the
            iterator of batches from that step on, which has a method `close`.
          work_log: in which the processes note their records.
          start_step: of the first batch.
          timeout_secs: longest time that a process may be at one record.
          name_of: a record's name, for messages.
          on_quarantine: told the record, the reason (`crashed` or `hung`) and the step.
        """
        self._open_batches = open_batches
        self._log = work_log
        self._step = start_step
        self._timeout_secs = timeout_secs
        self._name_of = name_of
        self._on_quarantine = on_quarantine
        self._quarantined: dict[int, str] = {}
        self._failed_at: dict[int, int] = {}
        self._restarts = 0
        self._batches = self._puller = None
        _open.add(self)
        self._open()

    def __next__(self) -> Any:
        while True:
            try:
                batch = self._draw()
            except _Failure as failure:
                self._start_again(failure)
            else:
                self._step += 1
                self._restarts = 0
                return batch

    def close(self) -> None:
        """Ends the processes."""
        _open.discard(self)
        self._close()
        self._log.remove()
        # Grain's iterator, once at its end, is a circle of an exception and the frames
        # that it went through, which hold the last batch and its shared memory.
        gc.collect()

    def _open(self) -> None:
        self._batches = self._open_batches(self._step, dict(self._quarantined))
        self._puller = _Puller(self._batches)

    def _close(self, avoid: Collection[int] = (), at_once: bool = False) -> None:
        """Ends the processes; those that are at a record to avoid, or all, at once."""
        if self._batches is not None:
            self._puller.end()
            # The others end by themselves and leave no shared memory behind.
            for work in self._log.read():
                is_stuck = work.secs > self._timeout_secs or work.record in avoid
                if at_once or (work.record >= 0 and is_stuck):
                    _kill(work.pid)
            # Grain waits for a process that hangs for as long as it does.
            ending = threading.Thread(target=self._batches.close, daemon=True)
            ending.start()
            ending.join(_END_SECS)
            if ending.is_alive():
                for work in self._log.read():
                    _kill(work.pid)
                ending.join(_END_SECS)
            self._log.remove_arrays()
            self._batches = self._puller = None

    def _draw(self) -> Any:
        self._puller.ask()
        began = time.monotonic()
        while True:
            try:
                return self._puller.wait(_POLL_SECS)
            except queue.Empty:
                works, limit = self._log.read(), self._timeout_secs
                records = {w.record for w in works if w.secs > limit} - {-1}
                if records:
                    if 1 < len(works) == len(records):
                        # All of them at once: the file system, rather than any record.
                        records = set()
                    detail = f"took more than {limit:g} s"
                    raise _Failure("hung", records, detail) from None
                waited = time.monotonic() - began
                idle = min((work.secs for work in works), default=waited)
                if min(waited, idle) > limit + _START_SECS:
                    detail = f"nothing happened for {waited:.0f} s"
                    raise _Failure("hung", set(), detail) from None
            except RuntimeError as error:
                if "terminated unexpectedly" not in str(error):  # in Grain's words
                    raise
                living = {child.pid for child in multiprocessing.active_children()}
                dead = [work for work in self._log.read() if work.pid not in living]
                records = {work.record for work in dead if work.record >= 0}
                detail = str(error).partition(". Search")[0]
                raise _Failure("crashed", records, detail) from None

    def _start_again(self, failure: _Failure) -> None:
        names = ", ".join(repr(self._name_of(r)) for r in sorted(failure.records))
        what = (
            f"a decoding process {failure.how} "
            f"{f'on {names}' if names else 'while it was at no video'} ({failure})"
        )
        self._restarts += 1
        for record in failure.records:
            steps = self._step - self._failed_at.get(record, -math.inf)
            self._failed_at[record] = self._step
            if steps <= _FAILS_AGAIN_WITHIN_STEPS:
                self._quarantined[record] = failure.how
                self._on_quarantine(record, failure.how, self._step)
        if self._restarts > _MAX_RESTARTS:
            raise UserError(
                f"{what}, {self._restarts} times in a row: if memory or /dev/shm "
                "ran out, lower data.num_workers or data.prefetch_megabytes or enlarge "
                "them; otherwise drop the videos named"
            )
        logging.error("%s: starting the processes again at step %d", what, self._step)
        self._close(failure.records, at_once=not failure.records)
        self._log.clear()
        self._open()


@atexit.register
def _end_children() -> None:
    """Ends the processes that nobody closed, before multiprocessing does.

    It would send SIGTERM, to which they are deaf, and wait. Functions that were
    registered later are called earlier, hence the import of `util` above.
    """
    for batches in list(_open):
        batches.close()
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def require_shared_memory(num_bytes: int, folder: str = "/dev/shm") -> None:
    """Refuses to start what would die of a full `folder`, where there is one.

    Raises:
      UserError: less than `num_bytes` are free.
    """
    if not os.path.isdir(folder):
        return
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"{folder} has {free / 1e6:.0f} MB free and the batches of the decoding "
            f"processes take {num_bytes / 1e6:.0f} MB: enlarge it (docker run "
            "--shm-size), or lower data.num_workers or, in pretraining, "
            "data.prefetch_megabytes"
        )
