"""When the main object of a clip will meet something, were the clip to go on."""

import math

import numpy as np

from vjepa_jax.world.motion import advance
from vjepa_jax.world.scenes import Motion, Scene, World

_EXACT = 1e-9  # sides per frame; free flight changes velocities by rounding only


def frames_to_contact(
    world: World,
    scene: Scene,
    motion: Motion,
    position: np.ndarray,
    velocity: np.ndarray,
    horizon: int,
) -> float:
    """Return after how many frames the main object meets a wall or another object.

    What is to come follows from places and velocities, which what came before shows:
    objects fly freely and reflect elastically.

    Args:
      world: of the clip.
      scene, motion: from `world.draw_clip`.
      position, velocity: [K, 2] of all objects in the frame from which it is counted.
      horizon: frames to look ahead.

    Returns:
      The middle of the frame interval in which they meet: 0.5, 1.5, ...; NaN if they do
      not within the horizon, or if the object grows or shrinks, of which a clip does
      not show how long it will last.
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
