"""What a run computes on and with: noted at every start, for reports."""

import datetime
import json
import os
import pathlib
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax

FILE = "starts.jsonl"
_PACKAGES = ("vjepa_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain")


def describe() -> dict[str, Any]:
    """Describe the devices of all processes, this process's machine, and versions."""
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
        except metadata.PackageNotFoundError:  # such as a folder that is on the path
            continue


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    return next(names, platform.processor() or platform.machine())


def note_start(folder: pathlib.Path, step: int) -> None:
    """Append a line to `starts.jsonl`.

    Args:
      folder: of the run.
      step: updates finished before this start.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with open(folder / FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "time": now} | describe()) + "\n")
