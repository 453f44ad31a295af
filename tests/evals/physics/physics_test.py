"""The surprise of a pretrained predictor, its scores, and the null beside it."""

import importlib.util
import math
import pathlib

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from physics_files import (
    SIZE,
    quadruplet,
    render_pairs,
    write_intphys,
    write_intphys2,
)
from sklearn.metrics import roc_auc_score
from surprise_setup import BATCH, make_model, plain_surprise

from vjepa_jax.base.errors import UserError
from vjepa_jax.evals import frozen, registry
from vjepa_jax.evals.physics import physics
from vjepa_jax.evals.physics.physics import Outcome, tabulate_outcomes, welch_p
from vjepa_jax.evals.physics.surprise import Protocol
from vjepa_jax.evals.physics.videos import open_groups, read_group

CONFIG = pathlib.Path(__file__).parents[3] / "configs" / "probe_physics.py"


@pytest.fixture(scope="module")
def model():
    return make_model()


# --------------------------------------------------------------------------- the scores


def losses_of(rng, num_windows, num_contexts=3):
    # Of few values, so that there are ties.
    return rng.integers(0, 4, (num_windows, num_contexts)).astype(np.float32)


@given(seed=st.integers(0, 2**32 - 1), context=st.sampled_from([None, 0, 1, 2]))
@settings(max_examples=30, deadline=None)
def test_scores_equal_a_plain_count(seed, context):
    rng = np.random.default_rng(seed)
    num_windows = int(rng.integers(1, 4))
    pair_losses = [
        (losses_of(rng, num_windows), losses_of(rng, num_windows)) for _ in range(6)
    ]
    singles = [(x, i == 0) for pair in pair_losses for i, x in enumerate(pair)]
    outcome = Outcome(pair_losses, singles)

    def of_windows(losses):
        return [min(row) if context is None else row[context] for row in losses]

    hits = []
    for possible, broken in pair_losses:
        ours, theirs = of_windows(possible), of_windows(broken)
        hits.append(sum(ours) < sum(theirs))
    np.testing.assert_array_equal(outcome.hits(context), hits)
    scores = [max(of_windows(losses)) for losses, _ in singles]
    wins = [
        1.0 if b > p else 0.5 if b == p else 0.0
        for b, (_, b_possible) in zip(scores, singles, strict=True)
        for p, (_, p_possible) in zip(scores, singles, strict=True)
        if p_possible and not b_possible
    ]
    assert math.isclose(outcome.auroc(context), sum(wins) / len(wins))


def make_outcomes(rng, num_pairs=8):
    outcomes = {}
    for name in ("gravity", "inertia"):
        rows = [(losses_of(rng, 2, 2), losses_of(rng, 2, 2)) for _ in range(num_pairs)]
        singles = [(x, i == 0) for pair in rows for i, x in enumerate(pair)]
        outcomes[name] = Outcome(rows, singles)
    return outcomes


def test_the_table_compares_with_the_null(rng):
    trained, null = make_outcomes(rng), [make_outcomes(rng) for _ in range(10)]
    table = tabulate_outcomes(trained, null, (4, 8), 1)
    share = {
        name: [np.mean(m[name].hits(1)) for m in [trained, *null]] for name in trained
    }
    for name, (own, *others) in share.items():
        row = table[name]
        assert row["accuracy"] == row["context_8_accuracy"] == own
        assert math.isclose(row["null_accuracy"], np.mean(others))
        assert math.isclose(row["null_std"], np.std(others, ddof=1))
        both = [trained[name].hits(1), np.ravel([m[name].hits(1) for m in null])]
        wanted = scipy.stats.ttest_ind(*both, equal_var=False).pvalue
        if np.ptp(both[0]):
            assert math.isclose(row["p_value"], wanted)
        assert row["filtered_accuracy"] == trained[name].hits(None).mean()
        options = [row[f"{k}_accuracy"] for k in ("context_4", "context_8", "filtered")]
        assert row["best_accuracy"] == max(options)
        scores = [x[:, 1].max() for x, _ in trained[name].videos]
        truth = [not possible for _, possible in trained[name].videos]
        assert math.isclose(row["auroc"], roc_auc_score(truth, scores))
    mean = table["mean"]
    per_seed = np.mean([values[1:] for values in share.values()], axis=0)
    assert math.isclose(mean["accuracy"], np.mean([v[0] for v in share.values()]))
    assert math.isclose(mean["null_accuracy"], per_seed.mean())
    assert math.isclose(mean["null_std"], per_seed.std(ddof=1))
    wanted = welch_p(
        np.array([v[0] for v in share.values()]),
        np.ravel([v[1:] for v in share.values()]),
    )
    assert math.isclose(mean["p_over_properties"], wanted)


