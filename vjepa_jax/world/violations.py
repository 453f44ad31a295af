"""Matched pairs of clips of the synthetic world: one possible, one that breaks a law.

The clips of a pair are the same, pixel by pixel, up to the frame before the violation.

Pairs measure whether the end follows from the beginning, not whether one end is easier
to predict than another. For most properties they therefore come as twins, after the
quadruplets of IntPhys (Riochet et al.): of two possible clips, Aa and Bb, pair 2k is Aa
against Ab, pair 2k + 1 is Bb against Ba. Each end is possible in one twin and
impossible in the other, so a score of the end alone is right in only one of them. No
possible clip has inverted gravity or an open wall: the twins of `gravity` and
`solidity` are mirror images instead, so that the ends are alike on average.

Properties:

- `permanence`: an object vanishes behind the occluder, or one that never went in comes
  out;
- `continuity`: an object jumps to another place;
- `shape`, `colour`: an object changes its shape or colours;
- `solidity`: an object leaves through a wall and comes in through the opposite one;
- `gravity`: a falling object falls upwards;
- `inertia`: an object turns without a cause;
- `launch`: the motion of an object passes to another one that it does not touch;
- `contact`: an object strikes another, which does not move.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from vjepa_jax.world.motion import CORNER, draw_scene
from vjepa_jax.world.painting import paint
from vjepa_jax.world.scenes import SHAPES, Clip, Scene, Track, World

MIN_FRAMES = 12  # of a clip, which must show a law obeyed before it is broken
_AFTER = 4  # least number of frames from the violation to the end
_ATTEMPTS = 5000
_GAP = 0.02  # least distance of objects that do not interact


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two clips with the same beginning.

    Attributes:
      possible, impossible: the clips; their label is the property's number.
      onset: the first frame that differs.
    """

    possible: Clip
    impossible: Clip
    onset: int


# Position and velocity, each float [T, 2], of an object.
Flight = Sequence[np.ndarray]


class _DrawAgainError(Exception):
    """The drawn numbers do not make a pair."""


@dataclasses.dataclass
class _Draft:
    """A pair before it is painted.

    Attributes:
      scene: background, occluder and look of the objects.
      kept: track of the possible clip.
      broken: track of the impossible clip from `onset` on.
      onset: the first frame that differs.
      behind: bool [K], the objects that are behind the occluder.
    """

    scene: Scene
    kept: Track
    broken: Track
    onset: int
    behind: np.ndarray


class _Stage:
    """A scene whose companions drift; the main object has no motion yet.

    Attributes:
      scene: the scene.
      frames: of the clip, T.
      time: float [T], in frames.
    """

    def __init__(self, world: World, rng: np.random.Generator, pull: float = 0.0):
        self.scene, self.frames = draw_scene(world, rng), world.num_frames
        self.time = np.arange(self.frames, dtype=np.float64)
        self._companions = []
        for radius in self.scene.radius[1:]:
            start = rng.uniform(radius, 1 - radius, 2)
            drift = _heading(rng) * rng.uniform(0, 0.004)
            self._companions.append(self.fly(start, drift, self.frames / 2, pull))

    def fly(
        self,
        place: np.ndarray,
        velocity: np.ndarray,
        moment: float = 0.0,
        pull: float = 0.0,
    ) -> Flight:
        """Return the positions and velocities of an object in free flight.

        Args:
          place, velocity: [2], its state at `moment`.
          moment: in frames.
          pull: gravity, downwards, sides per frame squared.
        """
        time = (self.time - moment)[:, None]
        acceleration = np.array([0.0, pull])
        position = place + velocity * time + acceleration * time**2 / 2
        return position, velocity + acceleration * time

    def track(self, *objects: Flight) -> Track:
        """Return the track of these objects, the main one first, and the companions.

        Raises:
          _DrawAgainError: an object leaves the frame, or a companion nears another one.
        """
        companions = self._companions[len(objects) - 1 :]
        position, velocity = (
            np.stack(part, 1) for part in zip(*objects, *companions, strict=True)
        )
        scene, shape = self.scene, position.shape[:2]
        margin = scene.radius[:, None] - 1e-9
        _require(np.all(position > margin) & np.all(position < 1 - margin))
        for k in range(len(objects), position.shape[1]):
            between = position[:, :k] - position[:, k : k + 1]
            reach = scene.radius[:k] + scene.radius[k] + _GAP
            _require(np.all(np.linalg.norm(between, axis=-1) > reach))
        radius, angle = (np.broadcast_to(a, shape) for a in (scene.radius, scene.angle))
        return Track.of(scene, position, velocity, radius, angle)

    def draft(self, kept: Track, broken: Track, onset: int) -> _Draft:
        """Make a draft with all objects in front of the occluder."""
        behind = np.zeros(kept.radius.shape[1], bool)
        return _Draft(self.scene, kept, broken, onset, behind)


