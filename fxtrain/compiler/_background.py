"""Graphs that run uncompiled until a worker thread has compiled them."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.compiler.call._graph import Graph
from fxtrain.compiler.lowering._compile_thread import Job, compiler_lock, is_idle
from fxtrain.compiler.lowering._executable import uncompiled
from fxtrain.compiler.lowering._muted_logs import without_torch_messages
from fxtrain.compiler.lowering._routes import Routes
from fxtrain.core import Batch, TrainState
from fxtrain.step import EvalFunction, Step

_log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class _Entry:
    """A graph that is not compiled yet."""

    graph: Graph
    kinds: dict[str, str]
    batch: Batch  # of functions from ``_blank`` in place of tensors
    job: Job | None = None
    seconds: float = 0.0  # spent on tracing


class BackgroundGraphs:
    """The graphs of one step that are not compiled yet, in the order of their first batches.

    Args:
        step: The step.
        routes: The routes by which it is compiled.
        options: Keyword arguments of ``Graph``.
    """

    def __init__(self, step: Step | EvalFunction, routes: Routes, options: dict[str, bool]) -> None:
        self._step, self._routes, self._options = step, routes, options
        self._entries: list[_Entry] = []
        self._refused: list[dict[str, str]] = []
        self.seconds = 0.0
        """The time spent on tracing and compiling, in seconds."""
        self.calls = 0
        """The number of calls that ran uncompiled."""

    def __len__(self) -> int:
        return len(self._entries)

    def is_refused(self, kinds: dict[str, str]) -> bool:
        """Whether a graph for states and batches of these kinds failed to compile in the background."""
        return kinds in self._refused

    def add(self, state: TrainState, entered: TrainState, batch: Batch, kinds: dict[str, str]) -> Graph:
        """Adds a graph that runs uncompiled for now.

        Args:
            state: An example of the states that it accepts.
            entered: The part of the state that enters the graph.
            batch: An example of the batches that it accepts.
            kinds: The kinds of their leaves, from ``described``.

        Raises:
            ValueError: Several processes take the same steps. Graphs and uncompiled steps order their collectives
                differently, and each process would switch to its graph at another step.
        """
        processes = _processes()
        if processes > 1:
            raise ValueError(
                f"expected one process for a step compiled with background=True, got {processes}. Processes that get "
                "their graphs at different steps would deadlock. Leave out background=True."
            )
        executable = uncompiled(self._step, entered, batch, in_place=self._options["donate"])
        graph = Graph(self._step, state, batch, executable, **self._options)
        self._entries.append(_Entry(graph, kinds, tree.map(_blank, batch)))
        return graph

    def count(self, graph: Graph) -> None:
        """Counts a call if the graph runs uncompiled."""
        self.calls += any(entry.graph is graph for entry in self._entries)

    def advance(self, state: TrainState) -> list[Graph]:
        """Installs a graph whose compilation has ended, and begins to compile the next one.

        Args:
            state: The state of the next call. Its values are not read.

        Returns:
            The graphs that cannot be compiled in the background. They are no longer pending.
        """
        refused: list[Graph] = []
        for entry in list(self._entries):
            if entry.job is None:
                is_begun = self._begin(entry, state) if is_idle() else None
            else:
                is_begun = self._collect(entry, entry.job) if entry.job.is_over else None
            if is_begun is False:
                self._entries.remove(entry)
                self._refused.append(entry.kinds)
                refused.append(entry.graph)
        return refused

    def _begin(self, entry: _Entry, state: TrainState) -> bool | None:
        """Traces a graph and hands it to a worker. False if it cannot be traced, None if it has to wait."""
        batch = tree.map(lambda make: make(), entry.batch)
        if entry.graph.find(state, batch) is None or not compiler_lock().acquire(blocking=False):
            return None
        began = time.perf_counter()
        try:
            if not self._routes.has_trace:
                # An earlier graph fell back to a route that only works in the foreground.
                return False
            with without_torch_messages():
                finish = self._routes.trace(
                    self._step, self._step.enter(state), batch, in_place=self._options["donate"]
                )
        except Exception as error:
            _log.debug("%r cannot be traced in the background.", self._step, exc_info=error)
            return False
        finally:
            compiler_lock().release()
        entry.seconds = time.perf_counter() - began
        entry.job = Job(finish, state.step.device)
        _log.info("Compiling %r in the background.", self._step)
        return True

    def _collect(self, entry: _Entry, job: Job) -> bool | None:
        """Installs the result of a job. False if the job failed, None if it has to be repeated."""
        entry.job = None
        job.close()
        if job.error is None and job.result is None:
            return None
        self.seconds += entry.seconds + job.seconds
        if job.error is not None:
            _log.info("%r failed to compile in the background. Compiling it in the foreground.", self._step)
            _log.debug("The error was:", exc_info=job.error)
            return False
        _log.info("Compiled %r in the background in %.1f s.", self._step, entry.seconds + job.seconds)
        assert job.result is not None
        entry.graph.replace_executable(job.result)
        self._entries.remove(entry)
        return True


def _processes() -> int:
    distributed: Any = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _blank(leaf: object) -> Callable[[], Any]:
    """Returns a function that makes an uninitialized tensor like this one. Traces do not read its values."""
    if type(leaf) is not Tensor:
        return lambda: leaf
    shape, stride, dtype, device = leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return lambda: torch.empty_strided(shape, stride, dtype=dtype, device=device)
