"""Pretrain and probe a world config with several seeds; print mean and spread.

    python benchmarks/world.py --config=configs/world_tiny.py --out=runs/bench

Runs the very commands of the demo, one after the other: what is complete is kept.
Prints a Markdown table: mean over the seeds, and lowest to highest.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import numpy as np


def _run(module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", module, *arguments]
    print("+", " ".join(command), file=sys.stderr, flush=True)
    subprocess.run(command, check=True, env={"JAX_PLATFORMS": "cpu", **os.environ})


def run_seed(config: str, workdir: pathlib.Path, seed: int, overrides: list[str]):
    """Train and probe one seed; return its `results.json`."""
    results = workdir / "results.json"
    if not results.exists():
        flag = f"--config={config}"
        _run("vjepa_jax.data.prepare", flag, *overrides)
        _run(
            "vjepa_jax.train",
            flag,
            f"--workdir={workdir}",
            f"--config.seed={seed}",
            *overrides,
        )
        probe = "--config=configs/probe_world.py"
        _run("vjepa_jax.probe", probe, f"--workdir={workdir}", f"--config.seed={seed}")
    return json.loads(results.read_text())


def table(runs: list[dict]) -> str:
    """Return a Markdown table: a row per measure, a column per features."""
    measures = [name for name in runs[0] if name != "seconds"]
    columns = list(runs[0][measures[0]])
    lines = ["| measure | " + " | ".join(columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for measure in measures:
        is_share = measure.endswith("accuracy")
        cells = []
        for column in columns:
            values = np.array([run[measure][column] for run in runs])
            mean, low, high = values.mean(), values.min(), values.max()
            if is_share:
                cells.append(f"{mean:.1%} ({low:.1%} to {high:.1%})")
            else:
                cells.append(f"{mean:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {measure} | " + " | ".join(cells) + " |")
    seconds = {k: np.mean([r["seconds"][k] for r in runs]) for k in runs[0]["seconds"]}
    lines.append("")
    lines.append(
        f"{len(runs)} seeds; mean seconds: "
        + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items())
    )
    return "\n".join(lines)


def main() -> None:
    """Run the command line; unknown flags go to training as overrides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/world_tiny.py")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/bench"))
    parser.add_argument("--seeds", type=int, default=3)
    options, overrides = parser.parse_known_args()
    runs = [
        run_seed(options.config, options.out / f"seed{seed}", seed, overrides)
        for seed in range(options.seeds)
    ]
    print(table(runs))


if __name__ == "__main__":
    main()
