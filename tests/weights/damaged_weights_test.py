"""Damaged and foreign files of weights are one line, and nothing is written."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from damaged_files import damage, empty, halve, largest, other_json, zeros
from goldens import Golden
from safetensors.numpy import load_file, save_file

from vjepa_jax.base.errors import UserError
from vjepa_jax.run import cli, conversion
from vjepa_jax.weights import files, huggingface, rules

CONFIG, WEIGHTS, INDEX = (
    huggingface.CONFIG_FILE,
    huggingface.WEIGHTS_FILE,
    huggingface.INDEX_FILE,
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Write a small V-JEPA 2 as a folder for transformers."""
    folder = tmp_path_factory.mktemp("exported")
    conversion.save(Golden.named("vjepa2_train").converted(), str(folder / "ours"))
    conversion.export_huggingface(str(folder / "ours"), str(folder / "theirs"))
    return folder / "theirs"


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "model")


def refusal(source, **kwargs):
    output = source.parent / "output"
    with pytest.raises(UserError) as error:
        conversion.convert(str(source), str(output), **kwargs)
    assert not output.exists()
    message = str(error.value)
    # Names that do not fit are a list.
    assert "\n" not in message or message.count("\n") < 12
    return message


def shard(folder):
    """Split the weights into two files with an index; return the index."""
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, places = sorted(state), {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = folder / INDEX
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize("how", [halve, empty, zeros])
def test_config_that_is_no_json(copy, how):
    damage(copy / CONFIG, how)
    assert f"{copy / CONFIG} is not JSON, or is damaged" in refusal(copy)
    assert f"{copy / CONFIG} is not JSON" in refusal(copy / WEIGHTS)


@pytest.mark.parametrize("text", ["[]", '"vjepa2"', "3", "null", "true"])
def test_config_that_is_no_object(copy, text):
    (copy / CONFIG).write_text(text)
    assert f"{copy / CONFIG} holds a JSON" in refusal(copy)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_config_in_another_encoding_is_read(copy, encoding):
    text = (copy / CONFIG).read_text()
    (copy / CONFIG).write_text(text, encoding=encoding)
    assert files.read(str(copy)).num_heads > 0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", None, "has no model_type"),
        ("model_type", "vit", "is of a 'vit'"),
        ("model_type", ["vjepa2"], "is of a '['vjepa2']'"),
        ("hidden_act", "relu", "hidden_act 'relu' is unknown"),
        ("num_attention_heads", "2", "num_attention_heads='2' is not a positive"),
        ("num_attention_heads", True, "num_attention_heads=True is not a positive"),
        ("num_attention_heads", 0, "num_attention_heads=0 is not a positive"),
        ("num_attention_heads", 10**9, "does not divide"),
        ("pred_num_attention_heads", [12], "pred_num_attention_heads=[12] is not"),
        ("pred_num_attention_heads", None, "--predictor_heads"),
        ("crop_size", {"height": 64}, "crop_size={'height': 64} is not a positive"),
        ("frames_per_clip", -4, "frames_per_clip=-4 is not a positive number"),
        ("mlp_ratio", float("inf"), "mlp_ratio=inf is not a positive number"),
        ("hidden_size", 1024, "hidden_size=1024, in the weights"),
        ("num_hidden_layers", 7, "num_hidden_layers=7, in the weights"),
        ("patch_size", 14, "patch_size=14, in the weights"),
        ("tubelet_size", 1, "tubelet_size=1, in the weights"),
        ("mlp_ratio", 3.5, "mlp_ratio=3.5, in the weights"),
        ("pred_hidden_size", 8, "pred_hidden_size=8, in the weights"),
        ("pred_num_mask_tokens", 99, "pred_num_mask_tokens=99, in the weights"),
    ],
)
def test_config_with_other_values_names_the_key(copy, key, value, message):
    config = json.loads((copy / CONFIG).read_text()) | {key: value}
    config = {k: v for k, v in config.items() if v is not None}
    (copy / CONFIG).write_text(json.dumps(config))
    found = refusal(copy)
    assert message in found and "\n" not in found


