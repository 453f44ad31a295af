"""How far a target encoder in 8 bits moves the loss of a run of the synthetic world.

    python benchmarks/target_dtype.py --workdir=runs/demo [--batches=20]

The checkpoint's weights predict the same hidden tokens of the same clips of classes,
drawn for the purpose, with the target encoder's matmuls as they are and in each 8-bit
type. On a machine without such units the types are imitated: the numbers hold, no speed
does. Prints a Markdown table: the mean loss, and the relative difference of a batch's
loss, its mean, with its sign, and its largest size.
"""

import argparse

import jax
import numpy as np

from vjepa_jax.evals import frozen
from vjepa_jax.objective.masked import LossTerms, MaskedObjective
from vjepa_jax.program import build
from vjepa_jax.world import motion
from vjepa_jax.world.scenes import World

TYPES = "", "int8", "float8_e4m3fn"
BATCH = 32
SEED = 2024  # of clips; no split of a world has it


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
    print("| target encoder | loss | difference, mean | largest |\n|---|---|---|---|")
    for name, values in found.items():
        difference = values / found[""] - 1
        largest = np.abs(difference).max()
        print(
            f"| {name or 'as it is'} | {values.mean():.4f} | {difference.mean():+.2%} "
            f"| {largest:.2%} |"
        )


if __name__ == "__main__":
    main()
