"""Recalls compiled steps: beside a compiled graph, the signature of its step is kept for later processes."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.compiler.artefacts._file import DamagedFileError, Entry, read_entry, write_entry
from fxtrain.compiler.artefacts._fingerprint import digest
from fxtrain.compiler.artefacts._folder import Artefacts, facts_of, local_artefacts
from fxtrain.compiler.lowering._executable import Executable, Origin, kinds, run_graph
from fxtrain.compiler.lowering._inductor import load_compiled
from fxtrain.compiler.lowering._modes import AHEAD, load_ahead
from fxtrain.compiler.lowering._obstacles import obstacle
from fxtrain.compiler.lowering._signature import signature_of
from fxtrain.compiler.lowering._stored import loaded
from fxtrain.core import Batch, TrainState
from fxtrain.step import EvalFunction, Step

_log = logging.getLogger(__name__)

_SUFFIX = ".fxs"
_IMPORT_SECONDS, _TRACE_SECONDS = 1.0, 1e-3
"""At least what a trace takes, for its imports and for each operator."""


class Recall:
    """What earlier processes have compiled, found by the signatures of steps.

    Args:
        mode: As in ``compile``.
        artefacts: The folder of compiled graphs that the user has named.
    """

    def __init__(self, mode: str | None, artefacts: Artefacts | None) -> None:
        self._mode, self._artefacts = mode, artefacts

    def find(self, step: Step | EvalFunction, state: TrainState, batch: Batch, *, in_place: bool) -> Executable | None:
        """Returns what an earlier process has compiled for a step, without a trace. None if there is nothing.

        The step runs once, on copies, if an earlier process has kept a step with such inputs.

        Args:
            step: As for ``trace_step``, as are all others.
            state: The part of a state that enters the graph.
            batch: A batch.
            in_place: Whether to write the new state into the old state's buffers.
        """
        files = self._files(step, state, batch, in_place)
        if files is None or not files.has_any():
            return None
        signature = signature_of(step, state, batch)
        entry = None if signature is None else files.read(signature.digest)
        if signature is None or entry is None or tuple(entry.header["changed"]) != signature.changed:
            return None
        graph, read = entry.header["graph"], entry.header["read"]
        call = loaded(files.folders, graph, files.facts, load_ahead if self._mode == AHEAD else load_compiled)
        if call is None:
            return None
        files.write(signature.digest, entry.header)
        local, changed = local_artefacts(), signature.changed
        run = run_graph(call, read, changed, signature.output, in_place=in_place, is_step=isinstance(step, Step))
        mark = None if local is None else local.mark_of_check(graph, files.facts)
        return Executable(run, changed if in_place else None, mark=mark)

    def keep(
        self, step: Step | EvalFunction, state: TrainState, batch: Batch, origin: Origin, *, in_place: bool
    ) -> None:
        """Keeps the graph of a compiled step for ``find``, whose arguments it takes, if that is faster than a trace."""
        files = self._files(step, state, batch, in_place)
        if files is None:
            return
        began = time.perf_counter()
        signature = signature_of(step, state, batch)
        seconds = time.perf_counter() - began
        if signature is not None and seconds < _IMPORT_SECONDS + _TRACE_SECONDS * signature.operators:
            header = {"graph": origin.graph, "read": origin.read, "changed": signature.changed}
            files.write(signature.digest, header)

    def _files(
        self, step: Step | EvalFunction, state: TrainState, batch: Batch, in_place: bool
    ) -> _SignatureFiles | None:
        """Returns the files for a step and its inputs. None if such steps are not recognized."""
        leaves, inputs = tree.leaves(state), tree.leaves(batch)
        given: list[Tensor] = [*leaves, *inputs]
        # Ranks must take the same way. Steps on GPUs are not stored.
        if step.mesh is not None or any(leaf.device.type != "cpu" for leaf in given):
            return None
        if torch.is_autocast_enabled("cpu") or obstacle(leaves, is_in_place=True) is not None:
            return None
        folders = [folder for folder in (self._artefacts, local_artefacts()) if folder is not None]
        facts = kinds(leaves), kinds(inputs), in_place, self._mode, isinstance(step, Step), torch.is_grad_enabled()
        prefix = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
        return _SignatureFiles(folders, prefix, facts_of(given)) if folders else None


class _SignatureFiles(NamedTuple):
    """The files of all signatures of steps with the same kinds of inputs.

    Args:
        folders: The folders of compiled graphs: the one that the user has named, and that of this machine.
        prefix: How the names of the files begin.
        facts: The facts of this process.
    """

    folders: Sequence[Artefacts]
    prefix: str
    facts: dict[str, str]

    def has_any(self) -> bool:
        pattern = self._name("*")
        return any(True for folder in self.folders for _ in folder.folder.glob(pattern))

    def read(self, signature: str) -> Entry | None:
        """Returns the first entry for a signature."""
        entries = (self._entry(path, signature) for path in self._paths(signature))
        return next((entry for entry in entries if entry is not None), None)

    def write(self, signature: str, header: dict[str, Any]) -> None:
        """Writes an entry to all folders that have none."""
        for path in self._paths(signature):
            if self._entry(path, signature) is None:
                try:
                    write_entry(path, Entry({**header, "signature": signature, "facts": self.facts}, {}))
                except OSError as error:
                    _log.debug("%s cannot be written.", path, exc_info=error)

    def _entry(self, path: Path, signature: str) -> Entry | None:
        """Returns the entry in a file, or None if the file is missing, damaged or of another signature."""
        try:
            entry = read_entry(path)
        except (OSError, DamagedFileError) as error:
            _log.debug("%s: %s", path, error)
            return None
        is_ours = (entry.header.get("signature"), entry.header.get("facts")) == (signature, self.facts)
        return entry if is_ours else None

    def _paths(self, signature: str) -> list[Path]:
        return [folder.folder / self._name(signature[:32]) for folder in self.folders]

    def _name(self, signature: str) -> str:
        return f"{self.prefix}-{signature}-{digest(self.facts)}{_SUFFIX}"
