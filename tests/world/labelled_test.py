"""Videos with label maps: correct, repeatable, without effect on other splits."""

import pathlib

import numpy as np
import pytest
from render_test import tiny_world

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import get_config
from vjepa_jax.config.rules import validate
from vjepa_jax.data.clips import label_images
from vjepa_jax.data.sources import davis
from vjepa_jax.evals.segmentation.images import list_images
from vjepa_jax.world import labelled, motion, render

LOOKS = motion.World(size=32, num_frames=6)
ROOT = labelled.FOLDER


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Render the same world without label maps and with them."""
    roots = []
    for videos in (0, 5):
        config = tiny_world(tmp_path_factory.mktemp("world") / "w")
        config.pretrain_videos, config.segmentation_videos = 3, videos
        render.render_world(config)
        roots.append(config)
    return roots


def files(root):
    return {p.relative_to(root): p for p in root.rglob("*") if p.is_file()}


def test_other_splits_stay_bit_for_bit(rendered):
    without, having = (files(pathlib.Path(config.path)) for config in rendered)
    others = {p for p in having if p.parts[0] != ROOT}
    assert others == set(without)
    for path in others - {pathlib.Path(render.MANIFEST)}:
        assert without[path].read_bytes() == having[path].read_bytes(), path
    assert len(having) > len(without)


def test_files_are_the_clips_without_loss(rendered):
    config = rendered[1]
    looks = motion.World(size=config.size, num_frames=config.num_frames)
    train, val = (
        davis.list_videos(f"{config.path}/{ROOT}", f"2017/{split}", "480p")
        for split in ("train", "val")
    )
    names = [video.name for video in train + val]
    assert names == [f"{i:05d}" for i in range(5)] and len(train) == 2
    for index, video in enumerate(train + val):
        clip = labelled.make_labelled(looks, (config.seed, 7), index)
        shape = clip.objects.shape[1:]
        frames = [label_images.read_image(path, shape) for path in video.frames]
        np.testing.assert_array_equal(frames, clip.video)
        objects = [label_images.read_labels(path) for path in video.labels]
        np.testing.assert_array_equal(objects, clip.objects)
        folder = video.labels[0].parents[3] / "Classes/480p" / video.name
        classes = [label_images.read_labels(path) for path in sorted(folder.iterdir())]
        np.testing.assert_array_equal(classes, clip.classes)


def test_lists_of_classes_are_of_the_same_videos(rendered):
    root = f"{rendered[1].path}/{ROOT}"
    for key, split in (("train_path", "train"), ("test_path", "val")):
        images = list_images(f"{root}/{labelled.CLASS_LISTS[key]}")
        videos = davis.list_videos(root, f"2017/{split}", "480p")
        frames = [frame for video in videos for frame in video.frames]
        assert [image.image for image in images] == frames
        assert [image.labels.name for image in images] == [f.name for f in frames]


def test_label_maps_are_what_is_painted():
    """Followed objects are visible at first, and each of their pixels has its class."""
    unseen = several = 0
    for index in range(12):
        clip = labelled.make_labelled(LOOKS, 3, index)
        again = labelled.make_labelled(LOOKS, 3, index)
        np.testing.assert_array_equal(clip.objects, again.objects)
        assert clip.video.shape == (*clip.objects.shape, 3)
        numbers = set(np.unique(clip.objects)) - {0}
        assert numbers == set(range(1, len(numbers) + 1))
        assert numbers <= set(np.unique(clip.objects[0]))
        several += len(numbers) > 1
        shapes = {1, 2, 3, 4}
        for number in numbers:
            classes = set(np.unique(clip.classes[clip.objects == number]))
            assert len(classes) == 1 and classes <= shapes
        unseen += np.isin(clip.classes[clip.objects == 0], [1, 2, 3, 4]).any()
        # The occluder stands still and is never an object.
        occluder = clip.classes == labelled.CLASSES.index("occluder")
        assert occluder.any() and not clip.objects[occluder].any()
    assert several > 6
    assert unseen > 0


def test_objects_stand_out_from_the_background():
    """Colours inside and outside of the maps differ."""
    for index in range(4):
        clip = labelled.make_labelled(LOOKS, 5, index)
        is_object = clip.objects > 0
        inside, outside = clip.video[is_object], clip.video[clip.classes == 0]
        assert inside.mean() > outside.mean() + 20


def test_interrupted_rendering_makes_only_what_is_missing(tmp_path):
    config = tiny_world(tmp_path / "w")
    config.pretrain_videos, config.segmentation_videos = 3, 4
    render.render_world(config)
    root = tmp_path / "w"
    before = {p: p.read_bytes() for p in files(root).values()}
    lost = root / ROOT / "Classes/480p/00002/00007.png"
    kept = root / ROOT / "JPEGImages/480p/00001/00003.png"
    lost.unlink()
    stamp = kept.stat().st_mtime_ns
    (root / render.MANIFEST).rename(root / f"{render.MANIFEST}.part")
    assert render.render_world(config) is True
    after = {p: p.read_bytes() for p in files(root).values()}
    manifest = root / render.MANIFEST
    assert after.keys() == before.keys()
    assert all(after[p] == before[p] for p in after if p != manifest)
    assert kept.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("value", [-1, 2])
def test_values_out_of_range_are_named(value):
    config = get_config()
    config.world.path, config.data.path = "world", "world/pretrain.csv"
    config.world.segmentation_videos = value
    with pytest.raises(UserError, match=r"config\.world\.segmentation_videos=-?\d"):
        validate(config)
