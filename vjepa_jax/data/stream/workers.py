"""Worker processes that decode, and may hang or die without ending the run.

Every worker notes the record that it reads. If one dies or takes too long, the note
names the record, and all workers are restarted at the step that is due. They give the
same batches, since the stream is a pure function of (seed, step). A record at which
workers fail again soon is quarantined.

Workers are spawned, so a program that asks for them needs the usual
`if __name__ == "__main__"`.
"""

import atexit
import contextlib
import dataclasses
import functools
import gc
import math
import multiprocessing
import multiprocessing.connection
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

import grain
import numpy as np
from absl import flags, logging
from grain.multiprocessing import SharedMemoryArray

from vjepa_jax.base.errors import UserError
from vjepa_jax.base.host_memory import keep_freed_memory

Batch = dict[str, Any]

# How often the workers are checked while a batch is waited for.
_POLL_SECS = 0.5
# Workers that do not end by themselves within this time are killed.
_END_SECS = 10
# A new process imports everything in seconds, or minutes on a very busy machine.
_START_SECS = 120
# Restarts in a row, without a batch in between, after which the run ends.
_MAX_RESTARTS = 6
# A worker may die at a record for another reason, such as memory that another program
# took. If the record is the reason, workers fail again as soon as its batch is due. A
# failure after more steps than are decoded ahead is another accident.
_FAILS_AGAIN_WITHIN_STEPS = 1000

# The note of a worker; `array` is the name of the shared memory that it fills.
_NOTE = np.dtype([("record", "i8"), ("began", "i8"), ("array", "S64")])


@dataclasses.dataclass(frozen=True)
class Workers:
    """How batches are decoded ahead.

    Attributes:
      count: worker processes; 0 decodes in a thread of this process, where a decode
        that hangs or crashes cannot be handled.
      timeout_secs: longest time that a worker may take for one record.
      prefetch_megabytes: memory for batches decoded ahead, of all workers together;
        each has at least 2 batches and at most 16.
    """

    count: int
    timeout_secs: float
    prefetch_megabytes: float


class Work(NamedTuple):
    """State of a worker.

    Attributes:
      pid: of the process.
      record: that it reads; -1 for none.
      secs: time since it began.
      array: name of the shared memory that it fills; "" for none.
    """

    pid: int
    record: int
    secs: float
    array: str = ""


