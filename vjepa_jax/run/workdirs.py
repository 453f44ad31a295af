"""The folder of a run and its files, except checkpoints.

It may be remote (gs://). Files that grow during a run (metrics, lists of bad videos,
traces) are then written to a local folder and copied, since a store cannot append.
"""

import contextlib
import datetime
import json
import os
import pathlib
import platform
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any

import jax
from absl import logging
from etils import epath

from vjepa_jax.base import files
from vjepa_jax.base.errors import UserError
from vjepa_jax.config import saved
from vjepa_jax.config.defaults import ConfigDict, flatten
from vjepa_jax.parallel import distributed
from vjepa_jax.parallel.sharding import Decision

CONFIG_FILE = "config.json"
STARTS_FILE = "starts.jsonl"
SHARDINGS_FILE = "shardings.txt"
_PACKAGES = ("vjepa_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain")
# Keys that may differ between hosts.
_PER_HOST = (".path", "data.num_workers", "data.prefetch_megabytes")
_EVERY_SECS = 60.0


def require_no_other_run(config: ConfigDict, workdir: str) -> None:
    """Raise UserError if the workdir has a run of another config or is no folder."""
    path = _path(workdir) / CONFIG_FILE
    if not path.exists():
        if path.parent.exists() and not path.parent.is_dir():
            raise UserError(f"--workdir={workdir} is not a folder: give another")
        return
    try:
        old = saved.restored(json.loads(path.read_text())).to_dict()
    except (ValueError, IsADirectoryError) as error:
        raise UserError(
            f"{path} is not the config of a run, or is damaged ({error}): give another "
            "--workdir; or, if it is of this run, rename it, and the same command "
            "writes it again"
        ) from None
    changed = saved.differences(old, config.to_dict())
    if changed:
        raise UserError(
            f"{workdir} has a run of another config ({'; '.join(changed)}): give "
            "another --workdir, or the values of that run"
        )


def claim(config: ConfigDict, workdir: str) -> None:
    """Write `config.json`: from now on the workdir belongs to this config."""
    if distributed.is_main():
        path = _path(workdir) / CONFIG_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, json.dumps(config.to_dict(), indent=2) + "\n")


def require_same_config(config: ConfigDict) -> None:
    """Raise UserError if this process's config differs from that of process 0."""
    mine = json.dumps(config.to_dict())
    theirs = distributed.from_main("config", mine, distributed.WAIT_SECS)
    here, main = (flatten(json.loads(text)) for text in (mine, theirs))
    changed = [
        f"{key}: {main.get(key, 'absent')} on process 0, {here.get(key, 'absent')} here"
        for key in sorted(here.keys() | main.keys())
        if here.get(key) != main.get(key) and not key.endswith(_PER_HOST)
    ]
    if changed:
        raise UserError(
            f"process {distributed.process_index()} has another config than process 0 "
            f"({'; '.join(changed)}): start all processes with the same command"
        )


def environment() -> dict[str, Any]:
    """Return the devices of all processes, this process's machine, and versions."""
    devices = jax.devices()
    return {
        "device_kind": devices[0].device_kind,
        "num_devices": len(devices),
        "num_processes": jax.process_count(),
        "processor": _processor(),
        "num_cores": os.cpu_count(),
        "versions": {"python": platform.python_version()} | dict(_versions()),
    }


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:  # a folder on the path, not installed
            continue


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    return next(names, platform.processor() or platform.machine())


def log_start(folder: pathlib.Path, step: int) -> None:
    """Append a line to `starts.jsonl`: time, machine, `step` finished updates."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with open(folder / STARTS_FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "time": now} | environment()) + "\n")


def write_shardings(folder: pathlib.Path, decisions: Iterable[Decision]) -> None:
    """Write `shardings.txt`, a line per array of the state; log it at verbosity 1."""
    lines = [str(decision) for decision in decisions]
    for line in lines:
        logging.vlog(1, line)
    if distributed.is_main():
        (folder / SHARDINGS_FILE).write_text("\n".join(lines) + "\n")


class LocalFiles:
    """The local folder of a workdir; a context manager.

    A local workdir is used directly. For a remote one it is a temporary folder: changed
    files are copied to the workdir once a minute in a thread, at `copy_back`, and at
    the end.

    Attributes:
      folder: the local folder, which exists.
    """

    def __init__(self, workdir: str, fetched: str):
        """Prepare the folder.

        Args:
          workdir: local folder, or one of a remote store (`gs://bucket/run`).
          fetched: pattern of the files to copy from a remote workdir first, such as
            `*.jsonl`.
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

    def __exit__(self, *_: object) -> None:
        if self._remote is not None:
            self._done.set()
            self._thread.join()
            self.copy_back()
            shutil.rmtree(self.folder, ignore_errors=True)

    def copy_back(self) -> None:
        """Copy changed files to the remote workdir; log failures, which are retried."""
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
                # Clients of stores have no common base class.
                except Exception as error:
                    logging.warning("%s was not copied: %s", target, error)
                else:
                    self._copied[name] = stamp

    def _copy_on(self) -> None:
        while not self._done.wait(_EVERY_SECS):
            self.copy_back()

    def _stamps(self) -> dict[str, tuple[int, int]]:
        """Return {name: (size, time of the last change)}."""
        stamps = {}
        for folder, _, names in os.walk(self.folder):
            for file in (pathlib.Path(folder, name) for name in names):
                with contextlib.suppress(FileNotFoundError):  # renamed in the meantime
                    stat, name = file.stat(), str(file.relative_to(self.folder))
                    stamps[name] = stat.st_size, stat.st_mtime_ns
        return stamps


def _path(workdir: str) -> epath.Path:
    """Return the path of a workdir; raise UserError if its store cannot be read."""
    path = epath.Path(workdir)
    if files.is_remote(workdir):
        try:
            path.exists()
        except ImportError:
            raise UserError(
                f"--workdir={workdir} needs its store's client: pip install "
                "'vjepa_jax[gcs]'"
            ) from None
        except Exception as error:  # clients of stores have no common base class
            reason = " ".join(str(error).split())
            raise UserError(f"--workdir={workdir} cannot be read: {reason}") from None
    return path
