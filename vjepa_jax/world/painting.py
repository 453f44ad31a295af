"""Paint the clips of the synthetic world, pixel by pixel."""

import math

import numpy as np

from vjepa_jax.world.scenes import SHAPES, Clip, Scene, Track, World


def _coverage(
    shapes: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    radius: np.ndarray,
    softness: float,
) -> np.ndarray:
    """Return the antialiased coverage 0..1 [T, S, S] of an object, shaped [T]."""
    distance = np.empty(x.shape, x.dtype)
    for shape in np.unique(shapes):
        frames = shapes == shape
        distance[frames] = _distance(
            SHAPES[shape], x[frames], y[frames], radius[frames]
        )
    return np.clip(0.5 - distance / softness, 0, 1)


def _distance(
    shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray
) -> np.ndarray:
    """Return the signed distance of points from a shape's edge, negative inside."""
    if shape == "disc":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius
    if shape == "triangle":
        side = np.maximum(0.866 * x + 0.5 * y, -0.866 * x + 0.5 * y)
        return np.maximum(side, -y) - 0.62 * radius
    arm = 0.36 * radius
    horizontal = np.maximum(np.abs(x) - radius, np.abs(y) - arm)
    vertical = np.maximum(np.abs(x) - arm, np.abs(y) - radius)
    return np.minimum(horizontal, vertical)


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels' centres, x [1, 1, S] and y [1, S, 1] of 0..1."""
    grid = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return grid[None, None, :], grid[None, :, None]


def _object_coordinates(
    size: int, position: np.ndarray, angle: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return x, y [T, S, S] of the pixels relative to an object at [T, 2], turned."""
    gx, gy = _grid(size)
    dx, dy = gx - position[:, 0, None, None], gy - position[:, 1, None, None]
    cos, sin = (f(angle)[:, None, None] for f in (np.cos, np.sin))
    return cos * dx + sin * dy, cos * dy - sin * dx


def _occluder_coverage(scene: Scene, size: int) -> np.ndarray:
    """Return the antialiased coverage 0..1 [1, S, S] of the occluder."""
    gx, gy = _grid(size)
    cx, cy, *half = scene.occluder.astype(np.float32)
    distance = np.maximum(np.abs(gx - cx) - half[0], np.abs(gy - cy) - half[1])
    return np.clip(0.5 - distance * size, 0, 1)


def touches_occluder(world: World, scene: Scene) -> bool:
    """Return whether main object and occluder share a pixel of the middle frame."""
    position, angle, radius = (
        array[:1].astype(np.float32)
        for array in (scene.position, scene.angle, scene.radius)
    )
    x, y = _object_coordinates(world.size, position, angle)
    alpha = _coverage(scene.shape[:1], x, y, radius[:, None, None], 1 / world.size)
    return bool((alpha * _occluder_coverage(scene, world.size)).any())


def _paint_background(world: World, scene: Scene) -> np.ndarray:
    """Sum the scene's plane waves, scrolled by the camera: float32 [T, S, S, 3]."""
    frames, size = world.num_frames, world.size
    gx, gy = _grid(size)
    time = (np.arange(frames, dtype=np.float32) - frames // 2)[:, None, None]
    x = gx - np.float32(scene.camera[0]) * time
    y = gy - np.float32(scene.camera[1]) * time
    video = np.empty((frames, size, size, 3), np.float32)
    video[:] = scene.background
    phases = scene.phases.astype(np.float32).T[..., None, None]
    for (fx, fy, phase, *amplitude), change in zip(
        scene.waves.astype(np.float32), phases, strict=True
    ):
        wave = np.cos(2 * np.float32(math.pi) * (fx * x + fy * y) + phase + change)
        video += wave[..., None] * np.stack(amplitude)
    return video


def paint(
    world: World, scene: Scene, track: Track, behind: np.ndarray, label: int
) -> Clip:
    """Paint background, objects behind the occluder, the occluder, the other objects.

    Args:
      world: size and number of frames.
      scene: background, occluder, stripes and light.
      track: the objects in every frame.
      behind: bool [K], the objects that are behind the occluder.
      label: of the clip.
    """
    frames, size, count = world.num_frames, world.size, len(scene.radius)
    names = "position", "velocity", "radius", "angle", "colours"
    position, velocity, radius, angle, colours = (
        getattr(track, name).astype(np.float32) for name in names
    )
    gx, gy = _grid(size)
    video = _paint_background(world, scene)
    objects = np.zeros((frames, size, size), np.uint8)
    area = np.ones((frames, count))
    visible: dict[int, np.ndarray] = {}  # {object: its visible coverage [T, S, S]}
    layers = [k for k in range(count) if behind[k]] + [count]
    layers += [k for k in reversed(range(count)) if not behind[k]]
    for k in layers:
        if k == count:
            alpha = _occluder_coverage(scene, size)
            stripe = 0.5 + 0.5 * np.sin(2 * math.pi * 9 * (gx + gy))
            bright, dark = scene.occluder_colours.astype(np.float32)
        else:
            x, y = _object_coordinates(size, position[:, k], angle[:, k])
            r = radius[:, k, None, None]
            alpha = _coverage(track.shape[:, k], x, y, r, 1 / size)
            alpha[~track.present[:, k]] = 0
            pitch, phase = scene.stripes[k].astype(np.float32)
            stripe = 0.5 + 0.5 * np.sin(math.pi * pitch * x / r + phase)
            bright, dark = colours[:, k, :, None, None].swapaxes(0, 1)
            area[:, k] = alpha.sum((1, 2))
        for j in visible:
            visible[j] = visible[j] * (1 - alpha)
        if k < count:
            visible[k] = alpha
        drawn = dark + stripe[..., None] * (bright - dark)
        video += alpha[..., None] * (drawn - video)
        objects = np.where(alpha > 0.5, np.uint8(k + 1), objects)
    video *= scene.light.astype(np.float32)[:, None, None]
    visibility = np.stack([visible[k].sum((1, 2)) for k in range(count)], 1)
    return Clip(
        video=np.clip(np.rint(video * 255), 0, 255).astype(np.uint8),
        objects=objects,
        position=position,
        velocity=velocity,
        visibility=(visibility / np.maximum(area, 1e-6)).astype(np.float32),
        label=label,
    )
