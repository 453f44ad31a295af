"""EPIC-KITCHENS-100: its annotations, and the clip before each action.

Annotations are the released CSV files, which give the times of an action both as time
stamps and as frames. The layouts of the videos' folders are in `_LAYOUTS`.
"""

import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips.frames import Crop
from vjepa_jax.data.clips.reader import ClipReader
from vjepa_jax.data.clips.sampling import Sampling
from vjepa_jax.data.sources.file_lists import VideoList
from vjepa_jax.data.sources.records import Record, Source, digest_of
from vjepa_jax.evals.anticipation.context_sampling import ContextSampling

# Definitions of `anticipation_point`: each gives the moment to anticipate as a share of
# the action's length, counted from its start. For the paper, the point is this share.
# The released code computes `start * point + stop * (1 - point)`: 0 is the end.
ANCHORS = {
    "paper": lambda point: point,
    "released": lambda point: 1 - point,
}

# Paths of a video's file; the first one that exists is the layout of all videos.
_LAYOUTS = tuple(
    f"{folder}{{video}}{suffix}"
    for folder in ("{participant}/videos/", "{participant}/", "")
    for suffix in (".MP4", ".mp4")
)


@dataclasses.dataclass(frozen=True)
class Actions:
    """Annotated actions, in the order of their file; arrays are [n].

    Attributes:
      name: path of the file.
      video: names of videos, such as P01_01.
      start_secs, stop_secs: float64, from the beginning of the video.
      start_frame, stop_frame: int64, the same in frames.
      verb, noun: int64, numbers of the data set.
    """

    name: str
    video: np.ndarray
    start_secs: np.ndarray
    stop_secs: np.ndarray
    start_frame: np.ndarray
    stop_frame: np.ndarray
    verb: np.ndarray
    noun: np.ndarray

    def __len__(self) -> int:
        """Return the number of actions."""
        return len(self.video)

    def take(self, chosen: np.ndarray) -> "Actions":
        """Return some of the actions, chosen by index or by bool [n]."""
        fields = dataclasses.asdict(self)
        name = fields.pop("name")
        return Actions(name, **{key: array[chosen] for key, array in fields.items()})


def read_actions(path: str) -> Actions:
    """Read annotations, `EPIC_100_train.csv` or `EPIC_100_validation.csv`.

    Columns: video_id, start_timestamp, stop_timestamp (HH:MM:SS.ff), start_frame,
    stop_frame, verb_class, noun_class; others are ignored.

    Raises:
      UserError: the file cannot be read, or is not such a list; names file and line.
    """
    columns: dict[str, list] = {
        field.name: [] for field in dataclasses.fields(Actions) if field.name != "name"
    }
    try:
        text = epath.Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"annotations {path!r} cannot be read: {error}") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for row in reader:
        try:
            verb, noun = int(row["verb_class"]), int(row["noun_class"])
            if min(verb, noun) < 0:
                raise ValueError("a class is negative")
            action = {
                "video": row["video_id"],
                "start_secs": _seconds(row["start_timestamp"]),
                "stop_secs": _seconds(row["stop_timestamp"]),
                "start_frame": int(row["start_frame"]),
                "stop_frame": int(row["stop_frame"]),
                "verb": verb,
                "noun": noun,
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path}:{reader.line_num}: not an annotation of EPIC-KITCHENS-100 "
                f"({type(error).__name__}: {error}); give EPIC_100_train.csv or "
                "EPIC_100_validation.csv as released"
            ) from None
        for name, value in action.items():
            columns[name].append(value)
    if not columns["video"]:
        raise UserError(f"annotations {path!r} have no rows: give the CSV as released")
    return Actions(path, **{name: np.array(values) for name, values in columns.items()})


def _seconds(stamp: str) -> float:
    hours, minutes, seconds = stamp.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


@dataclasses.dataclass(frozen=True)
class Classes:
    """The verbs, nouns and pairs of both that occur in the training annotations.

    Attributes:
      verbs: int64 [V], numbers of the data set in increasing order.
      nouns: int64 [N], likewise.
      actions: int64 [A, 2], pairs (verb, noun), likewise.
    """

    verbs: np.ndarray
    nouns: np.ndarray
    actions: np.ndarray

    @classmethod
    def of(cls, actions: Actions) -> "Classes":
        """Collect the classes of annotations."""
        pairs = np.stack([actions.verb, actions.noun], axis=1)
        return cls(
            np.unique(actions.verb),
            np.unique(actions.noun),
            np.unique(pairs, axis=0),
        )

    @property
    def counts(self) -> dict[str, int]:
        """Return the numbers of classes by the name of a head's output."""
        return {name: int(table.max()) + 1 for name, table in self.tables().items()}

    def tables(self) -> dict[str, np.ndarray]:
        """Return the classes of verb, noun and action of every action, int64 [A]."""
        return {
            "verb": np.searchsorted(self.verbs, self.actions[:, 0]),
            "noun": np.searchsorted(self.nouns, self.actions[:, 1]),
            "action": np.arange(len(self.actions)),
        }

    def labels(self, actions: Actions) -> np.ndarray:
        """Return the class of each action, int64 [n]; -1 where its pair is unknown."""
        numbers = {tuple(pair): i for i, pair in enumerate(self.actions.tolist())}
        pairs = zip(actions.verb.tolist(), actions.noun.tolist(), strict=True)
        return np.array([numbers.get(pair, -1) for pair in pairs], np.int64)