@pytest.mark.parametrize("how", [halve, empty, zeros])
def test_safetensors_that_are_damaged(copy, how):
    damage(copy / WEIGHTS, how)
    for source in (copy, copy / WEIGHTS):
        message = refusal(source)
        assert (
            f"{copy / WEIGHTS} is not a file of safetensors, or is damaged" in message
        )


def test_weights_of_other_shapes_are_listed(copy):
    state = load_file(copy / WEIGHTS)
    for name, shape in (
        ("encoder.layer.0.attention.query.weight", (3, 5)),
        ("encoder.layernorm.weight", (2, 2, 2)),
        ("encoder.embeddings.patch_embeddings.proj.weight", (4, 4)),
        ("predictor.embeddings.mask_tokens", (3,)),
        ("predictor.proj.weight", ()),
    ):
        save_file(state | {name: np.zeros(shape, np.float32)}, copy / WEIGHTS)
        refusal(copy)


def test_shards_are_read_by_their_index(exported, copy):
    whole = files.read(str(exported))
    index = shard(copy)
    # What the index does not name is not read.
    save_file({"optimizer": np.zeros(3, np.float32)}, copy / "other.safetensors")
    sharded = files.read(str(copy))
    for name, value in whole.encoders["encoder"].items():
        np.testing.assert_array_equal(sharded.encoders["encoder"][name], value)
    (copy / "model-00002-of-00002.safetensors").unlink()
    message = refusal(copy)
    assert str(index) in message
    assert message.endswith("download model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    "how",
    [
        *(halve, empty),
        *map(other_json, ("[]", "{}", '{"weight_map": []}', '{"weight_map": {}}')),
    ],
)
def test_index_that_is_damaged(copy, how):
    index = shard(copy)
    damage(index, how)
    message = refusal(copy)
    assert str(index) in message and "download it again" in message


def test_shards_that_hold_the_same_name(copy):
    index = shard(copy)
    index.unlink()
    assert files.read(str(copy)).encoders  # all files of the folder
    shutil.copy(largest(copy), copy / "again.safetensors")
    assert "two files hold '" in refusal(copy)


def renamed(exported, folder, rename):
    """Write the weights under other names."""
    folder.mkdir()
    state = load_file(exported / WEIGHTS)
    save_file({rename(name): v for name, v in state.items()}, folder / WEIGHTS)
    shutil.copy(exported / CONFIG, folder / CONFIG)
    return files.read(str(folder))


@pytest.mark.parametrize(
    "rename",
    [
        "module.{}".format,
        "_orig_mod.{}".format,
        "module._orig_mod.{}".format,
        "_orig_mod.module.{}".format,
        "module.backbone.{}".format,
        "backbone._orig_mod.vjepa2.{}".format,
        "vjepa2.module.{}".format,
        lambda name: name.replace("encoder.", "encoder._orig_mod.", 1),
        lambda name: name.replace("layer.0.", "layer.0._orig_mod.", 1),
        lambda name: "_fsdp_wrapped_module." + name.replace("mlp.", "module.mlp."),
        lambda name: name.replace("layer.1.", "layer.1._checkpoint_wrapped_module.", 1),
    ],
)
def test_names_in_safetensors_are_freed_of_wrappers(exported, tmp_path, rename):
    wanted = files.read(str(exported))
    found = renamed(exported, tmp_path / "model", rename)
    assert found.num_heads == wanted.num_heads
    for part, other in (
        (found.encoders["encoder"], wanted.encoders["encoder"]),
        (found.predictor, wanted.predictor),
    ):
        assert part.keys() == other.keys()
        for name, value in other.items():
            np.testing.assert_array_equal(part[name], value)


