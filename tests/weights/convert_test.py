"""Official weights are imported and exported; nothing is lost or guessed."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from goldens import NAMES, Golden

import vjepa_jax
from vjepa_jax.base.errors import UserError
from vjepa_jax.config.rules import validate
from vjepa_jax.config.saved import restored
from vjepa_jax.models import positions, registry
from vjepa_jax.models.encoder import normalise
from vjepa_jax.program import build
from vjepa_jax.run import checkpoint, conversion
from vjepa_jax.weights import files, official, rules

FAMILIES = {
    "vjepa1_train": "vjepa",
    "vjepa2_train": "vjepa2",
    "vjepa2_swiglu_nonsquare": "vjepa2",
    "vjepa2_1_image": "vjepa2_1",
}


def assert_same_arrays(parts, content):
    for part, state in parts.items():
        theirs = rules.strip_prefixes(content[part])
        assert set(state) <= set(theirs)
        assert set(theirs) - set(state) <= set(rules.IGNORED)
        for name, value in state.items():
            assert value.tobytes() == theirs[name].tobytes(), f"{part} {name}"
            assert value.shape == theirs[name].shape


@pytest.mark.parametrize("name", NAMES)
def test_official_to_ours_and_back_is_the_same(name):
    golden = Golden.named(name)
    converted = golden.converted()
    models = {"target": converted.target, **(converted.params or {})}
    parts = conversion.export_parts(models, converted.meta)
    if name == "vjepa2_probe":
        (parts["classifier"],) = parts.pop("classifiers")
    assert set(parts) == set(golden.content)
    assert_same_arrays(parts, golden.content)
    if "config" in converted.meta:
        assert converted.meta["family"] == golden.meta["family"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every kind of golden, converted and written, with the online encoder."""
    base = tmp_path_factory.mktemp("converted")
    for name in FAMILIES:
        conversion.save(Golden.named(name).converted("encoder"), str(base / name))
    return base


@pytest.mark.parametrize("name", FAMILIES)
def test_load_encoder_equals_the_official_code(folders, name):
    golden, encode = Golden.named(name), vjepa_jax.load_encoder(str(folders / name))
    with jax.default_matmul_precision("highest"):
        features = encode(golden.eval_clips())
    wanted = golden.arrays["eval_encoder_full"]
    clips = golden.eval_clips()
    assert features.dtype == np.float32
    assert features.shape[:-1] == (len(clips), *encode.encoder.grid(clips.shape))
    error = np.abs(features.reshape(wanted.shape) - wanted).max() / wanted.std()
    assert error <= 2e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpoint_rebuilds_the_models(folders, name):
    golden = Golden.named(name)
    models, meta = checkpoint.restore_models(str(folders / name))
    config = restored(meta["config"])
    config.data.path = "videos"
    validate(config)
    encoder, predictor = build.make_models(config)
    assert (encoder.depth, encoder.width, encoder.num_heads) == tuple(
        golden.meta[key] for key in ("depth", "embed_dim", "num_heads")
    )
    assert predictor.num_heads == golden.meta["predictor_heads"]
    assert tuple(meta["video_shape"]) == build.video_shapes(config)["video"]
    assert_same_arrays(conversion.export_parts(models, meta), golden.content)


@pytest.fixture(scope="module")
def encode(folders):
    return vjepa_jax.load_encoder(str(folders / "vjepa2_train"))


def test_uint8_video_is_normalised(encode, rng):
    video = rng.integers(0, 256, (2, 4, 32, 48, 3), np.uint8)
    apply = jax.jit(encode.encoder.apply)
    wanted = apply({"params": encode.params}, normalise(video))
    features = encode(video)
    assert features.shape == (2, 2, 2, 3, 64)
    np.testing.assert_allclose(features.reshape(wanted.shape), wanted, atol=1e-5)
    np.testing.assert_array_equal(encode(video[0])[0], encode(video[:1])[0])


def test_one_frame_fills_a_tubelet(encode, rng):
    frame = rng.integers(0, 256, (32, 32, 3), np.uint8)
    features = encode(frame)
    assert features.shape == (1, 1, 2, 2, 64)
    np.testing.assert_array_equal(features, encode(np.stack([frame, frame])))


def test_levels_of_an_image_encoder(folders, rng):
    path = str(folders / "vjepa2_1_image")
    frame = rng.integers(0, 256, (1, 1, 32, 32, 3), np.uint8)
    last = vjepa_jax.load_encoder(path)(frame)
    every = vjepa_jax.load_encoder(path, all_levels=True)(frame)
    assert last.shape == (1, 1, 2, 2, 32)
    assert every.shape == (1, 1, 2, 2, 128)
    np.testing.assert_allclose(every[..., -32:], last, atol=1e-5)


def test_what_fills_no_tubelet_is_left_out(encode, rng):
    video = rng.integers(0, 256, (1, 5, 47, 33, 3), np.uint8)
    features = encode(video)
    assert features.shape == (1, 2, 2, 2, 64)
    np.testing.assert_array_equal(features, encode(video[:, :4, :32, :32]))


