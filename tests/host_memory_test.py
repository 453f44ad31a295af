"""Freed memory is reused: no page is made twice."""

import ctypes
import os
import subprocess
import sys

import pytest

# Takes and frees a large buffer again and again; prints the page faults of the second
# half, given whether to keep what is freed.
PROGRAM = """
import ctypes, resource, sys
from vjepa_jax.host_memory import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def use():
    buffer = libc.malloc(SIZE := 100 * 2**20)
    ctypes.memset(buffer, 1, SIZE)
    libc.free(buffer)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "keep":
    keep_freed_memory()
counts = [use() for _ in range(4)]
print(counts[-1] - counts[1])
"""

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt"
)


def faults(choice: str, **variables: str) -> int:
    settings = ("GLIBC_TUNABLES", "MALLOC_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(settings)}
    command = [sys.executable, "-c", PROGRAM, choice]
    env = kept | variables
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return int(done.stdout)


def test_freed_memory_is_reused():
    assert 20 * faults("keep") < faults("leave")


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


def test_other_settings_of_the_environment_do_not_matter():
    few = faults("keep", MALLOC_ARENA_MAX="4")
    assert 20 * few < faults("leave", MALLOC_ARENA_MAX="4")
