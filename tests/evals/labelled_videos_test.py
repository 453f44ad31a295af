"""Labels are compared by name, and mistakes are reported before anything is encoded."""

import numpy as np
import pytest
from colour_videos import make_frozen
from list_files import make_files, write_list
from video_files import write_video

from vjepa_jax.base.errors import UserError
from vjepa_jax.evals import classification, neighbours, settings
from vjepa_jax.evals.labelled import open_labelled, require_per_class
from vjepa_jax.evals.tokens import clip_tokens

COLOURS = {"apple": 0, "banana": 1, "cherry": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Write class folders to train on, and without a class to test on."""
    root = tmp_path_factory.mktemp("fruit")
    rng = np.random.default_rng(0)
    for part, names, count in (
        ("train", ("apple", "banana", "cherry"), 4),
        ("test", ("apple", "cherry"), 2),
        ("more", ("cherry",), 2),
    ):
        for name in names:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                frames = rng.integers(0, 60, (4, 32, 32, 3), dtype=np.uint8)
                frames[..., COLOURS[name]] += 150
                write_video(root / part / name / f"{i}.mp4", frames)
    return root


@pytest.fixture(scope="module")
def model():
    return make_frozen(depth=1)


@pytest.fixture
def config(folders):
    config = settings.neighbours()
    set_paths(config, folders / "train", folders / "test")
    config.data.update(frame_step=1, num_workers=0)
    config.update(k=(1,), shots=(1,), draws=2, random_init=False)
    return config


def set_paths(config, train, test):
    config.data.update(train_path=str(train), test_path=str(test))


def test_a_class_that_is_not_tested_moves_no_other(model, config, folders):
    found = neighbours.evaluate(model, config)
    assert found["knn_1_accuracy"]["pretrained"] == 1
    # Folders of different classes, separated by commas.
    set_paths(config, f"{folders}/more,{folders}/train", f"{folders}/test")
    found = neighbours.evaluate(model, config)
    assert found["knn_1_accuracy"]["pretrained"] == 1
    assert found["few_shot_1_nearest_mean_accuracy"]["pretrained"] == 1


@pytest.mark.parametrize("val", ["", "more"])
@pytest.mark.parametrize("augment", [False, True])
def test_heads_see_one_numbering(model, config, folders, augment, val):
    config = settings.classification()
    set_paths(config, folders / "train", folders / "test")
    config.data.update(num_frames=4, frame_step=1, resolution=16, num_workers=0)
    config.data.update(augment=augment, held_out_share=0.1, rand_augment="")
    config.data.update(crop_scale=(1.0, 1.0), erase_probability=0.0)
    config.data.val_path = f"{folders}/{val}" if val else ""
    config.update(epochs=20, batch_size=4, test_batch_size=4)
    config.head.update(kind="linear", depth=1, num_heads=2)
    config.grids.main.update(learning_rates=(0.3,), weight_decays=(0.0,))
    found = classification.evaluate(model, config)
    assert found["accuracy"]["pretrained"] == 1
    assert found["confusion"] == {
        "pretrained": [[2, 0, 0], [0, 0, 0], [0, 0, 2]],
        "class_names": ["apple", "banana", "cherry"],
    }


def test_numbers_without_names_stay(config, tmp_path):
    make_files(tmp_path, "a.mp4", "b.mp4")
    train = write_list(tmp_path, "a.mp4 2\nb.mp4 5\n")
    test = write_list(tmp_path, "a.mp4 5\n", "test.csv")
    set_paths(config, train, test)
    found = open_labelled(config, ("train_path", "test_path"))
    assert found["test_path"].labels.tolist() == [5]
    assert found.num_classes == 6 and found.class_names is None
    assert found.name_of(5) == "5"


# Of videos to train on and to test on, as lists or as files in folders.
@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("a/1.mp4 a/2.mp4", "a/1.mp4", "all 2 videos of .* have the class 'a'"),
        ("x.mp4 0\ny.mp4 0", "x.mp4 0", "all 2 videos of .* have the class '0'"),
        ("x.mp4 0\ny.mp4 -1", "x.mp4 0", "has the label -1, and labels count from 0"),
        ("x.mp4 1\ny.mp4 2", "x.mp4 0", "have the label 0, as in lists without"),
        ("x.mp4 1\ny.mp4 2", "x.mp4 1\ny.mp4 4", r"1 videos of .*test_path .*: 4;"),
        ("a/1.mp4 b/1.mp4", "b/1.mp4 c/1.mp4 d/1.mp4", r"2 videos .*: c, d;"),
        ("a/1.mp4 b/1.mp4 cover.jpg", "a/1.mp4", r"train.* no classes: .*'cover\.jpg'"),
        ("a/1.mp4 b/1.mp4", "1.mp4", r"test.* has no classes: .*'1\.mp4'"),
        ("a/1.mp4 b/1.mp4", "x.mp4 1", r"names of classes \(a, b\), but .*test\.csv"),
        ("x.mp4 1\ny.mp4 0", "a/1.mp4", r"names of classes \(a\), but .*train\.csv"),
    ],
)
@pytest.mark.parametrize("evaluation", [neighbours, classification])
def test_mistakes_are_one_line_before_encoding(
    tmp_path, monkeypatch, evaluation, train, test, message
):
    monkeypatch.setattr(clip_tokens, "make_videos", None)
    config = settings.DEFAULTS[evaluation.__name__.rpartition(".")[2]]()
    for key, text in (("train", train), ("test", test)):
        path = tmp_path / key
        if text.split()[1:] and "/" not in text and "." not in text.split()[1]:
            make_files(tmp_path, "x.mp4", "y.mp4")
            path = write_list(tmp_path, text, f"{key}.csv")
        else:
            make_files(path, *text.split())
        config.data[f"{key}_path"] = str(path)
    if "shots" in config:
        config.shots = (1,)
    with pytest.raises(UserError, match=message) as error:
        evaluation.evaluate(None, config)
    assert "\n" not in str(error.value)


def test_dates_are_no_labels(tmp_path):
    config = settings.classification()
    make_files(tmp_path, "x.mp4", "y.mp4")
    listed = write_list(tmp_path, "x.mp4 20230509\ny.mp4 20230510\n")
    set_paths(config, listed, listed)
    with pytest.raises(UserError, match="the largest label is 20230510"):
        classification.evaluate(None, config)


def test_hold_out_leaves_two_classes(tmp_path):
    config = settings.classification()
    make_files(tmp_path, "a/1.mp4", "b/1.mp4")
    set_paths(config, tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"the 1 videos that are left .* one class"):
        classification.evaluate(None, config)


def test_few_videos_of_a_class_are_named():
    names = ["put", "take"].__getitem__
    require_per_class(np.array([0, 1, 0, 1]), 2, "config.shots", names)
    with pytest.raises(UserError, match=r"asks for 2 .* 'take' has 1 readable"):
        require_per_class(np.array([0, 1, 0]), 2, "config.shots", names)
    with pytest.raises(UserError, match=r"all 1 readable videos .* class 'take'"):
        require_per_class(np.array([1]), 1, "config.shots", names)


def test_videos_to_learn_from_and_to_test_on_are_compared(config, folders, capfd):
    keys = "train_path", "test_path"
    open_labelled(config, keys)
    assert "are also in" not in "".join(capfd.readouterr())
    lines = [
        f"{folders}/train/../train/apple/0.mp4 0",
        f"{folders}/test/cherry/1.mp4 2",
    ]
    (folders / "mixed.csv").write_text("\n".join(lines))
    train = "".join(
        f"{folders}/train/{name}/{i}.mp4 {label}\n"
        for name, label in COLOURS.items()
        for i in range(4)
    )
    (folders / "train.csv").write_text(train)
    set_paths(config, folders / "train.csv", folders / "mixed.csv")
    open_labelled(config, keys)
    shown = "".join(capfd.readouterr())
    assert "1 of the 2 videos of config.data.test_path are also in" in shown
