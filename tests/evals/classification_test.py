"""Heads on frozen features are trained, chosen and tested by their protocol."""

import contextlib
import itertools

import jax
import numpy as np
import pytest
from colour_videos import SIDE, make_frozen, write_videos
from damaged_files import content_of, damage, empty, halve, zeros

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.sources.records import Source, Subset, hold_out
from vjepa_jax.evals import classification, settings
from vjepa_jax.evals import frozen as frozen_models
from vjepa_jax.evals.frozen import FrozenModel
from vjepa_jax.evals.heads.head_grid import epochs_order
from vjepa_jax.evals.tokens import clip_tokens, token_cache


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Return lists of videos to train on and to test on."""
    folder = tmp_path_factory.mktemp("videos")
    write_videos(folder, "train", 40)
    write_videos(folder, "test", 19)
    return folder


@pytest.fixture(scope="module")
def model():
    return make_frozen(depth=3)


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


@pytest.mark.parametrize("out_layers", [(), (0, 2)])
@pytest.mark.parametrize("is_pooled", [False, True])
def test_tokens_of_clips_are_joined_and_views_are_separate(
    rng, model, out_layers, is_pooled
):
    clips, views = 3, 2
    video = rng.integers(0, 256, (4, clips * views, 4, SIDE, SIDE, 3), dtype=np.uint8)
    encode = clip_tokens.Encoder(model, clips, 5, out_layers, is_pooled)
    found = encode(video)
    for b in range(4):
        for view in range(views):
            per_layer = [[] for _ in range(max(len(out_layers), 1))]
            for clip in range(clips):
                one = video[b, clip * views + view][None]
                for i, part in enumerate(per_layer):
                    layer = out_layers[i : i + 1]
                    part.append(model.encode(one, layer).reshape(-1, 16))
            wanted = np.concatenate([np.concatenate(part) for part in per_layer])
            if is_pooled:
                wanted = wanted.mean(0, keepdims=True)
            np.testing.assert_allclose(found[b, view], wanted, atol=2e-5)


@pytest.mark.parametrize("is_augmented", [False, True])
def test_batches_are_read_in_parts(model, config, monkeypatch, is_augmented):
    """Parts have `clips_per_call` clips, or one video; the batches are the same."""
    read_all, iterator, sizes = clip_tokens.read_all, clip_tokens.TrainIterator, []

    def recorded(*args, batch_size, **options):
        sizes.append(batch_size)
        return read_all(*args, batch_size=batch_size, **options)

    def recorded_iterator(source, reader, transform, batching, *args):
        sizes.append(batching.batch_size)
        return iterator(source, reader, transform, batching, *args)

    monkeypatch.setattr(clip_tokens, "read_all", recorded)
    monkeypatch.setattr(clip_tokens, "TrainIterator", recorded_iterator)
    config.data.num_clips = 2
    source = Subset(clip_tokens.open_source(config, "test_path"), np.arange(10))
    found = []
    for clips_per_call in (64, 9, 1):
        config.clips_per_call = clips_per_call
        views = 1 if is_augmented else 2
        videos = clip_tokens.make_videos(model, config, source, False, views)
        if is_augmented:
            options = {"seed": 3, "prefetch_megabytes": 1.0, "max_bad_fraction": 0.0}
            transform = clip_tokens.ClipTransform(SIDE)
            batches = clip_tokens.augmented_batches(
                videos, transform, batch_size=8, **options
            )
        else:
            batches = videos.batches(8)
        with contextlib.closing(batches):
            found.append([*itertools.islice(batches, 2)])
    # Videos, and of augmented ones their clips.
    assert sizes == ([16, 8, 2] if is_augmented else [8, 2, 1])
    for parts in found[1:]:
        for ours, wanted in zip(parts, found[0], strict=True):
            for field in ("index", "valid", "labels"):
                np.testing.assert_array_equal(
                    getattr(ours, field), getattr(wanted, field)
                )
            np.testing.assert_allclose(
                ours.tokens[ours.valid], wanted.tokens[wanted.valid], atol=2e-5
            )
    assert found[0][1].valid.sum() == (8 if is_augmented else 2)


def results_of(config, model):
    return {
        measure: columns["pretrained"]
        for measure, columns in classification.evaluate(model, config).items()
    }


def test_cached_tokens_are_those_of_the_clips(tmp_path, model, config):
    """Bit for bit, in any order, with padding."""
    config.data.update(num_clips=2)
    source = Subset(clip_tokens.open_source(config, "test_path"), np.arange(7))
    videos = clip_tokens.make_videos(model, config, source, False, num_views=2)
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


@pytest.mark.parametrize("name", ["index.npz", "tokens.arrayrecord"])
@pytest.mark.parametrize("how", [halve, empty, zeros, None])
def test_a_cache_that_is_damaged_is_named(tmp_path, model, config, name, how):
    source = Subset(clip_tokens.open_source(config, "test_path"), np.arange(3))
    videos = clip_tokens.make_videos(model, config, source, False)
    folder = token_cache.cached(videos, str(tmp_path), "float32", 4, "digest").folder
    damage(folder / name, how)
    before = content_of(tmp_path)
    with pytest.raises(UserError, match=f"damaged .*remove {folder}, and it is") as e:
        next(
            token_cache.cached(videos, str(tmp_path), "float32", 4, "digest").batches(4)
        )
    assert name in str(e.value) and content_of(tmp_path) == before


def test_cached_equals_on_the_fly(tmp_path, model, config, monkeypatch):
    """Bit for bit; the second evaluation encodes nothing."""
    config.data.update(num_clips=2, num_views=2)
    wanted = results_of(config, model)
    config.cache.path = str(tmp_path / "cache")
    assert results_of(config, model) == wanted
    monkeypatch.setattr(FrozenModel, "encode", None)
    assert results_of(config, model) == wanted
    assert wanted["accuracy"] > 0.9  # a colour is easy
    assert (
        wanted["lower_bound_accuracy"]
        < wanted["accuracy"]
        <= wanted["upper_bound_accuracy"]
    )
    assert wanted["videos_fitted"] == 32 and wanted["videos_tested"] == 19
    confusion = np.array(wanted["confusion"])
    assert confusion.sum(1).tolist() == [7, 6, 6]  # 19 videos in turn
    assert np.trace(confusion) / 19 == wanted["accuracy"]


def test_attentive_heads_learn(model, config):
    config.head.kind, config.grids.main.learning_rates = "attentive", (3e-2, 1e-3)
    assert results_of(config, model)["accuracy"] > 0.9


def test_augmented_training_learns(model, config):
    config.data.update(augment=True, num_clips=2)
    assert results_of(config, model)["accuracy"] > 0.9


def test_random_init_adds_a_column_of_an_untrained_encoder(model, config, monkeypatch):
    config.random_init = True
    monkeypatch.setattr(frozen_models, "random_init", lambda model, seed: (model, seed))
    monkeypatch.setattr(classification, "_evaluate", lambda model, *_: {"is": model})
    found = classification.evaluate(model, config)
    assert found == {"is": {"pretrained": model, "random_init": (model, config.seed)}}


def test_unreadable_videos_are_left_out_with_and_without_cache(
    tmp_path, videos, model, config
):
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
    wanted = results_of(config, model)
    assert wanted["videos_unreadable"] == 1 and wanted["videos_tested"] == 19
    config.cache.path = str(tmp_path / "cache")
    assert results_of(config, model) == wanted


def test_half_written_cache_is_not_used(tmp_path, model, config, monkeypatch):
    config.cache.path = str(tmp_path / "cache")
    wanted = results_of(config, model)
    for folder in (tmp_path / "cache").iterdir():
        folder.rename(tmp_path / "cache" / f".{folder.name}-x.part")
        (tmp_path / "cache" / f".{folder.name}-x.part" / "tokens.arrayrecord").unlink()
    encode = FrozenModel.encode
    calls = []

    def failing(self, *args):
        calls.append(args)
        if len(calls) > 1:  # of the two that the first source takes
            raise KeyboardInterrupt
        return encode(self, *args)

    monkeypatch.setattr(FrozenModel, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        results_of(config, model)
    monkeypatch.setattr(FrozenModel, "encode", encode)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name[0] != "."]
    assert results_of(config, model) == wanted


def test_of_two_programs_that_write_a_cache_one_is_kept(
    tmp_path, model, config, monkeypatch
):
    source = Subset(clip_tokens.open_source(config, "test_path"), np.arange(3))
    videos = clip_tokens.make_videos(model, config, source, False)
    write = token_cache._write

    def write_after_another_program(videos, folder, *arguments):
        write(videos, folder, *arguments)
        monkeypatch.setattr(token_cache, "_write", write)
        token_cache.cached(videos, str(tmp_path), "float32", 4, "digest")

    monkeypatch.setattr(token_cache, "_write", write_after_another_program)
    cached = token_cache.cached(videos, str(tmp_path), "float32", 4, "digest")
    assert next(cached.batches(4)).valid.sum() == 3
    assert [path.name for path in tmp_path.iterdir()] == [cached.folder.name]


def test_cache_depends_on_what_tokens_depend_on(tmp_path, model, config):
    config.cache.path = str(tmp_path / "cache")

    def count():
        return sum(p.name[0] != "." for p in (tmp_path / "cache").iterdir())

    digest = token_cache.weights_digest(model)
    source = Subset(clip_tokens.open_source(config, "test_path"), np.arange(3))

    def cache(changes=(), dtype="float32", digest=digest, source=source, pooled=False):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict(dict(changes))
        videos = clip_tokens.make_videos(model, other, source, pooled, 1)
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


def test_model_digest_depends_on_the_weights(model):
    other = jax.tree.map(np.array, model.params)
    other["target"]["norm"]["bias"][3] += 1e-6
    changed = FrozenModel(
        model.encoder, None, other, None, model.video_shape, model.mesh
    )
    digests = [token_cache.weights_digest(m) for m in (model, changed, model)]
    assert digests[0] == digests[2] != digests[1]


def test_head_is_chosen_before_the_test_is_seen(videos, tmp_path, model, config):
    """Wrong labels of the test set change its results but not the choice."""
    honest = results_of(config, model)
    lines = (videos / "test.csv").read_text().split()
    wrong = [f"{p} {(int(k) + 1) % 3}" for p, k in zip(*[iter(lines)] * 2, strict=True)]
    (tmp_path / "wrong.csv").write_text("\n".join(wrong))
    config.data.test_path = str(tmp_path / "wrong.csv")
    misled = results_of(config, model)
    same = [key for key in honest if "held" in key or key == "chosen_head"]
    assert len(same) >= 6
    assert {k: honest[k] for k in same} == {k: misled[k] for k in same}
    assert misled["accuracy"] < 0.1 < 0.9 < honest["accuracy"]
    tests = [v for k, v in misled.items() if k.startswith("head") and "test acc" in k]
    assert misled["official_best_on_test_accuracy"] == max(tests)


def test_given_validation_videos_are_used(videos, model, config):
    config.data.val_path = config.data.test_path
    found = results_of(config, model)
    assert found["videos_fitted"] == 40 and found["videos_held_out"] == 19
    assert found["accuracy"] == found["official_best_on_test_accuracy"]


def test_clips_of_one_video_are_held_out_together(rng):
    paths = [f"video{i}" for i in rng.integers(0, 30, 200)]
    source = Numbered(paths)
    rest, held_out = hold_out(source, 0.3, seed=int(rng.integers(1000)))
    sides = [{s.path_of(i) for i in range(len(s))} for s in (rest, held_out)]
    assert not sides[0] & sides[1]
    assert len(rest) + len(held_out) == 200
    assert len(sides[1]) == round(0.3 * len(set(paths)))
    np.testing.assert_array_equal(held_out.labels, held_out.indices)


def test_epochs_order_sees_every_video_once_per_epoch(rng):
    order = epochs_order(10, 3, steps=7, seed=int(rng.integers(99)))
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
        ({"num_classes": 2}, "has the label 2, and there are 2 classes: .*num_classes"),
        ({"grids.main.warmup_epochs": 2}, "give a number below config.epochs=2"),
        ({"grids.main.learning_rates": ()}, "learning_rates"),
        ({"cache.path": "gs://bucket/cache"}, "must be a local folder"),
    ],
)
def test_errors_are_one_line(model, config, changes, message):
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message) as error:
        classification.evaluate(model, config)
    assert "\n" not in str(error.value)


def test_full_disk_is_reported_before_writing(tmp_path, model, config, monkeypatch):
    monkeypatch.setattr(
        token_cache.shutil, "disk_usage", lambda _: type("", (), {"free": 1000})
    )
    config.cache.path = str(tmp_path / "cache")
    with pytest.raises(UserError, match=r"GB free: leave config\.cache\.path empty"):
        classification.evaluate(model, config)
    assert not list((tmp_path / "cache").iterdir())
