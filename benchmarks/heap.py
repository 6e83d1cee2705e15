"""Builds and reads heap.c, a preloaded library that counts the bytes that a process has allocated."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import pathlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

_SOURCE = pathlib.Path(__file__).with_name("heap.c")


class Allocated(NamedTuple):
    """Bytes above those before a call.

    Args:
        peak: The most at one time during the call.
        left: Those after the call.
    """

    peak: int
    left: int


@contextlib.contextmanager
def built() -> Iterator[dict[str, str]]:
    """Yields the environment variables with which a process counts its allocations. Needs glibc and a C compiler."""
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        library = pathlib.Path(folder, "heap.so")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, _SOURCE], check=True)
        yield {"LD_PRELOAD": str(library)}


def allocated(call: Callable[[], object]) -> Allocated:
    """Returns what a call allocates, in a process with the environment of ``built``."""
    library = ctypes.CDLL(None)
    library.heap_in_use.restype = library.heap_peak.restype = ctypes.c_long
    gc.collect()
    before: int = library.heap_in_use()
    library.heap_reset_peak()
    call()
    return Allocated(library.heap_peak() - before, library.heap_in_use() - before)
