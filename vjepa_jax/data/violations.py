"""Matched pairs of clips of the synthetic world: one possible, one that breaks a law.

The clips of a pair are the same, pixel by pixel, up to the frame before the violation.
What is drawn afterwards is drawn alike for both, wherever the law at stake allows it,
so that no look of a clip, but only its past, tells that it is impossible.

Properties, after the intuitive-physics benchmarks (Riochet et al., IntPhys):

- `permanence`: an object that goes behind the occluder is gone, or one comes out that
  never went in, in turns;
- `continuity`: an object is somewhere else at once;
- `shape`, `colour`: an object becomes another one;
- `solidity`: an object leaves through a wall that others bounce off;
- `gravity`: a falling object falls upwards;
- `inertia`: an object turns for no cause;
- `launch`: an object is launched by one that has not reached it;
- `contact`: an object goes through another.
"""

import copy
import dataclasses
import math
from collections.abc import Callable

import numpy as np

from vjepa_jax.data.painting import paint
from vjepa_jax.data.scenes import SHAPES, Clip, Scene, Track, World
from vjepa_jax.data.world import CORNER, advance, draw_scene

# Frames from the violation to the end, at least: what is there must be seen.
_AFTER = 4
_ATTEMPTS = 1000
_GAP = 0.02  # least distance of objects that have nothing to do with each other


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two clips of one past.

    Attributes:
      possible, impossible: the clips; their label is the property's number.
      onset: the first frame that differs.
    """

    possible: Clip
    impossible: Clip
    onset: int


class _DrawAgainError(Exception):
    """What was drawn does not make a pair."""


@dataclasses.dataclass
class _Draft:
    """A pair before it is painted: the scene, both tracks, who is behind what."""

    scene: Scene
    possible: Track
    impossible: Track
    behind: np.ndarray


@dataclasses.dataclass
class _Laws:
    """What moves objects; see `world.advance`."""

    gravity: float = 0.0
    walls: bool = True
    contacts: bool = True


def _follow(scene: Scene, velocity: np.ndarray, frames: int, laws: _Laws) -> Track:
    """Integrate a scene, as it is in the first frame."""
    x, v = scene.position.copy(), velocity.copy()
    position, velocities = (np.empty((frames, *x.shape)) for _ in range(2))
    for frame in range(frames):
        position[frame], velocities[frame] = x, v
        advance(
            x,
            v,
            scene.radius,
            scene.radius**2,
            laws.gravity,
            laws.walls,
            laws.contacts,
        )
    shape = frames, len(scene.radius)
    radius, angle = (np.broadcast_to(a, shape) for a in (scene.radius, scene.angle))
    return Track.of(scene, position, velocities, radius, angle)


def _resume(
    track: Track,
    scene: Scene,
    onset: int,
    laws: _Laws,
    change: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> Track:
    """Go on from the frame before `onset` under other laws, or after a change.

    Args:
      track: of the past.
      scene: its objects.
      onset: the first frame that may differ.
      laws: from there on.
      change: of the positions and velocities [K, 2] at that frame, in place.
    """
    x, v = track.position[onset].copy(), track.velocity[onset].copy()
    if change is None:
        x, v = track.position[onset - 1].copy(), track.velocity[onset - 1].copy()
        advance(
            x,
            v,
            scene.radius,
            scene.radius**2,
            laws.gravity,
            laws.walls,
            laws.contacts,
        )
    else:
        change(x, v)
    later = _follow(
        dataclasses.replace(scene, position=x), v, len(track.position) - onset, laws
    )
    other = copy.deepcopy(track)
    other.position[onset:], other.velocity[onset:] = later.position, later.velocity
    return other


def _require(is_met: bool) -> None:
    if not is_met:
        raise _DrawAgainError


def _require_apart(*tracks: Track) -> None:
    """Refuse companions that the main object comes near to, and objects outside."""
    for track in tracks:
        between = track.position[:, 1:] - track.position[:, :1]
        reach = track.radius[:, 1:] + track.radius[:, :1] + _GAP
        _require(np.all(np.linalg.norm(between, axis=-1) > reach))


def _require_inside(*tracks: Track) -> None:
    for track in tracks:
        margin = track.radius[..., None] - 1e-9
        _require(np.all(track.position > margin) & np.all(track.position < 1 - margin))


def _heading(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * math.pi)
    return np.array([math.cos(angle), math.sin(angle)])


def _scatter_companions(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Move the companions anywhere, slowly; return velocities, the main object's 0."""
    velocity = np.zeros_like(scene.position)
    for k in range(1, len(scene.radius)):
        r = scene.radius[k]
        scene.position[k] = rng.uniform(r, 1 - r, 2)
        velocity[k] = _heading(rng) * rng.uniform(0, 0.004)
    return velocity


