"""What features of the synthetic world tell: motion class, position, object permanence.

Every set of features gets the same read-outs: pretrained, random-init, raw pixels.
"""

import dataclasses
import pathlib
import sys
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix

from vjepa_jax.data import sources, streams
from vjepa_jax.data.reading import Reading
from vjepa_jax.data.world import CLASSES
from vjepa_jax.default_config import ConfigDict, UserError
from vjepa_jax.evals import probes
from vjepa_jax.evals.features import Encode, Features, extract, make_pixel_encode
from vjepa_jax.evals.frozen import Frozen, random_init

MEASURES = (
    "attentive_accuracy",
    "linear_accuracy",
    "few_label_accuracy",
    "position_r2",
    "velocity_r2",
    "occluded_position_r2",
)
_SPLITS = ("probe_train", "probe_test", "hidden_train", "hidden_test")


@dataclasses.dataclass(frozen=True)
class State:
    """Ground truth of the main object per time step of the features.

    Attributes:
      position, velocity: float [N, T', 2], averages over the frames of a time step.
      visibility: float [N, T'], average over the frames.
    """

    position: np.ndarray
    velocity: np.ndarray
    visibility: np.ndarray


def read_state(
    path: pathlib.Path, index: np.ndarray, reading: Reading, time_steps: int
) -> State:
    """Read the ground truth of the clips that `extract` cut, from a split's `.npz`."""
    with np.load(path) as truth:
        num_frames = truth["position"].shape[1]
        (frames,) = reading.sampling.frames(np.arange(num_frames))

        def per_step(name):
            main = truth[name][index][:, frames, 0]
            return main.reshape(len(index), time_steps, -1, *main.shape[2:])

        return State(
            per_step("position").mean(2),
            per_step("velocity").mean(2),
            per_step("visibility").mean(2),
        )


def read_features(
    encodes: dict[str, Encode],
    world_path: str,
    reading: Reading,
    batch_size: int,
    num_workers: int,
) -> dict[str, dict[str, tuple[Features, State]]]:
    """Encode every split of a world: {features' name: {split: (features, state)}}.

    Raises:
      UserError: the world is not there.
    """
    if not reading.sampling.frame_step:
        raise UserError("the world's probes need data.frame_step, not data.fps")
    out: dict[str, dict[str, tuple[Features, State]]] = {name: {} for name in encodes}
    for split in _SPLITS:
        truth = pathlib.Path(world_path) / f"{split}.npz"
        if not truth.exists():
            raise UserError(
                f"{truth} is missing: render the world first (python -m "
                "vjepa_jax.data.prepare --config=...)"
            )
        source = sources.open_source(str(truth.with_suffix(".csv")))
        parts = extract(encodes, source, reading, batch_size, num_workers)
        for name, features in parts.items():
            time_steps = features.tokens.shape[1]
            state = read_state(truth, features.index, reading, time_steps)
            out[name][split] = features, state
    return out


def measure(
    splits: dict[str, tuple[Features, State]],
    *,
    num_heads: int,
    labels_per_class: int,
    draws: int,
    hidden_visibility: float,
    attentive: dict,
    seed: int,
) -> dict[str, Any]:
    """Run all read-outs on one set of features.

    Args:
      splits: from `read_features`.
      num_heads: of the attentive probe.
      labels_per_class, draws: of the few-label probe.
      hidden_visibility: an object is occluded in a time step where at most this share
        of it is visible, averaged over the frames.
      attentive: further arguments of `probes.attentive_classes`.
      seed: of the probes.

    Returns:
      The `MEASURES`; accuracies 0..1 and R² on the test splits; and `confusion`, clips
      by true class (rows) and the attentive probe's (columns).
    """
    (train, _), (test, _) = splits["probe_train"], splits["probe_test"]
    pooled = (train.pooled(), train.labels, test.pooled(), test.labels)

    def r2(name, fit, judge, select):
        xs, ys = [], []
        for features, state in (fit, judge):
            chosen = select(state)
            xs.append(features.pooled_in_time_steps()[chosen])
            ys.append(getattr(state, name)[chosen])
        return probes.linear_r2(xs[0], ys[0], xs[1], ys[1])

    def everywhere(state):
        return np.ones(state.visibility.shape, bool)

    def occluded(state):
        return state.visibility <= hidden_visibility

    shown = splits["probe_train"], splits["probe_test"]
    hidden = splits["hidden_train"], splits["hidden_test"]
    said = probes.attentive_classes(
        train.flat(),
        train.labels,
        test.flat(),
        num_heads=num_heads,
        seed=seed,
        **attentive,
    )
    return {
        "attentive_accuracy": float((said == test.labels).mean()),
        "linear_accuracy": probes.linear_accuracy(*pooled),
        "few_label_accuracy": probes.few_label_accuracy(
            *pooled, labels_per_class=labels_per_class, draws=draws, seed=seed
        ),
        "position_r2": r2("position", *shown, everywhere),
        "velocity_r2": r2("velocity", *shown, everywhere),
        "occluded_position_r2": r2("position", *hidden, occluded),
        "confusion": confusion_matrix(
            test.labels, said, labels=range(len(CLASSES))
        ).tolist(),
    }


def chance() -> dict[str, float]:
    """Return what guessing gives: one class of all, the mean position."""
    accuracy = 1 / len(CLASSES)
    return {m: accuracy if m.endswith("accuracy") else 0.0 for m in MEASURES}


def evaluate(frozen: Frozen, config: ConfigDict) -> dict[str, dict[str, Any]]:
    """Probe a run of the world, an untrained network and raw pixels.

    Args:
      frozen: the run.
      config: as in `configs/probe_world.py`.

    Returns:
      {measure: {features' name: value}}, chance among them; and `confusion`, see
      `measure`.

    Raises:
      UserError: the run is not of the synthetic world, or the world is not there.
    """
    run, encoder = frozen.config, frozen.encoder
    if not run.world.path:
        raise UserError(
            "the run has no config.world.path: configs/probe_world.py probes runs of "
            "the synthetic world"
        )
    encodes = {
        "pretrained": frozen.encode,
        "random_init": random_init(frozen, config.seed).encode,
        "pixels": make_pixel_encode(encoder.patch_size, encoder.tubelet_size),
    }
    splits = read_features(
        encodes,
        run.world.path,
        streams.make_reading(run.data, run.data),
        config.batch_size,
        config.num_workers,
    )
    columns: dict[str, dict[str, Any]] = {}
    for name in encodes:
        print(f"probing {name} features", file=sys.stderr, flush=True)
        columns[name] = measure(
            splits[name],
            num_heads=config.num_heads,
            labels_per_class=config.labels_per_class,
            draws=config.draws,
            hidden_visibility=config.hidden_visibility,
            attentive=dict(config.attentive),
            seed=config.seed,
        )
    confusion = {name: column.pop("confusion") for name, column in columns.items()}
    columns["chance"] = chance()
    results = {m: {c: columns[c][m] for c in columns} for m in MEASURES}
    return results | {"confusion": confusion}
