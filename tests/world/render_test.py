"""Rendering a world: complete, restartable, never over another world's files."""

import json

import numpy as np
import pytest
from clip_files import read
from video_files import used_memory

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import get_config
from vjepa_jax.config.rules import validate
from vjepa_jax.data.sources.open import open_source
from vjepa_jax.data.transforms.transforms import central_box
from vjepa_jax.world import motion, play, render, violations


def tiny_world(path, **fields):
    config = get_config().world
    config.update(path=str(path), size=16, num_frames=8, pretrain_videos=13)
    config.update(probe_train_videos=11, probe_test_videos=11)
    config.update(hidden_train_videos=2, hidden_test_videos=2)
    config.update(fields)
    return config


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    assert render.render_world(tiny_world(root)) is True
    return root


def contents(root):
    return {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def test_lists_truth_and_files_agree(rendered):
    for split in render.splits(tiny_world(rendered)):
        source = open_source(str(rendered / f"{split.name}.csv"))
        truth = np.load(rendered / f"{split.name}.npz")
        assert len(source) == len(truth["label"]) == split.num_videos
        np.testing.assert_array_equal(source.labels, truth["label"])
        video = read(source[0].path, num_frames=8, size=16, crop=central_box)
        assert video.shape == (8, 16, 16, 3)
        assert truth["position"].shape == (split.num_videos, 8, 2, 2)


def test_splits_do_not_share_clips(rendered):
    first = [
        np.load(rendered / f"{s.name}.npz")["position"][0, 4, 0]
        for s in render.splits(tiny_world(rendered))
    ]
    assert len({tuple(position) for position in first}) == len(first)


def test_complete_world_is_left_alone(rendered):
    before = contents(rendered)
    assert render.render_world(tiny_world(rendered)) is False
    assert contents(rendered) == before


def test_other_settings_are_refused_and_nothing_is_touched(rendered):
    before = contents(rendered)
    config = tiny_world(rendered, pretrain_videos=14)
    with pytest.raises(UserError, match=r"other settings.*world\.path"):
        render.render_world(config)
    assert contents(rendered) == before


def test_interrupted_rendering_makes_only_what_is_missing(tmp_path):
    config = tiny_world(tmp_path)
    render.render_world(config)
    complete = contents(tmp_path)
    manifest = tmp_path / render.MANIFEST
    described = json.loads(manifest.read_text())["world"]
    manifest.unlink()
    (tmp_path / f"{render.MANIFEST}.part").write_text(json.dumps({"world": described}))
    lost = tmp_path / "pretrain" / "000003.mp4"
    pixels = lost.read_bytes()
    lost.unlink()
    assert render.render_world(config) is True
    after = contents(tmp_path)
    assert after.keys() == complete.keys()
    remade = {p for p in after if p.suffix == ".mp4" and after[p] != complete[p]}
    assert remade == {lost}
    assert lost.read_bytes() == pixels


def test_the_same_frames_make_the_same_file(tmp_path):
    """Uninitialised memory does not reach the encoder."""
    video = motion.make_clip(motion.World(size=32), (0, 1), 1).video
    contents = set()
    for _ in used_memory(150):
        render.write_video(tmp_path / "clip.mp4", video)
        contents.add((tmp_path / "clip.mp4").read_bytes())
    assert len(contents) == 1


def test_world_path_that_is_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(UserError, match="not a folder"):
        render.render_world(tiny_world(path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("physics_pairs", 3),
        ("physics_pairs", -2),
        ("play_fraction", 1.5),
        ("action_clips", 1),
        ("action_clips", -4),
    ],
)
def test_values_out_of_range_are_named(key, value):
    config = get_config()
    config.world.path, config.data.path = "world", "world/pretrain.csv"
    config.world[key] = value
    with pytest.raises(UserError, match=rf"config\.world\.{key}={value}"):
        validate(config)


def test_pairs_need_clips_of_a_minimum_length(tmp_path):
    config = tiny_world(tmp_path / "world", physics_pairs=2)
    with pytest.raises(UserError, match="num_frames of 12 or more"):
        render.render_world(config)


# --------------------------------------------------------------------- pairs and play


PAIRS = {
    "num_frames": 12,
    "pretrain_videos": 30,
    "play_fraction": 0.5,
    "physics_pairs": 2,
}


@pytest.fixture(scope="module")
def with_pairs(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    render.render_world(tiny_world(root, **PAIRS))
    return root


def frames_of(path):
    return read(path, num_frames=12, size=16, crop=central_box).astype(int)


def test_pairs_are_listed_with_their_ground_truth(with_pairs):
    truth = np.load(with_pairs / "physics.npz")
    names = list(violations.PROPERTIES)
    assert truth["property"].tolist() == [n for n in names for _ in range(4)]
    assert truth["pair"].tolist() == [0, 0, 1, 1] * len(names)
    assert truth["possible"].tolist() == [1, 0] * (2 * len(names))
    assert ((truth["onset"] >= 6) & (truth["onset"] <= 8)).all()
    source = open_source(str(with_pairs / "physics.csv"))
    np.testing.assert_array_equal(source.labels, truth["possible"])
    for i in (0, 1, 4 * len(names) - 1):
        index, kind = truth["pair"][i], ("im" * (i % 2)) + "possible"
        name = f"{truth['property'][i]}_{index:04d}_{kind}.mp4"
        assert source.path_of(i) == str(with_pairs / "physics" / name)


def test_decoded_pairs_are_equal_up_to_the_onset_bit_for_bit(with_pairs, tmp_path):
    """They would differ if frames could depend on later ones."""
    truth = np.load(with_pairs / "physics.npz")
    source = open_source(str(with_pairs / "physics.csv"))
    looks = motion.World(size=16, num_frames=12)
    leaks = 0
    for i in range(0, len(source), 2):
        onset = truth["onset"][i]
        pair = [frames_of(source.path_of(j)) for j in (i, i + 1)]
        np.testing.assert_array_equal(pair[0][:onset], pair[1][:onset])
        assert np.any(pair[0][onset:] != pair[1][onset:])
        name, index = str(truth["property"][i]), int(truth["pair"][i])
        drawn = violations.make_pair(looks, (0, 5), name, index)
        assert drawn.onset == onset
        for j, clip in enumerate((drawn.possible, drawn.impossible)):
            assert np.abs(pair[j] - clip.video).mean() < 8
            render.write_video(tmp_path / f"{j}.mp4", clip.video)
        usual = [frames_of(tmp_path / f"{j}.mp4")[:onset] for j in (0, 1)]
        leaks += np.any(usual[0] != usual[1])
    assert leaks > 0


def test_play_is_a_share_of_the_clips_and_leaves_the_others_as_they_are(with_pairs):
    truth = np.load(with_pairs / "pretrain.npz")
    config = tiny_world(with_pairs, **PAIRS)
    is_play = np.array([play.is_play(0.5, (0, 0), i) for i in range(30)])
    assert 5 < is_play.sum() < 25
    np.testing.assert_array_equal(truth["label"] == play.LABEL, is_play)
    assert truth["position"].shape == (30, 12, 2, 2)
    looks = motion.World(size=16, num_frames=12)
    split = render.splits(config)[0]
    for index in range(6):
        clip = split.make_clip(looks, index)
        if is_play[index]:
            wanted = play.make_play(looks, split.seed, index)
        else:
            wanted = motion.make_clip(looks, split.seed, index)
        np.testing.assert_array_equal(clip.video, wanted.video)
    # No split for fitting or evaluating probes has any.
    assert [s.play_fraction for s in render.splits(config)[1:]] == [0] * 4
