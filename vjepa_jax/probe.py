"""Probe what a run's target encoder has learned, with its weights frozen.

    python -m vjepa_jax.probe --config=configs/probe_world.py --workdir=DIR

Reads DIR's checkpoint, prints one table and writes `results.json` and pictures to DIR.
"""

import json
import pathlib
import sys
import time

import flax.linen as nn
import jax
import numpy as np
from absl import flags

from vjepa_jax import build, checkpoint, cli, metrics
from vjepa_jax.data import render, sources, streams
from vjepa_jax.data.reading import Reading
from vjepa_jax.default_config import ConfigDict, UserError
from vjepa_jax.evals import features, pictures, world
from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.saved_config import restored

RESULTS_FILE = "results.json"


def random_init(encoder: VideoEncoder, video_shape: tuple[int, ...], seed: int):
    """Return the parameters of an untrained encoder of the same architecture."""
    # Not the run's own seed: that encoder is where the run started.
    key = jax.random.fold_in(jax.random.key(seed), 1)
    boxed = encoder.init(key, np.zeros((1, *video_shape), np.float32))
    return jax.tree.map(np.asarray, nn.unbox(boxed["params"]))


def format_table(results: dict[str, dict[str, float]]) -> str:
    """Return the results as a table: a row per measure, a column per features."""
    columns = list(next(iter(results.values())))
    rows = [f"{'':24}" + "".join(f"{c:>14}" for c in columns)]
    for measure, values in results.items():
        cells = (
            f"{v:14.1%}" if measure.endswith("accuracy") else f"{v:14.3f}"
            for v in values.values()
        )
        rows.append(f"{measure:24}" + "".join(cells))
    return "\n".join(rows)


def _earlier_seconds(run: ConfigDict, workdir: str) -> dict[str, float]:
    """Return how long rendering and training took, as they noted it."""
    rows = metrics.read_metrics(workdir)
    return {
        "render": render.render_seconds(run.world.path),
        "train": rows[-1]["perf/wall_seconds"] if rows else 0.0,
    }


def probe(config: ConfigDict, workdir: str) -> dict[str, dict[str, float]]:
    """Run the world's evaluation on `workdir` and write its results there.

    Raises:
      UserError: there is no checkpoint, or the run is not of the synthetic world.
    """
    began = time.perf_counter()
    step = None if config.step < 0 else config.step
    target, meta = checkpoint.restore_target(workdir, step)
    run = restored(meta["config"])
    if not run.world.path:
        raise UserError(
            f"the run in {workdir} has no config.world.path: configs/probe_world.py "
            "probes runs of the synthetic world"
        )
    encoder, _ = build.make_models(run)
    video_shape = tuple(meta["video_shape"])
    untrained = random_init(encoder, video_shape, config.seed)
    encodes = {
        "pretrained": features.make_encode(encoder, target),
        "random_init": features.make_encode(encoder, untrained),
        "pixels": features.make_pixel_encode(encoder.patch_size, encoder.tubelet_size),
    }
    reading = streams.make_reading(run.data, run.data)
    splits = world.read_features(
        encodes, run.world.path, reading, config.batch_size, config.num_workers
    )
    columns: dict[str, dict[str, float]] = {}
    for name in encodes:
        print(f"probing {name} features", file=sys.stderr, flush=True)
        columns[name] = world.measure(
            splits[name],
            num_heads=config.num_heads,
            labels_per_class=config.labels_per_class,
            draws=config.draws,
            hidden_visibility=config.hidden_visibility,
            attentive=dict(config.attentive),
            seed=config.seed,
        )
    columns["chance"] = world.chance()
    results = {m: {c: columns[c][m] for c in columns} for m in world.MEASURES}
    _draw(run, workdir, encodes, reading)
    seconds = _earlier_seconds(run, workdir)
    seconds["probe"] = time.perf_counter() - began
    path = pathlib.Path(workdir) / RESULTS_FILE
    path.write_text(json.dumps(results | {"seconds": seconds}, indent=2) + "\n")
    return results


def _draw(run: ConfigDict, workdir: str, encodes, reading: Reading) -> None:
    """Draw curves, masks and features of one clip into the workdir."""
    folder = pathlib.Path(workdir)
    pictures.draw_curves(metrics.read_metrics(workdir), folder / "curves.png")
    listed = sources.open_source(str(pathlib.Path(run.world.path) / "hidden_test.csv"))
    clip = next(features.read_clips(listed, reading, count=8))
    encoder, _ = build.make_models(run)
    grid = encoder.grid(clip.shape)
    masks = build.make_masks(run.masks, grid)
    pictures.draw_masks(clip[0], grid, masks, folder / "masks.png")
    named = {k: encodes[k](clip) for k in ("pretrained", "random_init")}
    pictures.draw_principal_components(clip[0], grid, named, folder / "features.png")


def main() -> None:
    """Run the command line."""
    checkpoint.quiet_orbax()
    results = probe(_CONFIG.value, _WORKDIR.value)
    print(format_table(results))
    print(f"results and pictures in {_WORKDIR.value}", file=sys.stderr)


if __name__ == "__main__":
    _CONFIG = cli.define_config_flag()
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run", required=True)
    cli.run(main)