@dataclasses.dataclass(frozen=True)
class Context(Record):
    """The clip before an action, in a video that may be hours long.

    Attributes:
      moment_secs, moment_frame, ahead_secs: see `ContextSampling`.
    """

    moment_secs: float = 0.0
    moment_frame: float = 0.0
    ahead_secs: float = 0.0

    def sampling(self, common: Sampling) -> ContextSampling:
        """Return this context's sampling; `common` holds what all contexts share."""
        return ContextSampling(
            **dataclasses.asdict(common),
            moment_secs=self.moment_secs,
            moment_frame=self.moment_frame,
            ahead_secs=self.ahead_secs,
        )


class ContextReader(ClipReader):
    """Reads contexts; `sampling` holds what is common to all of them."""

    def read(
        self,
        record: Any,
        crop: Crop | Sequence[Crop],
        rng: np.random.Generator | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Read the clip of a `Context`, uint8 [1, T, S, S, 3], see `ClipReader`."""
        placed = dataclasses.replace(self, sampling=record.sampling(self.sampling))
        return ClipReader.read(placed, record, crop, rng, out)


class Contexts(Source):
    """The contexts of actions.

    Attributes:
      name: path of the annotations.
      actions: the action after each context.
      labels: int64 [n], numbers of `Classes.actions`.
      ahead_secs: float64 [n], from the end of each context to the moment anticipated.
    """

    def __init__(
        self,
        actions: Actions,
        labels: np.ndarray,
        videos_path: str,
        *,
        anchor: str,
        point: np.ndarray | float,
        ahead_secs: np.ndarray | float,
    ):
        """Compute the times of the contexts.

        Args:
          actions: to anticipate, n of them.
          labels: int64 [n].
          videos_path: folder or URL of the videos.
          anchor: one of `ANCHORS`.
          point: float [n] or a number, the position of the moment in the action.
          ahead_secs: float [n] or a number.

        Raises:
          UserError: none of the videos is in the folder.
        """
        count = len(actions)
        share = ANCHORS[anchor](np.broadcast_to(np.asarray(point, float), (count,)))
        layout = _find_layout(actions, videos_path)
        entries = (_entry(layout, video) for video in actions.video.tolist())
        self.name = actions.name
        self.actions = actions
        self.labels: np.ndarray = np.asarray(labels, np.int64)
        self.ahead_secs = np.broadcast_to(np.asarray(ahead_secs, float), (count,))
        self._moment_secs = _between(actions.start_secs, actions.stop_secs, share)
        self._moment_frame = _between(actions.start_frame, actions.stop_frame, share)
        self._videos = VideoList(actions.name, videos_path, entries, self.labels)

    def __len__(self) -> int:
        """Return the number of contexts."""
        return len(self.actions)

    def __getitem__(self, index: int) -> Context:
        """Return the context at `index`, which may count from the end."""
        video = self._videos[index]
        return Context(
            video.path,
            video.label,
            moment_secs=float(self._moment_secs[index]),
            moment_frame=float(self._moment_frame[index]),
            ahead_secs=float(self.ahead_secs[index]),
        )

    def path_of(self, index: int) -> str:
        """Return the video of a context."""
        return self._videos.path_of(index)

    def digest(self) -> str:
        """Return a hash of videos, times of the contexts and labels."""
        times = (self._moment_secs, self._moment_frame, self.ahead_secs)
        parts = (array.astype("<f8").tobytes() for array in times)
        return digest_of((self._videos.digest().encode(), *parts))

    def sees_action(self) -> np.ndarray:
        """Return whether each context ends after its action has begun, bool [n]."""
        return self._moment_secs - self.ahead_secs > self.actions.start_secs


def _between(start: np.ndarray, stop: np.ndarray, share: np.ndarray) -> np.ndarray:
    return start * (1 - share) + stop * share


def _entry(layout: str, video: str) -> str:
    return layout.format(participant=video.split("_")[0], video=video)


def _find_layout(actions: Actions, videos_path: str) -> str:
    """Return the layout of the first video that exists."""
    if not videos_path:
        raise UserError(
            "config.data.videos_path is not set: give the folder of EPIC-KITCHENS' "
            "videos"
        )
    root = epath.Path(videos_path)
    # In a partial copy the first ones may be missing.
    videos = list(dict.fromkeys(actions.video.tolist()))
    for video in videos:
        for layout in _LAYOUTS:
            if (root / _entry(layout, video)).exists():
                return layout
    examples = " or ".join(_entry(layout, videos[0]) for layout in _LAYOUTS[::2])
    raise UserError(
        f"none of the {len(videos)} videos of {actions.name!r} is in {videos_path!r}: "
        f"looked for {examples}, and so on"
    )
