"""Folders of compiled graphs: the one that the user names, and the one next to torch's compiled code."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from fxtrain._torch_internals.inductor import are_files_allowed, cache_folder
from fxtrain._torch_internals.interface import MissingInterfaceError
from fxtrain.compiler.artefacts._file import (
    SUFFIX,
    DamagedFileError,
    Entry,
    extracted,
    read_entry,
    read_header,
    write_entry,
)
from fxtrain.compiler.artefacts._fingerprint import differences, digest, environment_facts
from fxtrain.compiler.artefacts._lease import local_turn, turn
from fxtrain.core import check_new_path, warn

_log = logging.getLogger(__name__)

Load = Callable[[Entry], Any]


class Artefacts:
    """Files of compiled graphs in a folder that several processes and machines may share.

    Args:
        folder: The folder. It is created when the first graph is saved.
    """

    _turn = staticmethod(turn)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._warned = set[str]()

    def load(self, graph: str, facts: Mapping[str, str], load: Load) -> Any:
        """Returns what ``load`` makes of a file, or None if there is none that works here, and says why.

        Args:
            graph: The hash of the graph.
            facts: The facts of this process.
            load: Makes a function of the file. It raises if this fails.
        """
        path = self._path(graph, facts)
        try:
            entry = read_entry(path)
            if entry.header.get("graph") != graph or entry.header.get("facts") != dict(facts):
                raise DamagedFileError("was renamed: it is of another graph")
            return load(entry)
        except (FileNotFoundError, NotADirectoryError):
            self._explain_miss(graph, facts)
        except DamagedFileError as error:
            self._warn(f"{path} {error}. The step is compiled, and the file is replaced.")
        except Exception as error:
            self._warn(f"{path} cannot be loaded ({type(error).__name__}: {error}). The step is compiled instead.")
        return None

    def has(self, graph: str, facts: Mapping[str, str]) -> bool:
        """Whether there is a file for a graph. It may be damaged."""
        return self._path(graph, facts).exists()

    def save(self, graph: str, facts: Mapping[str, str], files: Mapping[str, bytes], header: Mapping[str, Any]) -> None:
        """Saves a compiled graph. If that fails, it is said, and the run goes on."""
        header = {**header, "graph": graph, "facts": dict(facts), "host": socket.gethostname(), "time": time.time()}
        try:
            write_entry(self._path(graph, facts), Entry(header, dict(files)))
        except OSError as error:
            self._warn(
                f"The compiled step cannot be saved in {self.folder} ({error.strerror or error}). The run goes on, and "
                "other processes compile the step themselves."
            )

    def turn(self, graph: str, facts: Mapping[str, str], on_wait: Callable[[], None]) -> AbstractContextManager[bool]:
        """A context in which one process compiles a graph, while others wait for its file.

        Args:
            graph: The hash of the graph.
            facts: The facts of this process.
            on_wait: Called once before this process waits.
        """
        path = self._path(graph, facts)

        def announce() -> None:
            _log.info("Another process compiles this graph. Waiting for its file in %s.", self.folder)
            on_wait()

        return self._turn(path.with_suffix(".lease"), path.exists, announce)

    def turn_of_part(
        self, graph: str, facts: Mapping[str, str], part: int, *, waits: bool
    ) -> AbstractContextManager[bool]:
        """A context in which one process compiles a part of a graph. It yields whether that is this process.

        Args:
            graph: The hash of the graph.
            facts: The facts of this process.
            part: The index of the part.
            waits: Whether to wait while another process compiles the part.
        """
        path = self._path(graph, facts).with_suffix(f".{part}.lease")
        return self._turn(path, lambda: not waits, lambda: None)

    def mark_of_check(self, graph: str, facts: Mapping[str, str]) -> Path:
        """Returns the file whose existence says that a graph has passed its check."""
        return self._path(graph, facts).with_suffix(".checked")

    def _path(self, graph: str, facts: Mapping[str, str]) -> Path:
        return self.folder / f"{graph[:32]}-{digest(facts)}{SUFFIX}"

    def _explain_miss(self, graph: str, facts: Mapping[str, str]) -> None:
        """Says why no file works here, unless the folder is empty."""
        headers = [read_header(path) for path in sorted(self.folder.glob(f"*{SUFFIX}"))]
        headers = [header for header in headers if _is_readable(header)]
        same = [header for header in headers if header.get("graph") == graph]
        if not same and any(header["facts"] == dict(facts) for header in headers):
            _log.info("%s has %d graphs, but none of this step, state and batch.", self.folder, len(headers))
        elif headers:
            last = max(same or headers, key=lambda header: header.get("time", 0))
            took = last.get("seconds")
            before = f" It took {took:.1f} s there." if isinstance(took, float) else ""
            self._warn(
                f"The compiled steps in {self.folder} are of another environment ({differences(facts, last['facts'])})."
                f" The step is compiled.{before}"
            )

    def _warn(self, message: str) -> None:
        """Warns once about each problem."""
        if message not in self._warned:
            self._warned.add(message)
            warn(message, UserWarning)


class _LocalArtefacts(Artefacts):
    """The compiled graphs of this machine, next to torch's compiled code. Problems with them are not reported."""

    _turn = staticmethod(local_turn)

    def _explain_miss(self, graph: str, facts: Mapping[str, str]) -> None:
        pass

    def _warn(self, message: str) -> None:
        _log.debug("%s", message)


def _is_readable(header: Mapping[str, Any]) -> bool:
    """Whether a header, which is read without its checksum, has values of the right types."""
    facts = header.get("facts")
    has_text = isinstance(facts, dict) and all(isinstance(value, str) for value in facts.values())
    return has_text and isinstance(header.get("time", 0), int | float)


def local_artefacts() -> Artefacts | None:
    """Returns the compiled graphs of this machine, or None if the user has switched off torch's cache."""
    try:
        return _LocalArtefacts(Path(cache_folder(), "fxtrain")) if are_files_allowed() else None
    except MissingInterfaceError:
        return None


def extract(content: bytes, suffix: str) -> Path:
    """Returns a file of this machine with this content, for code that can be loaded only from a file."""
    return extracted(Path(cache_folder(), "fxtrain", "libraries"), content, suffix)


def artefacts_in(path: str | os.PathLike[str]) -> Artefacts:
    """Returns the compiled graphs in a folder.

    Raises:
        TypeError: It is not a path.
        ValueError: The path is that of a file, or of a link to nothing, or none that the system accepts.
    """
    check_new_path("artefacts", path)
    folder = Path(path)
    if folder.is_symlink() and not folder.exists():
        raise ValueError(
            f"expected artefacts to be a folder, got a link to {folder.readlink()}, which does not exist. Create that "
            "folder, or name another."
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"expected artefacts to be a folder, got the file {folder}. Name a folder. It is created if it is missing."
        )
    return Artefacts(folder)


def facts_of(tensors: Iterable[torch.Tensor]) -> dict[str, str]:
    """Returns the facts of this process for a graph with these inputs."""
    return environment_facts({tensor.device for tensor in tensors})
