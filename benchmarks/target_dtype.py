"""Measure how much 8-bit matmuls in the target encoder change the loss of a run.

    python benchmarks/target_dtype.py --workdir=runs/demo [--batches=20]

The run is of the synthetic world. Its weights predict the same hidden tokens of the
same new clips with the target encoder's matmuls unchanged and in each 8-bit type.
Hardware without 8-bit units emulates them: the losses are right, the speed is not.
Prints a Markdown table: the mean loss, and the relative difference of a batch's loss
(its signed mean, and its largest absolute value).
"""

import argparse

import jax
import markdown
import numpy as np

from vjepa_jax.evals import frozen
from vjepa_jax.objective.masked import LossTerms, MaskedObjective
from vjepa_jax.program import build
from vjepa_jax.world import motion
from vjepa_jax.world.scenes import World

TYPES = "", "int8", "float8_e4m3fn"
BATCH = 32
SEED = 2024  # of the clips; no split of a world uses it


def losses(model: frozen.FrozenModel, batches: int) -> dict[str, np.ndarray]:
    """Return {type: the loss of each batch}."""
    (stream,) = streams = build.make_streams(model.config, model.encoder)
    looks = World(size=model.video_shape[1], num_frames=model.video_shape[0])
    objectives = {
        name: MaskedObjective(
            model.encoder,
            model.predictor,
            streams,
            LossTerms(**model.config.objective),
            target_dtype=name,
        )
        for name in TYPES
    }
    functions = {name: jax.jit(o.loss) for name, o in objectives.items()}
    found = {name: [] for name in TYPES}
    for batch in range(batches):
        numbers = range(BATCH * batch, BATCH * (batch + 1))
        clips = np.stack([motion.make_clip(looks, SEED, i).video for i in numbers])
        videos = {stream: clips}
        masks = objectives[""].sample(jax.random.key(batch), videos)
        for name, function in functions.items():
            target = model.params["target"]
            total, _ = function(model.params, target, videos, masks, None, 0)
            found[name].append(float(total))
    return {name: np.array(values) for name, values in found.items()}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--batches", type=int, default=20)
    options = parser.parse_args()
    model = frozen.load(options.workdir)
    if model.config.streams:
        parser.error(f"{options.workdir} has other streams than clips of the world")
    found = losses(model, options.batches)
    rows = []
    for name, values in found.items():
        change = values / found[""] - 1
        shares = f"{change.mean():+.2%}", f"{np.abs(change).max():.2%}"
        rows.append([name or "unchanged", f"{values.mean():.4f}", *shares])
    columns = ["target encoder", "loss", "difference, mean", "largest"]
    markdown.print_table(columns, rows)


if __name__ == "__main__":
    main()
