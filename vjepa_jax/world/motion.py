"""A synthetic 2-D world with physics: short clips whose labels live in the motion.

A clip holds a textured main object, smaller textured companions, and a static occluder
before a textured background that may scroll, under a light that may change. Lengths are
fractions of the frame's side, time is counted in frames.

By construction no single frame reveals the label. Position, shape, size, colours,
companions, occluder, background and light are drawn *before* the class, at the middle
frame. The class only chooses velocities (and growth, spin and gravity); the motion is
integrated forwards and backwards from the middle frame. Elastic physics is reversible,
so both halves obey it. A gap between the main object and the occluder ensures that the
middle frame does not show which of them is in front.
"""

import math

import numpy as np

from vjepa_jax.world.painting import paint, touches_occluder
from vjepa_jax.world.scenes import SHAPES, Clip, Motion, Scene, Track, World

CLASSES = (
    "left",
    "right",
    "up",
    "down",
    "bounce",
    "fall",
    "spin",
    "grow",
    "shrink",
    "collide",
    "hide",
)

_EXACT = 1e-9  # sides per frame; free flight changes velocities by rounding only
_SUBSTEPS = 8  # integration steps per frame: a fast object moves under 1 % of the side
CORNER = 1.25  # the furthest point of any shape, in radii
_GAP = 0.015  # least distance between any two things at the middle frame


def _rgb(rng: np.random.Generator, value: tuple[float, float], n: int) -> np.ndarray:
    """Draw n colours of random hue and saturation, brightness in `value`: [n, 3]."""
    hue, saturation = rng.uniform(0, 1, (n, 1)), rng.uniform(0.2, 0.7, (n, 1))
    brightness = rng.uniform(*value, (n, 1))
    ramp = np.abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    return brightness * (1 - saturation * (1 - np.clip(ramp, 0, 1)))


