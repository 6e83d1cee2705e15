"""The shim between a process and its file system: built, loaded, armed, and its log read."""

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
    """Kinds of calls, as crash.c has them."""

    GROWS = 1
    NAMES = 2
    REMOVES = 4
    SYNCS = 8


class Call(NamedTuple):
    """One call that changed something below the folder, or a note of the harness's own, whose text is the path.

    Names: create, truncate, open, write, sync, mkdir, remove, rename, link, note.
    """

    name: str
    path: str
    target: str = ""


def run_under(module: str, arguments: Sequence[str]) -> int:
    """Runs ``python -m module`` with the shim before it, and with no threads at its start, so that it can fork."""
    with tempfile.TemporaryDirectory() as folder:
        library = pathlib.Path(folder) / "crash.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, _SOURCE, "-ldl"], check=True)
        alone = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
        env = {**os.environ, **alone, "LD_PRELOAD": str(library)}
        return subprocess.run([sys.executable, "-m", module, *arguments], env=env, check=False).returncode


def loaded() -> bool:
    """Whether this process runs with the shim."""
    return hasattr(ctypes.CDLL(None), "fault_arm")


def arm(
    folder: pathlib.Path, *, kill_at: int = 0, fail_from: int = 0, errno: int = 0, kinds: int = 0, log: int = -1
) -> None:
    """From now on, calls below ``folder`` are counted: number ``kill_at`` is SIGKILL, those of ``kinds`` from
    ``fail_from`` on fail with ``errno``, and all that go through are written to the descriptor ``log``."""
    ctypes.CDLL(None).fault_arm(
        os.path.realpath(folder).encode(),
        ctypes.c_long(kill_at),
        ctypes.c_long(fail_from),
        ctypes.c_int(errno),
        ctypes.c_int(kinds),
        ctypes.c_int(log),
    )


def disarm() -> None:
    """The file system is as usual again."""
    ctypes.CDLL(None).fault_disarm()


def count() -> int:
    """How many calls there were since ``arm``."""
    function = ctypes.CDLL(None).fault_count
    function.restype = ctypes.c_long
    return int(function())


def note(text: str) -> None:
    """A line of the harness's own in the log."""
    ctypes.CDLL(None).fault_note(text.encode())


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder in memory where there is one. What the kernel has been told survives a killed process anywhere, and the
    faults come from the shim: a disk would only take longer."""
    memory = pathlib.Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)


@contextlib.contextmanager
def log_file() -> Iterator[tuple[int, pathlib.Path]]:
    """A file for ``arm``'s log, outside of every folder that is watched."""
    with tempfile.NamedTemporaryFile(prefix="calls-") as file:
        yield file.fileno(), pathlib.Path(file.name)


def parse(log: str) -> list[Call]:
    """The calls of a log."""
    return [Call(*line.split("\t")) for line in log.splitlines()]
