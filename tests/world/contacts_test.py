"""The time to a contact follows from positions and velocities."""

import math

import numpy as np
import pytest

from vjepa_jax.world import motion as laws
from vjepa_jax.world.motion import CLASSES
from vjepa_jax.world.scenes import World

WORLD = World(size=32)
MIDDLE = WORLD.num_frames // 2
SUBSTEP = 1 / laws._SUBSTEPS  # a contact is noticed at the end of a substep


def draw(rng, name):
    index = int(rng.integers(1 << 30))
    return laws.draw_clip(WORLD, 0, index, CLASSES.index(name))


def found_at(scene, motion, position, velocity, horizon):
    return laws.frames_to_contact(scene, motion, position, velocity, horizon)


def first_contact(scene, motion, position, velocity, horizon):
    """Follow straight lines and parabolas in small steps until something is met.

    None where the companion meets a wall first, since its path is then bent.
    """
    steps = 400
    time = np.arange(1, horizon * steps + 1)[:, None] / steps
    fall = np.array([0.0, motion.gravity])
    main = position[0] + velocity[0] * time + fall * time**2 / 2
    r0, r1 = scene.radius[:2]
    other = position[1] + velocity[1] * time + fall * time**2 / 2
    walled = np.any((main < r0) | (main > 1 - r0), axis=1)
    met = np.linalg.norm(main - other, axis=1) < r0 + r1
    own = np.any((other < r1) | (other > 1 - r1), axis=1)
    happened = np.flatnonzero(walled | met)
    if own.any() and (not len(happened) or own.argmax() < happened[0]):
        return None  # the companion's line is bent before: no reference
    return time[happened[0], 0] if len(happened) else math.nan


@pytest.mark.parametrize("name", ["left", "down", "bounce", "fall", "collide", "hide"])
def test_it_is_when_free_flight_ends(rng, name):
    times = []
    for _ in range(25):
        scene, motion = draw(rng, name)
        state = scene.position, motion.velocity
        wanted = first_contact(scene, motion, *state, 24)
        if wanted is None or abs(wanted - 24) < 1:
            continue
        found = found_at(scene, motion, *state, 24)
        times.append(found)
        if math.isnan(wanted):
            assert math.isnan(found)
        else:
            assert abs(found - wanted) <= 0.5 + SUBSTEP + 0.01
    assert len(times) > 5 and np.isfinite(times).any()


@pytest.mark.parametrize("name", ["bounce", "collide"])
def test_the_rest_of_the_clip_shows_what_was_predicted(rng, name):
    """From the middle frame, with the velocities of the clip itself."""
    seen = 0
    for _ in range(20):
        scene, motion = draw(rng, name)
        _, velocity, _, _ = laws.simulate(WORLD, scene, motion)
        after = velocity[MIDDLE:, 0]
        changed = np.flatnonzero(np.abs(np.diff(after, axis=0)).max(1) > 1e-9)
        horizon = len(after) - 1
        found = found_at(scene, motion, scene.position, motion.velocity, horizon)
        if len(changed):
            assert found == changed[0] + 0.5
            seen += 1
        else:
            assert math.isnan(found)
    assert seen > 3


def test_no_contact_beyond_the_horizon_or_of_a_growing_object(rng):
    scene, motion = draw(rng, "left")
    state = scene.position, motion.velocity
    found = found_at(scene, motion, *state, 40)
    assert 0 < found < 40
    assert math.isnan(found_at(scene, motion, *state, int(found)))
    scene, motion = draw(rng, "grow")
    motion.velocity[0] = 0.5, 0.0
    assert math.isnan(found_at(scene, motion, scene.position, motion.velocity, 40))


def test_the_clip_itself_stays_as_it_was_drawn(rng):
    """Its positions and velocities are not modified."""
    scene, motion = draw(rng, "right")
    position, velocity = scene.position.copy(), motion.velocity.copy()
    found_at(scene, motion, scene.position, motion.velocity, 20)
    np.testing.assert_array_equal(scene.position, position)
    np.testing.assert_array_equal(motion.velocity, velocity)