def test_outputs_of_chosen_blocks(folders, encode, rng):
    path = str(folders / "vjepa2_train")
    video = rng.integers(0, 256, (1, 2, 32, 32, 3), np.uint8)
    both = vjepa_jax.load_encoder(path, out_layers=(0, 1))(video)
    assert both.shape == (1, 1, 2, 2, 128)
    np.testing.assert_allclose(both[..., 64:], encode(video), atol=1e-5)
    assert np.abs(both[..., :64] - both[..., 64:]).max() > 0.1
    with pytest.raises(UserError, match=r"out_layers=\(2,\).*blocks are 0 to 1"):
        vjepa_jax.load_encoder(path, out_layers=(2,))


@pytest.mark.parametrize(
    ("shape", "dtype", "match"),
    [
        ((1, 4, 32, 15, 3), np.uint8, "4 frames of 32x15 is smaller than a tubelet"),
        ((1, 3, 4, 32, 32), np.uint8, "is not .B, T, H, W, 3."),
        ((0, 4, 32, 32, 3), np.uint8, "is empty"),
        ((1, 4, 32, 32, 3), np.int64, "int64 is neither"),
    ],
)
def test_video_that_cannot_be_encoded(encode, shape, dtype, match):
    with pytest.raises(UserError, match=match):
        encode(np.zeros(shape, dtype))


def test_gated_mlp_of_the_encoder_alone():
    golden = Golden.named("vjepa2_swiglu_nonsquare")
    predictor = rules.strip_prefixes(golden.content["predictor"])
    width = golden.meta["predictor_dim"]
    for i in range(golden.meta["predictor_depth"]):
        block = f"predictor_blocks.{i}.mlp"
        del predictor[f"{block}.fc3.weight"], predictor[f"{block}.fc3.bias"]
        for name, (rows, columns) in (
            ("fc1", (4 * width, width)),
            ("fc2", (width, 4 * width)),
        ):
            predictor[f"{block}.{name}.weight"] = np.ones((rows, columns), np.float32)
            predictor[f"{block}.{name}.bias"] = np.ones(rows, np.float32)
    golden.content = {**golden.content, "predictor": predictor}
    meta = golden.converted().meta
    encoder, ours = build.make_models(restored(meta["config"]))
    assert (encoder.mlp, ours.mlp, ours.mlp_dim) == ("swiglu", "gelu", 4 * width)


def test_distilled_model():
    """The student has four norms and trains one; its predictor's target is wider."""
    golden = Golden.named("vjepa2_1_train")
    content = golden.content
    predictor = rules.strip_prefixes(content["predictor"])
    for name in ("predictor_embed.0", "predictor_embed.2"):
        del predictor[f"{name}.weight"], predictor[f"{name}.bias"]
    predictor["predictor_embed.weight"] = np.ones((24, 32), np.float32)
    predictor["predictor_embed.bias"] = np.ones(24, np.float32)
    for name in ("predictor_proj", "predictor_proj_context"):
        predictor[f"{name}.weight"] = np.ones((40, 24), np.float32)
        predictor[f"{name}.bias"] = np.ones(40, np.float32)
    golden.content = {
        "ema_encoder": content["target_encoder"],
        "encoder": content["encoder"],
        "predictor": predictor,
    }
    converted = golden.converted()
    encoder, ours = build.make_models(restored(converted.meta["config"]))
    assert encoder.levels == (2, 5, 8, 11)
    assert (encoder.out_dim, ours.out_dim, ours.input_dim) == (32, 40, 0)
    models = {"target": converted.target, **converted.params}
    parts = conversion.export_parts(models, converted.meta)
    assert set(parts) == set(golden.content)
    assert_same_arrays(parts, golden.content)


def test_chosen_encoder():
    golden = Golden.named("vjepa2_train")
    golden.content["encoder"] = golden.content["target_encoder"] | {
        "module.backbone.norm.bias": np.full(64, 7, np.float32)
    }
    assert (golden.converted().target["norm"]["bias"] != 7).all()
    file = golden.file("encoder")
    converted = conversion.import_file(file, golden.hints)
    assert (converted.target["norm"]["bias"] == 7).all()
    why = converted.ignored["target_encoder"]
    assert why == "another encoder: --key=target_encoder takes it"
    with pytest.raises(UserError, match="no such encoder; it has: target_encoder, en"):
        golden.file("ema_encoder")


def test_every_wrong_name_is_listed():
    golden = Golden.named("vjepa2_train")
    state = golden.content["target_encoder"]
    del state["module.backbone.blocks.1.norm1.bias"]
    state["module.backbone.extra.weight"] = np.zeros(3)
    state["module.backbone.norm.weight"] = np.zeros(5, np.float32)
    with pytest.raises(UserError, match=r"do not fit target_encoder \(3 names\)") as e:
        golden.converted()
    message = str(e.value)
    assert "blocks.1.norm1.bias: missing" in message
    assert "extra.weight: unknown, of shape (3,)" in message
    assert "norm.weight: (5,) makes norm/scale of (5,), the model has (64,)" in message


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("blocks.0.mlp.fc1.weight", "have no 'blocks.0.mlp.fc1.weight'"),
        ("patch_embed.proj.weight", "have no 'patch_embed.proj.weight'"),
    ],
)
def test_name_on_which_the_size_depends(name, match):
    golden = Golden.named("vjepa2_train")
    del golden.content["target_encoder"][f"module.backbone.{name}"]
    with pytest.raises(UserError, match=match):
        golden.converted()


