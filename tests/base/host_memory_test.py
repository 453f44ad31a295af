"""Freed memory is reused: no page is made twice."""

import ctypes
import os
import platform
import subprocess
import sys
import types

import pytest

from vjepa_jax.base import host_memory

# Takes and frees a large buffer again and again; prints the page faults of the second
# half, given who keeps what is freed.
PROGRAM = """
import ctypes, multiprocessing, resource, sys, types

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def use():
    buffer = libc.malloc(SIZE := 100 * 2**20)
    ctypes.memset(buffer, 1, SIZE)
    libc.free(buffer)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def main():
    counts = [use() for _ in range(4)]
    print(counts[-1] - counts[1])

def decoding_worker():
    from vjepa_jax.data.stream import workers
    workers._start_worker(types.SimpleNamespace(begin=lambda: None), 0, 1)
    main()

who = sys.argv.pop(1)
if who == "command":
    from vjepa_jax.run import cli
    cli.run(main)
elif who == "decoding worker":
    worker = multiprocessing.get_context("fork").Process(target=decoding_worker)
    worker.start()
    worker.join()
elif who == "keep":
    from vjepa_jax.base import host_memory
    host_memory.keep_freed_memory()
    main()
else:
    main()
"""

LIBRARY, VERSION = platform.libc_ver()
needs_glibc = pytest.mark.skipif(
    LIBRARY != "glibc" or tuple(map(int, VERSION.split("."))) < (2, 35),
    reason="keeps no large buffers",
)


def faults(choice: str, **variables: str) -> int:
    settings = ("GLIBC_TUNABLES", "MALLOC_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(settings)}
    command = [sys.executable, "-c", PROGRAM, choice]
    env = kept | variables
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return int(done.stdout)


@needs_glibc
@pytest.mark.parametrize("who", ["command", "decoding worker", "keep"])
def test_freed_memory_is_reused(who):
    assert 20 * faults(who) < faults("leave")


@needs_glibc
@pytest.mark.parametrize(
    "variables",
    [
        {"MALLOC_MMAP_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"},
    ],
    ids=str,
)
def test_thresholds_of_the_environment_are_left(variables):
    assert faults("keep", **variables) > 20 * faults("keep")


@needs_glibc
def test_other_settings_of_the_environment_do_not_matter():
    few = faults("keep", MALLOC_ARENA_MAX="4")
    assert 20 * few < faults("leave", MALLOC_ARENA_MAX="4")


@pytest.mark.parametrize("most", [2**30, 2**25, 0], ids=str)
def test_an_old_library_is_given_what_it_takes(monkeypatch, most):
    """The second threshold alone would end the growth of the first."""
    taken = []

    def mallopt(option, value):
        accepted = option == host_memory._M_TRIM_THRESHOLD or value <= most
        taken.extend([(option, value)] * accepted)
        return int(accepted)

    for name in [name for name in os.environ if host_memory._is_setting(name)]:
        monkeypatch.delenv(name)
    library = types.SimpleNamespace(mallopt=mallopt)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    host_memory.keep_freed_memory()
    kept = min(most, 2**28)
    assert taken == [(-3, kept), (-1, 2**30)] * (kept > 0)
