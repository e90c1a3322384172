"""Memory that an update frees stays with the process, so that the next update finds it there."""

from __future__ import annotations

import ctypes
import os
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGEST = 32 * 2**20  # the most that mallopt(3) allows
KEPT = 512 * 2**20


def keep_freed() -> None:
    """Have glibc keep freed memory, and torch ask for large arrays in large pages.

    An update frees arrays and asks for others of the same sizes. Given back to the kernel between
    the two, every page of theirs is faulted in and cleared again, which for large arrays can take
    longer than what is computed in them. Up to 512 MB of free memory are kept instead, in arrays of
    up to 32 MB each.

    Called before torch is imported, which reads its setting once. Does nothing where the C library
    is another one, and leaves a setting that the environment has.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    library = ctypes.CDLL(None)
    for name, setting, value in (
        ("MALLOC_MMAP_THRESHOLD_", MMAP_THRESHOLD, LARGEST),
        ("MALLOC_TRIM_THRESHOLD_", TRIM_THRESHOLD, KEPT),
    ):
        if name not in os.environ:
            os.environ[name] = str(value)  # for workers
            library.mallopt(setting, value)