def _walk(rng: np.random.Generator, world: World, n: int) -> np.ndarray:
    """Draw n random walks of unit steps that are 0 at the middle frame: [T, n]."""
    walk = np.cumsum(rng.normal(0, 1, (world.num_frames, n)), axis=0)
    return walk - walk[world.num_frames // 2]


def _draw_companions(
    rng: np.random.Generator,
    position: np.ndarray,
    radius: np.ndarray,
    occluder: np.ndarray,
) -> None:
    """Place the companions, in place, by rejection of those that touch something."""
    low, high = occluder[:2] - occluder[2:], occluder[:2] + occluder[2:]
    for k in range(1, len(radius)):
        for _ in range(200):
            place = rng.uniform(radius[k] + _GAP, 1 - radius[k] - _GAP, 2)
            apart = np.linalg.norm(position[:k] - place, axis=1)
            # A collision must be within reach of half a clip, hence the first companion
            # is near the main object, whatever the class.
            near = k > 1 or apart[0] < radius[0] + radius[1] + 0.25
            free = np.linalg.norm(place - np.clip(place, low, high)) > radius[k] + _GAP
            if near and free and np.all(apart > radius[:k] + radius[k] + 4 * _GAP):
                break
        position[k] = place


def draw_scene(world: World, rng: np.random.Generator) -> Scene:
    """Draw the middle frame; it does not depend on the class."""
    count = 1 + world.num_companions
    radius = np.concatenate(
        [
            rng.uniform(*world.main_radius, 1),
            rng.uniform(*world.companion_radius, count - 1),
        ]
    )
    position = np.empty((count, 2))
    position[0] = rng.uniform(0.38, 0.62, 2)
    # The occluder stands beside the main object, on the side with room to come out.
    axis = int(rng.integers(2))
    side = 1.0 if position[0, axis] < 0.5 else -1.0
    half = np.empty(2)
    half[axis] = radius[0] + rng.uniform(0.01, 0.04)
    half[1 - axis] = radius[0] + rng.uniform(0.03, 0.10)
    centre = position[0].copy()
    # Corners reach beyond the radius, and their soft edges a pixel further. If object
    # and occluder touched, the middle frame would show which is in front.
    reach = CORNER * radius[0] + 1 / world.size
    centre[axis] += side * (reach + half[axis] + rng.uniform(0, 0.045))
    centre[1 - axis] += rng.uniform(-0.02, 0.02)
    occluder = np.concatenate([centre, half])
    _draw_companions(rng, position, radius, occluder)
    num_waves = 6
    frequency = rng.normal(0, 1.5, (num_waves, 2))
    amplitude = rng.normal(0, 1.0, (num_waves, 3)) * 0.5 + rng.normal(
        0, 1.0, (num_waves, 1)
    )
    amplitude *= world.background_contrast / math.sqrt(num_waves)
    phase = rng.uniform(0, 2 * math.pi, (num_waves, 1))
    moving = rng.uniform() >= world.still_fraction
    heading = rng.uniform(0, 2 * math.pi)
    speed = world.camera_speed * rng.uniform(0.3, 1.0) * moving
    scene = Scene(
        position=position,
        radius=radius,
        angle=rng.uniform(0, 2 * math.pi, count),
        shape=rng.integers(len(SHAPES), size=count),
        colours=np.stack([_rgb(rng, (0.85, 1.0), count), _rgb(rng, (0.5, 0.7), count)])
        .swapaxes(0, 1)
        .copy(),
        stripes=np.stack(
            [rng.uniform(0.8, 1.6, count), rng.uniform(0, 2 * math.pi, count)], 1
        ),
        occluder=occluder,
        occluder_colours=_rgb(rng, (0.2, 0.5), 2),
        waves=np.concatenate([frequency, phase, amplitude], 1),
        background=_rgb(rng, (0.1, 0.35), 1)[0],
        camera=speed * np.array([math.cos(heading), math.sin(heading)]),
        phases=_walk(rng, world, num_waves) * world.background_change,
        light=np.exp(_walk(rng, world, 3) * world.light_change),
    )
    if touches_occluder(world, scene):  # by the occluder's soft edge of half a pixel
        scene.occluder[axis] += side * 0.5 / world.size
    return scene


def _straight_speed(scene: Scene, axis: int, reach: float) -> float:
    """Return the largest speed along `axis` that meets no wall in `reach` frames."""
    place, radius = scene.position[0, axis], scene.radius[0]
    return (min(place, 1 - place) - radius) / reach


def draw_motion(
    world: World, scene: Scene, label: int, rng: np.random.Generator
) -> Motion:
    """Draw the velocities at the middle frame that make `scene` a clip of its class."""
    count = len(scene.radius)
    reach = world.num_frames / 2
    name = CLASSES[label]
    velocity = np.zeros((count, 2))
    heading = rng.uniform(0, 2 * math.pi, count - 1)
    drift = rng.uniform(0, world.companion_speed, count - 1)
    velocity[1:] = (drift * np.stack([np.cos(heading), np.sin(heading)])).T
    spin, growth, gravity = np.zeros(count), np.zeros(count), 0.0
    behind = rng.uniform(size=count) < 0.5
    behind[0] = False
    sign = rng.choice([-1.0, 1.0])
    if name in ("left", "right", "up", "down"):
        axis = 0 if name in ("left", "right") else 1
        direction = -1.0 if name in ("left", "up") else 1.0
        speed = _straight_speed(scene, axis, reach) * rng.uniform(0.75, 1.0)
        velocity[0, axis] = direction * speed
    elif name == "bounce":
        axis = int(rng.integers(2))
        place = scene.position[0, axis]
        wall = -1.0 if place < 0.5 else 1.0
        distance = min(place, 1 - place) - scene.radius[0]
        moment = rng.uniform(0.3, 0.7) * reach
        # A positive sign bounces after the middle frame, a negative one before it.
        velocity[0, axis] = sign * wall * distance / moment
        velocity[0, 1 - axis] = rng.uniform(-0.01, 0.01)
    elif name == "fall":
        gravity = rng.uniform(0.7, 1.0) * 0.5 / reach**2
        velocity[0] = rng.uniform(-0.012, 0.012), rng.uniform(-0.01, 0.02)
    elif name == "spin":
        spin[0] = sign * rng.uniform(1.4, 2.6) / reach
    elif name in ("grow", "shrink"):
        growth[0] = (1 if name == "grow" else -1) * rng.uniform(0.35, 0.5) / reach
    elif name == "collide":
        between = scene.position[1] - scene.position[0]
        distance = np.linalg.norm(between)
        gap = distance - scene.radius[0] - scene.radius[1]
        approach = sign * gap / (rng.uniform(0.25, 0.6) * reach)
        share = rng.uniform(0.4, 0.8)
        velocity[0] = share * approach * between / distance
        velocity[1] = -(1 - share) * approach * between / distance
    elif name == "hide":
        offset = scene.occluder[:2] - scene.position[0]
        axis = int(np.argmax(np.abs(offset)))
        travel = abs(offset[axis]) + scene.occluder[2 + axis] + scene.radius[0]
        # The fastest passes the occluder, the slowest ends well hidden behind it.
        speed = rng.uniform(0.7, 1.05) * travel / reach
        velocity[0, axis] = sign * np.sign(offset[axis]) * speed
        behind[0] = True
    return Motion(velocity, spin, growth, gravity, behind)


def _collide(
    position: np.ndarray, velocity: np.ndarray, radius: np.ndarray, mass: np.ndarray
) -> None:
    """Reflect at walls and exchange momentum between touching pairs, in place."""
    for axis in range(2):
        low = (position[:, axis] < radius) & (velocity[:, axis] < 0)
        high = (position[:, axis] > 1 - radius) & (velocity[:, axis] > 0)
        velocity[low | high, axis] *= -1
    for i in range(len(radius)):
        for j in range(i):
            between = position[i] - position[j]
            distance = math.hypot(*between)
            normal = between / max(distance, 1e-9)
            approach = float(np.dot(velocity[i] - velocity[j], normal))
            if distance < radius[i] + radius[j] and approach < 0:
                impulse = 2 * approach / (mass[i] + mass[j])
                velocity[i] -= impulse * mass[j] * normal
                velocity[j] += impulse * mass[i] * normal


def advance(
    position: np.ndarray,
    velocity: np.ndarray,
    radius: np.ndarray,
    mass: np.ndarray,
    gravity: float = 0.0,
) -> None:
    """Integrate one frame, in place: free flight, and elastic walls and contacts.

    Args:
      position, velocity: [K, 2]; lengths in sides, time in frames.
      radius, mass: [K].
      gravity: downwards, sides per frame squared.
    """
    dt = 1 / _SUBSTEPS
    for _ in range(_SUBSTEPS):
        # Gravity is even under time reversal: half of it before, half after.
        velocity[:, 1] += gravity * dt / 2
        position += velocity * dt
        velocity[:, 1] += gravity * dt / 2
        _collide(position, velocity, radius, mass)


def simulate(
    world: World, scene: Scene, motion: Motion
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Integrate both halves of the clip from its middle frame.

    Returns:
      position, velocity [T, K, 2] and radius, angle [T, K], float64.
    """
    frames, count = world.num_frames, len(scene.radius)
    middle = frames // 2
    position = np.empty((frames, count, 2))
    velocity = np.empty((frames, count, 2))
    offset = np.arange(frames) - middle
    radius = scene.radius * np.exp(motion.growth * offset[:, None])
    angle = scene.angle + motion.spin * offset[:, None]
    mass = scene.radius**2
    for direction in (1, -1):
        x, v = scene.position.copy(), direction * motion.velocity
        frame = middle
        while 0 <= frame < frames:
            position[frame], velocity[frame] = x, direction * v
            advance(x, v, radius[frame], mass, motion.gravity)
            frame += direction
    return position, velocity, radius, angle


def render(world: World, scene: Scene, motion: Motion, label: int) -> Clip:
    """Paint the clip of a scene and a motion."""
    track = Track.of(scene, *simulate(world, scene, motion))
    return paint(world, scene, track, motion.behind, label)


def make_clip(
    world: World,
    seed: int | tuple[int, ...],
    index: int,
    classes: tuple[str, ...] = CLASSES,
) -> Clip:
    """Make clip `index` of the stream `seed`; the classes take turns."""
    label = CLASSES.index(classes[index % len(classes)])
    return render(world, *draw_clip(world, seed, index, label), label)


def draw_clip(
    world: World, seed: int | tuple[int, ...], index: int, label: int
) -> tuple[Scene, Motion]:
    """Draw scene and motion of clip `index` of the stream `seed`, of a class.

    Scene and motion have separate random streams: the scene is the same for each class.
    """
    scene_rng, motion_rng = (
        np.random.default_rng([*np.atleast_1d(seed), index, part]) for part in (0, 1)
    )
    scene = draw_scene(world, scene_rng)
    return scene, draw_motion(world, scene, label, motion_rng)


def frames_to_contact(
    scene: Scene,
    motion: Motion,
    position: np.ndarray,
    velocity: np.ndarray,
    horizon: int,
) -> float:
    """Return after how many frames the main object meets a wall or another object.

    It follows from their state: objects fly freely and reflect elastically.

    Args:
      scene, motion: from `draw_clip`.
      position, velocity: [K, 2] of all objects in the frame from which it is counted.
      horizon: frames to look ahead.

    Returns:
      The middle of the frame interval in which they meet: 0.5, 1.5, ...; NaN if they do
      not within the horizon. NaN too if the object grows or shrinks, since a clip does
      not show how long that will last.
    """
    if motion.growth[0]:
        return math.nan
    x, v = np.array(position, np.float64), np.array(velocity, np.float64)
    mass = scene.radius**2
    for frame in range(horizon):
        free = v[0] + (0.0, motion.gravity)
        advance(x, v, scene.radius, mass, motion.gravity)
        if np.abs(v[0] - free).max() > _EXACT:
            return frame + 0.5
    return math.nan
