"""A synthetic 2-D world with physics: short clips whose labels live in the motion.

A clip holds a textured main object, smaller textured companions, and a static occluder
before a textured background that may scroll, under a light that may change. Lengths are
fractions of the frame's side, time is counted in frames.

No single frame gives the label away, by construction: place, shape, size, colours,
companions, occluder, background and light are drawn *before* the class, at the middle
frame; the class only chooses velocities (and growth, spin and gravity), and the motion
is then integrated forwards and backwards from there. Elastic physics is reversible, so
both halves obey it. Whether an object is in front of the occluder or behind it cannot
be seen at the middle frame either, since main object and occluder keep a gap there.
"""

import dataclasses
import math

import numpy as np

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
SHAPES = ("disc", "square", "triangle", "cross")

_SUBSTEPS = 8  # integration steps per frame: a fast object moves under 1 % of the side
_CORNER = 1.25  # the furthest point of any shape, in radii
_GAP = 0.015  # least distance between any two things at the middle frame


@dataclasses.dataclass(frozen=True)
class World:
    """What a world looks like; with a seed and an index it determines every pixel.

    Attributes:
      size: side of the square frame in pixels, even (H.264 with 4:2:0 chroma).
      num_frames: frames per clip.
      num_companions: objects besides the main one, at least 1.
      main_radius, companion_radius: (low, high), in sides.
      companion_speed: their largest speed, sides per frame.
      camera_speed: largest speed of the scrolling background, sides per frame.
      still_fraction: share of the clips whose background does not move.
      background_contrast: amplitude of the background's texture, 0 to 1.
      background_change: random walk of the texture's phases, radians per frame; what
        cannot be foreseen is not worth a predictor's while.
      light_change: random walk of the light's three colours, relative, per frame.
    """

    size: int = 48
    num_frames: int = 16
    num_companions: int = 1
    companion_speed: float = 0.006
    main_radius: tuple[float, float] = (0.13, 0.16)
    companion_radius: tuple[float, float] = (0.06, 0.08)
    camera_speed: float = 0.03
    still_fraction: float = 0.3
    background_contrast: float = 0.02
    background_change: float = 0.4
    light_change: float = 0.02


@dataclasses.dataclass
class Scene:
    """Everything drawn at the middle frame, before a class is chosen.

    Objects are indexed along the first axis; the main object is number 0.
    """

    position: np.ndarray  # [K, 2] x, y (y grows downwards)
    radius: np.ndarray  # [K]
    angle: np.ndarray  # [K] radians
    shape: np.ndarray  # [K] index into SHAPES
    colours: np.ndarray  # [K, 2, 3] the two colours of the stripes, 0 to 1
    stripes: np.ndarray  # [K, 2] stripes per radius, phase
    occluder: np.ndarray  # [4] centre x, y, half width, half height
    occluder_colours: np.ndarray  # [2, 3]
    waves: np.ndarray  # [W, 6] background: fx, fy, phase, and an amplitude per channel
    background: np.ndarray  # [3] mean colour
    camera: np.ndarray  # [2] background velocity
    phases: np.ndarray  # [T, W] what is added to the waves' phases
    light: np.ndarray  # [T, 3] gain of each colour


@dataclasses.dataclass
class Motion:
    """What the class decides: velocities at the middle frame and the laws at work."""

    velocity: np.ndarray  # [K, 2]
    spin: np.ndarray  # [K] radians per frame
    growth: np.ndarray  # [K] relative growth per frame
    gravity: float
    behind: np.ndarray  # [K] bool: passes behind the occluder


@dataclasses.dataclass
class Clip:
    """A rendered clip with its ground truth: `T` frames, `K` objects, 0 the main one.

    Positions and velocities are fractions of the side (per frame). `visibility` is the
    visible share of an object's area; `masks` holds 0 for the background, k + 1 for
    object k and K + 1 for the occluder.
    """

    video: np.ndarray  # uint8 [T, S, S, 3]
    masks: np.ndarray  # uint8 [T, S, S]
    position: np.ndarray  # float32 [T, K, 2]
    velocity: np.ndarray  # float32 [T, K, 2]
    visibility: np.ndarray  # float32 [T, K]
    label: int


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


