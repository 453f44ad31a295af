"""The state that the world's probes predict follows from the clips' physics."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from colour_videos import make_frozen

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import get_config
from vjepa_jax.data.stream import streams
from vjepa_jax.evals import settings
from vjepa_jax.evals.heads import probes
from vjepa_jax.evals.tokens.features import Features
from vjepa_jax.evals.world_state import (
    MEASURES,
    State,
    evaluate,
    measure,
    read_state,
)
from vjepa_jax.parallel import sharding
from vjepa_jax.world import motion as world
from vjepa_jax.world import render
from vjepa_jax.world.motion import CLASSES

NUM_CLIPS, TIME_STEPS, STRIDE = 66, 4, 2


@pytest.fixture(scope="module")
def world_truth(tmp_path_factory):
    """(config, split, simulated position, velocity and label of its clips)."""
    config = get_config()
    config.world.path = str(tmp_path_factory.mktemp("world"))
    config.world.seed = 5
    config.data.num_frames, config.data.frame_step, config.data.resolution = 8, 1, 32
    split = next(s for s in render.splits(config.world) if s.name == "probe_test")
    looks = render.looks_of(config.world)
    truth = {"position": [], "velocity": [], "visibility": [], "label": []}
    for index in range(NUM_CLIPS):
        label = index % len(CLASSES)
        scene, motion = world.draw_clip(looks, split.seed, index, label)
        position, velocity, *_ = world.simulate(looks, scene, motion)
        shares = np.arange(position.shape[0] * position.shape[1]) / 100
        for key, value in (
            ("position", position),
            ("velocity", velocity),
            ("visibility", shares.reshape(position.shape[:2])),
            ("label", label),
        ):
            truth[key].append(value)
    truth = {k: np.asarray(v, np.float32) for k, v in truth.items()}
    truth["label"] = truth["label"].astype(np.int64)
    np.savez(f"{config.world.path}/{split.name}.npz", **truth)
    return config, split, truth


def test_state_is_that_of_the_frames_that_are_seen(world_truth):
    config, split, truth = world_truth
    reader = streams.make_reader(config.data, config.data)
    (frames,) = reader.sampling.frames(np.arange(16))
    index = np.arange(NUM_CLIPS)[::STRIDE]
    state = read_state(config.world, split, index, reader, TIME_STEPS)
    for step in range(TIME_STEPS):
        seen = frames[2 * step : 2 * step + 2]
        for name in ("position", "velocity", "visibility"):
            wanted = truth[name][index][:, seen, 0].mean(1)
            np.testing.assert_allclose(getattr(state, name)[:, step], wanted, rtol=1e-5)
    assert np.isnan(state.time_to_collision[:, :-1]).all()
    # The end of the video, which is not seen, shows the collisions that are predicted.
    last = frames[-1]
    assert last < 15
    known = 0
    for row, clip in enumerate(index):
        _, motion = world.draw_clip(
            render.looks_of(config.world), split.seed, clip, truth["label"][clip]
        )
        found = state.time_to_collision[row, -1, 0]
        change = np.diff(truth["velocity"][clip, last:, 0], axis=0)
        change = np.abs(change - (0.0, motion.gravity)).max(1) > 1e-5
        if motion.growth[0]:
            assert math.isnan(found)
        elif change.any():
            assert found == change.argmax() + 0.5
            known += 1
        else:
            assert math.isnan(found) or found > 15 - last
    assert known > 2


def make_split(rng, count):
    """Features whose tokens hold the state in some channels, and noise in others."""
    state = State(
        rng.normal(size=(count, 2, 2)),
        rng.normal(size=(count, 2, 2)),
        np.tile([0.1, 0.9], (count, 1)),
        np.full((count, 2, 1), np.nan),
    )
    meets = rng.uniform(size=count) < 0.7
    state.time_to_collision[meets, -1, 0] = rng.uniform(0, 16, meets.sum())
    parts = state.position, state.velocity, np.nan_to_num(state.time_to_collision)
    channels = np.concatenate([*parts, rng.normal(size=(count, 2, 3))], axis=-1)
    tokens = channels[:, :, None] + rng.normal(0, 0.1, (count, 2, 4, 8))
    labels = rng.permutation(np.arange(count) % 3)
    return Features(tokens.astype(np.float32), labels, np.arange(count)), state


def measured(splits, epochs, batch_size, **options):
    training = probes.ProbeTraining(
        num_heads=2,
        epochs=epochs,
        batch_size=batch_size,
        learning_rates=(1e-2,),
        weight_decay=0.0,
        seed=0,
        mesh=sharding.make_mesh(devices=jax.devices()[:1]),
    )
    heads = {"attentive": training, "regression": training}
    return measure(splits, draws=1, seed=0, **heads, **options)


def test_every_measure_finds_what_the_features_hold(rng):
    splits = {
        f"{kind}_{part}": make_split(rng, 600 if part == "train" else 200)
        for kind in ("probe", "hidden")
        for part in ("train", "test")
    }
    options = {"labels_per_class": 4, "hidden_visibility": 0.2}
    found = measured(splits, epochs=12, batch_size=32, **options)
    assert np.sum(found.pop("confusion")) == len(splits["probe_test"][0].labels)
    assert tuple(found) == MEASURES
    for name, value in found.items():
        if name.endswith("r2"):
            assert value > (0.5 if name.startswith("attentive") else 0.95), name
        else:  # the labels are in none of the channels
            assert value < 0.6, name


def test_too_few_labels_are_reported_before_encoding(tmp_path):
    config = settings.world()
    run = get_config()
    run.world.path = str(tmp_path)
    (tmp_path / "probe_train.npz").touch()
    videos = [tmp_path / f"{i}.mp4" for i in range(22)]
    videos[0].touch()
    lines = [f"{video} {i % 11}\n" for i, video in enumerate(videos)]
    (tmp_path / "probe_train.csv").write_text("".join(lines))
    model = dataclasses.replace(make_frozen(depth=1), config=run)
    message = r"config\.labels_per_class asks for 16 .* has 2 readable"
    with pytest.raises(UserError, match=message):
        evaluate(model, config)


def test_confusion_of_the_world_counts_the_attentive_probe(rng, monkeypatch):
    said = rng.integers(0, 11, 25)
    monkeypatch.setattr(probes, "attentive_classes", lambda *_: said)
    state = dict.fromkeys(("position", "velocity", "time_to_collision"), 0.0)
    monkeypatch.setattr(probes, "attentive_r2", lambda *_: state)

    def split(count):
        labels = np.arange(count) % 11
        tokens = rng.normal(size=(count, 2, 2, 4)).astype(np.float32)
        tokens[..., 0] += labels[:, None, None]
        of_clips = Features(tokens, labels, np.arange(count))
        state = rng.normal(size=(count, 2, 2))
        return of_clips, State(state, state, np.zeros((count, 2)), state[..., :1])

    names = ("probe_train", "probe_test", "hidden_train", "hidden_test")
    splits = {
        name: split(count) for name, count in zip(names, (44, 25, 22, 22), strict=True)
    }
    options = {"labels_per_class": 2, "hidden_visibility": 0.5}
    found = measured(splits, epochs=1, batch_size=8, **options)
    wanted = np.zeros((11, 11), int)
    np.add.at(wanted, (np.arange(25) % 11, said), 1)
    assert found["confusion"] == wanted.tolist()
    assert found["attentive_accuracy"] == pytest.approx(np.trace(wanted) / 25)
