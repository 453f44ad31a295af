"""Clips of play obey the laws; their second half has the events of the pairs."""

import dataclasses

import numpy as np
import pytest

from vjepa_jax.world import motion, play
from vjepa_jax.world.scenes import World

WORLD = World(size=32)
CLIPS = 60


@pytest.fixture(scope="module")
def drawn():
    """(scene, gravity, behind, track) of many clips."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    out = []
    for index in range(CLIPS):
        rng = np.random.default_rng([seed, index])
        scene, velocity, gravity, behind = play.draw(WORLD, rng)
        track = play.simulate(WORLD, scene, velocity, gravity)
        out.append((scene, gravity, behind, track))
    return out


def test_seed_and_index_determine_every_array():
    first, again = (play.make_play(WORLD, (3, 0), 5) for _ in range(2))
    for field in dataclasses.fields(motion.Clip):
        np.testing.assert_array_equal(
            getattr(first, field.name), getattr(again, field.name)
        )
    assert first.label == play.LABEL
    assert first.position.shape == (WORLD.num_frames, play.NUM_OBJECTS, 2)
    for other in (play.make_play(WORLD, (3, 0), 6), play.make_play(WORLD, (4, 0), 5)):
        assert (other.video != first.video).mean() > 0.5


def test_energy_is_conserved(drawn):
    """Walls and impacts are elastic, gravity has a potential (y points down)."""
    falling = 0
    for scene, gravity, _, track in drawn:
        mass = scene.radius**2
        kinetic = (mass * (track.velocity**2).sum(-1) / 2).sum(-1)
        energy = kinetic - (mass * gravity * track.position[..., 1]).sum(-1)
        scale = np.abs(energy).max() + kinetic.max()
        assert np.ptp(energy) <= 1e-12 * scale
        falling += gravity > 0
    assert 0 < falling < CLIPS / 2


def test_objects_stay_within_the_walls(drawn):
    for scene, gravity, _, track in drawn:
        r = scene.radius[:, None]
        beyond = np.maximum(r - track.position, track.position + r - 1)
        # A wall is noticed at the end of a substep.
        speed = np.abs(track.velocity).max() + gravity * WORLD.num_frames
        assert beyond.max() <= speed / motion._SUBSTEPS


def test_much_happens_in_the_second_half(drawn):
    """Bounces, impacts and re-emergences, each in a good share of the clips."""
    half = WORLD.num_frames // 2
    bounces, impacts, emerges = 0, 0, 0
    for scene, gravity, behind, track in drawn:
        steps = np.diff(track.velocity[half:], axis=0) - [0.0, gravity]
        changed = np.abs(steps).max((0, 2)) > 1e-9
        r = scene.radius[:, None]
        at_wall = (np.minimum(track.position, 1 - track.position) < r + 0.06).any(-1)
        bounces += (changed & at_wall[half:].any(0)).any()
        impacts += (
            changed.sum() >= 2
            and np.ptp(
                (scene.radius**2 * np.linalg.norm(track.velocity, axis=-1))[half:],
                axis=0,
            ).max()
            > 1e-9
        )
        far = np.abs(track.position[:, 0] - scene.occluder[:2]) + scene.radius[0]
        hidden = np.all(far <= scene.occluder[2:], axis=-1)
        out = np.any(far > scene.occluder[2:] + 0.05, axis=-1)
        assert behind[0]
        last = np.flatnonzero(hidden[:half])
        emerges += len(last) > 0 and out[half:].any()
    assert bounces > 0.3 * CLIPS
    assert impacts > 0.3 * CLIPS
    assert emerges > 0.2 * CLIPS


def test_the_share_of_play_is_drawn(rng):
    seed = int(rng.integers(1 << 30))
    drawn = [play.is_play(0.3, seed, i) for i in range(1000)]
    assert 220 < sum(drawn) < 380
    assert not any(play.is_play(0.0, seed, i) for i in range(100))
    assert all(play.is_play(1.0, seed, i) for i in range(100))
