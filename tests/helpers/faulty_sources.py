"""A source whose records can kill or block the process that reads them.

In a module of its own, since the processes import it.
"""

import os
import pathlib
import signal
import sys
import time
from multiprocessing import shared_memory

import numpy as np
import train_iterators

from vjepa_jax.data.clips.reader import ClipReader
from vjepa_jax.data.clips.sampling import Sampling
from vjepa_jax.data.sources.records import Mixture, Record, Source

# By their names a test finds its own segments among those of other programs.
if "SHM_PREFIX" in os.environ:
    shared_memory._SHM_NAME_PREFIX = f"/{os.environ['SHM_PREFIX']}"


class FaultySource(Source):
    """Frames from memory; some records fail, the first `times` times.

    Attributes:
      faults: {record: "kill", "hang", "error" or "runtime"}.
      times: how often a record fails, over all processes.
      folder: where the times are counted.
      start_fault: whether processes die before they read a record.
    """

    def __init__(self, num_records, faults, folder, times=1000, start_fault=False):
        self.name = "faulty"
        self.labels = np.zeros(num_records, np.int64)
        self.faults, self.times, self.folder = faults, times, pathlib.Path(folder)
        self.start_fault = start_fault

    def __setstate__(self, state):
        if state["start_fault"]:
            os.kill(os.getpid(), signal.SIGKILL)
        self.__dict__.update(state)

    def __len__(self):
        return len(self.labels)

    def path_of(self, index):
        return f"record-{index}"

    def digest(self):
        return "faulty"

    def __getitem__(self, index):
        fault = self.faults.get(index)
        marks = self.folder / f"times-{index}"
        if fault and (marks.stat().st_size if marks.exists() else 0) < self.times:
            with open(marks, "a") as file:
                file.write("x")
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault == "hang":
                time.sleep(3600)
            kinds = {"error": ZeroDivisionError, "runtime": NotImplementedError}
            raise kinds[fault]("a bug in a reader")
        rng = np.random.default_rng(index)
        frames = rng.integers(0, 256, (8, 16, 16, 3), np.uint8)
        return Record(self.path_of(index), 0, frames, 12.0)


def make_iterator(source, **overrides):
    """Return the training stream of a source, batches of 4 clips of 4x16x16."""
    settings = {
        "reader": ClipReader(Sampling(4, frame_step=1), 16),
        "count": 2,
        "prefetch_megabytes": 0.1,
        "timeout_secs": 100.0,
    }
    mixture = Mixture([(source, 1.0)])
    return train_iterators.make_iterator(mixture, **settings | overrides)


def take(num_batches, source, **overrides):
    """Return uint8 [num_batches, B, T, S, S, 3]."""
    with make_iterator(source, **overrides) as batches:
        # Copied, so that no shared memory outlives the iterator.
        return np.stack([np.array(next(batches)["video"]) for _ in range(num_batches)])


def die_filling(log):
    """Die with an array of 1000 bytes half filled."""
    with log.array((1000,)) as array:
        array[:500] = 1
        os.kill(os.getpid(), signal.SIGKILL)


def main():
    """Draw batches; then end normally, by an error, or wait, as `sys.argv` says."""
    ending, folder = sys.argv[1:]
    batches = make_iterator(FaultySource(12, {}, folder))
    for _ in range(3):
        batch = next(batches)
    if ending == "full":
        counts = [0]
        while counts[-8:] != counts[-1:] * 8 or not counts[-1]:
            time.sleep(0.25)
            names = os.listdir("/dev/shm")
            prefix = os.environ["SHM_PREFIX"]
            counts.append(sum(name.startswith(prefix) for name in names))
        # A batch is three arrays: clips, records tried, and reasons.
        print(counts[-1] / 3, batches.shared_bytes / batch["video"].nbytes)
        batches.close()
        return
    del batch
    print("drawn", flush=True)
    if ending == "error":
        raise ValueError("an error of the program")
    if ending == "wait":
        time.sleep(600)
    if ending == "close":
        batches.close()


if __name__ == "__main__":
    main()
