"""The labelled videos of an evaluation: one numbering of classes for all its sources.

All that can be wrong with labels is reported before anything is encoded.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.data.sources.classes import CLASSES_FILE, shown, unite_classes
from vjepa_jax.data.sources.records import Source
from vjepa_jax.evals.tokens import clip_tokens
from vjepa_jax.parallel.distributed import print_on_main

TRAIN = "train_path"


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Sources whose labels mean the same.

    Attributes:
      sources: by their keys in `config.data`.
      num_classes: labels are below it.
      class_names: in the order of the labels; None: numbers only.
    """

    sources: dict[str, Source]
    num_classes: int
    class_names: Sequence[str] | None

    def __getitem__(self, key: str) -> Source:
        """Return the source of a key."""
        return self.sources[key]

    def name_of(self, label: int) -> str:
        """Return the name of a class, or its number."""
        names = self.class_names or ()
        return names[label] if label < len(names) else str(label)


def open_labelled(
    config: ConfigDict, keys: Sequence[str], num_classes: int = 0
) -> Labelled:
    """Open the labelled videos of an evaluation.

    Args:
      config: of the evaluation.
      keys: of `config.data`, that of the training videos among them. Each may be
        anything that `data.path` of a run may be.
      num_classes: of the config; 0: as many as there are names or numbers.

    Raises:
      UserError: a source cannot be opened or has no classes, names and numbers of
        classes cannot be compared, a label is out of range, there is only one class to
        train on, or a class is not among the training videos.
    """
    sources = _open_united(config, keys)
    labels = {key: np.asarray(source.labels) for key, source in sources.items()}
    names = sources[TRAIN].class_names
    num_classes = num_classes or (
        len(names) if names else 1 + max(int(of.max()) for of in labels.values())
    )
    for key, source in sources.items():
        _require_range(source, labels[key], num_classes)
    found = Labelled(sources, num_classes, names)
    _require_classes(found, labels)
    _report_shared(sources)
    return found


def require_per_class(
    labels: np.ndarray, wanted: int, key: str, name_of: Callable[[int], str]
) -> None:
    """Raise UserError unless there are two classes, each with enough videos.

    Args:
      labels: int [N], of the videos to learn from.
      wanted: videos of each class.
      key: of the config, which asks for so many.
      name_of: from labels to names of classes.
    """
    classes, counts = np.unique(labels, return_counts=True)
    least = name_of(int(classes[counts.argmin()]))
    if len(classes) < 2:
        raise UserError(
            f"all {len(labels)} readable videos to learn from have the class "
            f"{least!r}: give videos of two classes at least"
        )
    if wanted > counts.min():
        raise UserError(
            f"{key} asks for {wanted} videos of every class, and {least!r} has "
            f"{counts.min()} readable ones to learn from: ask for at most as many"
        )


def _open_united(config: ConfigDict, keys: Sequence[str]) -> dict[str, Source]:
    parts = {key: clip_tokens.open_parts(config, key) for key in keys}
    for key, sources in parts.items():
        for source in sources:
            if source.unlabelled:
                raise UserError(
                    f"config.data.{key}: {source.name!r} has no classes: "
                    f"{source.unlabelled}"
                )
    united = iter(unite_classes([s for sources in parts.values() for s in sources]))
    return {
        key: clip_tokens.joined([next(united) for _ in sources])
        for key, sources in parts.items()
    }


def _report_shared(sources: dict[str, Source]) -> None:
    """Print how many of the other videos are among the training videos."""
    learned = set(_paths(sources[TRAIN]))
    for key, source in sources.items():
        shared = sum(path in learned for path in _paths(source))
        if shared and key != TRAIN:
            print_on_main(
                f"{shared} of the {len(source)} videos of config.data.{key} are also "
                f"in config.data.{TRAIN}: accuracies are higher than on new videos"
            )


def _paths(source: Source) -> Iterator[str]:
    return (os.path.normpath(source.path_of(i)) for i in range(len(source)))


def _require_range(source: Source, labels: np.ndarray, num_classes: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        label = labels[wrong[0]]
        reason = (
            "and labels count from 0: fix the list"
            if label < 0
            else f"and there are {num_classes} classes: fix the list, or set "
            "config.num_classes"
        )
        path = source.path_of(int(wrong[0]))
        raise UserError(f"{path!r} of {source.name!r} has the label {label}, {reason}")


def _require_classes(found: Labelled, labels: dict[str, np.ndarray]) -> None:
    trained = np.unique(labels[TRAIN])
    if len(trained) < 2:
        raise UserError(
            f"all {len(labels[TRAIN])} videos of config.data.{TRAIN} "
            f"({found[TRAIN].name!r}) have the class "
            f"{found.name_of(trained[0])!r}: give videos of two classes at least"
        )
    for key, of_key in labels.items():
        source = found[key]
        if found.class_names is None and not of_key.any():
            raise UserError(
                f"all videos of config.data.{key} ({source.name!r}) have the label 0, "
                "as in lists without classes: give their labels, or, if the class 0 is "
                f"meant, its name in {CLASSES_FILE} beside the lists"
            )
        unknown = np.setdiff1d(of_key, trained)
        if len(unknown):
            names = shown([found.name_of(label) for label in unknown])
            count = int(np.isin(of_key, unknown).sum())
            raise UserError(
                f"{count} videos of config.data.{key} ({source.name!r}) have classes "
                f"without a video in config.data.{TRAIN} ({found[TRAIN].name!r}): "
                f"{names}; remove these videos, or add videos to train on"
            )
