"""Change one setting of the demo's recipe at a time, on the synthetic world.

    python benchmarks/ablation.py --out=runs/ablation
    python benchmarks/ablation.py --rows=recipe,pixels --seeds=1

A row is a run of `configs/world_tiny.py` with `STEPS` updates and changed values. It is
evaluated by `configs/probe_world.py` and, if it predicts features, by
`configs/probe_physics.py`. Runs are in `NAME/seedN` of the output folder; complete ones
are kept. Prints a Markdown table: mean over the seeds, lowest to highest.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence

import markdown
import world

STEPS = 800
CONFIG = "configs/world_tiny.py"
_PIXELS = "objective.target=pixels"
_BLOCKS = "masks.future.num_blocks=8", "masks.future.max_temporal_keep=1.0"
# {name: (description, changed values)}. The recipe's objective is that of V-JEPA and
# V-JEPA 2. Only masks with boxes have different official and unbiased budgets, so these
# two are compared with boxes.
ROWS = {
    "recipe": ("the demo's recipe", ()),
    "no_play": (
        "data: no clips of play, as many of classes instead",
        (
            "world.play_fraction=0.0",
            "world.path=runs/world_no_play",
            "data.path=runs/world_no_play/pretrain.csv",
        ),
    ),
    "v2_1": (
        "objective: V-JEPA 2.1's, visible tokens too",
        ("model.predictor.predict_context=True", "objective.context_weight=0.5"),
    ),
    "v2_1_levels": (
        "objective: V-JEPA 2.1's, all four blocks' outputs as targets",
        (
            "model.predictor.predict_context=True",
            "objective.context_weight=0.5",
            "model.encoder.levels=(0,1,2,3)",
            "model.predictor.deep_input=True",
        ),
    ),
    "pixels": ("objective: pixels as targets", (_PIXELS,)),
    "terms": (
        "objective: VICReg's variance and covariance terms as well",
        ("objective.variance_weight=0.025", "objective.covariance_weight=0.0025"),
    ),
    "future_blocks": (
        "masks: the future, and 8 boxes of 15 % of the past",
        ("masks.future.num_blocks=8",),
    ),
    "blocks_unbiased": ("masks: 8 boxes of 15 %, unbiased budgets", _BLOCKS),
    "blocks_official": (
        "masks: 8 boxes of 15 %, official budgets",
        (*_BLOCKS, "masks.future.mode=official"),
    ),
    "tubes": (
        "masks: random tubes of 75 %",
        (
            "masks.future.kind=tube",
            "masks.future.max_temporal_keep=1.0",
            "masks.future.spatial_scale=(0.75,0.75)",
        ),
    ),
    "no_ema": (
        "EMA: none, the target is the encoder",
        ("ema.start=0.0", "ema.end=0.0"),
    ),
    "ema_998": ("EMA: 0.998 to 1", ("ema.start=0.998",)),
    "predictor_deep": ("predictor: 4 blocks", ("model.predictor.depth=4",)),
    "predictor_narrow": ("predictor: 32 channels", ("model.predictor.width=32",)),
}
_MEASURES = {
    "few_label_accuracy": "few-label",
    "linear_accuracy": "linear",
    "position_r2": "position R²",
    "velocity_r2": "velocity R²",
    "occluded_position_r2": "occluded position R²",
    "physics_accuracy": "physics, mean of nine",
}


def run(folder: pathlib.Path, seed: int, changes: tuple[str, ...]) -> dict:
    """Train and evaluate one seed of a row, unless that is done; return the results."""
    workdir = folder / f"seed{seed}"
    values = f"total_steps={STEPS}", *changes
    world.train(CONFIG, workdir, seed, [f"--config.{value}" for value in values])
    if not (workdir / "results.json").exists():
        # The table shows linear probes only: the others get one epoch.
        probe = "random_init=False", "attentive.epochs=1", "regression.epochs=1"
        _evaluate("world", workdir, seed, probe)
    results = json.loads((workdir / "results.json").read_text())
    surprise = workdir / "results_physics_world.json"
    if (
        _PIXELS in changes
    ):  # no target features that a prediction could be compared with
        return results | {"physics_accuracy": {}}
    if not surprise.exists():
        _evaluate("physics", workdir, seed, ["null_seeds=0"])
    share = json.loads(surprise.read_text())["mean"]["accuracy"]
    return results | {"physics_accuracy": {"pretrained": share}}


def _evaluate(
    name: str, workdir: pathlib.Path, seed: int, changes: Sequence[str]
) -> None:
    values = [f"--config.{value}" for value in changes]
    world.evaluate(f"configs/probe_{name}.py", workdir, seed, values)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS), help="separated by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default="runs/ablation")
    options = parser.parse_args()
    names = options.rows.split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        parser.error(f"unknown rows {', '.join(unknown)}; known: {', '.join(ROWS)}")

    def row(name: str) -> list[str]:
        text, changes = ROWS[name]
        runs = [run(options.out / name, seed, changes) for seed in range(options.seeds)]
        return [name, text, *(world.cell(m, "pretrained", runs) for m in _MEASURES)]

    markdown.print_table(["row", "change", *_MEASURES.values()], map(row, names))


if __name__ == "__main__":
    main()
