"""What pyproject.toml promises: one version, one licence, and optional extras."""

import pathlib
import subprocess
import sys
import tomllib

import vjepa_jax

ROOT = pathlib.Path(__file__).parents[1]
# What the extra `report` installs.
REPORT = {"jinja2", "matplotlib", "plotly", "sklearn"}


def imported_by(module: str) -> set[str]:
    """Return the top-level packages that a module imports, in a process of its own."""
    code = f"import sys, {module}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, check=True, cwd=ROOT, capture_output=True, text=True)
    return set(done.stdout.split())


def test_version_and_licence_are_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {vjepa_jax.__version__}\n" in citation
    assert project["license"] == "Apache-2.0"
    assert "license: Apache-2.0\n" in citation
    for name in ("LICENSE", "README.md"):
        assert "Apache-2.0" in (ROOT / name).read_text(), name


def test_the_version_is_read_without_jax():
    assert "jax" not in imported_by("vjepa_jax")


def test_training_and_probes_start_without_the_report_extra():
    assert imported_by("vjepa_jax.train, vjepa_jax.probe") & REPORT == set()
