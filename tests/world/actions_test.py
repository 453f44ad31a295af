"""Events in clips of play are found and listed as actions."""

import csv

import numpy as np
import pytest

from vjepa_jax.config.defaults import get_config
from vjepa_jax.evals.anticipation.epic_kitchens import Contexts, read_actions
from vjepa_jax.world import actions, motion, play, render
from vjepa_jax.world.actions import VERBS, Event
from vjepa_jax.world.scenes import SHAPES, World

WORLD = World(size=32)


@pytest.fixture
def clips(rng, monkeypatch):
    """(scene, track, gravity, log of contacts) of clips, logged during integration."""
    log = []
    collide = motion._collide

    def logged(x, v, radius, mass):
        before = v.copy()
        collide(x, v, radius, mass)
        moved = np.flatnonzero(np.any(v != before, axis=1))
        log.append({int(k): (before[k], v[k].copy(), x[k].copy()) for k in moved})

    monkeypatch.setattr(motion, "_collide", logged)
    seed, out = int(rng.integers(1 << 30)), []
    for index in range(40):
        log.clear()
        scene, track, gravity, _ = play.simulate_clip(WORLD, seed, index)
        out.append((scene, track, gravity, [dict(step) for step in log]))
    return out


def test_events_are_what_was_integrated(clips):
    """Each change of motion is one object's bounce, or two objects' strike."""
    substeps, kinds = motion._SUBSTEPS, set()
    for scene, track, gravity, log in clips:
        found = actions.events(scene, track, gravity)
        kinds |= {event.verb for event in found}
        for frame in range(1, WORLD.num_frames):
            steps = log[(frame - 1) * substeps : frame * substeps]
            happened = [step for step in steps if step]
            in_frame = [event for event in found if event.frame == frame]
            if not happened:
                assert not in_frame
            if len(happened) != 1:
                continue  # two things in one frame may be one event, or none
            (step,) = happened
            if len(step) == 1:
                ((k, (before, after, place)),) = step.items()
                axes = np.flatnonzero(before * after < 0)
                if len(axes) == 1:  # no corner
                    (event,) = in_frame
                    wall = 2 * axes[0] + round(place[axes[0]])
                    assert event == Event(frame, wall, int(scene.shape[k]))
            elif len(step) == 2:
                gap = np.linalg.norm(np.subtract(*(x for *_, x in step.values())))
                if gap < scene.radius[list(step)].sum():
                    (event,) = in_frame
                    faster = max(step, key=lambda k: np.linalg.norm(step[k][0]))
                    assert event.verb == VERBS.index("strike")
                    assert event.noun in scene.shape[list(step)]
                    if not gravity:  # which changes speeds within the frame
                        assert event.noun == scene.shape[faster]
    assert kinds == set(range(len(VERBS)))


def test_the_action_is_the_first_event_of_the_last_quarter(rng):
    seed, found = int(rng.integers(1 << 30)), 0
    for index in range(40):
        scene, track, gravity, _ = play.simulate_clip(WORLD, seed, index)
        action = actions.action_of(WORLD, seed, index)
        late = [e for e in actions.events(scene, track, gravity) if e.frame >= 12]
        assert action == (late[0] if late else None)
        assert all(action.frame <= event.frame for event in late)
        found += action is not None
    assert found > 5


def test_a_world_has_its_actions_listed(tmp_path):
    """In a form that anticipation reads; other splits stay as they are."""
    config = get_config().world
    config.path, config.size, config.action_clips = str(tmp_path / "with"), 16, 12
    for key in config:
        if key.endswith("_videos") and config[key]:
            config[key] = 1
    render.render_world(config)
    listed = 0
    for name, count, part in (("actions_train", 12, 6), ("actions_test", 6, 7)):
        rows = read_actions(str(tmp_path / "with" / f"{name}_actions.csv"))
        contexts = Contexts(
            rows,
            np.zeros(len(rows)),
            config.path,
            anchor="paper",
            point=0.0,
            ahead_secs=1 / 3,
        )
        looks = World(size=16)
        wanted = [actions.action_of(looks, (0, part), i) for i in range(count)]
        having = [(i, event) for i, event in enumerate(wanted) if event]
        assert len(rows) == len(having)
        for place, (index, event) in enumerate(having):
            path = tmp_path / "with" / name / f"{index:06d}.mp4"
            assert contexts.path_of(place) == str(path) and path.exists()
            assert rows.start_frame[place] == event.frame
            assert rows.start_secs[place] == pytest.approx(event.frame / 12, abs=1e-3)
            assert (rows.verb[place], rows.noun[place]) == (
                event.verb,
                event.noun,
            )
        listed += len(rows)
    assert listed > 4
    with open(tmp_path / "with" / "actions_train_actions.csv", newline="") as file:
        row = next(csv.DictReader(file))
    shape, verb = row["narration"].split()
    assert shape == SHAPES[int(row["noun_class"])]
    assert verb == VERBS[int(row["verb_class"])]
    config.action_clips, config.path = 0, str(tmp_path / "without")
    render.render_world(config)
    for path in (tmp_path / "without").rglob("*.mp4"):
        twin = tmp_path / "with" / path.relative_to(tmp_path / "without")
        assert path.read_bytes() == twin.read_bytes()
