"""The folder of a run: whose it is, and its files beside the checkpoints.

It may be remote (gs://). Metrics, lists of bad videos and traces grow while a run goes
on, which objects of a store cannot: they are written to a local folder and copied.
"""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
import threading

from absl import logging
from etils import epath

from vjepa_jax.base import files
from vjepa_jax.base.errors import UserError
from vjepa_jax.config import saved
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.parallel import distributed

CONFIG_FILE = "config.json"
_EVERY_SECS = 60.0


def check(config: ConfigDict, workdir: str) -> None:
    """Raise UserError if the workdir is none, or holds a run of another config."""
    path = _path(workdir) / CONFIG_FILE
    if not path.exists():
        if path.parent.exists() and not path.parent.is_dir():
            raise UserError(f"--workdir={workdir} is not a folder: give another")
        return
    try:
        old = saved.restored(json.loads(path.read_text())).to_dict()
    except (ValueError, TypeError, AttributeError, KeyError):
        raise UserError(f"{path} is no config: give another --workdir") from None
    changed = saved.differences(old, config.to_dict())
    if changed:
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(changed)}): give "
            "another --workdir, or the values of that run"
        )


def claim(config: ConfigDict, workdir: str) -> None:
    """Write `config.json`, whole or not at all."""
    if distributed.is_main():
        path = _path(workdir) / CONFIG_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, json.dumps(config.to_dict(), indent=2) + "\n")


class LocalFiles:
    """A local folder that stands for a workdir; a context manager.

    A local workdir is that folder itself. Of a remote one, the files whose names match
    `fetched` are brought here first, and what this process changes is copied back: once
    a minute in a thread, at `copy_back`, and at the end.

    Attributes:
      folder: the local folder, which exists.
    """

    def __init__(self, workdir: str, fetched: str):
        """Prepares the folder.

        Args:
          workdir: local folder, or one of a remote store (`gs://bucket/run`).
          fetched: pattern of the files that are continued or read, such as `*.jsonl`.
        """
        self._remote = _path(workdir) if files.is_remote(workdir) else None
        if self._remote is None:
            self.folder = pathlib.Path(workdir)
            self.folder.mkdir(parents=True, exist_ok=True)
            return
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="vjepa_run_"))
        if self._remote.exists():
            for file in self._remote.iterdir():
                if pathlib.PurePath(file.name).match(fetched):
                    (self.folder / file.name).write_bytes(file.read_bytes())
        self._copied = self._stamps()
        self._lock, self._done = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._copy_on, daemon=True)

    def __enter__(self) -> "LocalFiles":
        if self._remote is not None:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self._remote is not None:
            self._done.set()
            self._thread.join()
            self.copy_back()
            shutil.rmtree(self.folder, ignore_errors=True)

    def copy_back(self) -> None:
        """Copies what has changed to the remote workdir; a failure is logged.

        The next copy brings what this one could not.
        """
        if self._remote is None:
            return
        with self._lock:
            for name, stamp in self._stamps().items():
                if self._copied.get(name) == stamp:
                    continue
                try:
                    target = self._remote / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes((self.folder / name).read_bytes())
                except Exception as error:  # of any client of any store
                    logging.warning("%s was not copied: %s", target, error)
                else:
                    self._copied[name] = stamp

    def _copy_on(self) -> None:
        while not self._done.wait(_EVERY_SECS):
            self.copy_back()

    def _stamps(self) -> dict[str, tuple[int, int]]:
        """Returns {name: what changes with the file}."""
        stamps = {}
        for folder, _, names in os.walk(self.folder):
            for file in (pathlib.Path(folder, name) for name in names):
                with contextlib.suppress(FileNotFoundError):  # it was renamed meanwhile
                    stat, name = file.stat(), str(file.relative_to(self.folder))
                    stamps[name] = stat.st_size, stat.st_mtime_ns
        return stamps


def _path(workdir: str) -> epath.Path:
    """Returns the path of a workdir whose store answers."""
    path = epath.Path(workdir)
    if files.is_remote(workdir):
        try:
            path.exists()
        except ImportError:
            raise UserError(
                f"--workdir={workdir} needs its store's client: pip install "
                "'vjepa_jax[gcs]'"
            ) from None
        except Exception as error:  # the clients' errors have no base in common
            said = " ".join(str(error).split())
            raise UserError(f"--workdir={workdir} cannot be read: {said}") from None
    return path
