"""Neighbours vote as scikit-learn's, few shots are few, health is what was written."""

import dataclasses
import pathlib

import numpy as np
import pytest
from colour_videos import make_frozen, write_videos
from sklearn.neighbors import KNeighborsClassifier

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import get_config
from vjepa_jax.evals import health, neighbours, settings


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_votes_are_those_of_scikit_learn(rng, temperature):
    train, test = (rng.normal(size=(n, 6)) for n in (90, 53))
    labels, truth = (rng.integers(0, 7, n) for n in (90, 53))
    ks = (1, 5, 20, 200)
    found = neighbours.knn_accuracies(
        train, labels, test, truth, ks, temperature, queries_at_once=20
    )
    assert set(found) == {f"knn_{k}_accuracy" for k in ks[:-1]}
    for k in ks[:-1]:
        model = KNeighborsClassifier(
            k,
            metric="cosine",
            weights=lambda distance: np.exp((1 - distance) / temperature),
        )
        wanted = model.fit(train, labels).score(test, truth)
        # One video of 53 may fall on the other side of a tie that rounding breaks.
        assert abs(found[f"knn_{k}_accuracy"] - wanted) < 1.5 / 53


def test_with_few_videos_all_of_them_vote(rng):
    train, labels = rng.normal(size=(7, 3)), np.arange(7) % 2
    # All with the same weight: the class that has four of the seven wins everywhere.
    found = neighbours.knn_accuracies(train, labels, train, labels, (10, 20), 1e6)
    assert found == {"knn_7_accuracy": pytest.approx(4 / 7)}


def test_few_shots_learn_what_there_is(rng):
    centres = 5 * np.eye(4)
    labels, truth = (np.repeat(np.arange(4), n) for n in (12, 30))
    train, test = (
        centres[y] + rng.normal(0, 0.3, (len(y), 4)) for y in (labels, truth)
    )
    arguments = ((1, 5), 6, int(rng.integers(99)))
    found = neighbours.few_shot_accuracies(train, labels, test, truth, *arguments)
    accuracies = [v for k, v in found.items() if k.endswith("accuracy")]
    assert len(accuracies) == 4 and min(accuracies) > 0.95
    noise = rng.normal(size=train.shape)
    found = neighbours.few_shot_accuracies(noise, labels, test, truth, *arguments)
    assert found["few_shot_1_linear_accuracy"] < 0.6
    assert found["few_shot_1_nearest_mean_spread"] > 0


def test_few_shots_use_so_many_labels_and_the_nearest_mean(rng):
    """Of one video per class, the nearest mean is the nearest neighbour."""
    train, test = rng.normal(size=(3, 5)), rng.normal(size=(40, 5))
    labels, truth = np.arange(3), rng.integers(0, 3, 40)
    found = neighbours.few_shot_accuracies(train, labels, test, truth, (1,), 2, 0)
    (nearest,) = neighbours.knn_accuracies(
        train, labels, test, truth, (1,), 0.07
    ).values()
    assert found["few_shot_1_nearest_mean_accuracy"] == pytest.approx(nearest)
    assert found["few_shot_1_nearest_mean_spread"] == 0


@pytest.mark.parametrize(("videos", "clips", "width"), [(2, 2, 3), (9, 4, 6)])
def test_alignment_and_uniformity_are_their_definitions(rng, videos, clips, width):
    tokens = rng.normal(size=(videos, clips, 3, width))
    pooled = tokens.mean(2)
    found = health.measure(tokens, pooled)
    unit = pooled / np.linalg.norm(pooled, axis=-1, keepdims=True)
    within, across = [], []
    for i in range(videos):
        for j in range(videos):
            for a in range(clips):
                for b in range(clips):
                    distance = np.square(unit[i, a] - unit[j, b]).sum()
                    if i == j and a < b:
                        within.append(distance)
                    if i < j and a == b:
                        across.append(distance)
    assert found["alignment"] == pytest.approx(np.mean(within), rel=1e-4)
    wanted = np.log(np.mean(np.exp(-2 * np.array(across))))
    assert found["uniformity"] == pytest.approx(wanted, rel=1e-4)
    flat = tokens.reshape(-1, width)
    assert found["token_std"] == pytest.approx(flat.std(0).mean(), rel=1e-3)
    spectrum = np.linalg.eigvalsh(np.cov(pooled.reshape(-1, width).T))
    rank = spectrum.sum() ** 2 / np.square(spectrum).sum()
    assert found["pooled_effective_rank"] == pytest.approx(rank, rel=1e-2)


@pytest.fixture(scope="module")
def frozen():
    return make_frozen(depth=1)


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("videos"), "list", 12)


def test_evaluations_stand_beside_an_untrained_encoder(frozen, listed):
    config = settings.neighbours()
    config.data.update(train_path=listed, test_path=listed, frame_step=1, num_workers=0)
    config.data.update(num_clips=2, num_views=2)
    config.update(k=(1, 3), shots=(1, 2), draws=2, clips_per_call=16)
    found = neighbours.evaluate(frozen, config)
    assert found["knn_1_accuracy"] == {"pretrained": 1.0, "random_init": 1.0}
    assert found["videos_tested"] == {"pretrained": 12, "random_init": 12}
    assert set(found["few_shot_2_linear_accuracy"]) == {"pretrained", "random_init"}
    config.shots = (1, 5)
    with pytest.raises(UserError, match=r"config\.shots asks for 5 .* '0' has 4 "):
        neighbours.evaluate(frozen, config)
    unlabelled = pathlib.Path(listed).with_name("unlabelled.csv")
    unlabelled.write_text(pathlib.Path(listed).read_text().replace(" 0\n", " -1\n"))
    config.data.test_path = str(unlabelled)
    with pytest.raises(UserError, match="has the label -1, and labels count from 0"):
        neighbours.evaluate(frozen, config)


def test_health_reads_a_spread_of_the_videos(frozen, listed, monkeypatch):
    config = settings.health()
    config.data.update(test_path=listed, frame_step=1, num_workers=0)
    config.update(num_videos=5, tokens_per_clip=3, random_init=False)
    seen = []
    measure = health.measure
    monkeypatch.setattr(health, "measure", lambda *a: seen.append(a) or measure(*a))
    found = health.evaluate(frozen, config)
    assert [part.shape for part in seen[0]] == [(5, 2, 3, 16), (5, 2, 16)]
    assert 1 <= found["token_effective_rank"]["pretrained"] <= 16


def test_health_without_videos_takes_the_run_s(frozen, listed):
    config, run = settings.health(), get_config()
    config.data.num_workers, config.random_init = 0, False
    run.data.path, run.data.frame_step = listed, 1
    model = dataclasses.replace(frozen, config=run)
    found = health.evaluate(model, config)
    # The same said in the evaluation's config; four frames apart is another clip.
    config.data.update(test_path=listed, frame_step=1)
    assert health.evaluate(frozen, config) == found
    config.data.frame_step = 4
    assert health.evaluate(frozen, config) != found
    config.data.test_path = run.data.path = ""
    with pytest.raises(UserError, match=r"config\.data\.test_path is not set"):
        health.evaluate(model, config)