class WorkLog:
    """A folder in which every worker keeps a note of its state.

    Notes are memory maps, which are still there after a worker has died. Picklable:
    each worker writes its own note.
    """

    def __init__(self, has_workers: bool):
        """Make the folder."""
        self._has_workers = has_workers
        self._folder = tempfile.mkdtemp(prefix="vjepa_workers_")
        self._notes: dict[int, np.ndarray] = {}
        # Removed at the latest when this process ends, but never by copies in workers.
        self._remove = weakref.finalize(self, shutil.rmtree, self._folder, True)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the notes, which belong to this process."""
        return self.__dict__ | {"_notes": {}, "_remove": None}

    def begin(self) -> None:
        """Write the first note of this process, without a record."""
        self._note(-1)

    @contextlib.contextmanager
    def at(self, record: int) -> Iterator[None]:
        """Note the record that this process reads in the context."""
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
        # The time first: a new record must never be seen with an old time.
        note["began"] = time.monotonic_ns()
        note["record"] = record

    @contextlib.contextmanager
    def array(self, shape: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield a uint8 array to fill, which reaches the main process uncopied.

        In a worker it is shared memory, which the process that receives it removes. If
        the worker dies while it fills the array, `remove_arrays` removes it.
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
        """Return the state of every worker."""
        works = []
        # At the end of the program the folder may be removed before the workers end.
        names = os.listdir(self._folder) if os.path.isdir(self._folder) else []
        for name in names:
            notes = np.fromfile(os.path.join(self._folder, name), _NOTE)
            for record, began, array in notes.tolist():
                secs = (time.monotonic_ns() - began) / 1e9
                works.append(Work(int(name), record, secs, array.decode()))
        return works

    def remove_arrays(self) -> None:
        """Remove the shared memory that dead workers have left half filled."""
        for work in self.read():
            with contextlib.suppress(FileNotFoundError):
                if work.array:
                    left = SharedMemory(work.array)
                    left.close()
                    left.unlink()

    def clear(self) -> None:
        """Remove the notes of workers that have ended."""
        for name in os.listdir(self._folder):
            os.remove(os.path.join(self._folder, name))

    def remove(self) -> None:
        """Remove the folder."""
        self._remove()


class _Failure(Exception):
    """Workers failed (`how`: crashed or hung) while they read `records`."""

    def __init__(self, how: str, records: set[int], detail: str):
        super().__init__(detail)
        self.how, self.records = how, records


def _put_next(batches: Iterator, drawn: "queue.SimpleQueue[Any]") -> None:
    """Put the next batch, or the error that was raised, as (batch, error)."""
    try:
        drawn.put((next(batches), None))
    except BaseException as error:  # raised again in the main thread
        drawn.put((None, error))


# Iterators that are not closed yet. Their threads must not run while the interpreter
# ends, even if the program has dropped them.
_open: set["SupervisedBatches"] = set()


class SupervisedBatches(Iterator):
    """The batches of workers, which are restarted when one of them fails.

    Raises (from `next`):
      UserError: they fail again and again, and no single record is the cause.
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
        """Start the workers.

        Args:
          open_batches: from a step and {quarantined record: reason} to the iterator of
            batches from that step on, which has a method `close`.
          work_log: in which the workers note their records.
          start_step: of the first batch.
          timeout_secs: longest time that a worker may take for one record.
          name_of: gives a record's name, for messages.
          on_quarantine: called with the record, the reason (`crashed` or `hung`) and
            the step.
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
        self._batches: Any = None
        _open.add(self)
        self._open()

    def __next__(self) -> Any:
        while True:
            try:
                batch = self._draw()
            except _Failure as failure:
                self._restart_workers(failure)
            else:
                self._step += 1
                self._restarts = 0
                return batch

    def close(self) -> None:
        """End the workers."""
        _open.discard(self)
        self._close()
        self._log.remove()
        # At its end, Grain's iterator is a reference cycle of an exception and its
        # frames, which hold the last batch and its shared memory.
        gc.collect()

    def _open(self) -> None:
        self._batches = self._open_batches(self._step, dict(self._quarantined))

    def _close(self, avoid: Collection[int] = (), at_once: bool = False) -> None:
        """End the workers; kill those at a record to avoid, or all, at once."""
        if self._batches is not None:
            # The others end by themselves and remove their shared memory.
            for work in self._log.read():
                is_stuck = work.secs > self._timeout_secs or work.record in avoid
                if at_once or (work.record >= 0 and is_stuck):
                    _kill(work.pid)
            # Grain would wait for a hanging worker forever.
            ending = threading.Thread(target=self._batches.close, daemon=True)
            ending.start()
            ending.join(_END_SECS)
            if ending.is_alive():
                for work in self._log.read():
                    _kill(work.pid)
                ending.join(_END_SECS)
            self._log.remove_arrays()
            self._batches = None

    def _draw(self) -> Any:
        # In a thread, so that waiting can time out. It is a daemon, since a thread that
        # waits for a hanging worker must not keep the program from ending.
        drawn: queue.SimpleQueue[Any] = queue.SimpleQueue()
        arguments = self._batches, drawn
        threading.Thread(target=_put_next, args=arguments, daemon=True).start()
        began = time.monotonic()
        while True:
            try:
                batch, error = drawn.get(timeout=_POLL_SECS)
                if error is None:
                    return batch
                raise error
            except queue.Empty:
                works, limit = self._log.read(), self._timeout_secs
                records = {w.record for w in works if w.secs > limit} - {-1}
                if records:
                    if 1 < len(works) == len(records):
                        # All at once: the file system is the cause, not a record.
                        records = set()
                    detail = f"took more than {limit:g} s"
                    raise _Failure("hung", records, detail) from None
                waited = time.monotonic() - began
                idle = min((work.secs for work in works), default=waited)
                if min(waited, idle) > limit + _START_SECS:
                    detail = f"nothing happened for {waited:.0f} s"
                    raise _Failure("hung", set(), detail) from None
            except RuntimeError as error:
                if "terminated unexpectedly" not in str(error):  # Grain's text
                    raise
                living = {child.pid for child in multiprocessing.active_children()}
                dead = [work for work in self._log.read() if work.pid not in living]
                records = {work.record for work in dead if work.record >= 0}
                detail = str(error).partition(". Search")[0]
                raise _Failure("crashed", records, detail) from None

    def _restart_workers(self, failure: _Failure) -> None:
        names = ", ".join(repr(self._name_of(r)) for r in sorted(failure.records))
        what = (
            f"a decoding process {failure.how} "
            f"{f'on {names}' if names else 'while it read no video'} ({failure})"
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
                "them; otherwise remove the videos named"
            )
        logging.error("%s: restarting the processes at step %d", what, self._step)
        self._close(failure.records, at_once=not failure.records)
        self._log.clear()
        self._open()


@atexit.register
def _end_children() -> None:
    """End the workers that were not closed, before multiprocessing does.

    It would send SIGTERM, which they ignore, and wait. Functions that were registered
    later are called earlier, hence the import of `util` above.
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
    """Raise UserError if `folder` exists and has less than `num_bytes` free."""
    if not os.path.isdir(folder):
        return
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise UserError(
            f"{folder} has {free / 1e6:.0f} MB free and the batches of the decoding "
            f"processes need {num_bytes / 1e6:.0f} MB: enlarge it (docker run "
            "--shm-size), or lower data.num_workers or, in pretraining, "
            "data.prefetch_megabytes"
        )


