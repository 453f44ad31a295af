"""Read the small files of a workdir, but no weights."""

import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from vjepa_jax.base.errors import UserError
from vjepa_jax.config import saved
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.run import metrics, workdirs

RESULTS = "results"
CONFUSION = "confusion"
CLASS_NAMES = "class_names"


@dataclasses.dataclass
class Run:
    """A run, as its files describe it; what is missing is empty.

    Attributes:
      workdir: as given by the user.
      label: short name, different from that of the other run of the page.
      letter: A or B.
      folder: local folder with the small files of the workdir.
      step: saved step whose weights are shown; None: the latest.
      config: resolved config, or None.
      metrics: a row per log step, see `metrics.read_metrics`.
      starts: a row per start of the run, see `workdirs.STARTS_FILE`.
      results: results of evaluations, by file name without suffix.
      confusions: {"pretrained": matrix, ...}, by file name without suffix.
      class_names: of the rows of these matrices, likewise.
      bad_videos: unreadable videos, {"path", "reason", "step"}.
      notes: a line for each file that is missing or damaged.
    """

    workdir: str
    label: str
    letter: str
    folder: pathlib.Path
    step: int | None = None
    config: ConfigDict | None = None
    metrics: list[dict[str, float]] = dataclasses.field(default_factory=list)
    starts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    results: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    confusions: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    class_names: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    bad_videos: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def scalars(self, prefix: str) -> list[str]:
        """Return the names of the metrics with a prefix, in the order of the file."""
        names = dict.fromkeys(name for row in self.metrics for name in row)
        return [n for n in names if n.startswith(prefix) and n != "step"]

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Return steps and values of a metric; NaN where it was not finite."""
        rows = [row for row in self.metrics if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def last(self, name: str) -> float:
        """Return a metric's latest value; NaN where there is none."""
        values = self.curve(name)[1]
        return values[-1] if values else math.nan


@contextlib.contextmanager
def opened(workdir: str, label: str, letter: str) -> Iterator[Run]:
    """Read the files of a run; what is written to its `folder` reaches the workdir.

    Raises:
      UserError: the folder does not exist or holds no run.
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
        run.starts = _read_lines(folder / workdirs.STARTS_FILE)
        for path in sorted(folder.glob("bad_videos*.jsonl")):
            run.bad_videos += _read_lines(path)
        run.results = _read_named(run, RESULTS)
        for name, matrices in _read_named(run, CONFUSION).items():
            names = matrices.pop(CLASS_NAMES, None)
            if all(map(_is_square, matrices.values())):
                run.confusions[name] = matrices
                if isinstance(names, list):
                    run.class_names[name] = [str(class_name) for class_name in names]
            else:
                run.notes.append(f"{name}.json is damaged")
        yield run


def make_labels(paths: list[str]) -> list[str]:
    """Return short, different names of workdirs."""
    names = [pathlib.PurePath(path).name or path for path in paths]
    return names if len(set(names)) == len(names) else list(paths)


def _read_config(run: Run) -> ConfigDict | None:
    path = run.folder / workdirs.CONFIG_FILE
    if not path.exists():
        run.notes.append(f"{path.name} is missing")
        return None
    try:
        return saved.restored(json.loads(path.read_text()))
    except ValueError:
        run.notes.append(f"{path.name} is damaged")
        return None


def _read_named(run: Run, kind: str) -> dict[str, dict[str, Any]]:
    """Read KIND.json and then every KIND_NAME.json."""
    named = {}
    for path in sorted(run.folder.glob(f"{kind}*.json"), key=lambda p: p.stem):
        try:
            content = json.loads(path.read_text())
        except ValueError:
            content = None
        if isinstance(content, dict):
            named[path.stem] = content
        else:
            run.notes.append(f"{path.name} is damaged")
    return named


def _is_square(matrix: Any) -> bool:
    return (
        isinstance(matrix, list)
        and len(matrix) > 0
        and all(isinstance(row, list) and len(row) == len(matrix) for row in matrix)
        and all(isinstance(value, int) for row in matrix for value in row)
    )


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, without incomplete lines."""
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
