"""Rendering a world: complete, restartable, refused over another one's files."""

import json

import numpy as np
import pytest

from vjepa_jax.data import render, sources
from vjepa_jax.data.decode import read_clip
from vjepa_jax.data.transforms import central_box
from vjepa_jax.default_config import UserError, get_config


def tiny_world(path):
    config = get_config().world
    config.path = str(path)
    config.size = 16
    config.num_frames = 8
    config.pretrain_videos = 13
    config.probe_train_videos = 11
    config.probe_test_videos = 11
    config.hidden_train_videos = 2
    config.hidden_test_videos = 2
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
        source = sources.open_source(str(rendered / f"{split.name}.csv"))
        truth = np.load(rendered / f"{split.name}.npz")
        assert len(source) == len(truth["label"]) == split.num_videos
        np.testing.assert_array_equal(source.labels, truth["label"])
        video = read_clip(
            source[0].path, num_frames=8, frame_step=1, size=16, crop=central_box
        )
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
    config = tiny_world(rendered)
    config.pretrain_videos = 14
    with pytest.raises(UserError, match=r"other settings.*world\.path"):
        render.render_world(config)
    assert contents(rendered) == before


def test_interrupted_rendering_makes_only_what_is_missing(tmp_path):
    config = tiny_world(tmp_path)
    render.render_world(config)
    whole = contents(tmp_path)
    manifest = tmp_path / render.MANIFEST
    described = json.loads(manifest.read_text())["world"]
    manifest.unlink()
    (tmp_path / f"{render.MANIFEST}.part").write_text(json.dumps({"world": described}))
    lost = tmp_path / "pretrain" / "000003.mp4"
    pixels = lost.read_bytes()
    lost.unlink()
    assert render.render_world(config) is True
    after = contents(tmp_path)
    assert after.keys() == whole.keys()
    remade = {p for p in after if p.suffix == ".mp4" and after[p] != whole[p]}
    assert remade == {lost}
    assert lost.read_bytes() == pixels


def test_world_path_that_is_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(UserError, match="not a folder"):
        render.render_world(tiny_world(path))