def shared_bytes(num_workers: int, batches_ahead: int, batch_bytes: int) -> int:
    """Return the size of the workers' batches in /dev/shm.

    Each worker's queue, and the thread that empties it, hold one batch more than they
    buffer; the caller holds another one.
    """
    if not num_workers:
        return 0
    return (2 * num_workers * (batches_ahead + 1) + 1) * batch_bytes


def decoded_ahead(
    dataset: grain.MapDataset, num_workers: int, batches_ahead: int, work_log: WorkLog
) -> grain.DatasetIterator:
    """Return an iterator of `dataset` that is computed ahead of its use.

    Args:
      dataset: of batches, picklable.
      num_workers: processes; 0 computes in a thread.
      batches_ahead: batches that each worker computes ahead.
      work_log: in which the workers note their records.
    """
    if not flags.FLAGS.is_parsed():
        # Grain reads its own flags when it starts workers; tests and notebooks have no
        # command line.
        flags.FLAGS.mark_as_parsed()
    # A worker needs no thread: its batches wait in the queue to this process.
    threads, ahead = (0, 0) if num_workers else (1, batches_ahead)
    dataset = dataset.to_iter_dataset(grain.ReadOptions(threads, ahead))
    if num_workers:
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=num_workers, per_worker_buffer_size=batches_ahead
            ),
            worker_init_fn=functools.partial(_start_worker, work_log),
        )
    return iter(dataset)


def _start_worker(work_log: WorkLog, worker_index: int, worker_count: int) -> None:
    """Write the first note, ignore Ctrl-C and SIGTERM, and end with the parent.

    A terminal or a scheduler sends these signals to every process of the job. A worker
    that died of them would end the run before the state is saved. A parent that is
    killed cannot end its workers, which then would wait forever.
    """
    del worker_index, worker_count
    keep_freed_memory()
    work_log.begin()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
