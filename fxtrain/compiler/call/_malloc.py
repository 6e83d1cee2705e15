"""Keeps memory that a step frees for the next one, as PyTorch's caching allocator does on a GPU."""

from __future__ import annotations

import ctypes
import functools
import os

# From malloc.h. glibc accepts no larger mmap threshold than 2**25, and always maps larger blocks.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MAX_KEPT_BYTES, _MAX_BLOCK_BYTES = 2**31 - 1, 2**25
_USER_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


@functools.cache
def keep_freed_memory() -> None:
    """Sets glibc to keep up to 2 GiB of freed memory, in blocks of up to 32 MiB, for later allocations.

    By default, it returns much of this memory to the system at the end of each step, and the next step has to map each
    page and fill it with zeros again. Variables from malloc's manual page take precedence: with
    ``MALLOC_TRIM_THRESHOLD_=131072`` the default stays. Other allocators are not affected.
    """
    if any(name in os.environ for name in _USER_VARIABLES) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        # Not Linux, or another C library.
        return
    mallopt(_MMAP_THRESHOLD, _MAX_BLOCK_BYTES)
    mallopt(_TRIM_THRESHOLD, _MAX_KEPT_BYTES)