def _require(is_met: bool | np.bool) -> None:
    if not is_met:
        raise _DrawAgainError


def _heading(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * math.pi)
    return np.array([math.cos(angle), math.sin(angle)])


def _draw_onset(world: World, rng: np.random.Generator, early: bool = False) -> int:
    """Draw a frame of the second half; if `early`, of the first half of that."""
    half = world.num_frames // 2
    latest = half + half // 4 if early else world.num_frames - _AFTER
    return int(rng.integers(half, latest + 1))


def _straight(stage: _Stage, onset: int, rng: np.random.Generator) -> Flight:
    """Draw a flight by its place at the frame before the onset and its velocity."""
    velocity = _heading(rng) * rng.uniform(0.4, 0.75) / stage.frames
    place = rng.uniform(0.25, 0.75, 2)
    return stage.fly(place, velocity, onset - 1)


def _permanence(world: World, rng: np.random.Generator, is_odd: bool) -> _Draft:
    stage = _Stage(world, rng)
    scene, half = stage.scene, np.empty(2)
    scene.radius[0] = rng.uniform(0.08, 0.11)
    axis, sign = int(rng.integers(2)), rng.choice([-1.0, 1.0])
    reach = CORNER * scene.radius[0] + 1 / world.size  # soft edges are half a pixel
    half[axis] = reach + rng.uniform(0.03, 0.07)
    half[1 - axis] = reach + rng.uniform(0.01, 0.05)
    centre = rng.uniform(0.46, 0.54, 2)
    scene.occluder = np.concatenate([centre, half])
    # Behind the middle of the occluder in the middle of the clip.
    room = min(centre[axis], 1 - centre[axis]) - scene.radius[0]
    velocity = np.zeros(2)
    velocity[axis] = sign * rng.uniform(0.85, 1.0) * room / (stage.frames / 2)
    middle = stage.frames / 2 - rng.uniform(0, 1)
    seen = stage.track(stage.fly(centre, velocity, middle))
    hidden = np.abs(seen.position[:, 0, axis] - centre[axis]) + reach <= half[axis]
    (hidden,) = np.nonzero(hidden)
    _require(len(hidden) > 0 and hidden[0] >= 2)
    gone = copy.deepcopy(seen)
    gone.present[:, 0] = False
    draft = stage.draft(seen, gone, int(hidden[-1]) + 1)
    draft.behind[0] = True
    return _exchanged(draft, is_odd)


def _continuity(world: World, rng: np.random.Generator, is_odd: bool) -> _Draft:
    stage, onset = _Stage(world, rng), _draw_onset(world, rng)
    position, velocity = _straight(stage, onset, rng)
    jump = _heading(rng) * rng.uniform(0.25, 0.6)
    there = stage.track((position + jump, velocity))
    here = stage.track((position, velocity))
    return _exchanged(stage.draft(here, there, onset), is_odd)


def _shape(world: World, rng: np.random.Generator, is_odd: bool) -> _Draft:
    stage, onset = _Stage(world, rng), _draw_onset(world, rng)
    track = stage.track(_straight(stage, onset, rng))
    other = copy.deepcopy(track)
    step = rng.integers(1, len(SHAPES))
    other.shape[:, 0] = (stage.scene.shape[0] + step) % len(SHAPES)
    return _exchanged(stage.draft(track, other, onset), is_odd)


def _colour(world: World, rng: np.random.Generator, is_odd: bool) -> _Draft:
    stage, onset = _Stage(world, rng), _draw_onset(world, rng)
    track = stage.track(_straight(stage, onset, rng))
    # The colours of another scene have the same distribution.
    colours = draw_scene(world, rng).colours[0]
    _require(np.abs(colours - stage.scene.colours[0]).mean() > 0.15)
    other = copy.deepcopy(track)
    other.colours[:, 0] = colours
    return _exchanged(stage.draft(track, other, onset), is_odd)


