"""Matched pairs: one beginning, and a law that only one of the clips obeys."""

import dataclasses

import numpy as np
import pytest

from vjepa_jax.world import motion, violations
from vjepa_jax.world.scenes import World
from vjepa_jax.world.violations import PROPERTIES, make_pair

WORLD = World(size=32)
EXCHANGED = [name for name in PROPERTIES if name not in ("gravity", "solidity")]
TWINS = 2  # twins that every test looks at, of each property


@pytest.fixture
def seed():
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")  # shown where a test fails
    return seed


@dataclasses.dataclass
class Drawn:
    """A pair and the draft that it was painted from."""

    pair: violations.Pair
    scene: motion.Scene
    possible: motion.Track
    impossible: motion.Track


@pytest.fixture
def draw(monkeypatch, seed):
    """Make pairs of this test's seed, with their tracks."""
    painted = []

    def paint(looks, scene, track, behind, label):
        painted.append((scene, track))
        return original(looks, scene, track, behind, label)

    original = violations.paint
    monkeypatch.setattr(violations, "paint", paint)

    def draw(name, index, looks=WORLD):
        pair = make_pair(looks, seed, name, index)
        (scene, possible), (_, impossible) = painted[-2:]
        return Drawn(pair, scene, possible, impossible)

    return draw


def twins(draw, name):
    return [(draw(name, 2 * i), draw(name, 2 * i + 1)) for i in range(TWINS)]


def pairs(draw, name):
    return [drawn for both in twins(draw, name) for drawn in both]


def deviation(scene, track):
    """Return how far a track deviates from the physics of its first frame.

    Returns:
      The largest distance in lengths of an object's fastest step; infinite if an object
      changes its look, or appears or vanishes.
    """
    for looks in (track.shape, track.colours, track.present, track.radius):
        if np.any(looks != looks[0]):
            return np.inf
    there = track.present[0]
    x, v = (a[0, there].copy() for a in (track.position, track.velocity))
    radius = scene.radius[there]
    gravity = np.diff(track.velocity[:2, there, 1], axis=0).mean()
    far = 0.0
    for frame in range(len(track.position)):
        far = max(far, np.abs(track.position[frame, there] - x).max(initial=0))
        motion.advance(x, v, radius, radius**2, gravity)
    return far / np.abs(track.velocity).max()


@pytest.mark.parametrize("name", PROPERTIES)
def test_the_possible_clip_keeps_all_laws_and_the_impossible_one_does_not(draw, name):
    for drawn in pairs(draw, name):
        # Impacts are noticed at the end of a substep, an eighth of a step.
        assert deviation(drawn.scene, drawn.possible) < 0.5
        assert deviation(drawn.scene, drawn.impossible) > 1.0


@pytest.mark.parametrize("num_frames", [violations.MIN_FRAMES, 16])
@pytest.mark.parametrize("name", PROPERTIES)
def test_pairs_part_at_the_onset(seed, name, num_frames):
    looks = World(size=24, num_frames=num_frames)
    for index in range(2 * TWINS):
        pair = make_pair(looks, seed, name, index)
        possible, impossible = pair.possible.video, pair.impossible.video
        assert num_frames // 2 <= pair.onset <= num_frames - 4
        np.testing.assert_array_equal(possible[: pair.onset], impossible[: pair.onset])
        assert np.any(possible[pair.onset] != impossible[pair.onset])
        label = PROPERTIES.index(name)
        assert pair.possible.label == pair.impossible.label == label


@pytest.mark.parametrize("name", EXCHANGED)
def test_twins_exchange_their_ends(draw, name):
    """A score of the end alone is right in exactly one of the two."""
    for even, odd in twins(draw, name):
        assert even.pair.onset == odd.pair.onset
        end = slice(even.pair.onset, None)
        for one, other in ((even, odd), (odd, even)):
            np.testing.assert_array_equal(
                one.pair.possible.video[end], other.pair.impossible.video[end]
            )
        start = slice(even.pair.onset)
        assert np.any(even.pair.possible.video[start] != odd.pair.possible.video[start])


def test_twins_of_gravity_are_mirror_images(draw):
    for even, odd in twins(draw, "gravity"):
        end = slice(max(even.pair.onset, odd.pair.onset), None)
        for one, other in ((even, odd), (odd, even)):
            falls = one.possible.position[end, 0]
            rises = other.impossible.position[end, 0]
            np.testing.assert_allclose(falls, [0, 1] + [1, -1] * rises, atol=1e-12)


def test_twins_of_solidity_are_mirror_images(draw):
    for even, odd in twins(draw, "solidity"):
        mirrored = even.possible.position[:, 0] + odd.possible.position[:, 0]
        axis = int(np.argmin(np.ptp(mirrored, axis=0)))
        np.testing.assert_allclose(mirrored[:, axis], 1, atol=1e-12)


