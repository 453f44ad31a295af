"""DAVIS folders are read, their objects followed and scored; maps belong to frames."""

import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips import label_images
from vjepa_jax.data.sources import davis
from vjepa_jax.evals import registry, settings
from vjepa_jax.evals.frozen import FrozenModel
from vjepa_jax.evals.tokens.frame_features import FrameEncoder
from vjepa_jax.evals.video_objects import region_metrics, video_objects
from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.parallel import sharding

SHAPE = (4, 16, 16, 3)


def make_frozen(**fields):
    fields = {"patch_size": 8, "tubelet_size": 2} | fields
    encoder = VideoEncoder(depth=1, width=24, num_heads=2, mlp_dim=32, **fields)
    init = jax.jit(encoder.init)
    params = nn.unbox(init(jax.random.key(0), jnp.zeros((1, *SHAPE))))
    mesh = sharding.make_mesh()
    return FrozenModel(encoder, None, {"target": params["params"]}, None, SHAPE, mesh)


@pytest.fixture(scope="module")
def frozen():
    return make_frozen()


def square(height, width, top, left, side):
    mask = np.zeros((height, width), bool)
    mask[top : top + side, left : left + side] = True
    return mask


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two videos of squares that move, of other sizes, one with two objects."""
    root = tmp_path_factory.mktemp("davis")
    rng = np.random.default_rng(0)
    for name, height, width, count, kind in (
        ("walk", 40, 64, 1, "jpg"),
        ("cross", 64, 48, 2, "png"),
    ):
        for i in range(6):
            pixels = rng.integers(0, 40, (height, width, 3), dtype=np.uint8)
            mask = np.zeros((height, width), np.uint8)
            for k in range(count):
                left = 8 + 3 * i if k == 0 else width - 24 - 3 * i
                region = square(height, width, 2 + 24 * k, left, 16)
                pixels[region] = (230, 30, 30) if k == 0 else (30, 30, 230)
                mask[region] = k + 1
            mask[-1, -1] = label_images.IGNORED
            folders = [root / part / "480p" / name for part in ("JPEGImages",)]
            folders.append(root / "Annotations" / "480p" / name)
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels)
            image.save(folders[0] / f"{i:05d}.{kind}", quality=95)
            label_images.write_image(folders[1] / f"{i:05d}.png", mask)
    lists = root / "ImageSets" / "2017"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("walk\ncross\n")
    return root


@pytest.fixture
def config(dataset):
    config = settings.video_objects()
    config.path = str(dataset)
    config.update(resolution=32, clips_per_call=4, num_workers=2)
    config.update(last_frames=2, radius=3.0, places_at_once=5)
    return config


# -------------------------------------------------------------------------- the layout


def test_videos_are_listed_in_order(dataset):
    walk, cross = davis.list_videos(str(dataset), "2017/val", "480p")
    assert (walk.name, len(walk.frames), len(cross.labels)) == ("walk", 6, 6)
    assert [f.name for f in walk.frames][:2] == ["00000.jpg", "00001.jpg"]
    assert [f.stem for f in cross.labels] == [f.stem for f in cross.frames]


def test_frames_are_listed_by_their_numbers(tmp_path):
    for part, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        folder = tmp_path / part / "480p" / "v"
        folder.mkdir(parents=True)
        for number in range(12):
            (folder / f"{number}.{suffix}").touch()
    (tmp_path / "ImageSets").mkdir()
    (tmp_path / "ImageSets" / "val.txt").write_text("v\n", encoding="utf-16")
    (video,) = davis.list_videos(str(tmp_path), "val", "480p")
    assert [file.stem for file in video.frames] == [str(i) for i in range(12)]
    assert [file.stem for file in video.labels] == [str(i) for i in range(12)]


def test_palette_images_keep_their_numbers(dataset):
    path = dataset / "Annotations" / "480p" / "cross" / "00000.png"
    with Image.open(path) as image:
        assert image.mode == "P"
        colours = np.asarray(image.convert("RGB"))
    labels = label_images.read_labels(path)
    assert set(np.unique(labels)) == {0, 1, 2, 255}
    # The colours of DAVIS and VOC.
    for number, colour in ((0, (0, 0, 0)), (1, (128, 0, 0)), (2, (0, 128, 0))):
        assert np.all(colours[labels == number] == colour)


def test_what_is_missing_is_named(dataset, tmp_path):
    def refused(pattern, change):
        root = tmp_path / "copy"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(dataset, root)
        change(root)
        with pytest.raises(UserError, match=pattern):
            davis.list_videos(str(root), "2017/val", "480p")

    walk = "480p/walk/"
    refused(r"val\.txt is missing", lambda r: shutil.rmtree(r / "ImageSets"))
    refused(r"walk is missing", lambda r: shutil.rmtree(r / "JPEGImages" / walk))
    refused(
        "00003 is only a frame or only a label image",
        lambda r: (r / "Annotations" / walk / "00003.png").unlink(),
    )
    refused(
        "lists no videos", lambda r: (r / "ImageSets/2017/val.txt").write_text("\n")
    )

    def shorten(root):
        for part in ("JPEGImages", "Annotations"):
            for path in [*(root / part / walk).iterdir()]:
                if path.stem > "00001":
                    path.unlink()

    refused("walk has 2 frames", shorten)


def test_files_that_are_not_label_images_are_named(dataset, tmp_path, config, frozen):
    shutil.copytree(dataset, tmp_path / "copy")
    config.path = str(tmp_path / "copy")
    folder = tmp_path / "copy" / "Annotations" / "480p" / "walk"
    first = folder / "00000.png"
    Image.fromarray(np.zeros((40, 64, 3), np.uint8)).save(first)
    with pytest.raises(UserError, match=r"00000\.png is an image of mode RGB"):
        video_objects.evaluate(frozen, config)
    label_images.write_image(first, np.zeros((40, 64), np.uint8))
    with pytest.raises(UserError, match=r"00000\.png has no object to follow"):
        video_objects.evaluate(frozen, config)
    label_images.write_image(first, np.ones((40, 60), np.uint8))
    with pytest.raises(UserError, match=r"40x64 pixels and its label image 40x60"):
        video_objects.evaluate(frozen, config)
    first.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"00000\.png cannot be read"):
        video_objects.evaluate(frozen, config)


# ------------------------------------------------------------------- maps of features


def test_an_image_is_repeated_to_a_tubelet(frozen, rng):
    frames = rng.integers(0, 256, (5, 1, 16, 24, 3), dtype=np.uint8)
    encoder = FrameEncoder(frozen, 1, clips_per_call=2)
    found = encoder(frames)
    assert found.shape == (5, 2, 3, 24) and encoder.grid((16, 24)) == (2, 3)
    assert encoder.window(3, 9).tolist() == [3]
    wanted = frozen.encode(np.repeat(frames, 2, axis=1))
    np.testing.assert_allclose(found.reshape(5, 1, 6, 24), wanted, atol=1e-5)


def test_an_image_has_its_own_embedding_where_there_is_one(rng):
    frozen = make_frozen(image_embed=True)
    frames = rng.integers(0, 256, (2, 1, 16, 16, 3), dtype=np.uint8)
    found = FrameEncoder(frozen, 1, clips_per_call=8)(frames)
    wanted = frozen.encode(frames)
    np.testing.assert_allclose(found.reshape(2, 1, 4, 24), wanted, atol=1e-5)


@pytest.mark.parametrize(("tubelet", "num_frames"), [(2, 4), (1, 4), (2, 6), (4, 4)])
def test_the_map_of_a_clip_is_of_the_step_that_holds_the_frame(
    rng, tubelet, num_frames
):
    frozen = make_frozen(tubelet_size=tubelet)
    encoder = FrameEncoder(frozen, num_frames, clips_per_call=8)
    place = int(np.flatnonzero(encoder.window(50, 100) == 50)[0])
    step = place // tubelet
    frames = rng.integers(0, 256, (1, num_frames, 16, 16, 3), dtype=np.uint8)
    found = encoder(frames)
    wanted = frozen.encode(frames)[:, step].reshape(found.shape)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert encoder.window(50, 100).tolist() == list(
        range(50 - place, 50 - place + num_frames)
    )
    # It stands in the middle, as nearly as tubelets allow.
    assert abs(2 * place + 1 - num_frames) <= tubelet + 1
    edge = encoder.window(0, 3)
    assert edge.min() == 0 and edge.max() <= 2 and edge[place] == 0


def test_clips_that_tubelets_do_not_fill_are_refused(frozen):
    with pytest.raises(UserError, match="cannot be cut into tubelets"):
        FrameEncoder(frozen, 3, clips_per_call=1).grid((16, 16))


# ---------------------------------------------------------------------------- the whole


def test_network_sizes_are_whole_patches_near_the_shape():
    assert video_objects.network_size((480, 854), 480, 16) == (480, 848)
    assert video_objects.network_size((480, 910), 480, 16) == (480, 912)
    assert video_objects.network_size((64, 48), 32, 8) == (40, 32)


def test_labels_are_scaled_before_the_largest_is_taken(rng):
    labels = rng.random((4, 6, 3)).astype(np.float32) * [1, 0.3, 0]
    found = np.asarray(video_objects._most_likely(jnp.asarray(labels), size=(8, 12)))
    large = np.asarray(jax.image.resize(labels, (8, 12, 3), "linear"))
    wanted = np.zeros((8, 12), int)
    for y in range(8):
        for x in range(12):
            reach = [
                (large[y, x, k] - large[..., k].min()) / np.ptp(large[..., k])
                for k in range(2)
            ]
            wanted[y, x] = np.argmax(reach)
    # A label without any share is never predicted.
    np.testing.assert_array_equal(found, wanted)
    assert (found == 1).any()


def test_the_first_and_the_last_frame_are_not_scored(dataset, rng):
    _, cross = davis.list_videos(str(dataset), "2017/val", "480p")
    truth = [
        np.where(m == 255, 0, m) for m in map(label_images.read_labels, cross.labels)
    ]
    wrong = np.zeros_like(truth[0])
    found = video_objects.score_video(cross, iter([*truth[1:-1], wrong]))
    assert found.shape == (2, 2, 3)
    np.testing.assert_allclose(found, np.tile([1, 1, 0], (2, 2, 1)))
    noisy = [np.where(rng.random(m.shape) < 0.3, 0, m) for m in truth[1:]]
    found = video_objects.score_video(cross, iter(noisy))
    for k in (1, 2):
        for row, measure in enumerate(
            (region_metrics.region_similarity, region_metrics.boundary_accuracy)
        ):
            values = [
                measure(t == k, s == k)
                for t, s in zip(truth[1:-1], noisy[:-1], strict=True)
            ]
            wanted = region_metrics.statistics(np.array(values))
            np.testing.assert_allclose(found[k - 1, row], wanted)


def test_results_are_means_over_objects(rng):
    scores = [rng.random((count, 2, 3)) for count in (1, 3, 2)]
    found = video_objects.average_scores(scores, seed=0)
    objects = np.concatenate(scores)
    assert found["objects"] == 6 and found["videos"] == 3
    assert found["j_recall"] == pytest.approx(objects[:, 0, 1].mean())
    assert found["f_decay"] == pytest.approx(objects[:, 1, 2].mean())
    both = (found["j_mean"] + found["f_mean"]) / 2
    assert found["j_and_f_mean"] == pytest.approx(both)
    per_video = [part[..., 0].mean() for part in scores]
    low, high = found["lower_bound"], found["upper_bound"]
    assert min(per_video) - 1e-9 <= low <= both <= high <= max(per_video) + 1e-9


def test_objects_are_followed(frozen, config):
    """Even untrained features distinguish colours; repeated labels score lower."""
    found = registry.evaluate(frozen, config)
    columns = {"pretrained", "random_init", "first_mask"}
    assert all(set(row) == columns for row in found.values())
    assert found["objects"]["pretrained"] == 3
    followed, still = (found["j_mean"][name] for name in ("pretrained", "first_mask"))
    assert followed > still + 0.1
    again = video_objects.evaluate(frozen, config)
    assert again == found


def test_scores_of_repeated_labels(frozen, config):
    """A square of 16 that has moved by 3 i: J is (16 - 3 i) / (16 + 3 i)."""
    config.update(max_videos=1, random_init=False)
    found = video_objects.evaluate(frozen, config)
    wanted = np.mean([(16 - 3 * i) / (16 + 3 * i) for i in range(1, 5)])
    assert found["j_mean"]["first_mask"] == pytest.approx(wanted)
    assert found["videos"]["first_mask"] == 1


def test_values_out_of_range_are_named(frozen, config):
    config.top_k = 0
    with pytest.raises(UserError, match=r"config\.top_k=0 is out of range"):
        video_objects.evaluate(frozen, config)