def _straight(world: World, rng: np.random.Generator):
    """Draw a main object that crosses the frame: (scene, its track, onset)."""
    scene, frames = draw_scene(world, rng), world.num_frames
    velocity = _scatter_companions(scene, rng)
    onset = _draw_onset(world, rng)
    velocity[0] = _heading(rng) * rng.uniform(0.4, 0.75) / frames
    scene.position[0] = rng.uniform(0.3, 0.7, 2) - velocity[0] * onset
    track = _follow(scene, velocity, frames, _Laws())
    _require_inside(track)
    # Neither a wall nor another object: it keeps its velocity.
    _require(np.allclose(track.velocity[:, 0], velocity[0]))
    _require_apart(track)
    return scene, track, onset


def _draw_onset(world: World, rng: np.random.Generator) -> int:
    return int(rng.integers(world.num_frames // 2, world.num_frames - _AFTER + 1))


def _in_front(scene: Scene) -> np.ndarray:
    return np.zeros(len(scene.radius), bool)


def _permanence(world: World, rng: np.random.Generator, is_odd: bool) -> _Draft:
    scene, frames = draw_scene(world, rng), world.num_frames
    velocity = _scatter_companions(scene, rng)
    axis, sign = int(rng.integers(2)), rng.choice([-1.0, 1.0])
    reach = CORNER * scene.radius[0] + 1 / world.size  # soft edges are half a pixel
    centre, half = rng.uniform(0.46, 0.54, 2), np.empty(2)
    half[axis] = reach + rng.uniform(0.01, 0.04)
    half[1 - axis] = reach + rng.uniform(0.01, 0.06)
    scene.occluder = np.concatenate([centre, half])
    # Behind the middle of the occluder in the middle of the clip.
    room = min(centre[axis], 1 - centre[axis]) - scene.radius[0]
    velocity[0, axis] = sign * rng.uniform(0.85, 1.0) * room / (frames / 2)
    start = centre.copy()
    start[axis] -= velocity[0, axis] * (frames / 2 - rng.uniform(0, 1))
    scene.position[0] = start
    track = _follow(scene, velocity, frames, _Laws())
    _require_inside(track)
    _require_apart(track)
    beyond = np.abs(track.position[:, 0, axis] - centre[axis]) + reach > half[axis]
    (hidden,) = np.nonzero(~beyond)
    _require(len(hidden) > 0 and hidden[0] >= 2 and hidden[-1] < frames - _AFTER)
    shown, cut = copy.deepcopy(track), int(hidden[-1]) + 1
    other = copy.deepcopy(track)
    if is_odd:
        shown.present[:, 0] = False
        other.present[:cut, 0] = False
    else:
        other.present[cut:, 0] = False
    behind = _in_front(scene)
    behind[0] = True
    return _Draft(scene, shown, other, behind)


def _continuity(world: World, rng: np.random.Generator, is_odd: bool) -> _Draft:
    scene, track, onset = _straight(world, rng)
    r = scene.radius[0]
    jump = rng.uniform(r, 1 - r, 2) - track.position[onset, 0]
    _require(np.linalg.norm(jump) > 0.25)

    def change(position, velocity):
        position[0] += jump

    other = _resume(track, scene, onset, _Laws(), change)
    _require_inside(other)
    _require_apart(other)
    _require(np.allclose(other.velocity[:, 0], track.velocity[:, 0]))
    return _Draft(scene, track, other, _in_front(scene))


def _shape(world: World, rng: np.random.Generator, is_odd: bool) -> _Draft:
    scene, track, onset = _straight(world, rng)
    other = copy.deepcopy(track)
    step = rng.integers(1, len(SHAPES))
    other.shape[onset:, 0] = (scene.shape[0] + step) % len(SHAPES)
    return _Draft(scene, track, other, _in_front(scene))


def _colour(world: World, rng: np.random.Generator, is_odd: bool) -> _Draft:
    scene, track, onset = _straight(world, rng)
    # Those of another scene, which are drawn alike.
    colours = draw_scene(world, rng).colours[0]
    _require(np.abs(colours - scene.colours[0]).mean() > 0.15)
    other = copy.deepcopy(track)
    other.colours[onset:, 0] = colours
    return _Draft(scene, track, other, _in_front(scene))


def _solidity(world: World, rng: np.random.Generator, is_odd: bool) -> _Draft:
    scene, frames = draw_scene(world, rng), world.num_frames
    velocity = _scatter_companions(scene, rng)
    onset = _draw_onset(world, rng)
    axis, sign = int(rng.integers(2)), rng.choice([-1.0, 1.0])
    r = scene.radius[0]
    velocity[0, axis] = sign * rng.uniform(0.5, 0.8) / frames
    velocity[0, 1 - axis] = rng.uniform(-0.01, 0.01)
    scene.position[0] = rng.uniform(0.35, 0.65, 2)
    # It touches the wall just before the onset.
    wall = 1 - r if sign > 0 else r
    scene.position[0, axis] = wall - velocity[0, axis] * (onset - 1 + rng.uniform(0, 1))
    track = _follow(scene, velocity, frames, _Laws())
    # One wall, at its moment, and no other one.
    way = np.sign(track.velocity[:, 0, axis]) * sign
    _require(np.all(way[:onset] > 0) and np.all(way[onset:] < 0))
    _require(np.ptp(track.velocity[:, 0, 1 - axis]) == 0)
    other = _resume(track, scene, onset, _Laws(walls=False))
    _require_apart(track, other)
    return _Draft(scene, track, other, _in_front(scene))


def _gravity(world: World, rng: np.random.Generator, is_odd: bool) -> _Draft:
    scene, frames = draw_scene(world, rng), world.num_frames
    velocity = _scatter_companions(scene, rng)
    velocity[1:] = 0
    pull = rng.uniform(0.7, 1.0) * 0.5 / (frames / 2) ** 2
    onset = _draw_onset(world, rng)
    velocity[0] = rng.uniform(-0.012, 0.012), rng.uniform(-0.06, -0.01)
    r = scene.radius[0]
    scene.position[0] = rng.uniform(r, 1 - r, 2)
    # The companions hang still: what falls is the main object.
    track = _follow_main(scene, velocity, frames, pull)
    other = _turn_gravity(track, scene, onset, pull)
    _require_inside(track, other)
    _require_apart(track, other)
    return _Draft(scene, track, other, _in_front(scene))


def _follow_main(scene, velocity, frames, pull) -> Track:
    track = _follow(scene, velocity, frames, _Laws(pull, walls=False, contacts=False))
    track.position[:, 1:], track.velocity[:, 1:] = scene.position[1:], 0
    return track


def _turn_gravity(track, scene, onset, pull) -> Track:
    laws = _Laws(-pull, walls=False, contacts=False)
    other = _resume(track, scene, onset, laws)
    other.position[:, 1:], other.velocity[:, 1:] = scene.position[1:], 0
    return other


def _inertia(world: World, rng: np.random.Generator, is_odd: bool) -> _Draft:
    scene, track, onset = _straight(world, rng)
    turn = rng.choice([-1.0, 1.0]) * rng.uniform(0.4, 0.6) * math.pi
    cos, sin = math.cos(turn), math.sin(turn)

    def change(position, velocity):
        velocity[0] = np.array([[cos, -sin], [sin, cos]]) @ velocity[0]

    # At the frame before: from the onset on, it is somewhere else.
    other = _resume(track, scene, onset - 1, _Laws(), change)
    _require_inside(other)
    _require_apart(other)
    return _Draft(scene, track, other, _in_front(scene))


def _strike(world: World, rng: np.random.Generator, moment: float):
    """Draw an object that strikes another one, at rest, at a moment: (scene, track)."""
    scene, frames = draw_scene(world, rng), world.num_frames
    velocity = _scatter_companions(scene, rng)
    striker, other = (0, 1) if rng.uniform() < 0.5 else (1, 0)
    r = scene.radius
    velocity[other] = 0
    scene.position[other] = rng.uniform(0.3, 0.7, 2)
    heading = _heading(rng)
    speed = rng.uniform(0.5, 0.8) / frames
    velocity[striker] = heading * speed
    touching = scene.position[other] - heading * (r[0] + r[1])
    scene.position[striker] = touching - heading * speed * moment
    return scene, _follow(scene, velocity, frames, _Laws())


def _launch(world: World, rng: np.random.Generator, is_odd: bool) -> _Draft:
    onset = _draw_onset(world, rng)
    lead = rng.uniform(2.0, 3.0)  # frames between the launch and the contact
    scene, track = _strike(world, rng, onset - 1 + lead)
    after = math.ceil(onset - 1 + lead)
    _require(after + 1 < world.num_frames)

    def change(position, velocity):
        velocity[:2] = track.velocity[after + 1, :2]

    other = _resume(track, scene, onset - 1, _Laws(), change)
    _require_inside(track, other)
    return _Draft(scene, track, other, _in_front(scene))


def _contact(world: World, rng: np.random.Generator, is_odd: bool) -> _Draft:
    onset = _draw_onset(world, rng)
    scene, track = _strike(world, rng, onset - 1 + rng.uniform(0, 0.8))
    other = _resume(track, scene, onset, _Laws(contacts=False))
    _require_inside(track, other)
    return _Draft(scene, track, other, _in_front(scene))


_DRAFTS: dict[str, Callable[[World, np.random.Generator, bool], _Draft]] = {
    "permanence": _permanence,
    "continuity": _continuity,
    "shape": _shape,
    "colour": _colour,
    "solidity": _solidity,
    "gravity": _gravity,
    "inertia": _inertia,
    "launch": _launch,
    "contact": _contact,
}
PROPERTIES = tuple(_DRAFTS)


def make_pair(world: World, seed: int | tuple[int, ...], name: str, index: int) -> Pair:
    """Make pair `index` of a property; seed, property and index determine every pixel.

    Args:
      world: the looks.
      seed: of all pairs.
      name: one of `PROPERTIES`.
      index: of the pair.
    """
    label = PROPERTIES.index(name)
    rng = np.random.default_rng([*np.atleast_1d(seed), label, index])
    for _ in range(_ATTEMPTS):
        try:
            draft = _DRAFTS[name](world, rng, bool(index % 2))
        except _DrawAgainError:
            continue
        possible, impossible = (
            paint(world, draft.scene, track, draft.behind, label)
            for track in (draft.possible, draft.impossible)
        )
        differs = np.any(possible.video != impossible.video, axis=(1, 2, 3))
        onset = int(np.argmax(differs))
        if (
            world.num_frames // 2 <= onset <= world.num_frames - _AFTER
            and differs.any()
        ):
            return Pair(possible, impossible, onset)
    raise RuntimeError(f"no pair of {name} in {_ATTEMPTS} draws")
