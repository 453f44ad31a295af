"""Pretrain and evaluate a world config with several seeds; print mean and spread.

    python benchmarks/world.py --config=configs/world_tiny.py
    python benchmarks/world.py --out=runs/bench_all \
        --evaluations=world,neighbours,physics,anticipation,davis:world \
        --config.world.path=runs/all --config.data.path=runs/all/pretrain.csv \
        --config.world.action_clips=1600 --config.world.segmentation_videos=200

Runs the demo's commands, without its evaluations during training, in `runs/bench_NAME`
for a config NAME. Complete runs and results are kept; a run with other settings is an
error, and other evaluation clips need another `--out`. An evaluation NAME:VARIANT is
`configs/probe_NAME.py:VARIANT`, on the files of the run's own world. Prints a Markdown
table for each: mean over the seeds, lowest to highest.
"""

import argparse
import json
import os
import pathlib
import runpy
import subprocess
import sys

import markdown
import numpy as np

from vjepa_jax import probe

# Overrides of evaluations, for a world in the folder {}.
_OVERRIDES = {
    "neighbours": (
        "data.train_path={}/probe_train.csv",
        "data.test_path={}/probe_test.csv",
        "data.frame_step=1",
        "draws=3",
    ),
    "anticipation": (
        "data.videos_path={}",
        "data.train_path={}/actions_train_actions.csv",
        "data.test_path={}/actions_test_actions.csv",
    ),
}


def _config(evaluation: str) -> str:
    """Return the config file of NAME:VARIANT, as `--config` takes it."""
    name, *variant = evaluation.split(":")
    return ":".join([f"configs/probe_{name}.py", *variant])


def run(module: str, *arguments: str) -> None:
    """Run a command of the package; end the program if it fails."""
    command = [sys.executable, "-m", module, *arguments]
    print("+", " ".join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, env={"JAX_PLATFORMS": "cpu", **os.environ})
    if done.returncode:
        sys.exit(done.returncode)  # the command has printed the reason


def train(config: str, workdir: pathlib.Path, seed: int, overrides: list[str]) -> None:
    """Render the world and train one seed, unless that is done.

    A workdir with other settings ends the program.
    """
    flag = f"--config={config}"
    run("vjepa_jax.prepare", flag, *overrides)
    given = f"--workdir={workdir}", f"--config.seed={seed}"
    run("vjepa_jax.train", flag, *given, *overrides)


def evaluate(file: str, workdir: pathlib.Path, seed: int, overrides: list[str]) -> None:
    """Run one evaluation of a run."""
    given = f"--config={file}", f"--workdir={workdir}", f"--config.seed={seed}"
    run("vjepa_jax.probe", *given, *overrides)


def cell(measure: str, column: str, runs: list[dict]) -> str:
    """Return the mean, and lowest to highest, of a measure over the results of runs."""
    found = [run[measure].get(column) for run in runs]
    values = [value for value in found if value is not None]
    if not values:
        return ""
    is_share = measure.endswith("accuracy") or column.endswith("accuracy")
    numbers = np.mean(values), min(values), max(values)
    shown = [f"{x:.1%}" if is_share else f"{x:.2f}" for x in numbers]
    return "{} ({} to {})".format(*shown)


def print_results(runs: list[dict]) -> None:
    """Print the results of runs: a row per measure, a column per kind of features."""
    measures = [
        name for name in runs[0] if name != "seconds" and not name.endswith("_tested")
    ]
    columns = list(dict.fromkeys(c for name in measures for c in runs[0][name]))
    rows = (
        [name, *(cell(name, column, runs) for column in columns)] for name in measures
    )
    markdown.print_table(["measure", *columns], rows)
    seconds = {k: np.mean([r["seconds"][k] for r in runs]) for k in runs[0]["seconds"]}
    means = ", ".join(f"{k} {v:.0f}" for k, v in seconds.items())
    print(f"{len(runs)} seeds; mean seconds: {means}\n")


def main() -> None:
    """Run the command line; unknown flags go to training as overrides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/world_tiny.py")
    parser.add_argument("--out", type=pathlib.Path, help="runs/bench_NAME by default")
    parser.add_argument("--evaluations", default="world", help="separated by commas")
    parser.add_argument("--seeds", type=int, default=3)
    options, overrides = parser.parse_known_args()
    results = {}  # {evaluation: name of its file in a workdir}
    for evaluation in options.evaluations.split(","):
        file, *variant = _config(evaluation).split(":")
        if not pathlib.Path(file).exists():
            parser.error(
                f"there is no {file}: run this in the folder that contains configs/"
            )
        config = runpy.run_path(file)["get_config"](*variant)
        results[evaluation] = probe.results_file(config)
    stem = pathlib.Path(options.config.split(":")[0]).stem
    out = options.out or pathlib.Path(f"runs/bench_{stem}")
    workdirs = [out / f"seed{seed}" for seed in range(options.seeds)]
    for seed, workdir in enumerate(workdirs):
        train(options.config, workdir, seed, overrides)
        for evaluation, name in results.items():
            if (workdir / name).exists():
                continue
            world = json.loads((workdir / "config.json").read_text())["world"]
            values = _OVERRIDES.get(evaluation, ())
            values = [f"--config.{value}".format(world["path"]) for value in values]
            evaluate(_config(evaluation), workdir, seed, values)
    for evaluation, name in results.items():
        runs = [json.loads((workdir / name).read_text()) for workdir in workdirs]
        print(f"{evaluation}\n")
        print_results(runs)


if __name__ == "__main__":
    main()
