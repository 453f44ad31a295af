"""Tasks of camera footage: what each column of features can and cannot know."""

import numpy as np
import pytest
from colour_videos import make_frozen, write_videos
from video_files import write_video

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.sources.open import open_source
from vjepa_jax.evals import real_video, settings
from vjepa_jax.evals.heads import probes

TRAIN, TEST = 24, 12


def make_config(**tasks):
    config = settings.real_video()
    config.clips_per_call, config.data.num_workers = 8, 0
    config.update(labels_per_class=4, draws=2, num_heads=2)
    config.attentive.update(updates=80, batch_size=16)
    for name, fields in tasks.items():
        config.tasks[name] = settings.task(**fields)
    return config


def write_rising(folder, name, count, length=12, still=0):
    """Write videos that become brighter in time, at their own speed and level."""
    rng = np.random.default_rng(len(name))
    lines = []
    for i in range(count):
        start, step = rng.integers(10, 60), rng.integers(8, 12)
        levels = start + step * np.minimum(np.arange(length), length - 1 - still)
        noise = rng.integers(0, 6, (length, 32, 32, 3))
        noise[length - still :] = noise[length - still - 1]
        frames = (levels[:, None, None, None] + noise).astype(np.uint8)
        path = write_video(
            folder / f"{name}{i}.mp4", frames, codec_options={"crf": "4"}
        )
        np.savez(folder / f"{name}{i}.npz", level=levels, other=levels[::-1] + 0.5)
        lines.append(f"{path} 0\n")
    (folder / f"{name}.csv").write_text("".join(lines))
    return str(folder / f"{name}.csv")