def test_seed_property_and_index_determine_every_array(seed):
    for name in PROPERTIES:
        first, again = (make_pair(WORLD, seed, name, 3) for _ in range(2))
        for part in ("possible", "impossible"):
            for field in dataclasses.fields(motion.Clip):
                np.testing.assert_array_equal(
                    getattr(getattr(first, part), field.name),
                    getattr(getattr(again, part), field.name),
                )
        others = make_pair(WORLD, seed, name, 4), make_pair(WORLD, seed + 1, name, 3)
        for other in (*others, make_pair(WORLD, (seed, 1), name, 3)):
            assert (other.possible.video != first.possible.video).mean() > 0.5


# ----------------------------------------------------------------- what each one breaks


def test_permanence_what_is_hidden_comes_out_or_was_never_there(draw):
    for even, odd in twins(draw, "permanence"):
        onset = even.pair.onset
        for clip, before, after in (
            (even.pair.possible, True, True),
            (even.pair.impossible, True, False),
            (odd.pair.possible, False, False),
            (odd.pair.impossible, False, True),
        ):
            seen = (clip.objects == 1).any((1, 2))
            assert seen[:2].all() == before and seen[:2].any() == before
            assert seen[-2:].all() == after and seen[-2:].any() == after
            # It happens out of sight; soft corners extend a little further.
            assert not seen[onset - 1]
            assert clip.visibility[onset - 1, 0] < 1e-3


def test_continuity_and_inertia_change_place_or_direction_once(draw):
    for name, is_place in (("continuity", True), ("inertia", False)):
        for drawn in pairs(draw, name):
            track = drawn.impossible
            steps = np.diff(track.position[:, 0], axis=0)
            lengths = np.linalg.norm(steps, axis=1)
            speed = np.median(lengths)
            jumps = np.flatnonzero(lengths > 2 * speed)
            turned = np.any(track.velocity[:, 0] != track.velocity[0, 0])
            assert len(jumps) == is_place and turned == (not is_place)
            speeds = np.linalg.norm(track.velocity[:, 0], axis=1)
            np.testing.assert_allclose(speeds, speed, rtol=1e-9)


@pytest.mark.parametrize("name", ["shape", "colour"])
def test_looks_change_and_nothing_else(draw, name):
    attribute = {"shape": "shape", "colour": "colours"}[name]
    for drawn in pairs(draw, name):
        changed = {
            field.name
            for field in dataclasses.fields(motion.Track)
            if np.any(
                getattr(drawn.possible, field.name)
                != getattr(drawn.impossible, field.name)
            )
        }
        assert changed == {attribute}


def test_solidity_goes_through_the_wall_in_one_piece(draw):
    for drawn in pairs(draw, "solidity"):
        r = drawn.scene.radius[0]
        inside = drawn.possible.position[:, 0]
        assert inside.min() > r - 1e-9 and inside.max() < 1 - r + 1e-9
        through, copy = (drawn.impossible.position[:, k] for k in (0, -1))
        assert max(through.max() - (1 - r), r - through.min()) > r
        apart = np.abs(through - copy)[drawn.pair.onset :]
        np.testing.assert_allclose(np.sort(apart, axis=1), [[0, 1]] * len(apart))
        # The parts that leave and come in have one object's area together.
        area = [
            (np.isin(c.objects, (1, 3))).sum((1, 2)).astype(float)
            for c in (drawn.pair.possible, drawn.pair.impossible)
        ]
        assert abs(area[1].sum() / area[0].sum() - 1) < 0.15


def test_gravity_turns_its_direction(draw):
    for drawn in pairs(draw, "gravity"):
        onset = drawn.pair.onset
        for track, sign in ((drawn.possible, 1), (drawn.impossible, -1)):
            pull = np.diff(track.velocity[:, 0, 1])
            assert np.all(pull[: onset - 2] > 0)
            assert np.all(sign * pull[onset:] > 0)
            # The companions go on falling.
            assert np.all(np.diff(track.velocity[:, 1:, 1], axis=0) > 0)


def momentum(drawn, track):
    return (drawn.scene.radius[:2, None] ** 2 * track.velocity[:, :2]).sum(1)


def distances(drawn, track):
    between = np.linalg.norm(track.position[:, 0] - track.position[:, 1], axis=-1)
    return between - drawn.scene.radius[:2].sum()


def test_launch_hands_motion_on_without_contact(draw):
    for drawn in pairs(draw, "launch"):
        for track in (drawn.possible, drawn.impossible):
            assert distances(drawn, track).min() > 0
        assert np.all(np.ptp(drawn.possible.velocity[:, :2], axis=0) == 0)
        changed = np.ptp(drawn.impossible.velocity[:, :2], axis=0)
        assert np.linalg.norm(changed, axis=-1).min() > 0.02


def test_contact_without_effect_breaks_momentum(draw):
    for drawn in pairs(draw, "contact"):
        for track in (drawn.possible, drawn.impossible):
            assert abs(distances(drawn, track).min()) < 0.02
        kept, broken = (
            momentum(drawn, track) for track in (drawn.possible, drawn.impossible)
        )
        np.testing.assert_allclose(kept, np.tile(kept[0], (len(kept), 1)))
        np.testing.assert_allclose(broken[-1], -broken[0])
        # The struck object does not move.
        still = np.all(drawn.impossible.velocity[:, :2] == 0, axis=(0, 2))
        assert still.sum() == 1
