"""Heap: what a step frees is kept for the next one, as PyTorch keeps the memory of a GPU."""

from __future__ import annotations

import ctypes
import functools
import os

# From malloc.h. A larger block than the second is always mapped anew: that is the most which glibc takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST_TO_KEEP, _LARGEST_BLOCK = 2**31 - 1, 2**25
_OF_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


@functools.cache
def keep_freed_memory() -> None:
    """Has glibc keep up to 2 GiB of what is freed, in blocks of up to 32 MiB, for what is allocated next.

    By default it gives much of it back to the system at the end of each step, and at the next each page is mapped and
    filled with zeros again: a fifth of the small GPT's time. The variables of malloc's manual page are respected
    where one is set (``MALLOC_TRIM_THRESHOLD_=131072`` has it as it was), as is any other allocator.
    """
    if any(name in os.environ for name in _OF_USER) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another system, or another C library
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)
    mallopt(_TRIM_THRESHOLD, _MOST_TO_KEEP)