@pytest.fixture(scope="module")
def rising(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rising")
    return {
        "train_path": write_rising(folder, "train", TRAIN),
        "test_path": write_rising(folder, "tests", TEST),
        "frame_step": 2,
    }


@pytest.fixture(scope="module")
def model():
    return make_frozen(2)


def test_order_shows_in_clips_but_not_in_one_frame_or_their_mean(
    rising, model, monkeypatch
):
    # The attentive probe is tested on its own; here it would compile for each column.
    monkeypatch.setattr(
        probes,
        "attentive_classes",
        lambda train, labels, test, training: probes.linear_classes(
            train.mean(1), labels, test.mean(1)
        ),
    )
    tasks = {
        "arrow": rising | {"change": "arrow"},
        "halves": rising | {"change": "halves"},
    }
    results = real_video.evaluate(model, make_config(**tasks))
    for task in tasks:
        assert results[f"{task}_clips_tested"]["pretrained"] == 2 * TEST
        for measure in ("few_label", "knn", "linear", "attentive"):
            row = results[f"{task}_{measure}_accuracy"]
            assert list(row) == [
                *("pretrained", "single_frame", "random_init", "pixels"),
                *("mean_frame", "chance"),
            ]
            assert row["chance"] == 0.5
            # Both orders have the same mean.
            assert row["mean_frame"] == 0.5, (task, measure)
        linear = results[f"{task}_linear_accuracy"]
        assert linear["pixels"] == linear["pretrained"] == 1
    # The middle frame of a reversed clip is the one beside it.
    assert results["arrow_linear_accuracy"]["single_frame"] < 0.9


def test_classes_come_from_the_lists(tmp_path, model):
    lists = {
        f"{name}_path": write_videos(tmp_path, name, count)
        for name, count in (("train", TRAIN), ("test", TEST))
    }
    config = make_config(colour=lists | {"fps": 6.0})
    config.random_init = False
    results = real_video.evaluate(model, config)
    assert results["colour_clips_tested"] == {
        **dict.fromkeys(results["colour_clips_tested"]),
        "pretrained": TEST,
    }
    for measure in ("few_label", "knn", "linear", "attentive"):
        row = results[f"colour_{measure}_accuracy"]
        assert list(row) == ["pretrained", "single_frame", "chance"]
        assert row["chance"] == pytest.approx(1 / 3)
        # A single frame shows the colour.
        assert row["pretrained"] == row["single_frame"] == 1, measure


def test_values_are_those_of_the_frames_of_a_time_step(rising, model):
    config = make_config(level=rising | {"sensors": ("other", "level")})
    _, samples = real_video.read(model, config, "level")
    for column, of_column in samples.items():
        assert of_column.tokens.shape[:2] == (TEST, 2), column
    source = open_source(rising["test_path"])
    # Four frames in steps of two from the middle start: 2, 4 | 6, 8 of 12.
    for i, values in enumerate(samples["pretrained"].targets):
        with np.load(source.path_of(i).replace(".mp4", ".npz")) as file:
            for column, name in enumerate(("other", "level")):
                wanted = file[name][[2, 4, 6, 8]].reshape(2, 2).mean(1)
                np.testing.assert_allclose(values[:, column], wanted)


def test_values_are_read_out_of_time_steps(rising, model, monkeypatch):
    def attentive(train, values, clips, test, test_values, training):
        assert train.ndim == 3 and len(train) == len(clips) == 2 * TRAIN
        np.testing.assert_array_equal(clips, np.repeat(np.arange(TRAIN), 2))
        assert len(test) == len(test_values["level"]) == 2 * TEST
        return {
            name: probes.linear_r2(
                train.mean(1), values[name], test.mean(1), test_values[name]
            )
            for name in values
        }

    monkeypatch.setattr(probes, "attentive_r2", attentive)
    config = make_config(level=rising | {"sensors": ("other", "level")})
    results = real_video.evaluate(model, config)
    for name in ("other", "level"):
        assert results[f"level_{name}_ridge_r2"]["chance"] == 0
    # The brightness is that of a single frame, too.
    row = results["level_level_ridge_r2"]
    assert min(row["pixels"], row["single_frame"], row["pretrained"]) > 0.9
    assert row["mean_frame"] < 0.9
    assert results["level_level_attentive_r2"] == row


def test_clips_whose_end_is_still_do_not_show_the_direction(tmp_path, model, rising):
    """A short video is padded with its last frame: its direction needs no motion."""
    short = write_rising(tmp_path, "short", 4, length=5)
    config = make_config(arrow=rising | {"change": "arrow", "test_path": short})
    with pytest.raises(UserError, match="begin or end with equal frames"):
        real_video.evaluate(model, config)


def test_still_ends_are_seen():
    video = np.random.default_rng(0).integers(0, 9, (3, 4, 2, 2, 3), np.uint8)
    video[1, 3] = video[1, 2]
    video[2, 1] = video[2, 0]
    assert real_video.varies(video).ravel().tolist() == [1, 0, 0]


def test_wrong_tasks_are_named(tmp_path, rising, model):
    for fields, message in (
        ({"change": "rewind"}, "tasks.x.change='rewind'.*known"),
        ({"frame_step": 0}, "tasks.x.fps.*either"),
        ({"fps": 4.0}, "tasks.x.fps.*either"),
        ({"sensors": ("level",), "change": "arrow"}, "not both"),
        ({"sensors": ("level",), "frame_step": 0, "fps": 4.0}, "tasks.x.frame_step"),
        ({"test_path": ""}, r"config\.tasks\.x: config\.data\.test_path is not set"),
        ({"sensors": ("speed",)}, r"\.npz does not hold speed"),
    ):
        with pytest.raises(UserError, match=message):
            real_video.evaluate(model, make_config(x=rising | fields))
    with pytest.raises(UserError, match=r"config\.tasks is empty"):
        real_video.evaluate(model, make_config())
    video = write_video(tmp_path / "a.mp4", np.zeros((12, 32, 32, 3), np.uint8))
    (tmp_path / "a.csv").write_text(f"{video} 0\n")
    alone = rising | {"train_path": str(tmp_path / "a.csv"), "sensors": ("level",)}
    with pytest.raises(UserError, match=r"a\.npz is missing"):
        real_video.evaluate(model, make_config(x=alone))
