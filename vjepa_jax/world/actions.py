"""Events in clips of play, listed as actions to anticipate.

A clip's action is the first event of its last quarter: an object bounces off a wall or
strikes another one (the verb); the noun is its shape. Lists have the columns of
EPIC-KITCHENS-100's annotations, see `evals.anticipation.epic_kitchens`.
"""

import csv
import dataclasses
import itertools
import pathlib
from collections.abc import Iterable

import numpy as np

from vjepa_jax.world import play
from vjepa_jax.world.scenes import SHAPES, Scene, Track, World

VERBS = ("left", "right", "top", "bottom", "strike")  # walls, and another object
_STRIKE = VERBS.index("strike")
_COLUMNS = (
    "narration_id",
    "participant_id",
    "video_id",
    "start_timestamp",
    "stop_timestamp",
    "start_frame",
    "stop_frame",
    "narration",
    "verb_class",
    "noun_class",
)


@dataclasses.dataclass(frozen=True)
class Event:
    """A bounce or a strike of an object.

    Attributes:
      frame: the first frame after it.
      verb: index into `VERBS`.
      noun: index into `SHAPES`, of the object; in a strike, of the faster object.
    """

    frame: int
    verb: int
    noun: int


def events(scene: Scene, track: Track, gravity: float) -> list[Event]:
    """Return all bounces and strikes of a clip of play, ordered by time."""
    found = []
    x, v, radius = track.position, track.velocity, scene.radius
    for frame in range(1, len(x)):
        change = v[frame] - v[frame - 1] - np.array([0.0, gravity])
        moved = np.flatnonzero(np.abs(change).max(1) > 1e-9)
        struck = set()
        for i, j in itertools.combinations(moved, 2):
            gap = np.linalg.norm(x[frame, i] - x[frame, j]) - radius[i] - radius[j]
            if gap < np.linalg.norm(v[frame, i]) + np.linalg.norm(v[frame, j]):
                struck |= {i, j}
                faster = max(i, j, key=lambda k: np.linalg.norm(v[frame - 1, k]))
                found.append(Event(frame, _STRIKE, int(scene.shape[faster])))
        for k in sorted(set(moved) - struck):
            axis = int(np.argmax(np.abs(change[k])))
            wall = 2 * axis + int(x[frame, k, axis] > 0.5)
            found.append(Event(frame, wall, int(scene.shape[k])))
    return found


def action_of(world: World, seed: int | tuple[int, ...], index: int) -> Event | None:
    """Return the action of clip `index` of play in the stream `seed`, or None."""
    scene, track, gravity, _ = play.simulate_clip(world, seed, index)
    first = world.num_frames * 3 // 4
    late = (event for event in events(scene, track, gravity) if event.frame >= first)
    return next(late, None)


def write_actions(
    path: pathlib.Path, actions: Iterable[Event | None], videos: list[str], fps: float
) -> None:
    """Write the actions of clips as annotations; a clip without one has no row.

    Args:
      path: the CSV file to write.
      actions: of the clips.
      videos: the clips' names, without a suffix.
      fps: frames per second of their files.
    """
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        for video, event in zip(videos, actions, strict=True):
            if event is None:
                continue
            # An action lasts one frame.
            start, stop = event.frame, event.frame + 1
            row = {
                "narration_id": f"{video}_0",
                "participant_id": "world",
                "video_id": video,
                "start_timestamp": f"00:00:{start / fps:06.3f}",
                "stop_timestamp": f"00:00:{stop / fps:06.3f}",
                "start_frame": start,
                "stop_frame": stop,
                "narration": f"{SHAPES[event.noun]} {VERBS[event.verb]}",
                "verb_class": event.verb,
                "noun_class": event.noun,
            }
            writer.writerow(row)
