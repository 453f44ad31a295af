"""Test set-up: eight devices on any machine, one cache of compiled programs.

The variables must be set before jax is first imported, hence the imports' order.
"""

import atexit
import os
import shutil
import signal
import tempfile

# A job in the background of a shell ignores Ctrl-C; the programs that tests interrupt
# must not inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["JAX_PLATFORMS"] = "cpu"

# Both workers, and the processes that tests start, share what they compile.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.mkdtemp(prefix="vjepa_jax_compiled_")
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import chex
import fsspec
import numbered_videos
import numpy as np
import pytest
from absl import flags
from buckets import Bucket
from etils.epath import backend
from pod import Pod

chex.set_n_cpu_devices(8)
# Grain's workers read absl flags, which only an absl entry point parses.
flags.FLAGS.mark_as_parsed()


# The files that take longest start first, so that both workers end together.
_SLOWEST = (
    "hook_test.py",
    "runs_test.py",
    "anticipation_test.py",
    "train_test.py",
    "processes_test.py",
    "train_step_test.py",
    "objective_test.py",
    "configs_test.py",
    "distributed_test.py",
    "workers_test.py",
)


def pytest_collection_modifyitems(items):
    """Order the files; tests of a file keep their order."""
    places = {name: place for place, name in enumerate(_SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture
def rng():
    """Fresh random numbers in every run; the seed is shown where a test fails."""
    seed = np.random.SeedSequence().entropy
    print(f"numpy seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """Folder of short videos whose frames show their numbers; not to be changed."""
    return numbered_videos.write_folder(tmp_path_factory.mktemp("videos"))


@pytest.fixture
def bucket(monkeypatch):
    """Fill gs:// from a dict of contents, in memory."""

    def filesystem(name, **_):
        assert name in ("gcs", "gs")
        return Bucket(skip_instance_cache=True)

    monkeypatch.setenv("EPATH_USE_TF", "false")
    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.setattr(fsspec, "filesystem", filesystem)
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]

    def fill(contents):
        for path, content in contents.items():
            Bucket().pipe_file(path, content)

    yield fill
    backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture
def make_pod(tmp_path):
    """Return a function that makes a Pod of a plan; its processes end with the test."""
    pods = []

    def make(**plan):
        pods.append(Pod(tmp_path, **plan))
        return pods[-1]

    yield make
    for pod in pods:
        pod.end()