def _inertia(world: World, rng: np.random.Generator, is_odd: bool) -> _Draft:
    stage, onset = _Stage(world, rng), _draw_onset(world, rng)
    position, velocity = _straight(stage, onset, rng)
    turn = rng.choice([-1.0, 1.0]) * rng.uniform(0.4, 0.6) * math.pi
    cos, sin = math.cos(turn), math.sin(turn)
    turned = np.array([[cos, -sin], [sin, cos]]) @ velocity[0]
    # Both are at the same place at the frame before the onset.
    other = stage.track(stage.fly(position[onset - 1], turned, onset - 1))
    track = stage.track((position, velocity))
    return _exchanged(stage.draft(track, other, onset), is_odd)


def _gravity(world: World, rng: np.random.Generator, is_odd: bool) -> _Draft:
    half, onset = world.num_frames / 2, _draw_onset(world, rng, early=True)
    pull = rng.uniform(0.7, 1.0) * 0.5 / half**2
    stage = _Stage(world, rng, pull)
    place = np.array([rng.uniform(0.3, 0.7), 0.5 + rng.uniform(-0.05, 0.05)])
    velocity = np.array([rng.uniform(-0.2, 0.2), rng.uniform(-0.1, 0.1)]) / half
    drafts = []
    for is_flipped in (False, True):
        if is_flipped:
            place = np.array([0, 1]) + np.array([1, -1]) * place
            velocity = np.array([1, -1]) * velocity
        falls, rises = (
            stage.track(stage.fly(place, velocity, onset - 1, sign * pull))
            for sign in (1, -1)
        )
        drafts.append(stage.draft(falls, rises, onset))
    return drafts[is_odd]


def _solidity(world: World, rng: np.random.Generator, is_odd: bool) -> _Draft:
    stage, onset = _Stage(world, rng), _draw_onset(world, rng, early=True)
    axis, sign = int(rng.integers(2)), rng.choice([-1.0, 1.0])
    r = stage.scene.radius[0] = rng.uniform(0.1, 0.13)
    velocity = rng.uniform(-0.01, 0.01, 2)
    velocity[axis] = sign * rng.uniform(0.8, 1.1) / stage.frames
    place = rng.uniform(0.3, 0.7, 2)
    place[axis] = 1 - r if sign > 0 else r
    moment = onset - rng.uniform(0, 1)  # of touching the wall
    before = (stage.time < moment)[:, None]
    drafts = []
    for is_flipped in (False, True):
        if is_flipped:
            place[axis], velocity[axis] = 1 - place[axis], -velocity[axis]
        on, back = velocity, velocity.copy()
        back[axis] *= -1
        through = stage.fly(place, on, moment)
        pairs = zip(through, stage.fly(place, back, moment), strict=True)
        bounces = stage.track([np.where(before, a, b) for a, b in pairs])
        drafts.append(_through_the_wall(stage, bounces, through, axis, onset))
    return drafts[is_odd]


def _through_the_wall(
    stage: _Stage, bounces: Track, through: Flight, axis: int, onset: int
) -> _Draft:
    """Draft an object that leaves by a wall while its copy comes in by the other."""
    draft = stage.draft(_with_copy(bounces), _with_copy(bounces), onset)
    scene, broken = copy.deepcopy(stage.scene), draft.broken
    for name in ("position", "radius", "angle", "shape", "colours", "stripes"):
        value = getattr(scene, name)
        setattr(scene, name, np.concatenate([value, value[:1]]))
    draft.scene, draft.behind = scene, np.append(draft.behind, False)
    broken.position[:, 0], broken.velocity[:, 0] = through
    broken.position[:, -1], broken.velocity[:, -1] = through
    broken.position[:, -1, axis] -= np.sign(through[1][0, axis])
    broken.present[onset:, -1] = True
    reach = scene.radius[1:-1] + scene.radius[0] + _GAP
    for k in (0, -1):
        between = broken.position[onset:, 1:-1] - broken.position[onset:, k, None]
        _require(np.all(np.linalg.norm(between, axis=-1) > reach))
    return draft


