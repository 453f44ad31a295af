"""The layout holds: modules import, downwards only, and libraries stay in rooms."""

import ast
import importlib
import pathlib
import pkgutil
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

import vjepa_jax
from vjepa_jax.config_rules import validate

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "vjepa_jax"

# A module imports from strictly lower floors; fractions order the rooms of a floor.
FLOORS = {
    "train": 5,
    "compile_check": 5,
    "probe": 5,
    "report": 5,
    "reporting.page": 4.97,
    "reporting.sections": 4.96,
    "reporting.model_sections": 4.95,
    "reporting.clips": 4.9,
    "reporting.surprise": 4.9,
    "reporting.results": 4.2,
    "reporting.curves": 4.1,
    "reporting.tables": 4.1,
    "reporting.run_files": 4,
    "reporting.figures": 1,
    "reporting.media": 1,
    "reporting.parts": 1,
    "convert": 5,
    "data.prepare": 5,
    "data.check": 5,
    "evals.registry": 4.9,
    "evals.hook": 4.95,
    "evals.anticipation": 4.85,
    "evals.classification": 4.8,
    "evals.neighbours": 4.8,
    "evals.health": 4.8,
    "evals.segmentation": 4.85,
    "evals.segmentation_data": 4.6,
    "evals.video_objects": 4.8,
    "evals.frame_features": 4.5,
    "evals.confusion": 4.5,
    "evals.label_propagation": 4,
    "evals.mask_metrics": 1,
    "evals.token_cache": 4.7,
    "evals.clip_tokens": 4.6,
    "evals.head_grid": 3.9,
    "evals.settings": 1,
    "evals.world": 4.8,
    "evals.physics": 4.8,
    "evals.physics_data": 4.5,
    "evals.epic_kitchens": 4.5,
    "evals.features": 4.5,
    "data.streams": 4.5,
    "evals.frozen": 4.4,
    "evals.forward": 4.3,
    "encode": 4.4,
    "evals.pictures": 4,
    "evals.probes": 4,
    "build": 4.2,
    "program": 4.3,
    "step_report": 4.5,
    "official": 4,
    "train_step": 4,
    "checkpoint": 4,
    "checkpoint_format": 3,
    "data.pipeline": 4,
    "data.read_all": 4,
    "data.reading": 3.95,
    "data.workers": 3.9,
    "data.bad_videos": 3.9,
    "data.mixture": 3.5,
    "data.render": 4,
    "train_state": 3,
    "weight_files": 3.5,
    "weights": 3,
    "optim": 3,
    "sharding": 3,
    "compilation": 3,
    "topologies": 3.1,
    "hlo": 1,
    "hlo_text": 0.9,
    "metrics": 3,
    "workdirs": 3,
    "data.encode_shards": 3.9,
    "data.encoders": 3.85,
    "data.shard_job": 3.85,
    "data.beam_job": 3,
    "data.reencode": 3.8,
    "data.decode": 3.5,
    "data.augment": 3,
    "data.transforms": 3.2,
    "data.packets": 3.3,
    "data.media": 3.2,
    "data.frames": 3,
    "data.sampling": 3,
    "data.sources": 3,
    "data.subset": 2.9,
    "data.file_lists": 2.9,
    "data.shards": 2.9,
    "data.tfds_source": 2.9,
    "data.records": 2.8,
    "data.scenes": 2.8,
    "data.painting": 2.9,
    "data.world": 3,
    "data.violations": 3.1,
    "data.play": 3.1,
    "data.contacts": 3.1,
    "data.masks": 3.3,
    "data.mask_lists": 3,
    "data.davis": 3,
    "data.masked_world": 3.5,
    "data.play_actions": 3.2,
    "data.survey": 4,
    "data.children": 3,
    "data.findings": 4.5,
    "models.registry": 2.5,
    "models.encoder": 2,
    "models.predictor": 2,
    "models.heads": 2,
    "models.layers": 1.5,
    "models.attention": 1,
    "models.splash": 0.9,
    "models.blockwise": 0.8,
    "models.functional": 0.8,
    "models.platform": 0.8,
    "models.positions": 1,
    "masking": 1,
    "losses": 1,
    "flops": 1,
    "cli": 1,
    "fit": 1,
    "huggingface": 1,
    "smoke": 1,
    "saved_config": 0.5,
    "config_rules": 0.5,
    "default_config": 0,
    "distributed": 0.5,
    "cluster": 0.2,
    "goodput": 1,
    "watchdog": 1,
    "profiling": 1,
    "environment": 1,
    "host_memory": 0,
}
ROOMS = {
    "orbax": ("checkpoint",),
    "grain": ("data.",),
    "av": ("data.",),
    "PIL": ("data.augment", "data.masks", "reporting.media"),
    "plotly": ("reporting.",),
    "jinja2": ("reporting.page",),
    "array_record": ("data.shards", "evals.token_cache"),
    "apache_beam": ("data.beam_job",),
    "tensorflow_datasets": ("data.tfds_source",),
    "tensorboardX": ("metrics",),
    "ml_collections": ("default_config", "cli"),
}
MODULES = sorted(
    module.name.removeprefix("vjepa_jax.")
    for module in pkgutil.walk_packages([str(PACKAGE)], "vjepa_jax.")
    if not module.ispkg
)


def imported(name: str) -> set[str]:
    """Names of all modules that a module of the package imports."""
    path = PACKAGE / (name.replace(".", "/") + ".py")
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("name", MODULES)
def test_module_imports(name):
    importlib.import_module(f"vjepa_jax.{name}")


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name):
    names = imported(name)
    for other in MODULES:
        if any(f"{i}.".startswith(f"vjepa_jax.{other}.") for i in names):
            assert FLOORS[other] < FLOORS[name], f"{name} imports {other}"


@pytest.mark.parametrize("name", MODULES)
def test_libraries_stay_in_their_rooms(name):
    libraries = {i.split(".")[0] for i in imported(name)}
    for library, rooms in ROOMS.items():
        if library in libraries:
            whole = tuple(room for room in rooms if room.endswith("."))
            is_there = name in rooms or name.startswith(whole)
            assert is_there, f"{name} imports {library}"
    if name.startswith("models."):
        assert "ml_collections" not in libraries


def test_data_never_sees_models_and_models_never_see_data():
    for name in MODULES:
        if name.startswith("data."):
            assert not any(".models." in i for i in imported(name))
        if name.startswith("models."):
            assert not any(".data." in i for i in imported(name))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=str)
def test_config_loads_and_validates(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    assert isinstance(config, ConfigDict)
    assert config.is_locked
    if "total_steps" in config:
        config.data.path = config.data.path or "videos"
        for key in ("init", "teacher"):
            config[key].path = "run" if config[key].is_required else ""
        for fields in config.streams.values():
            fields.path = fields.path or "images"
        validate(config)


def test_no_file_grows_out_of_hand():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 450, path


def test_importing_the_package_starts_no_device():
    command = "import sys, vjepa_jax; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True)
    assert vjepa_jax.__version__
