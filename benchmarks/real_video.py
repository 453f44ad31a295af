"""Pretrain on camera footage with several seeds; print what was learned, and its cost.

    python benchmarks/real_video.py --droid=DROID --donkey=DONKEY
    python benchmarks/real_video.py --droid=DROID --donkey=DONKEY --growth

DROID holds `labels.csv` (columns file, lab, scene, verb) and the clips that it names;
DONKEY holds NAME.mp4 and NAME.npz (`steering` and `throttle` for every frame). Two
laboratories are only tested on: neither pretraining nor a read-out sees them. Of the
drives, the last part of each, or the whole of one, is only tested on.

Writes lists, shards and runs to `--out`; what is complete there is kept. Prints a
Markdown table: mean over the seeds, lowest to highest. `--growth` also trains on parts
of the videos and with other numbers of updates, and draws OUT/growth.png.
"""

import argparse
import itertools
import json
import pathlib
import re

import matplotlib.pyplot as plt
import numpy as np
import world

from vjepa_jax.run import metrics

_TEST_LABS = "lab_03,lab_08"
# Flags of make_list by the name of a task's lists.
_LISTS: dict[str, tuple[str, ...]] = {
    "all": (),
    "scene": ("--label=scene", "--class=Industrial office,Kitchen,Office"),
    "verb": ("--label=verb", "--class=Put,Move,Pick,Remove,Take,Open,Close"),
    "open_or_close": ("--label=verb", "--class=Open,Close"),
    "put_or_remove": (
        "--label=verb",
        "--class=put=Put,Place",
        "--class=remove=Remove,Take",
    ),
}
_LAST_SHARE = 0.3  # of a drive's pieces, to test on
# Runs of the growth: (name, one of how many videos, share of the updates).
_GROWTH = {
    "videos_quarter": (4, 1.0),
    "videos_half": (2, 1.0),
    "updates_half": (1, 0.5),
    "updates_double": (1, 2.0),
}
_RESULTS = "results_real_video.json"
# Drawn against the clips seen.
_DRAWN = {
    "arrow_attentive_accuracy": "arrow of time, attentive",
    "halves_attentive_accuracy": "order of halves, attentive",
    "drive_by_time_steering_ridge_r2": "steering, ridge",
}


def make_droid_lists(droid: pathlib.Path, out: pathlib.Path) -> None:
    """Write the lists of all tasks on the robot arms."""
    for name, choice in _LISTS.items():
        world.run(
            "vjepa_jax.make_list",
            f"--table={droid / 'labels.csv'}",
            f"--output={out / 'droid' / name}",
            *choice,
            "--split_by=lab",
            f"--test_values={_TEST_LABS}",
        )


def make_drive_lists(donkey: pathlib.Path, out: pathlib.Path) -> None:
    """Write the lists of the drives: split by time, and by drive.

    Pieces of one drive follow each other; the piece between the two parts is left out.
    """
    names = sorted(donkey.glob("*.mp4"))
    drives = [
        list(pieces)
        for _, pieces in itertools.groupby(
            names, lambda p: re.sub(r"_\d+$", "", p.stem)
        )
    ]
    by_time: dict[str, list[pathlib.Path]] = {"train": [], "test": []}
    for pieces in drives:
        count = round(len(pieces) * (1 - _LAST_SHARE))
        by_time["train"] += pieces[:count]
        by_time["test"] += pieces[count + 1 :]
    by_track = {"train": [*itertools.chain(*drives[:-1])], "test": drives[-1]}
    for split, parts in (("time", by_time), ("track", by_track)):
        folder = out / "donkey" / split
        folder.mkdir(parents=True, exist_ok=True)
        for part, files in parts.items():
            lines = (f"{file.resolve()} 0\n" for file in files)
            (folder / f"{part}.csv").write_text("".join(lines))


def make_shards(out: pathlib.Path, every: int = 1) -> pathlib.Path:
    """Prepare every so-many-th of the videos to pretrain on; return the folder."""
    listed = out / "droid" / "all" / "train.csv"
    folder = out / "shards"
    if every > 1:
        lines = listed.read_text().splitlines(keepends=True)[::every]
        listed, folder = listed.with_name(f"every_{every}.csv"), out / f"shards_{every}"
        listed.write_text("".join(lines))
    flags = "--short_side=112", "--fps=10", f"--data={listed}", f"--output={folder}"
    world.run("vjepa_jax.prepare", *flags)
    return folder


def run_seed(
    options: argparse.Namespace, name: str, seed: int, overrides: list[str]
) -> dict:
    """Train and evaluate a run, unless that is done; return its results."""
    workdir = options.out / name / f"seed{seed}"
    given = f"--config={options.config}", f"--workdir={workdir}"
    world.run("vjepa_jax.train", *given, f"--config.seed={seed}", *overrides)
    if not (workdir / _RESULTS).exists():
        values = ["other.name=world", f"other.path={options.world}"]
        values = [f"--config.{value}" for value in values if options.world]
        world.evaluate(
            f"configs/probe_real_video.py:{options.out}", workdir, seed, values
        )
    return json.loads((workdir / _RESULTS).read_text())


def draw(runs: dict[str, pathlib.Path], file: pathlib.Path) -> None:
    """Draw loss and probes of runs against the clips that they have seen."""
    figure, (loss, probes) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, workdir in runs.items():
        config = json.loads((workdir / "config.json").read_text())
        rows = metrics.read_metrics(str(workdir))
        rows = [row for row in rows if "train/loss" in row]
        clips = np.array([row["step"] for row in rows]) * config["batch_size"] / 1000
        loss.plot(
            clips, [row["train/loss"] for row in rows], label=name.replace("_", " ")
        )
        results = json.loads((workdir / _RESULTS).read_text())
        for number, measure in enumerate(_DRAWN):
            style = {"color": f"C{number}", "marker": "o"}
            value = results[measure]["pretrained"]
            probes.plot(clips[-1], value, **style, linestyle="")
            probes.annotate(name.replace("_", " "), (clips[-1], value), fontsize=6)
    for number, text in enumerate(_DRAWN.values()):
        probes.plot([], [], color=f"C{number}", marker="o", linestyle="", label=text)
    loss.set(xlabel="thousand clips seen", ylabel="training loss", yscale="log")
    probes.set(xlabel="thousand clips seen", ylabel="accuracy or R²")
    loss.legend()
    probes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Run the command line; unknown flags go to training as overrides."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--droid", type=pathlib.Path, required=True)
    parser.add_argument("--donkey", type=pathlib.Path, required=True)
    parser.add_argument("--config", default="configs/droid_small.py")
    parser.add_argument("--out", type=pathlib.Path, default="runs/real_video")
    parser.add_argument("--world", default="", help="a run to compare with")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--growth", action="store_true")
    options, overrides = parser.parse_known_args()
    make_droid_lists(options.droid, options.out)
    make_drive_lists(options.donkey, options.out)
    overrides = [f"--config.data.path={make_shards(options.out)}", *overrides]
    results = [
        run_seed(options, "main", seed, overrides) for seed in range(options.seeds)
    ]
    world.print_results(results)
    if not options.growth:
        return
    runs = {"main": options.out / "main" / "seed0"}
    config = json.loads((runs["main"] / "config.json").read_text())
    for name, (every, share) in _GROWTH.items():
        changes = [
            f"--config.data.path={make_shards(options.out, every)}",
            f"--config.total_steps={round(share * config['total_steps'])}",
        ]
        run_seed(options, name, 0, [*overrides, *changes])
        runs[name] = options.out / name / "seed0"
    draw(runs, options.out / "growth.png")


if __name__ == "__main__":
    main()