def test_names_that_are_one_without_wrappers_are_refused(exported, tmp_path):
    state = load_file(exported / WEIGHTS)
    name = next(iter(state))
    for prefix in ("module.", "vjepa2.", "_orig_mod."):
        folder = tmp_path / prefix
        folder.mkdir()
        save_file(state | {prefix + name: state[name]}, folder / WEIGHTS)
        assert "without their prefixes" in refusal(folder)


@pytest.mark.parametrize("prefix", ["", "module.backbone.", "_orig_mod."])
def test_safetensors_with_official_names(tmp_path, prefix):
    golden = Golden.named("vjepa2_train")
    state = rules.strip_prefixes(golden.content["target_encoder"])
    path = tmp_path / "encoder.safetensors"
    save_file({prefix + name: value for name, value in state.items()}, path)
    found = files.read(str(path)).encoders["encoder"]
    assert found.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("is_legacy", [False, True])
def test_pickles_that_are_damaged(tmp_path, rng, is_legacy):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    content = {"encoder": {f"module.w{i}": torch.ones(8, 8) for i in range(4)}}
    path = tmp_path / "weights.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not is_legacy)
    whole = path.read_bytes()
    for _ in range(60):
        changed = bytearray(whole[: rng.integers(len(whole))])
        if changed and rng.random() < 0.5:  # the length is kept
            changed = bytearray(whole)
            changed[rng.integers(len(whole))] ^= 0xFF
        path.write_bytes(changed)
        try:
            files.read(str(path))  # a changed weight is read
        except UserError as error:
            message = str(error)
            assert str(path) in message or "weights" in message
            assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no dictionary of weights"),
        ({}, "neither an encoder nor a probe"),
        ({"model": {}}, "'model', which is not a known part"),
        ({"encoder": {}}, "'encoder', which is not a known part, or has no arrays"),
        ({"encoder": 3}, "'encoder', which is not a known part, or has no arrays"),
        ({"classifiers": 3}, "'classifiers', which is not a known part"),
        ({"encoder": {3: np.zeros(2)}}, "'encoder', which is not a known part"),
        ({3: {"w": np.zeros(2)}}, "'3', which is not a known part"),
        ({"epoch": 3}, "neither an encoder nor a probe"),
    ],
)
def test_files_with_other_content(content, message):
    with pytest.raises(UserError) as error:
        files.sort_parts(content, "x.pt")
    assert message in str(error.value) and "x.pt" in str(error.value)


@pytest.mark.parametrize(
    ("name", "model", "key", "shape"),
    [
        ("vjepa1_train", "target_encoder", "pos_embed", ()),
        ("vjepa1_train", "target_encoder", "pos_embed", (0,)),
        ("vjepa1_train", "target_encoder", "pos_embed", (2, 3)),
        ("vjepa1_train", "target_encoder", "patch_embed.proj.weight", (3,)),
        ("vjepa2_swiglu_nonsquare", "predictor", "predictor_embed.weight", (2, 3)),
        ("vjepa2_1_image", "encoder", "patch_embed_img.proj.weight", (3, 3)),
        ("vjepa2_ac", "predictor", "action_encoder.weight", ()),
        ("vjepa2_ac", "predictor", "action_encoder.weight", (0, 0)),
    ],
)
def test_official_weights_of_other_shapes(name, model, key, shape):
    golden = Golden.named(name)
    state = rules.strip_prefixes(golden.content[model])
    assert key in state
    golden.content[model] = state | {key: np.zeros(shape, np.float32)}
    with pytest.raises(UserError):
        conversion.import_file(golden.file(), golden.hints)


def test_the_command_ends_with_one_line(copy):
    (copy / CONFIG).write_text('{"model_type": "vjepa2",')
    output = copy.parent / "output"
    command = [sys.executable, "-m", "vjepa_jax.convert"]
    ended = subprocess.run(
        [*command, f"--source={copy}", f"--output={output}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == cli.EXIT_USER_ERROR
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: {copy / CONFIG} is not JSON")
    assert not output.exists()
