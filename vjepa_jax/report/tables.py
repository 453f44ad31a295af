"""Tables of a page: the run, its settings, unreadable videos."""

import collections
import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from vjepa_jax.config.defaults import ConfigDict, flatten, get_config, mask, stream
from vjepa_jax.models import registry
from vjepa_jax.report.run_files import Run
from vjepa_jax.run.goodput import WALL_SECONDS, duration

ABSENT = "—"
_MAX_BAD_VIDEOS = 20  # listed by name


@dataclasses.dataclass(frozen=True)
class Cell:
    """The value of a run, and its interval where one is known."""

    text: str
    interval: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A table whose cells have one entry per run, or one that holds for all runs.

    Attributes:
      caption: heading.
      columns: their heads, including that of the rows' names.
      rows: (name, cells); a cell is a list of entries in the order of the runs.
      note: text below it.
      is_prose: whether long words may be broken.
    """

    caption: str
    columns: list[str]
    rows: list[tuple[str, list[list[Cell]]]]
    note: str = ""
    is_prose: bool = True


def _entries(texts: list[str]) -> list[Cell]:
    """Return an entry per run, or one where all are equal."""
    return [Cell(text) for text in (texts[:1] if len(set(texts)) == 1 else texts)]


# ------------------------------------------------------------------------------ config


def config_differences(runs: Sequence[Run]) -> Table | None:
    """List the keys of the configs that differ from the defaults."""
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
        rows.append((key, [[Cell(default)], _entries(values)]))
    names = "this run" if len(runs) == 1 else "these runs"
    return Table("Config, where it is not the default", ["key", "default", names], rows)


def flat_differences(config: ConfigDict) -> dict[str, tuple[str, str]]:
    """Return {key: (default, value)} of all keys whose values differ.

    The fields of a mask type or a stream that is not in the default config are compared
    with those of a new one. A mask type that was removed takes one line.
    """
    ours, default = config.to_dict(), get_config().to_dict()
    new = {"masks": mask().to_dict(), "streams": stream().to_dict()}
    out = {}

    def align(group: str, named: dict[str, Any], before: dict[str, Any]) -> None:
        for name in named.keys() - before.keys():
            out[f"{group}.{name}"] = ABSENT, "present"
            before[name] = copy.deepcopy(new[group.split(".")[-1]])
        for name in before.keys() - named.keys():
            out[f"{group}.{name}"] = "present", ABSENT
            del before[name]

    for group in new:
        align(group, ours[group], default[group])
    for name, fields in ours["streams"].items():
        before = default["streams"][name]["masks"]
        align(f"streams.{name}.masks", fields["masks"], before)
    before, after = flatten(default), flatten(ours)
    return out | {
        key: (_value(before[key]) if key in before else ABSENT, _value(value))
        for key, value in after.items()
        if key not in before or before[key] != value
    }


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return '""' if value == "" else str(value)


# ------------------------------------------------------------------------------- facts


def progress(runs: Sequence[Run]) -> Table:
    """List how far the runs are, and their time, speed and memory."""
    return _facts("Time, speed and memory", runs, _progress)


def settings(runs: Sequence[Run]) -> Table:
    """List model, data, hardware and versions of the runs."""
    return _facts("The run" if len(runs) == 1 else "The runs", runs, _settings)


def _facts(
    caption: str, runs: Sequence[Run], facts_of: Callable[[Run], dict[str, str]]
) -> Table:
    facts = [facts_of(run) for run in runs]
    rows = [
        (name, [_entries([of_run.get(name, "not recorded") for of_run in facts])])
        for name in dict.fromkeys(name for of_run in facts for name in of_run)
    ]
    return Table(caption, ["", "value"], rows)


def _progress(run: Run) -> dict[str, str]:
    out = {"updates": count_updates(run)}
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
        out["skipped updates"] = f"{skipped:.0f}"
    return out


def count_updates(run: Run) -> str:
    """Return how many of the updates are done, as `DONE of TOTAL`."""
    done = f"{run.metrics[-1]['step']:,.0f}" if run.metrics else "0"
    return f"{done} of {run.config.total_steps:,}" if run.config else done


def _settings(run: Run) -> dict[str, str]:
    out = {"workdir": run.workdir}
    if run.config is not None:
        out |= _config_facts(run.config)
    if not run.starts:
        return out | {"hardware": "not recorded", "versions": "not recorded"}
    kinds = dict.fromkeys(_hardware(start) for start in reversed(run.starts))
    versions = run.starts[-1].get("versions") or {}
    started = str(run.starts[0].get("time", "?"))
    if len(run.starts) > 1:
        started += f", {len(run.starts)} starts"
    return out | {
        "hardware": "; before: ".join(kinds),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
        "started": started,
    }


def _config_facts(config: ConfigDict) -> dict[str, str]:
    model, data = config.model, config.data
    try:
        size = registry.size_of(model.encoder.size)
        shape = f" (depth {size.depth}, width {size.width})"
    except ValueError:  # the size has been removed since the run
        shape = ""
    side, tubelet = model.encoder.patch_size, model.encoder.tubelet_size
    return {
        "encoder": model.encoder.size + shape,
        "predictor": f"depth {model.predictor.depth}, width {model.predictor.width}",
        "clips": f"{data.num_frames} frames of {data.resolution} x {data.resolution} "
        f"pixels, tubelets of {tubelet} x {side} x {side}; {config.batch_size} per "
        "update",
        "data": data.path,
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
    """Count the unreadable videos by reason, and list the first ones."""
    reasons = collections.Counter(_text(row, "reason") for row in run.bad_videos)
    listed = run.bad_videos[:_MAX_BAD_VIDEOS]
    more = len(run.bad_videos) - len(listed)
    title = f"Unreadable videos of {run.label}"
    return [
        Table(
            f"{title} by reason",
            ["reason", "videos"],
            [(reason, [[Cell(str(n))]]) for reason, n in reasons.most_common()],
        ),
        Table(
            title,
            ["path", "reason", "step"],
            [
                (
                    _text(row, "path"),
                    [[Cell(_text(row, k))] for k in ("reason", "step")],
                )
                for row in listed
            ],
            f"{more} more are in bad_videos*.jsonl." if more else "",
        ),
    ]


def _text(row: dict[str, Any], key: str) -> str:
    return str(row.get(key, "?"))
