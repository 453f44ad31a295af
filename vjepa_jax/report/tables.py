"""Tables of a page: what ran, where its config is not the default, bad videos."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from vjepa_jax.config.defaults import ConfigDict, flatten, get_config, mask, stream
from vjepa_jax.models import registry
from vjepa_jax.report.run_files import Run, reasons
from vjepa_jax.run.goodput import WALL_SECONDS, duration

ABSENT = "—"
_MAX_BAD_VIDEOS = 20  # listed by name


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a run has to say: a value and, where known, how sure it is."""

    text: str
    interval: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table whose cells hold an entry per run, or one that holds for all.

    Attributes:
      caption: what it is.
      columns: heads, that of the rows' names included.
      rows: (name, cells), a cell being a list of entries in the order of the runs.
      note: below it.
      is_prose: long words may be broken; numbers never are.
    """

    caption: str
    columns: list[str]
    rows: list[tuple[str, list[list[Cell]]]]
    note: str = ""
    is_prose: bool = True


# ------------------------------------------------------------------------------ config


def config_differences(runs: Sequence[Run]) -> Table | None:
    """List the keys in which a run differs from the default config."""
    if all(run.config is None for run in runs):
        return None
    flats = [None if r.config is None else flat_differences(r.config) for r in runs]
    rows = []
    for key in sorted(set().union(*filter(None, flats))):
        default = next(flat[key][0] for flat in flats if flat and key in flat)
        values = [
            ABSENT if flat is None else flat.get(key, (default, default))[1]
            for flat in flats
        ]
        rows.append((key, [[Cell(default)], _cells(values)]))
    names = "this run" if len(runs) == 1 else "these runs"
    return Table("Config, where it is not the default", ["key", "default", names], rows)


def _cells(texts: list[str]) -> list[Cell]:
    """Return an entry per run, or one where all say the same."""
    return [Cell(text) for text in (texts[:1] if len(set(texts)) == 1 else texts)]


def flat_differences(config: ConfigDict) -> dict[str, tuple[str, str]]:
    """Return {key: (default, value)} of all keys whose values differ.

    A mask type or a stream that the default has not is compared with a plain one; one
    that is gone is one line.
    """
    ours, default = config.to_dict(), get_config().to_dict()
    out = {}
    pairs = [("masks", ours.pop("masks"), default.pop("masks"), mask().to_dict())]
    plain = stream().to_dict()
    for name, fields in ours.get("streams", {}).items():
        of_stream = fields.pop("masks")
        pairs.append((f"streams.{name}.masks", of_stream, {}, mask().to_dict()))
    pairs.append(("streams", ours.pop("streams"), default.pop("streams"), plain))
    for prefix, named, of_default, empty in pairs:
        for name in named.keys() | of_default.keys():
            key = f"{prefix}.{name}"
            if name not in named:
                out[key] = "there", ABSENT
                continue
            if name not in of_default:
                out[key] = ABSENT, "there"
            against = flatten(of_default.get(name, empty))
            out |= _changed(against, flatten(named[name]), f"{key}.")
    return out | _changed(flatten(default), flatten(ours), "")


def _changed(default, ours, prefix) -> dict[str, tuple[str, str]]:
    missing = object()
    return {
        prefix + key: (_value(default.get(key, missing), missing), _value(value))
        for key, value in ours.items()
        if default.get(key, missing) != value
    }


def _value(value: Any, missing: Any = None) -> str:
    if value is missing and missing is not None:
        return ABSENT
    if isinstance(value, float):
        return f"{value:g}"
    return '""' if value == "" else str(value)


# ------------------------------------------------------------------------------- facts


def facts(runs: Sequence[Run]) -> Table:
    """Say what ran, on what, and for how long."""
    found = [_facts(run) for run in runs]
    names = dict.fromkeys(name for of_run in found for name in of_run)
    rows = []
    for name in names:
        texts = [of_run.get(name, "not recorded") for of_run in found]
        rows.append((name, [_cells(texts)]))
    return Table("The run" if len(runs) == 1 else "The runs", ["", "value"], rows)


def _facts(run: Run) -> dict[str, str]:
    out = {"workdir": run.workdir, "updates": steps_of(run)}
    if run.config is not None:
        out |= _of_config(run.config)
    out |= _of_starts(run.starts)
    if math.isfinite(seconds := run.last(WALL_SECONDS)):
        out["wall time"] = duration(seconds)
    speeds = [v for v in run.curve("perf/clips_per_second")[1] if math.isfinite(v)]
    if speeds:
        out["speed"] = f"{sorted(speeds)[len(speeds) // 2]:.3g} clips/s (median)"
    if math.isfinite(mfu := run.last("perf/mfu")):
        out["model FLOP utilisation"] = f"{mfu:.1%}"
    for name, where in (("host", "main process"), ("device", "fullest device")):
        if math.isfinite(peak := run.last(f"perf/{name}_peak_gib")):
            out[f"peak memory, {where}"] = f"{peak:.2f} GiB"
    if math.isfinite(skipped := run.last("optim/skipped")):
        out["updates refused"] = f"{skipped:.0f}"
    return out


def steps_of(run: Run) -> str:
    """Say how many updates of how many are finished."""
    done = f"{run.metrics[-1]['step']:,.0f}" if run.metrics else "0"
    return f"{done} of {run.config.total_steps:,}" if run.config else done


def _of_config(config: ConfigDict) -> dict[str, str]:
    model, data = config.model, config.data
    try:
        size = registry.size_of(model.encoder.size)
        described = f" (depth {size.depth}, width {size.width})"
    except ValueError:  # of a registry that has changed since
        described = ""
    side, tubelet = model.encoder.patch_size, model.encoder.tubelet_size
    return {
        "encoder": model.encoder.size + described,
        "predictor": f"depth {model.predictor.depth}, width {model.predictor.width}",
        "clips": f"{data.num_frames} frames of {data.resolution} x {data.resolution} "
        f"pixels, tubelets of {tubelet} x {side} x {side}; {config.batch_size} per "
        "update",
        "data": data.path,
    }


def _of_starts(starts: list[dict[str, Any]]) -> dict[str, str]:
    if not starts:
        return {"hardware": "not recorded", "versions": "not recorded"}
    last = starts[-1]
    kinds = dict.fromkeys(_hardware(start) for start in reversed(starts))
    versions = last.get("versions") or {}
    return {
        "hardware": "; before: ".join(kinds),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
        "started": f"{starts[0].get('time', '?')}"
        + (f", {len(starts)} starts" if len(starts) > 1 else ""),
    }


def _hardware(start: dict[str, Any]) -> str:
    hosts = start.get("num_processes", 1)
    return (
        f"{start.get('num_devices', '?')} x {start.get('device_kind', '?')}"
        f"{f' in {hosts} processes' if hosts != 1 else ''}, "
        f"{start.get('num_cores', '?')} cores of {start.get('processor', '?')}"
    )


# -------------------------------------------------------------------------- bad videos


def bad_videos(run: Run) -> list[Table]:
    """Count the videos that could not be read by reason, and list the first ones."""
    counts = reasons(run).most_common()
    listed = run.bad_videos[:_MAX_BAD_VIDEOS]
    keys = ("path", "reason", "step")
    rows = [
        (str(row.get("path", "?")), [[Cell(str(row.get(k, "?")))] for k in keys[1:]])
        for row in listed
    ]
    left_out = len(run.bad_videos) - len(listed)
    note = f"{left_out} more are in bad_videos*.jsonl." if left_out else ""
    return [
        Table(
            f"Unreadable videos of {run.label} by reason",
            ["reason", "videos"],
            [(reason, [[Cell(str(count))]]) for reason, count in counts],
        ),
        Table(
            f"Unreadable videos of {run.label}", ["path", "reason", "step"], rows, note
        ),
    ]
