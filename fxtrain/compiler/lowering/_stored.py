"""Compiled graphs from files: found by a hash of the graph, loaded if they work here, and saved once compiled."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.fx import GraphModule

from fxtrain._torch_internals.dispatch import Operator
from fxtrain._torch_internals.inductor import changed_settings
from fxtrain.compiler.artefacts._file import Entry
from fxtrain.compiler.artefacts._folder import Artefacts, facts_of, local_artefacts
from fxtrain.core import warn
from fxtrain.core._bits import as_bytes

_log = logging.getLogger(__name__)

# Operators of these libraries compile to the same code in every process. Others may have been replaced by the user.
_KNOWN_LIBRARIES = ("aten", "prims", "fxtrain", "_c10d_functional")


class Compiled(NamedTuple):
    """A compiled graph.

    Args:
        call: The function.
        files: Returns its code as files. It raises ``ValueError`` if that is impossible.
        header: Values that ``load`` needs besides the files.
    """

    call: Any
    files: Callable[[], Mapping[str, bytes]]
    header: Mapping[str, Any]


class Turns(Protocol):
    """Returns a context in which one process compiles a part of a graph. It yields whether that is this process."""

    def __call__(self, part: int, *, waits: bool) -> AbstractContextManager[bool]: ...


def _always(part: int, *, waits: bool) -> AbstractContextManager[bool]:
    return contextlib.nullcontext(True)


class GraphFiles:
    """The files of a graph.

    Args:
        graph: A graph from ``make_fx``.
        examples: Tensors with the shapes, strides, dtypes and devices of its inputs. They may be fake.
        options: The compiler's options.
        artefacts: The folder that the user has named.

    Attributes:
        mark: The file whose existence says that the graph has passed its check on this machine. None before the graph
            is ready, and if other processes cannot recognize it.
        key: The hash of the graph by which its files are found. None if it has no files.
    """

    def __init__(
        self,
        graph: GraphModule,
        examples: Sequence[Tensor],
        options: Mapping[str, object],
        artefacts: Artefacts | None,
    ) -> None:
        self._graph, self._examples, self._options = graph, examples, options
        self._artefacts = artefacts
        self.mark: Path | None = None
        self.key: str | None = None

    def compiled_or_loaded(
        self,
        compile_graph: Callable[[Turns], Compiled],
        load: Callable[[Entry], Any],
        help_compile: Callable[[Turns, Callable[[], bool]], None] | None = None,
    ) -> Any:
        """Returns the function of the graph: from a file where one works here, otherwise compiled and then saved.

        Args:
            compile_graph: Compiles the graph.
            load: Makes the function of a file.
            help_compile: Compiles parts of the graph while another process compiles it, until a function says that the
                graph is done. None if the graph has no parts.
        """
        artefacts = self._artefacts
        reason = _unstorable(self._graph, self._examples)
        if reason is not None:
            if artefacts is not None:
                _cannot_save(artefacts, reason)
            return compile_graph(_always).call
        key, facts = graph_hash(self._graph, self._examples, self._options), facts_of(self._examples)
        local = local_artefacts()
        if local is not None:
            self.mark = local.mark_of_check(key, facts)
        folders = [folder for folder in (artefacts, local) if folder is not None]
        found = loaded(folders, key, facts, load)
        if found is not None:
            self.key = key
            return found
        shared = folders[0] if folders else None
        # Parts are exchanged by Inductor's cache, which belongs to this machine.
        turns = _always if local is None else functools.partial(local.turn_of_part, key, facts)

        def on_wait() -> None:
            if help_compile is not None and shared is not None:
                try:
                    help_compile(turns, functools.partial(shared.has, key, facts))
                except Exception as error:
                    # The process that compiles the whole graph reports what fails.
                    _log.debug("A part of a graph cannot be compiled.", exc_info=error)

        with contextlib.nullcontext() if shared is None else shared.turn(key, facts, on_wait):
            # Another process may have compiled it meanwhile.
            if shared is not None and shared.has(key, facts):
                found = loaded([shared], key, facts, load)
                if found is not None:
                    self.key = key
                    return found
            began = time.perf_counter()
            compiled = compile_graph(turns)
            if folders:
                try:
                    files = compiled.files()
                except Exception as error:
                    _log.debug("A compiled graph cannot be saved.", exc_info=error)
                    if artefacts is not None:
                        _cannot_save(artefacts, str(error))
                    return compiled.call
                header = {**compiled.header, "seconds": time.perf_counter() - began}
                for folder in folders:
                    folder.save(key, facts, files, header)
                self.key = key
        return compiled.call


def loaded(folders: Sequence[Artefacts], key: str, facts: Mapping[str, str], load: Callable[[Entry], Any]) -> Any:
    """Returns the function in the first file that works, and copies this file to the folders before its own."""
    missing: list[Artefacts] = []
    for folder in folders:
        began, entries = time.perf_counter(), list[Entry]()

        def load_and_keep(entry: Entry, entries: list[Entry] = entries) -> Any:
            call = load(entry)
            entries.append(entry)
            return call

        call = folder.load(key, facts, load_and_keep)
        if call is not None:
            _log.info("Loaded a compiled graph from %s in %.1f s.", folder.folder, time.perf_counter() - began)
            for other in missing:
                other.save(key, facts, entries[0].files, entries[0].header)
            return call
        missing.append(folder)
    return None


def graph_hash(graph: GraphModule, examples: Sequence[Tensor], options: Mapping[str, object]) -> str:
    """Returns a hash of everything in a graph that its compiled code depends on."""
    digest = hashlib.sha256(repr(sorted(options.items())).encode())
    for name, part in graph.named_modules():
        if isinstance(part, GraphModule):
            digest.update(f"{name}\n{part.code}".encode())
    for leaf in examples:
        digest.update(f"{tuple(leaf.shape)} {leaf.dtype} {leaf.stride()} {leaf.device}\n".encode())
    for name, constant in (*graph.named_buffers(), *graph.named_parameters()):
        digest.update(f"{name} {constant.dtype} {list(constant.shape)}".encode())
        digest.update(as_bytes(constant.detach().cpu().contiguous()).numpy().data)
    return digest.hexdigest()


def _unstorable(graph: GraphModule, examples: Sequence[Tensor]) -> str | None:
    """Returns why a hash of the graph's code would not identify its compiled code, or None if it would."""
    if any(not isinstance(size, int) for leaf in examples for size in getattr(leaf, "shape", (None,))):
        return "its sizes are symbolic"
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            if not isinstance(node.target, Operator):
                return f"it calls {getattr(node.target, '__name__', node.target)}"
            if node.target.namespace not in _KNOWN_LIBRARIES:
                return f"it calls the operator {node.target}"
    if changed_settings() is None:
        return "the settings of Inductor cannot be compared, such as passes of the user"
    return None


def _cannot_save(artefacts: Artefacts, reason: str) -> None:
    warn(
        f"The compiled step cannot be saved in {artefacts.folder}, because {reason}. Each process compiles it.",
        UserWarning,
    )
