"""Two runs and their pages, written once for all tests of the report."""

import json

import pytest
import report_files

from vjepa_jax.report import __main__ as report


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Return the workdir of a run of the world, whose names are hostile."""
    root = tmp_path_factory.mktemp("report")
    # The name of a folder may hold all of HOSTILE but the slash.
    name = report_files.HOSTILE.replace("/", "|")
    data = report_files.write_videos(root / f"videos {name}")
    return report_files.make_run(root / f"run {name}", data)


@pytest.fixture(scope="session")
def other(run):
    """Return the workdir of a second run, on the same data."""
    data = json.loads((run / "config.json").read_text())["data"]["path"]
    return report_files.make_run(run.parent / "other", data, scale=2.0, seed=1)


@pytest.fixture(scope="session")
def pages(run, other):
    """Return the paths of the page of `run` and of the page of both runs."""
    both = run.parent / "new folder" / "both.html"
    return {
        "one": report.write_report(str(run)),
        "both": report.write_report(str(run), str(other), str(both)),
    }
