"""The papers' evaluations: every variant is valid and makes the heads it should."""

import importlib.util
import pathlib
import sys

import pytest
from absl import flags

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.flags import define_config_flag
from vjepa_jax.evals import registry, settings
from vjepa_jax.evals.heads.head_grid import make_training
from vjepa_jax.models import registry as models

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
# Heads that V-JEPA 2 trains, by data set.
HEADS = {"k400": 20, "ssv2": 20, "coin": 20, "in1k": 21, "diving48": 3, "jester": 3}
SIZES = {"vitl16": "large", "vith16": "huge", "vitg16": "giant"}


def load(name):
    path = CONFIGS / f"probe_{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("variant", settings.VARIANTS)
def test_variant_is_valid_and_has_its_heads(name, variant):
    config = load(name).get_config(variant)
    settings.validate(config)
    assert config.is_locked and config.name == name
    assert config.evaluation in registry.EVALUATIONS
    training = make_training(config, steps_per_epoch=10)
    is_first = variant.startswith("vjepa_") and name not in ("diving48", "jester")
    assert len(training.heads()) == (1 if is_first else HEADS[name])
    assert config.head.depth == (1 if is_first else 4)
    of_size = SIZES[variant.removeprefix("vjepa_").removesuffix("_384")]
    encoder = models.make_encoder(of_size, mlp="gelu")
    assert encoder.width % (config.head.num_heads or encoder.num_heads) == 0
    assert all(0 <= layer < encoder.depth for layer in config.out_layers)
    assert config.data.resolution % 16 == 0 and config.data.num_frames % 2 == 0


@pytest.mark.parametrize("variant", ["", "vith16", "vitg16", "vitg16_384"])
def test_anticipation_is_valid_and_has_its_heads(variant):
    """The numbers of the official files."""
    config = load("ek100").get_config(variant)
    settings.validate(config)
    assert config.is_locked and config.evaluation in registry.EVALUATIONS
    heads = make_training(config, steps_per_epoch=10).heads()
    assert len(heads) == 20 and {d for _, d in heads} == {1e-4, 1e-3, 1e-2, 1e-1}
    assert (config.data.num_frames, config.data.fps, config.epochs) == (32, 8, 20)
    assert config.data.resolution == (384 if variant == "vitg16_384" else 256)
    assert config.batch_size == 128 and config.mask_index == 1
    with pytest.raises(UserError, match="'vjepa_vitl16' is no variant"):
        load("ek100").get_config("vjepa_vitl16")


@pytest.mark.parametrize("name", ["neighbours", "health", "physics", "world"])
def test_defaults_of_an_evaluation_are_those_of_its_file(name):
    assert load(name).get_config() == settings.DEFAULTS[name]().lock()


def test_every_evaluation_has_valid_defaults():
    assert set(settings.DEFAULTS) == set(registry.EVALUATIONS)
    for name, make in settings.DEFAULTS.items():
        config = make()
        settings.validate(config)
        assert config.evaluation == name


@pytest.mark.parametrize("text", ["physics:grasp", "own.py:grasp"])
def test_the_flag_takes_names_and_files_in_any_folder(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "from vjepa_jax.evals.settings import physics as get_config"
    )
    arguments = ["probe", f"--asked={text}", "--asked.null_seeds=3"]
    monkeypatch.setattr(sys, "argv", arguments)
    known = set(flags.FLAGS)
    holder = define_config_flag("asked", required=False, named=settings.DEFAULTS)
    try:
        flags.FLAGS(arguments)
        config = holder.value
    finally:
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
    assert config.is_locked and config.dataset == "grasp"
    assert (config.frame_step, config.null_seeds) == (10, 3)


@pytest.mark.parametrize(
    ("name", "variant"),
    [("davis", v) for v in ("davis", "world")]
    + [("segmentation", v) for v in ("ade20k", "cityscapes", "voc", "world")],
)
def test_dense_variant_is_valid(name, variant):
    config = load(name).get_config(variant)
    settings.validate(config)
    assert config.is_locked and config.name.endswith(variant)
    assert config.evaluation in registry.EVALUATIONS
    if name == "segmentation":
        assert config.num_classes > 1 and all(n % 16 == 0 for n in config.data.size)


@pytest.mark.parametrize("name", ["ssv2", "davis", "segmentation"])
def test_unknown_variant_is_named(name):
    with pytest.raises(UserError, match="'vitx' is no variant of this config; known"):
        load(name).get_config("vitx")