def test_unknown_part_of_a_file():
    golden = Golden.named("vjepa2_train")
    golden.content |= {"epoch": 3, "opt": {}}
    assert set(golden.file().ignored) == {"epoch", "opt"}
    golden.content["decoder"] = {}
    with pytest.raises(UserError, match="'decoder', which is not a known part"):
        golden.file()


def test_two_names_that_are_one_without_prefixes():
    state = {"module.norm.bias": np.zeros(2), "norm.bias": np.ones(2)}
    with pytest.raises(UserError, match=r"are norm\.bias without"):
        rules.strip_prefixes(state)


def with_table(grid, num_tokens):
    """Return a V-JEPA 2 whose file has a position table, like the public ones."""
    golden = Golden.named("vjepa2_train")
    table = positions.sincos_table(grid, 64)[None]
    for name in ("encoder", "target_encoder"):
        golden.content[name]["module.backbone.pos_embed"] = table
    for k in range(2, num_tokens):
        name = f"module.backbone.mask_tokens.{k}"
        golden.content["predictor"][name] = np.zeros((1, 1, 32), np.float32)
    return golden


def test_table_that_is_left_over():
    golden = with_table((4, 4, 4), 10)
    assert golden.converted().meta["family"] == "vjepa2"


def test_ambiguous_family():
    golden = with_table((4, 4, 4), 6)
    with pytest.raises(UserError, match="choose with --family=vjepa or"):
        golden.converted()
    for family, pos_embed in (("vjepa", "sincos"), ("vjepa2", "rope_tiled")):
        golden.hints = official.Hints(family, 2, 2)
        converted = golden.converted()
        assert converted.meta["config"]["model"]["pos_embed"] == pos_embed


@pytest.mark.parametrize("grid", [(8, 14, 14), (4, 3, 5), (1, 4, 4), (3, 4, 1)])
def test_grid_of_a_position_table(grid):
    golden = with_table(grid, 2)
    golden.hints = official.Hints("vjepa", 2, 2)
    config = golden.converted().meta["config"]
    assert tuple(config["model"]["base_grid"]) == grid
    for name in ("encoder", "target_encoder"):
        golden.content[name]["module.backbone.pos_embed"][0, 0, 0] += 0.01
    with pytest.raises(UserError, match="is not V-JEPA's table"):
        golden.converted()


@pytest.mark.parametrize("size", ["base", "large", "huge", "giant", "gigantic"])
def test_published_sizes_need_no_heads(size):
    wanted = registry.SIZES[size]

    def shaped(*shape):
        return np.broadcast_to(np.float32(0), shape)

    state = {
        "patch_embed.proj.weight": shaped(wanted.width, 3, 2, 16, 16),
        "blocks.0.mlp.fc1.weight": shaped(wanted.mlp_dim, wanted.width),
        f"blocks.{wanted.depth - 1}.norm1.bias": shaped(wanted.width),
    }
    config = official.make_config("vjepa2", state, {}, official.Hints())
    assert config.model.encoder.size == size


def test_unknown_heads():
    golden = Golden.named("vjepa2_train")
    golden.hints = official.Hints()
    with pytest.raises(
        UserError, match="64 channels are not a published size: give --num"
    ):
        golden.converted()
    golden.hints = official.Hints(num_heads=7)
    with pytest.raises(UserError, match="--num_heads=7 does not divide 64"):
        golden.converted()


def test_existing_output_stays(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    converted = Golden.named("vjepa2_train").converted()
    with pytest.raises(UserError, match="exists: give another --output"):
        conversion.save(converted, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_nothing_is_left_of_a_failure(tmp_path):
    def write(place):
        place.mkdir()
        raise OSError("disk full")

    (tmp_path / ".out-0.part").write_text("of a killed conversion")
    with pytest.raises(OSError, match="disk full"):
        files.write_complete(str(tmp_path / "out"), write)
    assert not list(tmp_path.iterdir())


def test_model_without_an_official_twin():
    converted = Golden.named("vjepa2_train").converted()
    converted.meta["config"]["model"]["pos_embed"] = "rope"
    with pytest.raises(UserError, match="no official code computes this model"):
        conversion.export_parts({"target": converted.target}, converted.meta)


def test_without_pytorch(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(UserError, match="PyTorch, which is not installed: pip install"):
        files.read(str(tmp_path / "x.pt"))


def test_command_reports_a_mistake_in_one_line(tmp_path):
    command = [sys.executable, "-m", "vjepa_jax.convert", "--source=no.pt"]
    done = subprocess.run(
        [*command, f"--output={tmp_path}/out"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: no such file: no.pt"
