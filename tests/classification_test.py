"""Heads on frozen features are trained, chosen and judged as their protocol says."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import video_files
from sklearn.metrics import top_k_accuracy_score
from step_setup import one_device

from vjepa_jax import sharding
from vjepa_jax.data.records import Source
from vjepa_jax.data.subset import Subset, hold_out
from vjepa_jax.default_config import UserError
from vjepa_jax.evals import classification, clip_tokens, settings, token_cache
from vjepa_jax.evals.frozen import Frozen
from vjepa_jax.evals.head_grid import HeadGrid, Schedules
from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.models.heads import AttentiveClassifier, LinearClassifier

CLASSES = 3
SIDE = 16


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Write videos whose class is a colour, and lists to train on and to test by."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("test", 19)):
        lines = []
        for i in range(count):
            label = i % CLASSES
            frames = rng.integers(0, 60, (12, 32, 48, 3), dtype=np.uint8)
            frames[..., label] += 150
            path = video_files.write_video(folder / f"{name}{i}.mp4", frames)
            lines.append(f"{path} {label}\n")
        (folder / f"{name}.csv").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def frozen():
    encoder = VideoEncoder(depth=3, width=16, num_heads=2, mlp_dim=32, patch_size=8)
    shape = (4, SIDE, SIDE, 3)
    init = jax.jit(encoder.init)
    params = nn.unbox(init(jax.random.key(0), jnp.zeros((1, *shape))))
    mesh = sharding.make_mesh()
    return Frozen(encoder, None, {"target": params["params"]}, None, shape, mesh)


@pytest.fixture
def config(videos):
    config = settings.classification()
    config.data.train_path = str(videos / "train.csv")
    config.data.test_path = str(videos / "test.csv")
    config.data.update(num_frames=4, frame_step=1, resolution=SIDE, num_workers=0)
    config.data.update(augment=False, held_out_share=0.2)
    config.update(epochs=2, batch_size=8, test_batch_size=16)
    config.head.update(kind="linear", depth=1, num_heads=2)
    config.grids.main.update(learning_rates=(0.3, 1e-3), weight_decays=(0.01, 0.4))
    return config


class Numbered(Source):
    """Records that need no files."""

    name = "numbered"

    def __init__(self, paths):
        self._paths = paths
        self.labels = np.arange(len(paths))

    def __len__(self):
        return len(self._paths)

    def __getitem__(self, index):
        raise NotImplementedError

    def path_of(self, index):
        return self._paths[index]

    def digest(self):
        return "numbered"


@pytest.mark.parametrize("kind", ["attentive", "linear"])
def test_grid_equals_heads_trained_one_by_one(rng, kind):
    """With warm-up, decay and clipping; also where some are in memory together."""
    head = LinearClassifier(5)
    if kind == "attentive":
        head = AttentiveClassifier(5, num_heads=2)
    groups = [
        Schedules((3e-3,), (0.1, 0.8)),
        Schedules((1e-2,), (0.5,), 1e-3, warmup_steps=2, final_weight_decay_share=0.1),
    ]
    steps, num_tokens = 4, 6
    batches = [
        (
            rng.normal(size=(11, num_tokens, 8)).astype(np.float32),
            rng.integers(0, 5, 11),
            np.arange(11) != rng.integers(11),
        )
        for _ in range(steps)
    ]

    def make(groups, heads_at_once=0):
        return HeadGrid(
            head,
            groups,
            total_steps=steps,
            token_shape=(num_tokens, 8),
            seed=3,
            mesh=sharding.make_mesh() if kind == "linear" else one_device(),
            clip_norm=0.05,
            heads_at_once=heads_at_once,
        )

    at_once = make(groups)
    grids = [at_once] + [make(groups, heads_at_once=2)] * (kind == "linear")
    initial = jax.tree.map(np.array, at_once.state[0])
    for batch in batches:
        for grid in grids:
            grid.update(*batch)

    adam = optax.scale_by_adam()

    def loss_fn(params, tokens, labels, weights):
        logits = head.apply({"params": params}, tokens)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (each * weights).sum() / jnp.maximum(weights.sum(), 1)

    @jax.jit
    def reference(params, moments, batch, rate, decay):
        gradient = jax.grad(loss_fn)(params, *batch)
        norm = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(gradient)))
        gradient = jax.tree.map(lambda g: g * jnp.minimum(1, 0.05 / norm), gradient)
        change, moments = adam.update(gradient, moments)
        params = jax.tree.map(lambda p, u: p - rate * (u + decay * p), params, change)
        return params, moments

    def learning_rate(peak, start, warmup, step):
        step += 1
        if step < warmup:
            return start + step / warmup * (peak - start)
        return peak * 0.5 * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup)))

    plans = [(r, d, 0, 0, 1) for r in (3e-3,) for d in (0.1, 0.8)]
    plans.append((1e-2, 0.5, 1e-3, 2, 0.1))
    assert at_once.heads == [plan[:2] for plan in plans]
    for number, (peak, decay, start, warmup, share) in enumerate(plans):
        params = jax.tree.map(lambda x, i=number: x[i], initial)
        moments = jax.jit(adam.init)(params)
        for step, batch in enumerate(batches):
            rate = learning_rate(peak, start, warmup, step)
            cosine = 0.5 * (1 + np.cos(np.pi * (step + 1) / steps))
            decayed = decay * (share + (1 - share) * cosine)
            params, moments = reference(params, moments, batch, rate, decayed)
        for grid in grids:
            trained = jax.device_get(grid.state[0])
            trained = jax.tree.map(lambda x, i=number: x[i], trained)
            jax.tree.map(
                # Adam divides small gradients by their size: rounding grows.
                lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
                trained,
                params,
            )


def test_heads_start_differently():
    grid = HeadGrid(
        LinearClassifier(4),
        [Schedules((1e-3,), (0.0, 0.0))],
        total_steps=1,
        token_shape=(2, 8),
        seed=0,
        mesh=sharding.make_mesh(),
    )
    kernel = np.asarray(grid.state[0]["linear"]["kernel"])
    assert (kernel[0] != kernel[1]).mean() > 0.9


def test_head_computes_the_same_in_other_ways(rng):
    """In bfloat16 but for rounding, and with blocks computed anew in the backward."""
    tokens = rng.normal(size=(2, 6, 16)).astype(np.float32)
    head = AttentiveClassifier(5, num_heads=2, depth=2)
    params = nn.unbox(jax.jit(head.init)(jax.random.key(0), tokens))
    params = jax.device_get(params)
    params = jax.tree.map(
        lambda x: x + rng.normal(0, 0.2, x.shape).astype(x.dtype), params
    )

    def of(head):
        def total(params):
            logits = head.apply(params, tokens)
            return jnp.square(logits).sum(), logits

        return jax.jit(jax.grad(total, has_aux=True))(params)

    gradient, logits = of(head)
    again, same = of(head.clone(remat="full"))
    np.testing.assert_allclose(same, logits, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
        again,
        gradient,
    )
    rounded = jax.jit(head.clone(dtype="bfloat16").apply)(params, tokens)
    assert rounded.dtype == jnp.float32
    error = np.abs(rounded - logits).max() / np.abs(logits).max()
    assert 1e-5 < error < 0.05


def test_softmax_is_averaged_over_views(rng):
    head = LinearClassifier(7)
    mesh = sharding.make_mesh()
    schedules = [Schedules((1e-3, 1e-2), (0.1,))]
    grid = HeadGrid(
        head, schedules, total_steps=1, token_shape=(5, 8), seed=1, mesh=mesh
    )
    # Far apart, so that a mean of softmax and one of logits do not agree.
    tokens = rng.normal(0, 60, (59, 3, 5, 8)).astype(np.float32)
    found = grid.classify(tokens, num_best=3)
    for number in range(2):
        params = jax.tree.map(lambda x, i=number: x[i], grid.state[0])
        logits = np.asarray(head.apply({"params": params}, tokens.reshape(-1, 5, 8)))
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        shares = (shares / shares.sum(-1, keepdims=True)).reshape(59, 3, 7).mean(1)
        np.testing.assert_array_equal(found[number], np.argsort(-shares)[:, :3])
        labels = rng.integers(0, 7, 59)
        top = (found[number] == labels[:, None]).any(1).mean()
        assert top == pytest.approx(
            top_k_accuracy_score(labels, shares, k=3, labels=np.arange(7))
        )


@pytest.mark.parametrize("out_layers", [(), (0, 2)])
@pytest.mark.parametrize("is_pooled", [False, True])
def test_tokens_of_clips_stand_together_and_views_apart(
    rng, frozen, out_layers, is_pooled
):
    clips, views = 3, 2
    video = rng.integers(0, 256, (4, clips * views, 4, SIDE, SIDE, 3), dtype=np.uint8)
    encode = clip_tokens.Encoder(frozen, clips, 5, out_layers, is_pooled)
    found = encode(video)
    for b in range(4):
        for view in range(views):
            per_layer = [[] for _ in range(max(len(out_layers), 1))]
            for clip in range(clips):
                one = video[b, clip * views + view][None]
                for i, part in enumerate(per_layer):
                    layer = out_layers[i : i + 1]
                    part.append(frozen.encode(one, layer).reshape(-1, 16))
            wanted = np.concatenate([np.concatenate(part) for part in per_layer])
            if is_pooled:
                wanted = wanted.mean(0, keepdims=True)
            np.testing.assert_allclose(found[b, view], wanted, atol=2e-5)


def results_of(config, frozen):
    return {
        measure: columns["pretrained"]
        for measure, columns in classification.evaluate(frozen, config).items()
    }


def test_cached_tokens_are_those_of_the_clips(tmp_path, frozen, config):
    """To the last bit, in any order, with padding."""
    config.data.update(num_clips=2)
    source = Subset(clip_tokens.open_source(config, "test_path"), np.arange(7))
    videos = clip_tokens.make_videos(frozen, config, source, False, num_views=2)
    cached = token_cache.cached(videos, str(tmp_path), "float32", 4, "digest")
    for order in (None, np.array([3, 3, 0, 6, 1, 2, 6, 5, 4])):
        pairs = zip(cached.batches(4, order), videos.batches(4, order), strict=True)
        for ours, wanted in pairs:
            np.testing.assert_array_equal(ours.index, wanted.index)
            np.testing.assert_array_equal(ours.valid, wanted.valid)
            np.testing.assert_array_equal(ours.labels, wanted.labels)
            np.testing.assert_array_equal(
                ours.tokens[ours.valid], wanted.tokens[ours.valid]
            )
    assert wanted.tokens.shape == (4, 2, 16, 16) and wanted.valid.sum() == 1


def test_cached_equals_on_the_fly(tmp_path, frozen, config, monkeypatch):
    """To the last bit; the second time, nothing is encoded any more."""
    config.data.update(num_clips=2, num_views=2)
    wanted = results_of(config, frozen)
    config.cache.path = str(tmp_path / "cache")
    assert results_of(config, frozen) == wanted
    monkeypatch.setattr(Frozen, "encode", None)
    assert results_of(config, frozen) == wanted
    assert wanted["accuracy"] > 0.9  # a colour is easy
    assert (
        wanted["lower_bound_accuracy"]
        < wanted["accuracy"]
        <= wanted["upper_bound_accuracy"]
    )
    assert wanted["videos_fitted"] == 32 and wanted["videos_tested"] == 19


def test_attentive_heads_learn(frozen, config):
    config.head.kind, config.grids.main.learning_rates = "attentive", (3e-2, 1e-3)
    assert results_of(config, frozen)["accuracy"] > 0.9


def test_augmented_training_learns(frozen, config):
    config.data.update(augment=True, num_clips=2)
    assert results_of(config, frozen)["accuracy"] > 0.9


def test_an_untrained_encoder_stands_beside(frozen, config, monkeypatch):
    config.random_init = True
    monkeypatch.setattr(
        classification, "random_init", lambda model, seed: (model, seed)
    )
    monkeypatch.setattr(classification, "_evaluate", lambda model, _: {"is": model})
    found = classification.evaluate(frozen, config)
    assert found == {"is": {"pretrained": frozen, "random_init": (frozen, config.seed)}}


def test_unreadable_videos_are_left_out_in_both_ways(tmp_path, videos, frozen, config):
    lists = {}
    for name in ("train", "test"):
        lines = (videos / f"{name}.csv").read_text().splitlines()
        broken = tmp_path / f"{name}.mp4"
        broken.write_bytes(b"no video" * 1000)
        lines[4:4] = [f"{broken} 1"]
        lists[name] = tmp_path / f"{name}.csv"
        lists[name].write_text("\n".join(lines) + "\n")
        config.data[f"{name}_path"] = str(lists[name])
    source = clip_tokens.open_source(config, "train_path")
    config.seed = next(  # of which the broken one is trained on
        seed
        for seed in range(99)
        if 4 in hold_out(source, config.data.held_out_share, seed)[0].indices
    )
    wanted = results_of(config, frozen)
    assert wanted["videos_unreadable"] == 1 and wanted["videos_tested"] == 19
    config.cache.path = str(tmp_path / "cache")
    assert results_of(config, frozen) == wanted


def test_half_written_cache_is_not_used(tmp_path, frozen, config, monkeypatch):
    config.cache.path = str(tmp_path / "cache")
    wanted = results_of(config, frozen)
    for folder in (tmp_path / "cache").iterdir():
        folder.rename(tmp_path / "cache" / f".{folder.name}-x.part")
        (tmp_path / "cache" / f".{folder.name}-x.part" / "tokens.arrayrecord").unlink()
    encode = Frozen.encode
    calls = []

    def failing(self, *args):
        calls.append(args)
        if len(calls) > 1:  # of the two that the first source takes
            raise KeyboardInterrupt
        return encode(self, *args)

    monkeypatch.setattr(Frozen, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        results_of(config, frozen)
    monkeypatch.setattr(Frozen, "encode", encode)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name[0] != "."]
    assert results_of(config, frozen) == wanted


def test_cache_depends_on_what_tokens_depend_on(tmp_path, frozen, config):
    config.cache.path = str(tmp_path / "cache")

    def count():
        return sum(p.name[0] != "." for p in (tmp_path / "cache").iterdir())

    digest = token_cache.weights_digest(frozen)
    source = Subset(clip_tokens.open_source(config, "test_path"), np.arange(3))

    def cache(changes=(), dtype="float32", digest=digest, source=source, pooled=False):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict(dict(changes))
        videos = clip_tokens.make_videos(frozen, other, source, pooled, 1)
        return token_cache.cached(videos, config.cache.path, dtype, 4, digest)

    first = next(cache().batches(3))
    changes = (
        {},
        {"changes": {"data.num_clips": 2}},
        {"changes": {"data.frame_step": 2}},
        {"changes": {"data.resolution": 24}},
        {"changes": {"out_layers": (1,)}},
        {"changes": {"clips_per_call": 3}},  # the only one that changes nothing
        {"pooled": True},
        {"dtype": "bfloat16"},
        {"source": Subset(source.source, [0, 2, 1])},
        {"digest": "another model's"},
    )
    numbers = []
    for change in changes:
        last = cache(**change)
        numbers.append(count())
    assert numbers == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9]
    del last
    rounded = next(cache(dtype="bfloat16").batches(3))
    assert rounded.tokens.dtype == np.float32
    np.testing.assert_allclose(rounded.tokens, first.tokens, rtol=2**-8)
    swapped = next(cache(**changes[-2]).batches(3))
    np.testing.assert_array_equal(swapped.tokens, first.tokens[[0, 2, 1]])


def test_model_digest_tells_weights_apart(frozen):
    other = jax.tree.map(np.array, frozen.params)
    other["target"]["norm"]["bias"][3] += 1e-6
    changed = Frozen(frozen.encoder, None, other, None, frozen.video_shape, frozen.mesh)
    digests = [token_cache.weights_digest(model) for model in (frozen, changed, frozen)]
    assert digests[0] == digests[2] != digests[1]


def test_head_is_chosen_before_the_test_is_seen(videos, tmp_path, frozen, config):
    """Other labels in the test set change its numbers but not the choice."""
    honest = results_of(config, frozen)
    lines = (videos / "test.csv").read_text().split()
    wrong = [f"{p} {(int(k) + 1) % 3}" for p, k in zip(*[iter(lines)] * 2, strict=True)]
    (tmp_path / "wrong.csv").write_text("\n".join(wrong))
    config.data.test_path = str(tmp_path / "wrong.csv")
    misled = results_of(config, frozen)
    same = [key for key in honest if "held" in key or key == "chosen_head"]
    assert len(same) >= 6
    assert {k: honest[k] for k in same} == {k: misled[k] for k in same}
    assert misled["accuracy"] < 0.1 < 0.9 < honest["accuracy"]
    tests = [v for k, v in misled.items() if k.startswith("head") and "test acc" in k]
    assert misled["official_best_on_test_accuracy"] == max(tests)


def test_given_validation_videos_are_used(videos, frozen, config):
    config.data.val_path = config.data.test_path
    found = results_of(config, frozen)
    assert found["videos_fitted"] == 40 and found["videos_held_out"] == 19
    assert found["accuracy"] == found["official_best_on_test_accuracy"]


def test_clips_of_one_video_are_on_one_side(rng):
    paths = [f"video{i}" for i in rng.integers(0, 30, 200)]
    source = Numbered(paths)
    rest, held_out = hold_out(source, 0.3, seed=int(rng.integers(1000)))
    sides = [{s.path_of(i) for i in range(len(s))} for s in (rest, held_out)]
    assert not sides[0] & sides[1]
    assert len(rest) + len(held_out) == 200
    assert len(sides[1]) == round(0.3 * len(set(paths)))
    np.testing.assert_array_equal(held_out.labels, held_out.indices)


def test_epochs_order_sees_every_video_once_per_epoch(rng):
    order = classification.epochs_order(10, 3, steps=7, seed=int(rng.integers(99)))
    assert len(order) == 21
    for epoch in (order[:9], order[9:18]):
        assert len(set(epoch.tolist())) == 9
    assert order[:9].tolist() != order[9:18].tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"head.kind": "attentive", "head.num_heads": 3},
            "head.num_heads=3 does not divide the 16 channels",
        ),
        ({"head.kind": "mlp"}, "head.kind='mlp' is out of range: known: attentive"),
        ({"epochs": 0}, "epochs=0 is out of range"),
        ({"batch_size": 40}, "batch_size=40 exceeds the 32 videos"),
        ({"data.held_out_share": 1.0}, "held_out_share=1.0 is out of range"),
        ({"data.augment": True, "cache.path": "x"}, "set config.data.augment=False"),
        ({"data.train_path": ""}, r"config\.data\.train_path is not set"),
        ({"data.num_frames": 5}, "cannot be cut into tubelets"),
        ({"out_layers": (3,)}, "the blocks are 0 to 2"),
        ({"num_classes": 2}, "has the label 2, and there are 2 classes"),
        ({"grids.main.warmup_epochs": 2}, "give a number below config.epochs=2"),
        ({"grids.main.learning_rates": ()}, "learning_rates"),
        ({"cache.path": "gs://bucket/cache"}, "must be a local folder"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(frozen, config, changes, message):
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message) as error:
        classification.evaluate(frozen, config)
    assert "\n" not in str(error.value)


def test_full_disk_is_said_before_writing(tmp_path, frozen, config, monkeypatch):
    monkeypatch.setattr(
        token_cache.shutil, "disk_usage", lambda _: type("", (), {"free": 1000})
    )
    config.cache.path = str(tmp_path / "cache")
    with pytest.raises(UserError, match=r"GB free: leave config\.cache\.path empty"):
        classification.evaluate(frozen, config)
    assert not list((tmp_path / "cache").iterdir())