def _with_copy(track: Track) -> Track:
    """Add an invisible copy of the main object."""
    fields = {
        field.name: np.concatenate([value, value[:, :1]], axis=1)
        for field in dataclasses.fields(Track)
        for value in (getattr(track, field.name),)
    }
    fields["present"][:, -1] = False
    return Track(**fields)


def _draw_line(
    stage: _Stage, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Draw two objects of one size on a line: (centre, heading, radius, speed)."""
    radius = rng.uniform(0.07, 0.1)
    stage.scene.radius[:2] = radius
    speed = rng.uniform(0.4, 0.6) / stage.frames
    return rng.uniform(0.35, 0.65, 2), _heading(rng), radius, speed


def _launch(world: World, rng: np.random.Generator, is_odd: bool) -> _Draft:
    stage, onset = _Stage(world, rng), _draw_onset(world, rng)
    centre, heading, r, speed = _draw_line(stage, rng)
    # They do not touch in any frame of either clip.
    frames = max(onset - 1, stage.frames - onset)
    gap = speed * frames + rng.uniform(_GAP, 3 * _GAP)
    one, two = (centre + s * heading * (r + gap / 2) for s in (-1, 1))
    still, moves = np.zeros(2), heading * speed
    # The first object moves towards the second, or the second away from the first. Both
    # are at their places in the frame before the onset.
    first, second = (
        stage.track(stage.fly(one, v, onset - 1), stage.fly(two, w, onset - 1))
        for v, w in ((moves, still), (still, moves))
    )
    return _exchanged(stage.draft(first, second, onset), is_odd)


def _contact(world: World, rng: np.random.Generator, is_odd: bool) -> _Draft:
    stage, onset = _Stage(world, rng), _draw_onset(world, rng)
    centre, heading, r, speed = _draw_line(stage, rng)
    moment = onset - rng.uniform(0, 1)
    before = (stage.time < moment)[:, None]
    places = [centre + s * heading * r for s in (-1, 1)]

    def struck(striker: int) -> Track:
        """Return the track in which one object stops as it strikes the other."""
        velocity = heading * (speed if striker == 0 else -speed)
        comes, rests = (stage.fly(p, velocity, moment) for p in places), np.zeros(2)
        objects = []
        for k, flight in enumerate(comes):
            waits = stage.fly(places[k], rests)
            moving = before if k == striker else ~before
            pairs = zip(flight, waits, strict=True)
            objects.append([np.where(moving, a, b) for a, b in pairs])
        return stage.track(*objects)

    return _exchanged(stage.draft(struck(0), struck(1), onset), is_odd)


def _exchanged(draft: _Draft, is_odd: bool) -> _Draft:
    """Return a draft of two possible tracks, or if `is_odd` its twin."""
    if is_odd:
        draft.kept, draft.broken = draft.broken, draft.kept
    return draft


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


def _spliced(draft: _Draft, end: Track) -> Track:
    """Return the possible track before the onset, continued by `end`."""
    fields, onset = {}, draft.onset
    for name in (field.name for field in dataclasses.fields(Track)):
        start, rest = getattr(draft.kept, name)[:onset], getattr(end, name)[onset:]
        fields[name] = np.concatenate([start, rest])
    return Track(**fields)


def make_pair(world: World, seed: int | tuple[int, ...], name: str, index: int) -> Pair:
    """Make pair `index` of a property; seed, property and index fix every pixel.

    Args:
      world: of at least `MIN_FRAMES` frames.
      seed: of all pairs.
      name: one of `PROPERTIES`.
      index: of the pair; 2k and 2k + 1 are twins.
    """
    label = PROPERTIES.index(name)
    rng = np.random.default_rng([*np.atleast_1d(seed), label, index // 2])
    for _ in range(_ATTEMPTS):
        try:
            draft = _DRAFTS[name](world, rng, bool(index % 2))
        except _DrawAgainError:
            continue
        tracks = (_spliced(draft, end) for end in (draft.kept, draft.broken))
        possible, impossible = (
            paint(world, draft.scene, track, draft.behind, label) for track in tracks
        )
        differs = np.any(possible.video != impossible.video, axis=(1, 2, 3))
        onset = int(np.argmax(differs))
        latest = world.num_frames - _AFTER
        if differs.any() and world.num_frames // 2 <= onset <= latest:
            return Pair(possible, impossible, onset)
    raise RuntimeError(f"no pair of {name} in {_ATTEMPTS} draws")
