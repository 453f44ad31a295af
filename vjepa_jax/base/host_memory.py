"""Reuse freed host memory instead of returning it to the kernel.

Every step on a CPU and every decoded clip allocates and frees buffers of many
megabytes. By default the C library returns them, and each 4 KiB costs a page fault at
the next step: a third of the demo's time.
"""

import ctypes
import os

# Constants of malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Bytes. Larger buffers are returned as before, and so is free memory of a heap beyond
# _MAX_FREE. glibc before 2.35 accepts no more than the second number.
_MAX_KEPT_BUFFER = 256 * 2**20
_MAX_KEPT_BUFFER_BEFORE_2_35 = 32 * 2**20
_MAX_FREE = 2**30


def keep_freed_memory() -> None:
    """Let this process reuse freed memory, if the C library is glibc.

    Thresholds of the environment (`MALLOC_TRIM_THRESHOLD_`, `GLIBC_TUNABLES`, ...)
    take precedence.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # missing on macOS
    settings = " ".join(f"{k}={v}" for k, v in os.environ.items() if _is_setting(k))
    if mallopt is None or "threshold" in settings.lower():
        return
    for size in (_MAX_KEPT_BUFFER, _MAX_KEPT_BUFFER_BEFORE_2_35):
        if mallopt(_M_MMAP_THRESHOLD, size):
            mallopt(_M_TRIM_THRESHOLD, _MAX_FREE)
            return


def _is_setting(name: str) -> bool:
    return name == "GLIBC_TUNABLES" or name.startswith("MALLOC_")