def test_a_model_that_knows_differs_from_the_null(rng):
    low, high = np.zeros((1, 1)), np.ones((1, 1))
    knows = {"x": Outcome([(low, high)] * 20, [(low, True), (high, False)])}
    null = [make_outcomes(rng, 20) for _ in range(10)]
    null = [{"x": m["gravity"]} for m in null]
    row = tabulate_outcomes(knows, null, (4,), 0)["x"]
    assert row["accuracy"] == row["auroc"] == 1
    assert row["p_value"] < 1e-6
    assert "best_accuracy" not in row
    reversed_pairs = {"x": Outcome([(high, low)] * 20, [(high, True), (low, False)])}
    row = tabulate_outcomes(reversed_pairs, [], (4,), None)["x"]
    assert row == {"accuracy": 0.0, "auroc": 0.0}


def test_a_test_of_constants_is_a_number():
    assert welch_p(np.ones(3), np.ones(9)) == 1.0
    assert welch_p(np.ones(3), np.zeros(9)) == 0.0


# ---------------------------------------------------------------------- the whole of it


def make_evaluation(variant="world", **fields):
    spec = importlib.util.spec_from_file_location("probe_physics", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(variant)
    config.update({"batch_size": BATCH} | fields)
    return config


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    render_pairs(root)
    return root


def test_pairs_of_the_world_from_files_to_the_table(model, pairs):
    config = make_evaluation(
        path=str(pairs),
        num_frames=0,
        context_frames=(2, 4),
        reported_context=4,
        null_seeds=2,
    )
    config.groups_at_once = 7
    table = registry.evaluate(model, config)
    groups = open_groups("world", str(pairs))
    videos = [read_group(g, size=SIZE, frame_step=1) for g in groups]
    networks = [model, *(frozen.random_init(model, seed) for seed in (1, 2))]
    hits = {}
    for number, network in enumerate(networks):
        losses = plain_surprise(network, np.array(videos), Protocol(8, 2, (4,)))
        for group, scores in zip(groups, losses.mean((2, 3)), strict=True):
            hits.setdefault((number, group.property), []).append(scores[0] < scores[1])
    for name in dict.fromkeys(g.property for g in groups):
        assert table[name]["accuracy"] == np.mean(hits[0, name])
        null = [np.mean(hits[number, name]) for number in (1, 2)]
        assert math.isclose(table[name]["null_accuracy"], np.mean(null))
    assert list(table)[-1] == "mean" and len(table) == 10


def test_a_test_set_without_labels_gives_the_surprise_of_every_video(
    model, tmp_path, rng
):
    videos = quadruplet(rng)
    write_intphys(tmp_path, {"O1/0001": videos}, labels=[None] * 4)
    config = make_evaluation(
        "intphys", path=str(tmp_path), num_frames=0, frame_step=1, context_frames=(2, 4)
    )
    found = registry.evaluate(model, config)
    assert list(found) == [f"O1/0001/{i}" for i in (1, 2, 3, 4)]
    for video, scores in zip(videos, found.values(), strict=True):
        losses = plain_surprise(model, video, Protocol(8, 2, (2, 4))).min(1)
        np.testing.assert_allclose(scores["mean"], losses.mean(), rtol=1e-4)
        np.testing.assert_allclose(scores["max"], losses.max(), rtol=1e-4)


def plain_early(model, video, contexts):
    """Return each context's surprises: of shorter ones at the start, and of windows."""
    known = (2, 4, 6)
    losses = plain_surprise(model, video, Protocol(8, 2, known))
    columns = []
    for context in contexts:
        number = known.index(context)
        columns.append(np.concatenate([losses[0, :number], losses[:, number]]))
    return columns


def test_intphys2_from_files_to_the_table(model, tmp_path):
    scenes = {"0": "solidity", "1": "solidity", "2": "continuity"}
    decoded = write_intphys2(tmp_path, scenes)
    contexts = (2, 4, 6)
    config = make_evaluation(
        "intphys2",
        path=str(tmp_path),
        num_frames=0,
        frame_step=1,
        context_frames=contexts,
        reported_context=6,
        null_seeds=0,
    )
    table = registry.evaluate(model, config)
    assert list(table) == ["continuity", "solidity", "mean"]
    hits = {}
    for scene, condition in scenes.items():
        for pair in (0, 2):
            both = [
                plain_early(model, decoded[f"{scene}_{pair + i}.mp4"], contexts)
                for i in (0, 1)
            ]
            for context, good, bad in zip(contexts, *both, strict=True):
                hit = good.mean() < bad.mean()
                hits.setdefault((condition, context), []).append(hit)
    for condition in ("continuity", "solidity"):
        for context in contexts:
            found = table[condition][f"context_{context}_accuracy"]
            assert found == np.mean(hits[condition, context])
        assert table[condition]["accuracy"] == np.mean(hits[condition, 6])


def test_early_contexts_are_rows_of_the_first_window(model, rng):
    video = rng.integers(0, 256, (12, SIZE, SIZE, 3), np.uint8)
    protocol = Protocol(8, 2, (2, 4, 6))
    (found,) = physics.with_early_contexts(model, [video], protocol, BATCH)
    windows = plain_surprise(model, video, protocol)
    inf = np.inf
    first = windows[0]
    early = [[inf, first[0], first[0]], [inf, inf, first[1]]]
    np.testing.assert_allclose(found, [*early, *windows], rtol=1e-4)
    outcome = Outcome([(found, found + 1)], [(found, True), (found + 1, False)])
    assert [outcome.hits(c).tolist() for c in (None, 0, 1, 2)] == [[1.0]] * 4
    assert outcome.auroc(1) == 1


def test_intphys2_without_labels_names_its_videos(model, tmp_path):
    write_intphys2(tmp_path, {"0": "solidity"})
    (tmp_path / "metadata.csv").unlink()
    config = make_evaluation(
        "intphys2",
        path=str(tmp_path),
        num_frames=0,
        frame_step=1,
        context_frames=(2, 4, 6),
    )
    found = registry.evaluate(model, config)
    assert list(found) == [f"{tmp_path.name}/0_{i}.mp4" for i in range(4)]
    assert all(np.isfinite(list(row.values())).all() for row in found.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frames": 3}, r"num_frames=3.*a multiple of the 2 frames"),
        ({"stride": 0}, "stride=0"),
        ({"context_frames": (8,)}, r"context_frames=\(8,\).*below the window's 8"),
        ({"context_frames": (3,)}, "multiples of the 2 frames"),
        ({"context_frames": ()}, "context_frames"),
        ({"reported_context": 6}, "reported_context=6: give 0 or one of"),
        ({"null_seeds": 1}, "null_seeds=1"),
        ({"null_seeds": -1}, "null_seeds=-1 is out of range: give zero or a"),
        ({"groups_at_once": 0}, "groups_at_once=0 is out of range"),
        ({"frame_step": 0}, "frame_step=0 is out of range"),
        ({"mask_index": 2}, "mask_index=2: the predictor has 2 mask tokens, counted"),
        ({"num_frames": 14}, "12 frames are fewer than"),
    ],
)
def test_a_protocol_that_does_not_fit_is_named(model, pairs, fields, message):
    base = {"num_frames": 0, "context_frames": (4,), "reported_context": 0}
    fields = base | fields
    config = make_evaluation(path=str(pairs), **fields)
    with pytest.raises(UserError, match=message):
        physics.evaluate(model, config)


def test_variants_are_of_known_data():
    for variant in ("world", "intphys", "intphys2", "grasp", "inflevel"):
        config = make_evaluation(variant)
        assert config.dataset == variant and config.name == f"physics_{variant}"
        assert config.null_seeds >= 10
        reported = config.reported_context
        assert reported == 0 or reported in config.context_frames
    with pytest.raises(UserError, match="known: world"):
        open_groups(make_evaluation("novel").dataset, ".")
