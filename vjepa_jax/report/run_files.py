"""What the files of a workdir say about its run; no weights are read."""

import contextlib
import dataclasses
import json
import math
import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from etils import epath

from vjepa_jax.base.errors import UserError
from vjepa_jax.config import saved
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.run import environment, metrics, workdirs

RESULTS = "results"
CONFUSION = "confusion"


@dataclasses.dataclass
class Run:
    """A run, as far as its files tell; what is missing is empty.

    Attributes:
      workdir: as it was given.
      label: short and different from that of another run on the same page.
      letter: A or B.
      folder: local, with the workdir's small files.
      config: None where there is none yet.
      metrics: a row per log step, see `metrics.read_metrics`.
      starts: one per start of the run, see `environment`.
      results: of evaluations, by the name of their file without its suffix.
      confusions: confusion matrices by that name and by features' name.
      bad_videos: those that could not be read, {"path", "reason", "step"}.
      notes: what could not be understood, a line each.
    """

    workdir: str
    label: str
    letter: str
    folder: pathlib.Path
    config: ConfigDict | None = None
    metrics: list[dict[str, float]] = dataclasses.field(default_factory=list)
    starts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    results: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    confusions: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    bad_videos: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def scalars(self, prefix: str) -> list[str]:
        """Return the names of the metrics that begin so, in the order of the file."""
        names = dict.fromkeys(name for row in self.metrics for name in row)
        return [n for n in names if n.startswith(prefix) and n != "step"]

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Return steps and values of a metric; NaN where it was not finite."""
        rows = [row for row in self.metrics if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def last(self, name: str) -> float:
        """Return a metric's latest value; NaN where it was never measured."""
        values = self.curve(name)[1]
        return values[-1] if values else math.nan


@contextlib.contextmanager
def opened(workdir: str, label: str, letter: str) -> Iterator[Run]:
    """Read the files of a run; what is written to its `folder` reaches the workdir.

    Raises:
      UserError: there is no such folder, or no run in it.
    """
    if not epath.Path(workdir).is_dir():
        raise UserError(f"no such folder: {workdir}; give the workdir of a run")
    with workdirs.LocalFiles(workdir, fetched="*.json*") as files:
        folder = files.folder
        run = Run(workdir, label, letter, folder)
        run.config = _read_config(run)
        if (folder / metrics.FILE).exists():
            rows = metrics.read_metrics(str(folder))
            run.metrics = [row for row in map(_numbers, rows) if "step" in row]
        if run.config is None and not run.metrics:
            raise UserError(
                f"{workdir} holds neither {workdirs.CONFIG_FILE} nor {metrics.FILE}: "
                "give the workdir of a run"
            )
        run.starts = _read_lines(folder / environment.FILE)
        for path in sorted(folder.glob("bad_videos*.jsonl")):
            run.bad_videos += _read_lines(path)
        run.results = _read_named(run, RESULTS)
        run.confusions = _read_named(run, CONFUSION)
        for name, matrices in [*run.confusions.items()]:
            if not all(map(_is_square, matrices.values())):
                del run.confusions[name]
                run.notes.append(f"{name}.json is damaged")
        yield run


def labels(workdirs_: list[str]) -> list[str]:
    """Return short names of workdirs that tell them apart."""
    names = [pathlib.PurePath(path).name or path for path in workdirs_]
    return names if len(set(names)) == len(names) else list(workdirs_)


def _read_config(run: Run) -> ConfigDict | None:
    path = run.folder / workdirs.CONFIG_FILE
    if not path.exists():
        run.notes.append(f"{path.name} is missing")
        return None
    try:
        return saved.restored(json.loads(path.read_text()))
    except (ValueError, TypeError, AttributeError, KeyError):
        run.notes.append(f"{path.name} is damaged")
        return None


def _read_named(run: Run, kind: str) -> dict[str, dict[str, Any]]:
    """Read KIND.json and KIND_NAME.json; the first comes first."""
    found = {}
    for path in sorted(run.folder.glob(f"{kind}*.json"), key=lambda p: p.stem):
        try:
            content = json.loads(path.read_text())
        except ValueError:
            content = None
        if isinstance(content, dict):
            found[path.stem] = content
        else:
            run.notes.append(f"{path.name} is damaged")
    return found


def _is_square(matrix: Any) -> bool:
    return (
        isinstance(matrix, list)
        and len(matrix) > 0
        and all(isinstance(row, list) and len(row) == len(matrix) for row in matrix)
        and all(isinstance(value, int) for row in matrix for value in row)
    )


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, without lines that are not whole."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def reasons(run: Run) -> Counter:
    """Count the bad videos by reason."""
    return Counter(str(row.get("reason", "unknown")) for row in run.bad_videos)
