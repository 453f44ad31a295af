"""Clips for learning the laws of the synthetic world: objects that bounce and meet.

A clip of a class shows one event, often before the middle frame. In a clip of play
several objects move at once, from the first frame on, and the events that a predictor
of the future has to know are in the second half: objects bounce off walls, strike each
other, and come out from behind the occluder. There is no label.
"""

import dataclasses
import math

import numpy as np

from vjepa_jax.world.motion import CLASSES, CORNER, advance, draw_scene
from vjepa_jax.world.painting import paint
from vjepa_jax.world.scenes import Clip, Scene, Track, World

LABEL = len(CLASSES)  # lists need a label; the probes do not use this one
NUM_OBJECTS = 3
_GRAVITY_SHARE = 0.25  # of the clips
_RADIUS = (0.07, 0.13)
_ATTEMPTS = 1000
_GAP = 0.02  # least distance of objects at the start


def _draw_places(rng: np.random.Generator, radius: np.ndarray) -> np.ndarray:
    """Draw places inside the frame where no two objects touch: [K, 2]."""
    for _ in range(_ATTEMPTS):
        place = np.stack([rng.uniform(r, 1 - r, 2) for r in radius])
        between = np.linalg.norm(place[:, None] - place[None], axis=-1)
        np.fill_diagonal(between, np.inf)
        if np.all(between > radius[:, None] + radius + _GAP):
            return place
    raise RuntimeError(f"no room for {len(radius)} objects in {_ATTEMPTS} draws")


def _draw_velocities(
    world: World, scene: Scene, rng: np.random.Generator
) -> np.ndarray:
    """Draw the velocities [K, 2] at the first frame.

    Unless something interferes, the first object goes behind the occluder in the first
    half, and the second one strikes the third in the second half.
    """
    frames, place = world.num_frames, scene.position
    velocity = np.zeros_like(place)
    moment = rng.uniform(0.3, 0.5) * frames
    velocity[0] = (scene.occluder[:2] - place[0]) / moment
    if rng.uniform() < 0.5:
        angle, speed = rng.uniform(0, 2 * math.pi), rng.uniform(0.1, 0.6) / frames
        velocity[2] = speed * np.array([math.cos(angle), math.sin(angle)])
    moment = rng.uniform(0.45, 0.8) * frames
    between = place[2] - place[1]
    reach = 1 - (scene.radius[1] + scene.radius[2]) / np.linalg.norm(between)
    velocity[1] = velocity[2] + between * reach / moment
    return velocity


def draw(
    world: World, rng: np.random.Generator
) -> tuple[Scene, np.ndarray, float, np.ndarray]:
    """Draw the first frame: (scene, velocity, gravity, behind)."""
    looks = dataclasses.replace(world, num_companions=NUM_OBJECTS - 1)
    scene = draw_scene(looks, rng)
    scene.radius = rng.uniform(*_RADIUS, NUM_OBJECTS)
    scene.position = _draw_places(rng, scene.radius)
    # Large enough to hide all of the first object, which is visible at first.
    half = CORNER * scene.radius[0] + rng.uniform(0.02, 0.08, 2)
    for _ in range(_ATTEMPTS):
        centre = rng.uniform(0.3, 0.7, 2)
        if np.any(np.abs(scene.position[0] - centre) > half + scene.radius[0]):
            break
    scene.occluder = np.concatenate([centre, half])
    gravity = 0.0
    if rng.uniform() < _GRAVITY_SHARE:
        # As in the class `fall`.
        gravity = rng.uniform(0.7, 1.0) * 0.5 / (world.num_frames / 2) ** 2
    behind = rng.uniform(size=NUM_OBJECTS) < 0.5
    behind[0] = True
    return scene, _draw_velocities(world, scene, rng), gravity, behind


def simulate(world: World, scene: Scene, velocity: np.ndarray, gravity: float) -> Track:
    """Integrate from the first frame to the last."""
    x, v = scene.position.copy(), velocity.copy()
    shape = world.num_frames, len(x)
    position, velocities = np.empty((*shape, 2)), np.empty((*shape, 2))
    for frame in range(world.num_frames):
        position[frame], velocities[frame] = x, v
        advance(x, v, scene.radius, scene.radius**2, gravity)
    radius, angle = (np.broadcast_to(a, shape) for a in (scene.radius, scene.angle))
    return Track.of(scene, position, velocities, radius, angle)


def simulate_clip(
    world: World, seed: int | tuple[int, ...], index: int
) -> tuple[Scene, Track, float, np.ndarray]:
    """Return (scene, track, gravity, behind) of clip `index` of play."""
    rng = np.random.default_rng([*np.atleast_1d(seed), index, 3])
    scene, velocity, gravity, behind = draw(world, rng)
    return scene, simulate(world, scene, velocity, gravity), gravity, behind


def make_play(world: World, seed: int | tuple[int, ...], index: int) -> Clip:
    """Make clip `index` of play of the stream `seed`, of `NUM_OBJECTS` objects."""
    scene, track, _, behind = simulate_clip(world, seed, index)
    return paint(world, scene, track, behind, LABEL)


def is_play(fraction: float, seed: int | tuple[int, ...], index: int) -> bool:
    """Draw whether clip `index` of a stream is play; the others are unchanged."""
    rng = np.random.default_rng([*np.atleast_1d(seed), index, 2])
    return bool(rng.uniform() < fraction)
