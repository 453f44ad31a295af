"""The account of videos that gave no clip: counted, listed, and judged."""

import glob
import json
import os
from collections import Counter

import numpy as np
from absl import logging

from vjepa_jax.data import decode
from vjepa_jax.data.mixture import Mixture
from vjepa_jax.default_config import UserError

# Why a video is quarantined: processes died of it, or never came back from it.
CRASHED, HUNG = "crashed", "hung"
REASONS = (*decode.REASONS, CRASHED, HUNG)
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

    def __init__(self, source: Mixture, path: str | None, max_fraction: float):
        """Reads the list at `path`, if there is one.

        Args:
          source: what is drawn from.
          path: the list, in a folder that may yet have to be made; None: no list.
          max_fraction: share of the videos drawn that may be unreadable.
        """
        self._source = source
        self._path = path
        self._max_fraction = max_fraction
        self._drawn = np.zeros(len(source), bool)
        self._bad = np.zeros(len(source), bool)
        self._num_samples = 0
        self._listed = _read_list(path)
        self.counts = Counter(self._listed.values())

    def quarantined(self) -> dict[int, int]:
        """Returns what earlier runs quarantined: {record: its reason's code}.

        The lists of all processes of the run count, since another number of processes
        deals the records out differently.
        """
        listed = dict(self._listed)
        if self._path:
            stem, suffix = os.path.splitext(self._path)
            of_processes = f"{glob.escape(stem)}_*{suffix}"
            for path in sorted(glob.glob(of_processes)):
                listed |= _read_list(path)
        reasons = {p: r for p, r in listed.items() if r in (CRASHED, HUNG)}
        if not reasons:
            return {}
        paths = ((i, self._source.path_of(i)) for i in range(len(self._source)))
        return {i: CODES[reasons[path]] for i, path in paths if path in reasons}

    def add(self, record: int, reason: str, step: int) -> None:
        """Lists one record, unless it is listed."""
        path = self._source.path_of(record)
        if path in self._listed:
            return
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
            each place of the batch; -1 for none.
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
        self._judge(is_bad)

    def _judge(self, is_bad: np.ndarray) -> None:
        num_bad, num_drawn = int(self._bad.sum()), int(self._drawn.sum())
        where = f"of {self._source.name!r}" + (
            f" (listed in {self._path!r})" if self._path else ""
        )
        if is_bad.all(axis=1).any():
            raise UserError(
                f"{is_bad.shape[1]} videos {where} in a row cannot be read: mend or "
                "drop them"
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
    """Returns {path: reason}; ends a last line that a killed run left unfinished."""
    if not path or not os.path.exists(path):
        return {}
    listed = {}
    line = ""
    with open(path, "r+") as file:
        for line in file:
            try:
                entry = json.loads(line)
                listed[entry["path"]] = str(entry["reason"])
            except (ValueError, TypeError, KeyError):
                continue
        if line and not line.endswith("\n"):
            file.write("\n")
    return listed
