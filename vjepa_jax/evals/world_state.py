"""Probes of the synthetic world: motion class, and state of the main object.

Pretrained features, untrained ones and raw pixels get the same probes.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.data.clips.reader import ClipReader
from vjepa_jax.data.sources.open import open_source
from vjepa_jax.data.sources.records import Source
from vjepa_jax.data.stream import streams
from vjepa_jax.evals import settings
from vjepa_jax.evals.frozen import FrozenModel, random_init
from vjepa_jax.evals.heads import probes
from vjepa_jax.evals.heads.probes import ProbeTraining
from vjepa_jax.evals.labelled import require_per_class
from vjepa_jax.evals.tokens.features import Encode, Features, extract, make_pixel_encode
from vjepa_jax.world import render
from vjepa_jax.world.motion import CLASSES, draw_clip, frames_to_contact

MEASURES = (
    "attentive_accuracy",
    "linear_accuracy",
    "few_label_accuracy",
    "position_r2",
    "velocity_r2",
    "occluded_position_r2",
    "time_to_collision_r2",
    "attentive_position_r2",
    "attentive_velocity_r2",
    "attentive_occluded_position_r2",
    "attentive_time_to_collision_r2",
)
_SPLITS = ("probe_train", "probe_test", "hidden_train", "hidden_test")


@dataclasses.dataclass(frozen=True)
class State:
    """Ground truth of the main object per time step of the features.

    Attributes:
      position, velocity: float [N, T', 2], averages over the frames of a time step.
      visibility: float [N, T'], average over the frames.
      time_to_collision: float [N, T', 1], frames from the last one of the clip until
        the object meets a wall or another object. NaN in all but the last time step,
        and where it meets none within the number of frames of a video.
    """

    position: np.ndarray
    velocity: np.ndarray
    visibility: np.ndarray
    time_to_collision: np.ndarray


def read_state(
    world: ConfigDict,
    split: render.Split,
    index: np.ndarray,
    reader: ClipReader,
    time_steps: int,
) -> State:
    """Read the ground truth of clips from a split's `.npz`.

    The time to a collision is computed from it by the laws of the world.

    Args:
      world: config of the world.
      split: of the clips.
      index: int [N], the clips' indices in the split.
      reader: how the clips were cut.
      time_steps: of the features, T'.
    """
    looks = render.looks_of(world)
    arrays = render.read_truth(_truth_file(world, split.name))
    truth = {name: values[index] for name, values in arrays.items()}
    (frames,) = reader.sampling.frames(np.arange(looks.num_frames))

    def per_step(name):
        main = truth[name][:, frames, 0]
        return main.reshape(len(index), time_steps, -1, *main.shape[2:]).mean(2)

    last = frames[-1]
    time_to_collision = np.full((len(index), time_steps, 1), np.nan)
    for row, clip in enumerate(index):
        scene, motion = draw_clip(looks, split.seed, clip, truth["label"][row])
        now = truth["position"][row, last], truth["velocity"][row, last]
        frames_left = frames_to_contact(scene, motion, *now, looks.num_frames)
        time_to_collision[row, -1] = frames_left
    return State(
        per_step("position"),
        per_step("velocity"),
        per_step("visibility"),
        time_to_collision,
    )


def _truth_file(world: ConfigDict, split: str) -> pathlib.Path:
    return pathlib.Path(world.path) / f"{split}.npz"


def _open_split(world: ConfigDict, split: str) -> Source:
    truth = _truth_file(world, split)
    if not truth.exists():
        raise UserError(
            f"{truth} is missing: render the world first (python -m "
            "vjepa_jax.prepare --config=...)"
        )
    return open_source(str(truth.with_suffix(".csv")))


def read_features(
    encodes: Mapping[str, Encode],
    world: ConfigDict,
    reader: ClipReader,
    batch_size: int,
    num_workers: int,
) -> dict[str, dict[str, tuple[Features, State]]]:
    """Encode every split of a world.

    Args:
      encodes: functions that encode clips, by the name of the features.
      world: config of the world.
      reader: how to cut the clips.
      batch_size: clips per call of an encode.
      num_workers: decoding processes.

    Returns:
      {name of the features: {split: (features, state)}}.

    Raises:
      UserError: the world has not been rendered.
    """
    if not reader.sampling.frame_step:
        raise UserError("the world's probes need data.frame_step, not data.fps")
    out: dict[str, dict[str, tuple[Features, State]]] = {name: {} for name in encodes}
    splits = {split.name: split for split in render.splits(world)}
    for split in _SPLITS:
        source = _open_split(world, split)
        parts = extract(encodes, source, reader, batch_size, num_workers)
        first = next(iter(parts.values()))  # all are of the same clips and time steps
        time_steps = first.tokens.shape[1]
        state = read_state(world, splits[split], first.index, reader, time_steps)
        for name, features in parts.items():
            out[name][split] = features, state
    return out


def measure(
    splits: dict[str, tuple[Features, State]],
    *,
    labels_per_class: int,
    draws: int,
    hidden_visibility: float,
    attentive: ProbeTraining,
    regression: ProbeTraining,
    seed: int,
) -> dict[str, Any]:
    """Run all probes on one set of features.

    Args:
      splits: from `read_features`.
      labels_per_class, draws: of the few-label probe.
      hidden_visibility: an object is occluded in a time step if at most this share of
        it is visible, averaged over the frames.
      attentive: of the attentive probe of classes.
      regression: of the attentive probes of state, which see the tokens of a time step.
      seed: of the few-label probe.

    Returns:
      The `MEASURES`; accuracies 0..1 and R² on the test splits; and `confusion`, clips
      by true class (rows) and the attentive probe's (columns).
    """
    (train, _), (test, _) = splits["probe_train"], splits["probe_test"]
    pooled = (train.pooled(), train.labels, test.pooled(), test.labels)

    shown = splits["probe_train"], splits["probe_test"]
    hidden = splits["hidden_train"], splits["hidden_test"]

    def everywhere(state):
        return np.ones(state.visibility.shape, bool)

    def occluded(state):
        return state.visibility <= hidden_visibility

    def before_collision(state):
        return np.isfinite(state.time_to_collision[..., 0])

    def linear_r2(name, both, select):
        values = []
        for features, state in both:
            chosen = select(state)
            values.append(features.pooled_in_time_steps()[chosen])
            values.append(getattr(state, name)[chosen])
        return probes.linear_r2(*values)

    def attentive_r2(names, both, select, training):
        (train, train_state), (test, test_state) = both
        train_chosen, test_chosen = select(train_state), select(test_state)
        return probes.attentive_r2(
            train.tokens[train_chosen],
            {name: getattr(train_state, name)[train_chosen] for name in names},
            np.nonzero(train_chosen)[0],
            test.tokens[test_chosen],
            {name: getattr(test_state, name)[test_chosen] for name in names},
            training,
        )

    quantities = ("position", "velocity", "time_to_collision")
    attentive_shown = attentive_r2(quantities, shown, everywhere, regression)
    # More epochs, so that the fewer occluded time steps get as many updates.
    count = int(np.count_nonzero(occluded(hidden[0][1])))
    factor = max(1, shown[0][1].visibility.size // count)
    longer = dataclasses.replace(regression, epochs=factor * regression.epochs)
    attentive_hidden = attentive_r2(("position",), hidden, occluded, longer)
    predicted = probes.attentive_classes(
        train.flat(), train.labels, test.flat(), attentive
    )
    confusion = confusion_matrix(test.labels, predicted, labels=range(len(CLASSES)))
    results = {
        "attentive_accuracy": float((predicted == test.labels).mean()),
        "linear_accuracy": probes.linear_accuracy(*pooled),
        "few_label_accuracy": probes.few_label_accuracy(
            *pooled, labels_per_class=labels_per_class, draws=draws, seed=seed
        ),
        "position_r2": linear_r2("position", shown, everywhere),
        "velocity_r2": linear_r2("velocity", shown, everywhere),
        "occluded_position_r2": linear_r2("position", hidden, occluded),
        "time_to_collision_r2": linear_r2("time_to_collision", shown, before_collision),
        "attentive_occluded_position_r2": attentive_hidden["position"],
    }
    results |= {f"attentive_{name}_r2": attentive_shown[name] for name in quantities}
    ordered = {name: results[name] for name in MEASURES}
    return ordered | {"confusion": confusion.tolist()}


def chance() -> dict[str, float]:
    """Return the results of guessing: a random class, and the mean of the values."""
    accuracy = 1 / len(CLASSES)
    return {m: accuracy if m.endswith("accuracy") else 0.0 for m in MEASURES}


def evaluate(model: FrozenModel, config: ConfigDict) -> dict[str, dict[str, Any]]:
    """Probe a run of the synthetic world.

    Args:
      model: of the run.
      config: from `settings.world`.

    Returns:
      {measure: {"pretrained": value}}, with `config.random_init` also `random_init`, an
      untrained network, `pixels` and `chance`; and `confusion`, see `measure`, with its
      `class_names`.

    Raises:
      UserError: the run is not of the synthetic world, or the world has not been
        rendered, or a class has fewer than `config.labels_per_class` videos.
    """
    settings.validate(config)
    run, encoder = model.config, model.encoder
    if not run.world.path:
        raise UserError(
            "the run has no config.world.path: this evaluation takes runs of the "
            "synthetic world"
        )
    wanted, key = config.labels_per_class, "config.labels_per_class"
    labels = np.asarray(_open_split(run.world, "probe_train").labels)
    require_per_class(labels, wanted, key, CLASSES.__getitem__)
    encodes: dict[str, Encode] = {"pretrained": model.encode}
    if config.random_init:
        encodes["random_init"] = random_init(model, config.seed).encode
        encodes["pixels"] = make_pixel_encode(encoder.patch_size, encoder.tubelet_size)
    splits = read_features(
        encodes,
        run.world,
        streams.make_reader(run.data, run.data),
        config.batch_size,
        config.num_workers,
    )
    # Some are unreadable.
    (features, _) = splits["pretrained"]["probe_train"]
    require_per_class(features.labels, wanted, key, CLASSES.__getitem__)
    attentive, regression = (
        ProbeTraining(
            num_heads=config.num_heads,
            seed=config.seed,
            mesh=model.mesh,
            **config[key],
        )
        for key in ("attentive", "regression")
    )
    columns: dict[str, dict[str, Any]] = {}
    for name in encodes:
        print(f"probing {name} features", file=sys.stderr, flush=True)
        columns[name] = measure(
            splits[name],
            labels_per_class=config.labels_per_class,
            draws=config.draws,
            hidden_visibility=config.hidden_visibility,
            attentive=attentive,
            regression=regression,
            seed=config.seed,
        )
    confusion = {name: column.pop("confusion") for name, column in columns.items()}
    if config.random_init:
        columns["chance"] = chance()
    results = {m: {c: columns[c][m] for c in columns} for m in MEASURES}
    return results | {"confusion": confusion | {"class_names": list(CLASSES)}}
