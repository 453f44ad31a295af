"""What the C library does with memory that is freed: by default it gives it back.

A step on a CPU, and every clip that is decoded, takes buffers of many megabytes and
frees them. Given back, they cost the kernel a page fault for each 4 KiB at the next
step: a third of the demo's time.
"""

import ctypes
import os

# Of malloc.h; the Python standard library has no names for them.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# Larger buffers are mapped and given back as ever, and so is what a heap has free
# beyond the third number: bytes. glibc before 2.35 takes no more than the second, and
# heaps of threads other than the first end at 64 MiB.
_MAX_KEPT_BUFFER = 256 * 2**20
_MAX_KEPT_BUFFER_BEFORE_2_35 = 32 * 2**20
_MAX_FREE = 2**30


def keep_freed_memory() -> None:
    """Let this process reuse what it frees, where the C library is glibc.

    Thresholds that the environment sets (`MALLOC_TRIM_THRESHOLD_`, `GLIBC_TUNABLES`,
    ...) are left as they are.
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
