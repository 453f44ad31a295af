"""Linear heads on patches learn classes; measures equal those of scikit-learn."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, jaccard_score
from step_setup import one_device

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips import label_images
from vjepa_jax.evals import registry, settings
from vjepa_jax.evals.frozen import FrozenModel
from vjepa_jax.evals.heads.head_grid import GridTraining, HeadGrid, Schedules
from vjepa_jax.evals.segmentation import confusion, segmentation
from vjepa_jax.evals.segmentation.images import ImageReader, hold_out, list_images
from vjepa_jax.evals.tokens.frame_features import FrameEncoder
from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.models.heads import LinearClassifier
from vjepa_jax.parallel import sharding

COLOURS = np.array([(40, 40, 40), (220, 40, 40), (40, 40, 220)], np.uint8)


def write_files(root, name, labels, rng):
    """Write an image whose colours are its classes."""
    colours = COLOURS[np.where(labels == label_images.IGNORED, 0, labels)]
    noise = rng.integers(0, 30, (*labels.shape, 3), dtype=np.uint8)
    for folder, pixels in (("images", colours + noise), ("masks", labels)):
        path = root / folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        label_images.write_image(path, pixels)


def draw_labels(rng, height, width):
    labels = np.zeros((height, width), np.uint8)
    for k in (1, 2):
        top, left = rng.integers(0, height - 16), rng.integers(0, width - 16)
        labels[top : top + 16, left : left + 16] = k
    labels[: rng.integers(0, 4)] = label_images.IGNORED
    return labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 7)):
        for i in range(count):
            # Of several sizes in the test, as real images are.
            height, width = (32, 32) if split == "train" else (30 + 4 * i, 40)
            name = f"{i // 4}/{i}" if split == "train" else str(i)
            write_files(root / split, name, draw_labels(rng, height, width), rng)
    return root


@pytest.fixture(scope="module")
def frozen():
    encoder = VideoEncoder(
        depth=1, width=24, num_heads=2, mlp_dim=32, patch_size=4, tubelet_size=2
    )
    shape = (4, 32, 32, 3)
    init = jax.jit(encoder.init)
    params = nn.unbox(init(jax.random.key(0), jnp.zeros((1, *shape))))
    mesh = sharding.make_mesh()
    return FrozenModel(encoder, None, {"target": params["params"]}, None, shape, mesh)


@pytest.fixture
def config(folder):
    config = settings.segmentation()
    config.update(num_classes=3, epochs=12, batch_size=8, test_batch_size=4)
    config.update(clips_per_call=8, random_init=False)
    config.data.update(train_path=str(folder / "train"), test_path=str(folder / "test"))
    config.data.update(size=(32, 32), held_out_share=0.3, num_workers=2)
    config.grids.main.update(learning_rates=(0.1, 1e-5), weight_decays=(1e-3,))
    return config


# --------------------------------------------------------------------------- the lists


def test_folders_and_lists_give_the_same_images(folder, tmp_path):
    images = list_images(str(folder / "train"))
    assert len(images) == 24 and images[0].labels.is_file()
    lines = [f"{p.image} {p.labels.relative_to(folder)}" for p in images]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        text = "\n".join(lines) + "\n\n"
        (folder / "list.txt").write_text(text, encoding=encoding)
        assert list_images(str(folder / "list.txt")) == images


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("", "is empty"),
        ("one\n", "list.txt:1 is not 'IMAGE LABELS'"),
        ("\na.png b.png\n", "list.txt:2 names .*a.png, which is missing"),
    ],
)
def test_bad_lists_are_named(tmp_path, text, pattern):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=pattern):
        list_images(str(tmp_path / "list.txt"))


def test_images_without_labels_are_named(tmp_path, rng):
    with pytest.raises(UserError, match="neither a list"):
        list_images(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="has no images"):
        list_images(str(tmp_path))
    write_files(tmp_path, "a", draw_labels(rng, 20, 20), rng)
    (tmp_path / "masks" / "a.png").unlink()
    with pytest.raises(UserError, match=r"a\.png has no label image"):
        list_images(str(tmp_path))


def test_frames_of_a_folder_are_held_out_together(folder):
    images = list_images(str(folder / "train"))
    fit, held_out = hold_out(images, 0.3, seed=1)
    assert sorted(fit + held_out, key=str) == sorted(images, key=str)
    folders = [{p.image.parent for p in part} for part in (fit, held_out)]
    assert not folders[0] & folders[1] and len(folders[1]) == 2
    # In one folder, each image is for itself.
    one = list_images(str(folder / "test"))
    fit, held_out = hold_out(one, 0.3, seed=1)
    assert len(held_out) == 3 and len(fit) == 4
    with pytest.raises(UserError, match=r"held_out_share=0\.3 of 1 folders or images"):
        hold_out(one[:1], 0.3, seed=1)


def test_frames_around_an_image_are_those_of_its_folder(folder):
    image = list_images(str(folder / "train"))[6]
    files, place = image.frames_around()
    assert files[place] == image.image and len(files) == 4


def test_frames_around_an_image_are_in_the_order_of_their_numbers(tmp_path, rng):
    lines = []
    for number in range(12):
        write_files(tmp_path, f"a b {number}", draw_labels(rng, 20, 20), rng)
        lines.append(f"images/a b {number}.png\tmasks/a b {number}.png\n")
    (tmp_path / "list.txt").write_text("".join(lines))
    images = list_images(str(tmp_path / "list.txt"))
    files, place = images[9].frames_around()
    assert list(files) == [image.image for image in images] and place == 9


# ----------------------------------------------------------------------- what is read


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**32 - 1)
)
def test_labels_are_resized_to_the_nearest_pixel(height, width, scale, seed):
    resize = label_images.resize_labels
    labels = np.random.default_rng(seed).integers(0, 9, (height, width), np.uint8)
    large = resize(labels, (height * scale, width * scale))
    np.testing.assert_array_equal(large, np.kron(labels, np.ones((scale, scale), int)))
    np.testing.assert_array_equal(resize(large, labels.shape), labels)
    box = (height // 2, width // 3, height - height // 2, width - width // 3)
    cut = labels[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
    np.testing.assert_array_equal(resize(labels, cut.shape, box), cut)


def test_shares_are_those_of_a_loop(rng):
    labels = rng.integers(0, 5, (12, 20), np.uint8)
    found = label_images.patch_shares(labels, (12, 20), (3, 5), num_labels=4)
    assert found.shape == (3, 5, 4)
    for y in range(3):
        for x in range(5):
            patch = labels[4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
            wanted = [(patch == k).mean() for k in range(4)]
            np.testing.assert_allclose(found[y, x], wanted)


def make_reader(frozen, num_frames=1, **fields):
    encoder = FrameEncoder(frozen, num_frames, clips_per_call=8)
    fields = {"first_class": 0, "crop_scale": (1.0, 1.0), "flip_probability": 0.0} | (
        fields
    )
    return ImageReader(encoder, (32, 32), num_classes=3, **fields)


def test_image_and_labels_are_cropped_and_flipped_together(folder, frozen, rng):
    """Colours show the class, before and after."""
    image = list_images(str(folder / "train"))[3]
    read = make_reader(frozen, crop_scale=(0.2, 0.9), flip_probability=0.5)
    whole, seen = read(image), []
    np.testing.assert_array_equal(whole.labels, label_images.read_labels(image.labels))
    for number in range(8):
        sample = read(image, (int(rng.integers(999)), number))
        seen.append(sample.window.tobytes())
        of_patch = sample.window[0].reshape(8, 4, 8, 4, 3).mean((1, 3))
        distance = np.abs(of_patch[..., None, :] - COLOURS - 15.0).sum(-1)
        pure = sample.shares.max(-1) == 1
        assert pure.any()
        np.testing.assert_array_equal(
            distance.argmin(-1)[pure], sample.shares.argmax(-1)[pure]
        )
    assert len(set(seen)) > 4  # two of eight may be alike by chance


def test_clips_are_the_frames_around(folder, frozen):
    images = list_images(str(folder / "train"))[4:8]
    windows = [make_reader(frozen, num_frames=4)(image).window for image in images]
    alone = [make_reader(frozen)(image).window[0] for image in images]
    # The image is the fourth of its clip; before the first one it stands still.
    for i, window in enumerate(windows):
        wanted = [alone[max(0, min(3, i + k))] for k in (-3, -2, -1, 0)]
        np.testing.assert_array_equal(window, wanted)


def test_classes_count_from_the_first(tmp_path, frozen, rng):
    labels = np.full((32, 32), 1, np.uint8)
    labels[:8], labels[8:12] = 0, label_images.IGNORED
    labels[12:16] = 3
    write_files(tmp_path, "a", np.minimum(labels, 2), rng)
    path = tmp_path / "masks" / "a.png"
    label_images.write_image(path, labels)
    (image,) = list_images(str(tmp_path))
    found = make_reader(frozen, first_class=1)(image)
    wanted = np.where((labels == 0) | (labels == 255), 255, labels - 1)
    np.testing.assert_array_equal(found.labels, wanted)
    np.testing.assert_array_equal(found.shares[:3].sum(-1), 0)
    with pytest.raises(UserError, match=r"a\.png has the class 3, and there are 3"):
        make_reader(frozen)(image)


# ------------------------------------------------------------------------ the measures


def test_miou_is_that_of_scikit_learn(rng):
    truth, found = (rng.integers(0, 6, 400) for _ in range(2))
    # A class that is neither true nor predicted is left out of the mean.
    matrix = confusion_matrix(truth, found, labels=range(8))
    wanted = jaccard_score(truth, found, average=None, labels=range(6))
    np.testing.assert_allclose(confusion.class_iou(matrix)[:6], wanted)
    assert np.isnan(confusion.class_iou(matrix)[6:]).all()
    assert confusion.mean_iou(matrix) == pytest.approx(
        jaccard_score(truth, found, average="macro")
    )


@pytest.mark.parametrize("devices", [1, 8])
def test_heads_are_counted_as_one_by_one(rng, devices):
    """Images of several sizes, ignored pixels, padding; on one device and on eight."""
    classes, count, side = 4, 5, (3, 5)
    mesh = one_device() if devices == 1 else sharding.make_mesh(2, 4)
    grid = HeadGrid(
        LinearClassifier(classes),
        GridTraining((Schedules((1e-3, 1e-2), (0.1,)),), total_steps=1),
        (1, 6),
        seed=int(rng.integers(99)),
        mesh=mesh,
    )
    features = 9 * rng.normal(size=(count, *side, 6)).astype(np.float32)
    patch_labels = rng.integers(0, classes + 1, (count, *side), np.uint8)
    patch_labels[patch_labels == classes] = label_images.IGNORED
    shapes = np.array([(12, 20), (9, 15), (16, 11), (3, 5), (13, 24)], np.int32)
    labels = np.full((count, 16, 24), label_images.IGNORED, np.uint8)
    for filled, (height, width) in zip(labels, shapes, strict=True):
        filled[:height, :width] = rng.integers(0, classes, (height, width))
    labels[0, :4] = label_images.IGNORED
    found = confusion.confusions(
        grid, features, patch_labels, labels, shapes, batch_size=6
    )
    assert found.shape == (2, 2, classes, classes)
    for number in range(2):
        params = jax.tree.map(lambda x, i=number: np.asarray(x[i]), grid.state[0])
        layer = params["linear"]
        logits = features @ layer["kernel"] + layer["bias"]
        patches, pixels = [], []
        for i, (height, width) in enumerate(shapes):
            large = jax.image.resize(
                logits[i], (height, width, classes), "linear", antialias=False
            )
            for counted, truth, predicted in (
                (patches, patch_labels[i], logits[i].argmax(-1)),
                (pixels, labels[i, :height, :width], np.argmax(large, -1)),
            ):
                kept = truth != label_images.IGNORED
                counted.append((truth[kept], predicted[kept]))
        for counted, matrix in (
            (patches, found[number, 0]),
            (pixels, found[number, 1]),
        ):
            parts = zip(*counted, strict=True)
            truth, predicted = (np.concatenate(part) for part in parts)
            wanted = confusion_matrix(truth, predicted, labels=range(classes))
            # Rounding may turn a tie.
            assert np.abs(matrix - wanted).sum() <= 2
            assert matrix.sum() == wanted.sum()


# --------------------------------------------------------------------------- the whole


def test_heads_learn_and_the_best_on_held_out_images_counts(frozen, config):
    found = registry.evaluate(frozen, config)
    column = {measure: row["pretrained"] for measure, row in found.items()}
    assert column["chosen_head"] == 1
    assert column["patch_miou"] > 0.75
    # Upsampled logits of patches of 4 pixels do not meet every edge.
    assert column["miou"] > 0.6
    assert column["images_fitted"] + column["images_held_out"] == 24
    assert column["images_tested"] == 7
    heads = [
        column[f"head {n}: rate {rate}, decay 0.001, test miou"]
        for n, rate in ((1, "0.1"), (2, "1e-05"))
    ]
    assert heads[0] == column["miou"] and heads[1] < heads[0] - 0.2
    per_class = [column[f"class {k}, iou"] for k in range(3)]
    assert np.mean(per_class) == pytest.approx(column["miou"])


def test_an_evaluation_is_repeatable_and_has_an_untrained_column(frozen, config):
    config.update(epochs=1, random_init=True)
    config.data.max_images = 16
    first, again = (segmentation.evaluate(frozen, config) for _ in range(2))
    assert first == again
    assert set(first["miou"]) == {"pretrained", "random_init"}
    assert first["images_tested"]["pretrained"] == 7
    assert first["images_fitted"]["pretrained"] < 16


@pytest.mark.parametrize(
    ("value", "found"), [(1, "one class, 1"), (label_images.IGNORED, "no class")]
)
def test_label_images_of_one_class_are_refused(tmp_path, frozen, config, value, found):
    for i in range(16):
        for folder, shape in (("images", (20, 20, 3)), ("masks", (20, 20))):
            path = tmp_path / folder / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            label_images.write_image(path, np.full(shape, value, np.uint8))
    config.data.train_path = str(tmp_path)
    with pytest.raises(
        UserError, match=rf"of \d+ images, such as .*, hold {found}: 25"
    ):
        segmentation.evaluate(frozen, config)
    if value == label_images.IGNORED:
        config.data.update(train_path=config.data.test_path, test_path=str(tmp_path))
        config.update(epochs=1, batch_size=4)
        with pytest.raises(UserError, match="no pixel of 16 images to evaluate on"):
            segmentation.evaluate(frozen, config)


def test_what_does_not_fit_is_named(frozen, config):
    config.batch_size = 30
    with pytest.raises(UserError, match=r"config\.batch_size=30 exceeds the 16 images"):
        segmentation.evaluate(frozen, config)
    config.batch_size, config.num_classes = 8, 2
    with pytest.raises(UserError, match=r"has the class 2, and there are 2"):
        segmentation.evaluate(frozen, config)
    for config.num_classes in (0, 1):
        with pytest.raises(
            UserError, match=rf"num_classes={config.num_classes} is out"
        ):
            segmentation.evaluate(frozen, config)
