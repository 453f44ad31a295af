"""Count and list unreadable videos; end the run if there are too many."""

import dataclasses
import glob
import json
import os
from collections import Counter

import numpy as np
from absl import logging

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips import media
from vjepa_jax.data.sources.records import Mixture

# Why a video is quarantined: workers died while they read it, or took too long.
CRASHED, HUNG = "crashed", "hung"
REASONS = (*media.REASONS, CRASHED, HUNG)
CODES = {reason: code for code, reason in enumerate(REASONS)}

# The share of bad videos is compared with its limit after this many samples.
_MIN_SAMPLES = 100


@dataclasses.dataclass(frozen=True)
class BadVideoLimits:
    """How many unreadable videos a run accepts, and where it lists them.

    Attributes:
      max_fraction: largest share of the videos drawn that may be unreadable.
      path: file of JSON lines `{"path", "reason", "step"}`, in a folder that is made if
        needed. The n-th process of a run writes `STEM_n.SUFFIX` beside it. None: no
        list.
    """

    max_fraction: float
    path: str | None = None


class BadVideos:
    """Records which videos were drawn and which of them are unreadable.

    A restarted run reads its list again, so that no video is listed twice.

    Attributes:
      counts: unreadable videos known so far, by reason, including earlier runs.
    """

    def __init__(self, source: Mixture, limits: BadVideoLimits, process_index: int = 0):
        """Read this process's list, if there is one."""
        path = limits.path
        self._source = source
        self._first_path = self._path = path
        if path and process_index:
            stem, suffix = os.path.splitext(path)
            self._path = f"{stem}_{process_index}{suffix}"
        self._max_fraction = limits.max_fraction
        self._drawn = np.zeros(len(source), bool)
        self._bad = np.zeros(len(source), bool)
        self._num_samples = 0
        self._listed = _read_list(self._path)
        _end_last_line(self._path)
        self.counts = Counter(self._listed.values())

    def quarantined(self) -> dict[int, int]:
        """Return the records that earlier runs quarantined: {record: reason's code}.

        The lists of all processes are read, since the records of a process change with
        the number of processes.
        """
        lists = [self._listed, _read_list(self._first_path)]
        if self._first_path:
            stem, suffix = os.path.splitext(self._first_path)
            others = sorted(glob.glob(f"{glob.escape(stem)}_*{suffix}"))
            lists += [_read_list(path) for path in others]
        reasons = {
            path: reason
            for listed in lists
            for path, reason in listed.items()
            if reason in (CRASHED, HUNG)
        }
        if not reasons:
            return {}
        paths = ((i, self._source.path_of(i)) for i in range(len(self._source)))
        return {i: CODES[reasons[path]] for i, path in paths if path in reasons}

    def add(self, record: int, reason: str, step: int) -> None:
        """List a record, unless it is listed already."""
        path = self._source.path_of(record)
        listed = self._listed.get(path)
        if listed in (CRASHED, HUNG) or (listed and reason not in (CRASHED, HUNG)):
            return
        # A quarantine is always listed: the next start has to know it.
        if listed:
            self.counts[listed] -= 1
        self._listed[path] = reason
        self.counts[reason] += 1
        logging.warning("Replaced unreadable video %r: %s", path, reason)
        if self._path:
            os.makedirs(os.path.dirname(self._path) or ".", exist_ok=True)
            entry = {"path": path, "reason": reason, "step": step}
            with open(self._path, "a") as file:
                file.write(json.dumps(entry) + "\n")

    def add_batch(self, tried: np.ndarray, reasons: np.ndarray, step: int) -> None:
        """Count the records of a batch, and list the unreadable ones.

        Args:
          tried: int64 [B, tries], records in the order in which they were tried for
            each position of the batch; -1 for none.
          reasons: int8 [B, tries], code of the reason why each gave no clip; -1 for no
            record and for the one that gave the clip. If all failed, there is no clip.
          step: of the batch.

        Raises:
          UserError: too many videos are unreadable.
        """
        self._num_samples += len(tried)
        self._drawn[tried[tried >= 0]] = True
        is_bad = reasons >= 0
        if not is_bad.any():
            return
        self._bad[tried[is_bad]] = True
        for record, code in zip(tried[is_bad], reasons[is_bad], strict=True):
            self.add(int(record), REASONS[code], step)
        num_tries = (tried >= 0).sum(1)
        self._check(int(num_tries[num_tries == is_bad.sum(1)].max(initial=0)))

    def _check(self, num_in_row: int) -> None:
        num_bad, num_drawn = int(self._bad.sum()), int(self._drawn.sum())
        where = f"of {self._source.name!r}" + (
            f" (listed in {self._path!r})" if self._path else ""
        )
        if num_in_row:
            raise UserError(
                f"{num_in_row} videos {where} in a row cannot be read: fix or remove "
                "them"
            )
        if (
            self._num_samples >= _MIN_SAMPLES
            and num_bad > self._max_fraction * num_drawn
        ):
            raise UserError(
                f"{num_bad} of the {num_drawn} videos {where} drawn so far cannot be "
                f"read, more than data.max_bad_fraction={self._max_fraction:g} allows: "
                "fix or remove them, or allow more"
            )


def _read_list(path: str | None) -> dict[str, str]:
    """Return {path: reason}, without incomplete lines."""
    if not path or not os.path.exists(path):
        return {}
    listed = {}
    with open(path) as file:
        for line in file:
            try:
                entry = json.loads(line)
                listed[entry["path"]] = str(entry["reason"])
            except (ValueError, TypeError, KeyError):
                continue
    return listed


def _end_last_line(path: str | None) -> None:
    """End a line that a killed run left incomplete."""
    if path and os.path.exists(path):
        with open(path, "rb+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            if size and file.read() != b"\n":
                file.write(b"\n")
