"""Evaluate what a checkpoint has learned, with its weights frozen.

    python -m vjepa_jax.probe --config=NAME --workdir=DIR
    python -m vjepa_jax.probe --config=configs/probe_X.py --checkpoint=CONVERTED

`--config` takes the name of an evaluation (`health`, `physics:intphys`), with its
defaults, or a file. The command reads the checkpoint of a run, or converted weights. It
prints a table, and writes it to `results_NAME.json` beside the checkpoints, and
confusion matrices to `confusion_NAME.json`. NAME is the config's `name`, or its
`evaluation` if it has no `name`. The evaluation of the synthetic world writes
`results.json`, `confusion.json` and pictures. One process computes, on all its devices.
"""

import json
import os
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import flags

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.config.flags import define_config_flag
from vjepa_jax.data.sources.open import open_source
from vjepa_jax.data.stream import streams
from vjepa_jax.evals import drawing, frozen, registry, settings
from vjepa_jax.evals.frozen import FrozenModel
from vjepa_jax.evals.tokens.features import read_clips
from vjepa_jax.parallel import cluster
from vjepa_jax.program import build
from vjepa_jax.run import checkpoint, cli, metrics, workdirs
from vjepa_jax.world import render

WORLD_RESULTS_FILE = "results.json"
_SHARES = ("accuracy", "recall_at_5")


def format_table(results: dict[str, Any]) -> str:
    """Return results as a table: a row per measure, a column per name below it.

    A measure that is one number is in the column `value`. Rows and columns whose names
    end in accuracy or recall are in percent.
    """
    rows = {
        measure: values if isinstance(values, dict) else {"value": values}
        for measure, values in results.items()
    }
    columns = list(dict.fromkeys(name for values in rows.values() for name in values))
    widths = [max(14, len(name) + 2) for name in columns]
    margin = max(24, *(len(measure) + 2 for measure in rows))

    def cell(measure, column, width):
        value = rows[measure].get(column)
        if not isinstance(value, int | float):
            return f"{'' if value is None else value!s:>{width}}"
        is_share = measure.endswith(_SHARES) or column.endswith(_SHARES)
        return f"{value:{width}.{'1%' if is_share else '3f'}}"

    pairs = list(zip(columns, widths, strict=True))
    lines = [" " * margin + "".join(f"{c:>{w}}" for c, w in pairs)]
    for measure in rows:
        cells = (cell(measure, c, w) for c, w in pairs)
        lines.append(f"{measure:{margin}}" + "".join(cells))
    return "\n".join(lines)


def results_file(config: ConfigDict) -> str:
    """Return the name of the file that an evaluation writes."""
    if config.evaluation == "world":
        return WORLD_RESULTS_FILE
    return f"results_{config.get('name', config.evaluation)}.json"


def probe(config: ConfigDict, path: str) -> dict[str, Any]:
    """Run the config's evaluation on a checkpoint and write its results there.

    Args:
      config: of the evaluation; `step` is a saved step, -1 the latest.
      path: workdir of a run, or folder of a conversion.

    Raises:
      UserError: the config is not of an evaluation, there is no checkpoint, or the
        model does not suit the evaluation.
    """
    if "evaluation" not in config:
        known = ", ".join(settings.DEFAULTS)
        raise UserError(
            f"--config is not of an evaluation: give one of {known}, or a file like "
            "configs/probe_*.py"
        )
    began = time.perf_counter()
    model = frozen.load(path, None if config.step < 0 else config.step)
    results = registry.evaluate(model, config)
    with workdirs.LocalFiles(path, fetched=metrics.FILE) as files:
        seconds, name = {}, results_file(config)
        if config.evaluation == "world":
            rows = metrics.read_metrics(str(files.folder))
            drawing.draw_curves(rows, files.folder / "curves.png")
            draw_pictures(model, config.seed, files.folder)
            seconds = _earlier_seconds(model.config, files.folder)
        confusion = results.pop(registry.CONFUSION, None)
        if confusion is not None:  # a line: a matrix of 400 classes has many numbers
            text = json.dumps(confusion, separators=(",", ":"))
            file = files.folder / name.replace("results", registry.CONFUSION, 1)
            file.write_text(text + "\n")
        seconds |= {"probe": time.perf_counter() - began}
        text = json.dumps(results | {"seconds": seconds}, indent=2)
        (files.folder / name).write_text(text + "\n")
    return results


def _earlier_seconds(run: ConfigDict, folder: pathlib.Path) -> dict[str, float | None]:
    """Return how long rendering and training took, as they recorded it, or None."""
    rows = metrics.read_metrics(str(folder))
    return {
        "render": render.render_seconds(run.world.path),
        "train": rows[-1]["perf/wall_seconds"] if rows else 0.0,
    }


def draw_pictures(model: FrozenModel, seed: int, folder: pathlib.Path) -> None:
    """Draw masks and features of a clip of the world: masks.png and features.png."""
    run = model.config
    listed = open_source(str(pathlib.Path(run.world.path) / "hidden_test.csv"))
    reader = streams.make_reader(run.data, run.data)
    clips = read_clips(listed, reader, np.arange(min(8, len(listed))))
    grid = model.grid(clips.shape)
    masks = build.make_masks(run.masks, grid)
    rows = drawing.mask_rows(clips[0], grid, masks, jax.random.key(0))
    drawing.make_picture(rows).save(folder / "masks.png")
    untrained = frozen.random_init(model, seed)
    rows = {"clip": clips[0]}
    for name, network in (("pretrained", model), ("random-init", untrained)):
        caption = f"{name}: principal components 1-3 as red, green, blue"
        rows[caption] = drawing.principal_colours(network.encode(clips), grid)[0]
    drawing.make_picture(rows).save(folder / "features.png")


def main() -> None:
    """Run the command line."""
    if bool(_WORKDIR.value) == bool(_CHECKPOINT.value):
        raise UserError(
            "give either the --workdir of a run or a converted --checkpoint"
        )
    cluster.require_one_process(os.environ)
    path = _WORKDIR.value or _CHECKPOINT.value or ""
    checkpoint.quiet_orbax()
    results = probe(_CONFIG.value, path)
    print(format_table(results))
    print(f"results in {path}", file=sys.stderr)


if __name__ == "__main__":
    _CONFIG = define_config_flag(named=settings.DEFAULTS)
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run")
    _CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a conversion")
    cli.run(main)