def _draw_companions(rng, position, radius, occluder):
    """Place the companions by rejection; neither main object nor occluder moves."""
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
    """Draw the middle frame; the class is not an argument, and that is the point."""
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
    # Corners reach beyond the radius, and soft edges half a pixel further: were they to
    # touch, what is in front would show.
    reach = _CORNER * radius[0] + 1 / world.size
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
    return Scene(
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
        # Fully through at the fastest, well hidden at the slowest.
        speed = rng.uniform(0.7, 1.05) * travel / reach
        velocity[0, axis] = sign * np.sign(offset[axis]) * speed
        behind[0] = True
    return Motion(velocity, spin, growth, gravity, behind)


def _collide(position, velocity, radius, mass):
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


def simulate(world: World, scene: Scene, motion: Motion):
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
        dt = 1 / _SUBSTEPS
        frame = middle
        while 0 <= frame < frames:
            position[frame], velocity[frame] = x, direction * v
            for _ in range(_SUBSTEPS):
                # Gravity is even under time reversal: the same sign in both halves.
                v[:, 1] += motion.gravity * dt / 2
                x += v * dt
                v[:, 1] += motion.gravity * dt / 2
                _collide(x, v, radius[frame], mass)
            frame += direction
    return position, velocity, radius, angle


def _coverage(shape: str, x, y, radius, softness):
    """Antialiased coverage 0..1 of a shape at object coordinates x, y."""
    if shape == "disc":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius
    elif shape == "triangle":
        side = np.maximum(0.866 * x + 0.5 * y, -0.866 * x + 0.5 * y)
        distance = np.maximum(side, -y) - 0.62 * radius
    else:
        arm = 0.36 * radius
        horizontal = np.maximum(np.abs(x) - radius, np.abs(y) - arm)
        vertical = np.maximum(np.abs(x) - arm, np.abs(y) - radius)
        distance = np.minimum(horizontal, vertical)
    return np.clip(0.5 - distance / softness, 0, 1)


def _paint_background(world: World, scene: Scene) -> np.ndarray:
    """Sum the scene's plane waves, scrolled by the camera: float32 [T, S, S, 3]."""
    frames, size = world.num_frames, world.size
    grid = ((np.arange(size) + 0.5) / size).astype(np.float32)
    time = (np.arange(frames, dtype=np.float32) - frames // 2)[:, None, None]
    x = grid[None, None, :] - np.float32(scene.camera[0]) * time
    y = grid[None, :, None] - np.float32(scene.camera[1]) * time
    video = np.empty((frames, size, size, 3), np.float32)
    video[:] = scene.background
    phases = scene.phases.astype(np.float32).T[..., None, None]
    for (fx, fy, phase, *amplitude), change in zip(
        scene.waves.astype(np.float32), phases, strict=True
    ):
        wave = np.cos(2 * np.float32(math.pi) * (fx * x + fy * y) + phase + change)
        video += wave[..., None] * np.stack(amplitude)
    return video


def render(world: World, scene: Scene, motion: Motion, label: int) -> Clip:
    """Draw the clip: background, objects behind the occluder, occluder, the others."""
    frames, size, count = world.num_frames, world.size, len(scene.radius)
    position, velocity, radius, angle = (
        x.astype(np.float32) for x in simulate(world, scene, motion)
    )
    grid = ((np.arange(size) + 0.5) / size).astype(np.float32)
    gx, gy = grid[None, None, :], grid[None, :, None]
    video = _paint_background(world, scene)
    masks = np.zeros((frames, size, size), np.uint8)
    area = np.ones((frames, count))
    visible = {}  # object -> what is left to see of it, [T, S, S]
    layers = [k for k in range(count) if motion.behind[k]] + [count]
    layers += [k for k in reversed(range(count)) if not motion.behind[k]]
    for k in layers:
        if k == count:
            cx, cy, *half = scene.occluder.astype(np.float32)
            distance = np.maximum(np.abs(gx - cx) - half[0], np.abs(gy - cy) - half[1])
            alpha = np.clip(0.5 - distance * size, 0, 1)
            stripe = 0.5 + 0.5 * np.sin(2 * math.pi * 9 * (gx + gy))
            colours = scene.occluder_colours
        else:
            dx = gx - position[:, k, 0, None, None]
            dy = gy - position[:, k, 1, None, None]
            cos, sin = (f(angle[:, k])[:, None, None] for f in (np.cos, np.sin))
            x, y = cos * dx + sin * dy, cos * dy - sin * dx
            r = radius[:, k, None, None]
            alpha = _coverage(SHAPES[scene.shape[k]], x, y, r, 1 / size)
            pitch, phase = scene.stripes[k].astype(np.float32)
            stripe = 0.5 + 0.5 * np.sin(math.pi * pitch * x / r + phase)
            colours = scene.colours[k]
            area[:, k] = alpha.sum((1, 2))
        for j in visible:
            visible[j] = visible[j] * (1 - alpha)
        if k < count:
            visible[k] = alpha
        colours = colours.astype(np.float32)
        paint = colours[1] + stripe[..., None] * (colours[0] - colours[1])
        video += alpha[..., None] * (paint - video)
        masks = np.where(alpha > 0.5, np.uint8(k + 1), masks)
    video *= scene.light.astype(np.float32)[:, None, None]
    visibility = np.stack([visible[k].sum((1, 2)) for k in range(count)], 1)
    return Clip(
        video=np.clip(np.rint(video * 255), 0, 255).astype(np.uint8),
        masks=masks,
        position=position,
        velocity=velocity,
        visibility=(visibility / np.maximum(area, 1e-6)).astype(np.float32),
        label=label,
    )


def make_clip(
    world: World,
    seed: int | tuple[int, ...],
    index: int,
    classes: tuple[str, ...] = CLASSES,
) -> Clip:
    """Make clip `index` of the stream `seed`; the classes take turns.

    Random numbers for the scene and for the motion are separate streams, so that the
    same scene can be seen under every class (tests do).
    """
    label = CLASSES.index(classes[index % len(classes)])
    scene_rng, motion_rng = (
        np.random.default_rng([*np.atleast_1d(seed), index, part]) for part in (0, 1)
    )
    scene = draw_scene(world, scene_rng)
    motion = draw_motion(world, scene, label, motion_rng)
    return render(world, scene, motion, label)
