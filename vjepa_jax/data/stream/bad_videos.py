"""The account of videos that gave no clip: counted, listed, and judged."""

import glob
import json
import os
from collections import Counter

import numpy as np
from absl import logging

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips import reader
from vjepa_jax.data.jobs.worker_pool import CRASHED
from vjepa_jax.data.sources.records import Mixture

# Why a video is quarantined: processes died of it, or never came back from it.
HUNG = "hung"
REASONS = (*reader.REASONS, CRASHED, HUNG)
CODES = {reason: code for code, reason in enumerate(REASONS)}

# A share of bad files means something only after this many samples.
_MIN_SAMPLES_TO_JUDGE = 100


class BadVideos:
    """Takes note of what was drawn and what of it could not be read.

    The list is a file of JSON lines, `{"path", "reason", "step"}`; a restart reads it,
    so that no video is listed twice.

    Attributes:
      counts: unreadable videos known so far, by reason, those of earlier runs included.
    """

    def __init__(
        self,
        source: Mixture,
        path: str | None,
        max_fraction: float,
        process_index: int = 0,
    ):
        """Reads this process's list, if there is one.

        Args:
          source: what is drawn from.
          path: the list of the first process, in a folder that may yet have to be made;
            the n-th process has `STEM_n.SUFFIX`. None: no list.
          max_fraction: share of the videos drawn that may be unreadable.
          process_index: this process.
        """
        self._source = source
        self._first_path = self._path = path
        if path and process_index:
            stem, suffix = os.path.splitext(path)
            self._path = f"{stem}_{process_index}{suffix}"
        self._max_fraction = max_fraction
        self._drawn = np.zeros(len(source), bool)
        self._bad = np.zeros(len(source), bool)
        self._num_samples = 0
        self._listed = _read_list(self._path)
        _end_last_line(self._path)
        self.counts = Counter(self._listed.values())

    def quarantined(self) -> dict[int, int]:
        """Returns what earlier runs quarantined: {record: its reason's code}.

        The lists of all processes of the run count, since another number of processes
        deals the records out differently.
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
        """Lists one record, unless it is listed."""
        path = self._source.path_of(record)
        listed = self._listed.get(path)
        if listed in (CRASHED, HUNG) or (listed and reason not in (CRASHED, HUNG)):
            return
        # A quarantine is listed in any case: the next start has to know.
        self.counts[listed] -= listed is not None
        self._listed[path] = reason
        self.counts[reason] += 1
        logging.warning("Replaced unreadable video %r: %s", path, reason)
        if self._path:
            os.makedirs(os.path.dirname(self._path) or ".", exist_ok=True)
            entry = {"path": path, "reason": reason, "step": step}
            with open(self._path, "a") as file:
                file.write(json.dumps(entry) + "\n")

    def account(self, tried: np.ndarray, reasons: np.ndarray, step: int) -> None:
        """Takes note of a batch.

        Args:
          tried: int64 `[B, tries]`, records in the order in which they were tried for
            each place of the batch; -1 for none. Where all failed, the place is empty.
          reasons: int8 of the same shape, the code of why each gave no clip; -1 for
            none and for the one that did.
          step: the batch's.

        Raises:
          UserError: too large a share is unreadable.
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
        self._judge(int(num_tries[num_tries == is_bad.sum(1)].max(initial=0)))

    def _judge(self, num_in_row: int) -> None:
        num_bad, num_drawn = int(self._bad.sum()), int(self._drawn.sum())
        where = f"of {self._source.name!r}" + (
            f" (listed in {self._path!r})" if self._path else ""
        )
        if num_in_row:
            raise UserError(
                f"{num_in_row} videos {where} in a row cannot be read: mend or drop "
                "them"
            )
        if (
            self._num_samples >= _MIN_SAMPLES_TO_JUDGE
            and num_bad > self._max_fraction * num_drawn
        ):
            raise UserError(
                f"{num_bad} of the {num_drawn} videos {where} drawn so far cannot be "
                f"read, more than data.max_bad_fraction={self._max_fraction:g} allows: "
                "mend or drop them, or allow more"
            )


def _read_list(path: str | None) -> dict[str, str]:
    """Returns {path: reason}, without lines that are not whole."""
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
    """Ends a line that a killed run left unfinished."""
    if path and os.path.exists(path):
        with open(path, "rb+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            if size and file.read() != b"\n":
                file.write(b"\n")
