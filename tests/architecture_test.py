"""The rooms of the package, their order, and the libraries that stay in one room."""

import ast
import importlib
import importlib.util
import pathlib
import pkgutil
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

import vjepa_jax
from vjepa_jax.config.rules import validate

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "vjepa_jax"
# A file imports its own room and rooms of lines above its own.
ORDER = (
    "base",
    "config models",
    "parallel objective weights",
    "program",
    "data",
    "world run",
    "evals planning decoding",
    "report",
)
LEVELS = {room: level for level, line in enumerate(ORDER) for room in line.split()}
COMMANDS = len(ORDER)  # files of the root and of `report/__main__.py`
# {library: where it may be imported}
HOMES = {
    "orbax": ("run.checkpoint",),
    "grain": ("data.",),
    "av": ("data.", "world.render."),
    "PIL": ("data.", "evals.drawing", "report."),
    "plotly": ("report.",),
    "jinja2": ("report.",),
    "array_record": ("data.sources.shards", "evals.tokens.token_cache"),
    "apache_beam": ("data.jobs.",),
    "tensorflow_datasets": ("data.sources.tfds_source",),
    "tensorboardX": ("run.metrics",),
    "ml_collections": ("config.",),
}
MODULES = sorted(
    module.name.removeprefix("vjepa_jax.")
    for module in pkgutil.walk_packages([str(PACKAGE)], "vjepa_jax.")
    if not module.ispkg
)


def imported(name: str) -> set[str]:
    """Return the names of all that a module imports, inside functions too."""
    path = PACKAGE / (name.replace(".", "/") + ".py")
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_modules(name: str) -> set[str]:
    """Return the package's modules among them."""
    names = {f"{i}.".removeprefix("vjepa_jax.") for i in imported(name)}
    return {m for m in MODULES if any(i.startswith(f"{m}.") for i in names)}


def reachable(name: str, seen: frozenset[str] = frozenset()) -> frozenset[str]:
    """Return all modules that a module imports, directly or through others."""
    for other in imported_modules(name) - seen:
        seen = reachable(other, seen | {other})
    return seen


def room(name: str) -> str:
    """Return a module's room; a command has none."""
    return "" if name.endswith("__main__") else name.rpartition(".")[0].split(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_module_imports(name):
    importlib.import_module(f"vjepa_jax.{name}")


@pytest.mark.parametrize("name", MODULES)
def test_rooms_import_earlier_rooms(name):
    level = LEVELS.get(room(name), COMMANDS)
    for other in reachable(name):
        is_earlier = LEVELS.get(room(other), COMMANDS) < level
        assert is_earlier or room(other) == room(name), f"{name} reaches {other}"
        assert (room(name), room(other)) != ("data", "models"), f"{name}: {other}"


@pytest.mark.parametrize("name", MODULES)
def test_libraries_stay_at_home(name):
    libraries = {i.split(".")[0] for i in imported(name)}
    for library in libraries & set(HOMES):
        assert f"{name}.".startswith(HOMES[library]), f"{name} imports {library}"


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


def test_importing_the_package_starts_no_device():
    command = "import sys, vjepa_jax; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True)
    assert vjepa_jax.__version__
