"""Frozen features of camera footage: what shows in one frame, and what needs motion.

A task is a set of labelled clips. Labels come from lists, or are made from the clips
themselves: whether a clip runs backwards (the arrow of time), whether its halves are
exchanged, or values that a sensor recorded with every frame. Every task gets the same
read-outs for the same columns of features, so that the share of motion shows.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.data.clips.reader import ClipReader
from vjepa_jax.data.sources.records import Source
from vjepa_jax.data.stream import streams
from vjepa_jax.evals import frozen, settings
from vjepa_jax.evals.frozen import FrozenModel, random_init
from vjepa_jax.evals.heads import probes
from vjepa_jax.evals.heads.probes import ProbeTraining
from vjepa_jax.evals.labelled import open_labelled, require_per_class
from vjepa_jax.evals.tokens import clip_tokens
from vjepa_jax.evals.tokens.features import Encode, extract, make_pixel_encode

_KEYS = ("train_path", "test_path")  # of a task
# What is done to a clip [B, T, H, W, 3] to get the class 1; class 0 is the clip itself.
_CHANGES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "arrow": lambda video: video[:, ::-1],
    "halves": lambda video: np.roll(video, video.shape[1] // 2, axis=1),
}


@dataclasses.dataclass(frozen=True)
class Samples:
    """Features of a task's clips, and what to read out of them.

    Attributes:
      tokens: float32 [N, T', S, D]: T' time steps of S positions.
      targets: int64 [N], classes; or float [N, T', K], values at every time step.
    """

    tokens: np.ndarray
    targets: np.ndarray

    def pooled(self) -> np.ndarray:
        """Return a vector per clip: the mean over space at every time step, [N, T'*D].

        The order of the time steps is kept: a mean over time would hide it.
        """
        return self.tokens.mean(2).reshape(len(self.tokens), -1)

    def flat(self) -> np.ndarray:
        """Return all tokens of a clip in one axis: [N, T' * S, D]."""
        return self.tokens.reshape(len(self.tokens), -1, self.tokens.shape[-1])


def evaluate(model: FrozenModel, config: ConfigDict) -> dict[str, dict[str, Any]]:
    """Read the tasks' targets out of a model's features, and out of simpler ones.

    Args:
      model: of the features.
      config: from `settings.real_video`, with at least one task.

    Returns:
      {TASK_MEASURE: {column: value}}. Measures of classes are balanced accuracies
      (means of the classes' recalls): `few_label_accuracy`, `knn_accuracy`,
      `linear_accuracy`, `attentive_accuracy`; of values R²: `NAME_ridge_r2`,
      `NAME_attentive_r2`; and `test_clips`, their number. Columns: `pretrained`;
      `single_frame`, the same encoder on one frame repeated; with `config.random_init`
      also `random_init`, an untrained network, `pixels` and `mean_frame`, the pixels of
      the mean over time; the encoder at `config.other.path`, if any; and `chance`.

    Raises:
      UserError: config, data and model do not fit.
    """
    settings.validate(config)
    if not config.tasks:
        raise UserError(
            "config.tasks is empty: give a file with tasks, such as "
            "configs/probe_real_video.py"
        )
    columns: dict[str, dict[str, float]] = {}
    for name, task in config.tasks.items():
        print(f"task {name}: reading and encoding", file=sys.stderr, flush=True)
        train, test = read(model, config, name)
        for column in train:
            print(f"task {name}: {column} features", file=sys.stderr, flush=True)
            parts = train[column], test[column], config, model
            measured = (
                _values(*parts, task.sensors) if task.sensors else _classes(*parts)
            )
            for measure, value in measured.items():
                columns.setdefault(column, {})[f"{name}_{measure}"] = value
        num_classes = len(np.unique(train["pretrained"].targets))
        for measure in measured:
            chance = 0.0 if task.sensors else 1 / num_classes
            columns.setdefault("chance", {})[f"{name}_{measure}"] = chance
        count = len(test["pretrained"].targets)
        columns["pretrained"][f"{name}_clips_tested"] = count
    order = dict.fromkeys(m for values in columns.values() for m in values)
    return {
        measure: {column: values.get(measure) for column, values in columns.items()}
        for measure in order
    }


# --------------------------------------------------------------------- clips to samples


def read(
    model: FrozenModel, config: ConfigDict, name: str
) -> tuple[dict[str, Samples], dict[str, Samples]]:
    """Read and encode the clips of a task.

    Args:
      model: of the features.
      config: of the evaluation.
      name: of the task.

    Returns:
      Samples by column: to learn from, and to test on.

    Raises:
      UserError: a list or a recorded value is not as the task needs it.
    """
    task = config.tasks[name]
    config = config.copy_and_resolve_references()
    with config.unlocked():
        data = config.data
        for key in (*_KEYS, "frame_step", "fps"):
            data[key] = task[key]
        data.update(duration_secs=0.0, num_clips=1, allow_clip_overlap=False)
        data.num_frames = data.num_frames or model.video_shape[0]
        data.resolution = data.resolution or model.video_shape[1]
    try:
        if task.change or task.sensors:  # whose lists need no classes
            sources = {key: clip_tokens.open_source(config, key) for key in _KEYS}
        else:
            labelled = open_labelled(config, _KEYS)
            sources = labelled.sources
            labels = np.asarray(sources["train_path"].labels)
            _require_labels(labels, config, labelled.name_of)
        train, test = (_encode(model, config, task, sources[key]) for key in _KEYS)
    except UserError as error:
        raise UserError(f"config.tasks.{name}: {error}") from error
    return train, test


def _require_labels(
    labels: np.ndarray, config: ConfigDict, name_of: Callable[[int], str]
) -> None:
    require_per_class(
        labels, config.labels_per_class, "config.labels_per_class", name_of
    )


def _encode(
    model: FrozenModel, config: ConfigDict, task: ConfigDict, source: Source
) -> dict[str, Samples]:
    """Read a list's clips once, encode them for every column, and attach targets."""
    reader = streams.make_reader(config.data, config.data)
    model.grid(reader.shape()[1:])
    encodes = _make_encodes(model, config, has_values=bool(task.sensors))
    change = _CHANGES.get(task.change)
    asked: dict[tuple[str, str], Encode] = {("", "varies"): varies}
    for column, encode in encodes.items():
        asked[column, "clip"] = encode
        if change is not None:
            asked[column, "changed"] = _after(change, encode)
    found = extract(
        asked, source, reader, config.clips_per_call, config.data.num_workers
    )
    first = found["", "varies"]
    kept = np.ones(len(first.index), bool)
    if change is not None:
        kept = first.tokens[:, 0, 0, 0] > 0
        if not kept.any():
            raise UserError(
                f"all clips of {source.name!r} begin or end with equal frames: the "
                "videos are shorter than a clip, or still"
            )
    samples = {}
    for column in encodes:
        tokens, targets = found[column, "clip"].tokens[kept], first.labels
        if change is not None:
            changed = found[column, "changed"].tokens[kept]
            targets = np.repeat([0, 1], len(tokens))
            tokens = np.concatenate([tokens, changed])
        elif task.sensors:
            targets = _read_values(
                source, first.index, reader, tokens.shape[1], task.sensors
            )
        samples[column] = Samples(tokens, targets)
    return samples


def _after(change: Callable[[np.ndarray], np.ndarray], encode: Encode) -> Encode:
    return lambda video: encode(np.ascontiguousarray(change(video)))


def varies(video: np.ndarray) -> np.ndarray:
    """Return whether the first two and the last two frames differ: [B, 1, 1, 1].

    A video that is too short is padded with its last frame, and a camera that starts
    late repeats its first: such a clip shows its direction without any motion.
    """
    ends = video[:, [0, -1]] != video[:, [1, -2]]
    varies = ends.any((2, 3, 4)).all(1)
    return varies.astype(np.float32)[:, None, None, None]


def _make_encodes(
    model: FrozenModel, config: ConfigDict, *, has_values: bool
) -> dict[str, Encode]:
    """Return the columns: ways to turn clips [B, T, H, W, 3] into tokens."""
    encoder = model.encoder
    pixels = make_pixel_encode(encoder.patch_size, encoder.tubelet_size)

    def mean_frame(video: np.ndarray) -> np.ndarray:
        mean = video.mean(1, keepdims=True).round().astype(np.uint8)
        tokens = make_pixel_encode(encoder.patch_size, 1)(mean)
        steps = model.grid(video.shape)[0] if has_values else 1
        return np.repeat(tokens, steps, axis=1)

    encodes: dict[str, Encode] = {
        "pretrained": model.encode,
        "single_frame": _make_single_frame(model, every_step=has_values),
    }
    if config.random_init:
        encodes["random_init"] = random_init(model, config.seed).encode
        encodes |= {"pixels": pixels, "mean_frame": mean_frame}
    if config.other.path:
        other = frozen.load(config.other.path, mesh=model.mesh)
        if other.encoder.tubelet_size != encoder.tubelet_size:
            raise UserError(
                f"config.other.path={config.other.path!r} has tubelets of "
                f"{other.encoder.tubelet_size} frames, and the model of "
                f"{encoder.tubelet_size}: they do not have the same time steps"
            )
        encodes[config.other.name] = other.encode
    return encodes


def _make_single_frame(model: FrozenModel, *, every_step: bool) -> Encode:
    """Make an encode that sees one frame, repeated to the length of the clip.

    Args:
      model: of the features.
      every_step: give every time step the features of its own middle frame; otherwise
        there is one time step, of the clip's middle frame.
    """

    def encode(video: np.ndarray) -> np.ndarray:
        length, tubelet = video.shape[1], model.encoder.tubelet_size
        frames = [length // 2]
        if every_step:
            frames = [*range(tubelet // 2, length, tubelet)]
        still = [
            model.encode(np.repeat(video[:, [frame]], length, axis=1)).mean(1)
            for frame in frames
        ]
        return np.stack(still, axis=1)

    return encode


def _read_values(
    source: Source,
    index: np.ndarray,
    reader: ClipReader,
    time_steps: int,
    names: Sequence[str],
) -> np.ndarray:
    """Read what was recorded with the frames of clips: float64 [N, T', K].

    A time step's value is the mean over its frames. The values of a video stand in the
    file of its name with the suffix .npz: arrays [frames] by name.

    Raises:
      UserError: a file or an array is missing, or has not one number per frame.
    """
    rows = []
    for i in index.tolist():
        file = os.path.splitext(source.path_of(i))[0] + ".npz"
        try:
            with np.load(file) as arrays:
                values = np.stack([arrays[name] for name in names], axis=-1)
        except FileNotFoundError:
            raise UserError(
                f"{file} is missing: it should hold {', '.join(names)} for every frame"
            ) from None
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{file} does not hold {', '.join(names)}: {error}"
            ) from None
        if values.ndim != 2:
            raise UserError(f"{file}: an array of {values.shape[:-1]} is not [frames]")
        (frames,) = reader.sampling.frames(np.arange(len(values)))
        rows.append(values[frames].reshape(time_steps, -1, len(names)).mean(1))
    return np.stack(rows).astype(np.float64)


# ------------------------------------------------------------------------- read-outs


def _classes(
    train: Samples, test: Samples, config: ConfigDict, model: FrozenModel
) -> dict[str, float]:
    """Classify by few labels, by neighbours, and by linear and attentive probes."""
    vectors, labels = train.pooled(), train.targets
    _require_labels(labels, config, str)
    tested = test.pooled()

    def score(predicted: np.ndarray) -> float:
        return float(balanced_accuracy_score(test.targets, predicted))

    rng = np.random.default_rng(config.seed)
    few = [
        probes.draw_per_class(labels, config.labels_per_class, rng)
        for _ in range(config.draws)
    ]
    nearest = KNeighborsClassifier(
        min(config.k, len(vectors)), weights="distance", metric="cosine"
    )
    training = _training(config, model, train)
    return {
        "few_label_accuracy": float(
            np.mean(
                [
                    score(probes.linear_classes(vectors[rows], labels[rows], tested))
                    for rows in few
                ]
            )
        ),
        "knn_accuracy": score(nearest.fit(vectors, labels).predict(tested)),
        "linear_accuracy": score(probes.linear_classes(vectors, labels, tested)),
        "attentive_accuracy": score(
            probes.attentive_classes(train.flat(), labels, test.flat(), training)
        ),
    }


def _values(
    train: Samples,
    test: Samples,
    config: ConfigDict,
    model: FrozenModel,
    names: Sequence[str],
) -> dict[str, float]:
    """Predict the values of every time step from its tokens."""

    def per_step(samples: Samples) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        values = samples.targets.reshape(-1, len(names))
        by_name = {name: values[:, [i]] for i, name in enumerate(names)}
        return samples.tokens.reshape(-1, *samples.tokens.shape[2:]), by_name

    (tokens, values), (test_tokens, test_values) = per_step(train), per_step(test)
    results = {
        f"{name}_ridge_r2": probes.linear_r2(
            tokens.mean(1), values[name], test_tokens.mean(1), test_values[name]
        )
        for name in names
    }
    steps = train.tokens.shape[1]
    clips = np.repeat(np.arange(len(train.tokens)), steps)
    attentive = probes.attentive_r2(
        tokens,
        values,
        clips,
        test_tokens,
        test_values,
        _training(config, model, train, steps),
    )
    return results | {f"{name}_attentive_r2": attentive[name] for name in names}


def _training(
    config: ConfigDict, model: FrozenModel, train: Samples, per_clip: int = 1
) -> ProbeTraining:
    """Return the training of attentive probes: as many updates for few clips as many.

    Args:
      config: of the evaluation.
      model: its mesh computes.
      train: the samples.
      per_clip: samples of a clip.
    """
    attentive = config.attentive
    count = per_clip * len(train.tokens)
    per_epoch = max(1, int(0.9 * count) // attentive.batch_size)
    width = train.tokens.shape[-1]
    heads = max(n for n in range(1, config.num_heads + 1) if width % n == 0)
    return ProbeTraining(
        num_heads=heads,
        epochs=max(1, attentive.updates // per_epoch),
        batch_size=attentive.batch_size,
        learning_rates=attentive.learning_rates,
        weight_decay=attentive.weight_decay,
        seed=config.seed,
        mesh=model.mesh,
    )
