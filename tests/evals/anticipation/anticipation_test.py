"""Actions are anticipated, scored and reported by the protocol."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kitchen_files import SIDE, write_annotations, write_kitchen
from sklearn.metrics import top_k_accuracy_score
from sklearn.utils.class_weight import compute_sample_weight
from step_setup import one_device

from vjepa_jax.base.errors import UserError
from vjepa_jax.evals import registry, settings
from vjepa_jax.evals.anticipation import anticipation
from vjepa_jax.evals.anticipation.anticipation import (
    Anticipator,
    make_loss,
    measure_heads,
)
from vjepa_jax.evals.anticipation.epic_kitchens import Classes
from vjepa_jax.evals.classification import Predictions
from vjepa_jax.evals.frozen import FrozenModel
from vjepa_jax.evals.tokens import token_cache
from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.models.heads import AttentiveClassifier
from vjepa_jax.models.predictor import Predictor

CLASSES = Classes(
    verbs=np.array([0, 4, 7]),
    nouns=np.arange(5),
    actions=np.array([[v, n] for v in (0, 4, 7) for n in range(5)][:13]),
)


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory):
    root = tmp_path_factory.mktemp("kitchen")
    return root, write_kitchen(root, num_videos=24)


@pytest.fixture(scope="module")
def frozen():
    """Return an untrained model, whose features still distinguish colours."""
    encoder = VideoEncoder(depth=2, width=16, num_heads=2, mlp_dim=32, patch_size=8)
    predictor = Predictor(depth=1, width=16, num_heads=2, mlp_dim=32, out_dim=16)
    shape = (8, SIDE, SIDE, 3)

    @jax.jit
    def init(key):
        weights = encoder.init(key, jnp.zeros((1, *shape)))["params"]
        one = jnp.zeros((1, 1), jnp.int32)
        args = jnp.zeros((1, 1, 16)), one, one, (4, 2, 2)
        of_predictor = predictor.init(key, *args)["params"]
        return nn.unbox({"target": weights, "predictor": of_predictor})

    params = init(jax.random.key(0))
    tokens = np.random.default_rng(0).normal(0, 1, (2, 16)).astype(np.float32)
    params["predictor"]["mask_tokens"] = tokens
    return FrozenModel(encoder, predictor, params, None, shape, one_device())


def make_config(kitchen):
    config = settings.anticipation()
    config.data.train_path = str(kitchen[0] / "EPIC_100_train.csv")
    config.data.test_path = str(kitchen[0] / "EPIC_100_test.csv")
    config.data.videos_path = str(kitchen[0])
    config.data.update(num_frames=8, fps=5.0, resolution=SIDE, num_workers=0)
    config.data.update(augment=False, held_out_share=0.2, anchors=("paper",))
    config.update(epochs=1, batch_size=16, test_batch_size=16)
    config.head.update(depth=1, num_heads=2)
    config.grids.main.update(learning_rates=(3e-2, 1e-4), weight_decays=(0.01,))
    return config


@pytest.fixture
def config(kitchen):
    return make_config(kitchen)


@pytest.fixture(scope="module")
def found_at_first(kitchen, frozen):
    """Results of the unchanged config."""
    return anticipation.evaluate(frozen, make_config(kitchen))


def of_paper(found):
    return {name: columns["paper"] for name, columns in found.items()}


# ----------------------------------------------------------------------------- measures


def test_recall_is_averaged_over_classes(rng):
    """Compare with scikit-learn, and with a loop over classes."""
    labels = rng.choice(10, 200, p=np.arange(1, 11) / 55)  # some classes never occur
    best, scores = {}, {}
    for name, count in (("verb", 3), ("noun", 5), ("action", 13)):
        scores[name] = rng.normal(size=(2, 200, count))
        best[name] = np.argsort(-scores[name])[..., :5]
    found = measure_heads(Predictions(labels, best), CLASSES)
    for name, table in CLASSES.tables().items():
        of_name = table[labels]
        weights = compute_sample_weight("balanced", of_name)
        count = scores[name].shape[-1]
        for head in range(2):
            for k, keys in (
                (5, (f"{name}_recall_at_5", f"{name}_top5_accuracy")),
                (1, (f"{name}_class_mean_accuracy", f"{name}_accuracy")),
            ):
                for key, w in zip(keys, (weights, None), strict=True):
                    if k >= count:
                        assert found[key][head] == 1
                        continue
                    wanted = top_k_accuracy_score(
                        of_name,
                        scores[name][head],
                        k=k,
                        labels=np.arange(count),
                        sample_weight=w,
                    )
                    assert found[key][head] == pytest.approx(wanted)
            shares = []
            for c in sorted(set(of_name.tolist())):
                rows = best[name][head][of_name == c]
                shares.append(np.mean([c in row for row in rows.tolist()]))
            assert found[f"{name}_recall_at_5"][head] == pytest.approx(np.mean(shares))


def test_loss_is_the_focal_loss_of_all_three(rng):
    logits = {
        name: rng.normal(0, 3, (6, count)).astype(np.float32)
        for name, count in (("verb", 3), ("noun", 5), ("action", 13))
    }
    labels = rng.integers(0, 13, 6)
    found = jax.jit(make_loss(CLASSES))(logits, labels)
    wanted = np.zeros(6)
    for name, table in CLASSES.tables().items():
        for row in range(6):
            for c, x in enumerate(logits[name][row].astype(float)):
                p = 1 / (1 + np.exp(-x))
                if c == table[labels[row]]:
                    wanted[row] -= 0.25 * (1 - p) ** 2 * np.log(p)
                else:
                    wanted[row] -= 0.75 * p**2 * np.log(1 - p)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_each_query_has_a_linear_layer_of_its_own(rng):
    """Compute cross-attention, its MLP and the output layers in plain NumPy."""
    head = AttentiveClassifier(
        0, num_heads=2, outputs=(("verb", 3), ("noun", 5), ("action", 7))
    )
    tokens = rng.normal(size=(2, 6, 8))
    params = nn.unbox(jax.jit(head.init)(jax.random.key(0), tokens)["params"])
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape), params)
    found = jax.jit(head.apply)({"params": params}, tokens.astype(np.float32))

    def norm(x, of):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * of["scale"] + of["bias"]

    def linear(x, of):
        return x @ of["kernel"] + of["bias"]

    def gelu(x):
        erf = np.vectorize(__import__("math").erf)
        return x * 0.5 * (1 + erf(x / np.sqrt(2)))

    for row in range(2):
        kv = linear(norm(tokens[row], params["norm1"]), params["kv"])
        q = linear(params["query"][0], params["q"])
        parts = []
        for part in (slice(0, 4), slice(4, 8)):
            k, v = kv[:, :8][:, part], kv[:, 8:][:, part]
            weights = np.exp(q[:, part] @ k.T / 2)
            parts.append(weights / weights.sum(1, keepdims=True) @ v)
        x = params["query"][0] + np.concatenate(parts, axis=1)
        hidden = gelu(linear(norm(x, params["norm2"]), params["fc1"]))
        x = x + linear(hidden, params["fc2"])
        for query, name in enumerate(("verb", "noun", "action")):
            wanted = linear(x[query], params[f"{name}_linear"])
            np.testing.assert_allclose(found[name][row], wanted, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------- tokens


def test_time_ahead_is_rounded_down_to_steps_of_tokens(rng, frozen):
    """At 8 frames per second and tubelets of 2, a second is 4 steps."""
    video = rng.integers(0, 256, (5, *frozen.video_shape), dtype=np.uint8)
    see = Anticipator(frozen, 2, 8.0, 2, 1, True)
    found = see(video, np.array([1.0, 0.24, 0.25, 1.7499, 0.75 - 1e-12]))
    wanted = frozen.anticipate(video, [4, 0, 1, 6, 3], 1, 1)
    assert found.shape == (5, (4 + 1) * 4, 16)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    longer = dataclasses.replace(see, num_output_frames=5)
    assert longer(video, np.ones(5)).shape == (5, (4 + 2) * 4, 16)
    shorter = dataclasses.replace(see, num_output_frames=1)
    np.testing.assert_allclose(shorter(video, np.ones(5))[0], found[0], atol=1e-5)
    alone = dataclasses.replace(see, use_predictor=False)(video, np.ones(5))
    np.testing.assert_allclose(alone, found[:, :16], atol=1e-5)


# --------------------------------------------------------------------------- evaluation


def test_anticipation_is_learned_with_both_anchors(tmp_path, frozen, config):
    config.data.anchors = ("paper", "released")
    config.cache.path = str(tmp_path)
    config.update(epochs=25, evaluation="anticipation")
    found = registry.evaluate(frozen, config)
    assert found["actions_tested"] == {"paper": 36, "released": 36}
    for anchor in config.data.anchors:
        require_learned({name: columns[anchor] for name, columns in found.items()})


def test_anticipation_is_learned_from_what_is_drawn_anew(frozen, config):
    """Times and crops are drawn in every epoch."""
    config.data.update(augment=True, rand_augment="", erase_probability=0.0)
    config.data.update(train_anticipation_secs=(0.5, 1.2), crop_scale=(0.5, 1.0))
    config.epochs = 20
    require_learned(of_paper(anticipation.evaluate(frozen, config)))


def require_learned(found):
    assert found["verb_class_mean_accuracy"] > 0.7  # chance: a third
    assert found["noun_class_mean_accuracy"] > 0.6
    assert found["action_recall_at_5"] > 0.8  # chance: 5 of 9
    assert found["chosen_head"] == 1  # the other's rate is too low to learn anything
    key = "official_best_on_test_action_recall_at_5"
    assert found[key] >= found["action_recall_at_5"]
    other = next(v for k, v in found.items() if k.startswith("head 2") and "test" in k)
    assert other < found["action_recall_at_5"] - 0.2


def test_times_are_drawn_anew_in_each_epoch_from_the_seed(frozen, config, monkeypatch):
    config.data.augment, config.epochs = True, 2
    batches, made = anticipation._training_batches, []

    def recorded(prepare, contexts, fit, per_epoch):
        def noted(*args):
            made.append(args)
            return contexts(*args)

        return batches(prepare, noted, fit, per_epoch)

    monkeypatch.setattr(anticipation, "_training_batches", recorded)
    first, again = (anticipation.evaluate(frozen, config) for _ in range(2))
    assert first == again and len(made) == 4
    for actions, point, ahead_secs in made:
        count = first["actions_fitted"]["paper"]
        assert len(actions) == len(point) == len(ahead_secs) == count
        assert point.min() >= 0 and 0.1 < point.max() < 0.25
        assert 0.25 <= ahead_secs.min() < 0.6 and 1.4 < ahead_secs.max() < 1.75
    for place in (1, 2):
        assert (made[0][place] != made[1][place]).all()
        np.testing.assert_array_equal(made[0][place], made[2][place])


def test_cached_equals_on_the_fly(
    tmp_path, frozen, config, found_at_first, monkeypatch
):
    """The second time nothing is computed."""
    config.cache.path = str(tmp_path)
    assert anticipation.evaluate(frozen, config) == found_at_first
    monkeypatch.setattr(FrozenModel, "anticipate", None)
    assert anticipation.evaluate(frozen, config) == found_at_first


def test_the_cache_is_of_the_predictor_as_well(frozen):
    tokens = frozen.params["predictor"]["mask_tokens"]
    changed = frozen.params["predictor"] | {"mask_tokens": tokens + 1}
    other = dataclasses.replace(
        frozen, params=dict(frozen.params) | {"predictor": changed}
    )
    for with_predictor in (False, True):
        digests = {
            token_cache.weights_digest(model, with_predictor)
            for model in (frozen, other)
        }
        assert len(digests) == 1 + with_predictor


def test_what_cannot_be_judged_is_left_out_and_counted(
    tmp_path, kitchen, frozen, config, found_at_first
):
    """The test actions do not change which head is chosen."""
    _, lists = kitchen
    wanted = of_paper(found_at_first)
    rows = [*lists["test"][:20]]
    rows += [("P01_20", 5.0, 6.0, 5, 99), ("P01_20", 5.0, 6.0, 77, 3)]
    rows += [("P01_55", 5.0, 6.0, *rows[0][3:])]  # there is no such video
    config.data.test_path = write_annotations(tmp_path / "test.csv", rows)
    found = of_paper(anticipation.evaluate(frozen, config))
    assert found["actions_unknown"] == 2 and found["actions_unreadable"] == 1
    assert found["actions_tested"] == 20 and wanted["actions_tested"] == 36
    same = [key for key in wanted if "held" in key or key == "chosen_head"]
    assert len(same) == 5
    assert {k: found[k] for k in same} == {k: wanted[k] for k in same}


def test_an_untrained_model_stands_beside(frozen, config, monkeypatch):
    config.random_init, config.data.anchors = True, ("released", "paper")
    monkeypatch.setattr(anticipation, "random_init", lambda model, seed: "untrained")
    monkeypatch.setattr(
        anticipation, "_evaluate", lambda model, _, anchor: {"is": (model, anchor)}
    )
    found = anticipation.evaluate(frozen, config)["is"]
    assert list(found) == ["released", "released_random", "paper", "paper_random"]
    assert found["paper"] == (frozen, "paper")
    assert found["paper_random"] == ("untrained", "paper")


def test_without_a_predictor_the_message_names_the_fix(frozen, config):
    params = {"target": frozen.params["target"]}
    alone = dataclasses.replace(frozen, predictor=None, params=params)
    with pytest.raises(UserError, match=r"no predictor.*config\.use_predictor=False"):
        anticipation.evaluate(alone, config)
    config.use_predictor = False
    config.data.val_path = config.data.test_path  # actions given to choose by
    found = of_paper(anticipation.evaluate(alone, config))
    assert found["actions_tested"] == found["actions_held_out"] == 36
    assert found["actions_fitted"] == 108
    assert found["held_out_action_recall_at_5"] == found["action_recall_at_5"]


@pytest.mark.parametrize("mask_index", [0, 1])
def test_an_untrained_mask_token_is_warned_of(frozen, caplog, mask_index):
    tokens = np.array(frozen.params["predictor"]["mask_tokens"])
    tokens[1] = 0
    changed = frozen.params["predictor"] | {"mask_tokens": tokens}
    params = dict(frozen.params) | {"predictor": changed}
    with caplog.at_level("WARNING"):
        anticipation._check_predictor(
            dataclasses.replace(frozen, params=params), mask_index
        )
    assert ("never trained" in caplog.text) == (mask_index == 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.anchors": ("middle",)}, "anchors=.*known: paper, released"),
        ({"data.anchors": ()}, "anchors="),
        ({"data.train_path": ""}, r"data\.train_path is not set"),
        ({"data.videos_path": ""}, r"data\.videos_path is not set"),
        ({"data.fps": 0.0}, r"data\.fps"),
        ({"data.num_frames": 7}, "cannot be cut into tubelets"),
        ({"data.anticipation_secs": -1.0}, "anticipation_secs=-1.0 is out of range"),
        ({"data.train_anticipation_secs": (2.0, 1.0)}, "give 0 <= low <= high"),
        ({"data.train_anticipation_point": (0.0, 1.5)}, "low <= high <= 1"),
        ({"mask_index": 2}, "mask_index=2: the predictor has 2"),
        ({"num_output_frames": 0}, "num_output_frames=0 is out of range"),
        ({"head.num_heads": 3}, "does not divide the 16 channels"),
        ({"batch_size": 500}, "batch_size=500 exceeds the"),
        ({"data.augment": True, "cache.path": "x"}, "set config.data.augment=False"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(frozen, config, changes, message):
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message) as error:
        anticipation.evaluate(frozen, config)
    assert "\n" not in str(error.value)


def test_one_action_alone_is_refused(tmp_path, frozen, config):
    rows = [("P01_01", start, start + 1, 3, 4) for start in (5.0, 7.0)]
    config.data.train_path = write_annotations(tmp_path / "train.csv", rows)
    with pytest.raises(UserError, match=r"all 2 actions of .* one verb and one noun"):
        anticipation.evaluate(frozen, config)


def test_a_test_of_another_data_set_is_refused(tmp_path, frozen, config):
    rows = [("P01_01", 5.0, 6.0, 88, 99)]
    config.data.test_path = write_annotations(tmp_path / "test.csv", rows)
    with pytest.raises(UserError, match=r"no action that occurs in config\.data\.tra"):
        anticipation.evaluate(frozen, config)
