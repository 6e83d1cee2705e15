"""Builds and controls crash.c, a preloaded library that counts, fails, kills at and logs file-system calls."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_SOURCE = pathlib.Path(__file__).with_name("crash.c")


class Kind(enum.IntFlag):
    """Kinds of calls, with the values used in crash.c."""

    GROWS = 1
    NAMES = 2
    REMOVES = 4
    SYNCS = 8


class Call(NamedTuple):
    """A logged call below the folder, or a note of the harness with its text as the path.

    Names: create, truncate, open, write, sync, mkdir, remove, rename, link, note.
    """

    name: str
    path: str
    target: str = ""


def run_under(module: str, arguments: Sequence[str]) -> int:
    """Runs ``python -m module`` with the shim preloaded, and without library threads, so that it can fork."""
    with tempfile.TemporaryDirectory() as folder:
        library = pathlib.Path(folder) / "crash.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, _SOURCE, "-ldl"], check=True)
        alone = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
        env = {**os.environ, **alone, "LD_PRELOAD": str(library)}
        return subprocess.run([sys.executable, "-m", module, *arguments], env=env, check=False).returncode


def loaded() -> bool:
    """Returns whether this process has loaded the shim."""
    return hasattr(ctypes.CDLL(None), "fault_arm")


def arm(
    folder: pathlib.Path, *, kill_at: int = 0, fail_from: int = 0, errno: int = 0, kinds: int = 0, log: int = -1
) -> None:
    """Starts counting calls below ``folder``.

    Args:
        folder: The folder to watch.
        kill_at: The number of the call replaced by SIGKILL, 0 for none.
        fail_from: The number of the first call that may fail, 0 for none.
        errno: The error number of failing calls.
        kinds: The kinds of calls that fail, as flags of ``Kind``.
        log: A file descriptor to write calls to, -1 for none.
    """
    ctypes.CDLL(None).fault_arm(
        os.path.realpath(folder).encode(),
        ctypes.c_long(kill_at),
        ctypes.c_long(fail_from),
        ctypes.c_int(errno),
        ctypes.c_int(kinds),
        ctypes.c_int(log),
    )


def disarm() -> None:
    """Stops counting and injecting faults."""
    ctypes.CDLL(None).fault_disarm()


def count() -> int:
    """Returns the number of calls since ``arm``."""
    function = ctypes.CDLL(None).fault_count
    function.restype = ctypes.c_long
    return int(function())


def note(text: str) -> None:
    """Writes a note of the harness to the log."""
    ctypes.CDLL(None).fault_note(text.encode())


def scratch() -> tempfile.TemporaryDirectory[str]:
    """Returns a temporary folder, in shared memory if available.

    A disk would only be slower, because written data survives a killed process on any file system and the shim injects
    the faults.
    """
    memory = pathlib.Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)


@contextlib.contextmanager
def log_file() -> Iterator[tuple[int, pathlib.Path]]:
    """Yields the descriptor and path of a log file for ``arm``, outside of watched folders."""
    with tempfile.NamedTemporaryFile(prefix="calls-") as file:
        yield file.fileno(), pathlib.Path(file.name)


def parse(log: str) -> list[Call]:
    """Parses the calls of a log."""
    return [Call(*line.split("\t")) for line in log.splitlines()]
