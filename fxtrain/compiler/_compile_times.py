"""How long compilations took: kept in the folder of torch's compiled code, and reported to those who watch a step."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from fxtrain._torch_internals.inductor import cache_folder
from fxtrain._torch_internals.interface import MissingInterfaceError

_MIN_SECONDS = 2.0  # of compilations whose time is kept


class CompileWatcher(Protocol):
    """Sees when a step compiles in the foreground."""

    def compile_began(self, name: str, last_seconds: float | None) -> None:
        """Called before a compilation.

        Args:
            name: The name of what is compiled.
            last_seconds: Seconds that it took the last time; None if that is unknown.
        """

    def compile_ended(self, name: str, seconds: float | None) -> None:
        """Called after a compilation.

        Args:
            name: The name of what is compiled.
            seconds: Seconds that it took; None if it failed.
        """


class CompileTime:
    """The time of a graph's compilation, which earlier processes may have kept.

    Args:
        route: The backend and the route that make the graph, as text.
        parts: What the graph depends on, as text.
    """

    def __init__(self, route: str, *parts: Mapping[str, str] | str) -> None:
        self._path: Path | None = None
        if "inductor" in route:  # others keep no compiled code
            key = hashlib.sha256(repr((torch.__version__, route, parts)).encode()).hexdigest()[:32]
            with contextlib.suppress(OSError, MissingInterfaceError):
                self._path = Path(cache_folder(), "fxtrain", f"{key}.seconds")

    def read(self) -> float | None:
        """Returns the seconds of the latest compilation; None if they are unknown."""
        if self._path is not None:
            with contextlib.suppress(OSError, ValueError):
                return float(self._path.read_text())
        return None

    def write(self, seconds: float) -> None:
        """Keeps the seconds. If they are too few to matter, none are kept, because the graph was found in a file."""
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            if seconds < _MIN_SECONDS:
                self._path.unlink(missing_ok=True)
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(f"{seconds:.1f}")


@contextlib.contextmanager
def watched(watchers: Sequence[CompileWatcher], name: str, last_seconds: float | None) -> Iterator[None]:
    """Reports the compilation inside the block to watchers.

    Args:
        watchers: Those to report to.
        name: The name of what is compiled.
        last_seconds: Seconds that it took the last time; None if that is unknown.
    """
    began, seconds = time.perf_counter(), None
    for watcher in watchers:
        watcher.compile_began(name, last_seconds)
    try:
        yield
        seconds = time.perf_counter() - began
    finally:
        for watcher in watchers:
            watcher.compile_ended(name, seconds)
