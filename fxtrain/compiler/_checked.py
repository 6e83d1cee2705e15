"""Checked: a step as one graph for the values that Python read while it was traced.

The graph computes at each call whether these values are the same. Where they differ its result is dropped, and another
graph is made for the other values, or the call takes the next route.

The new state is returned beside the old one, also by a step that donates, because the old one is needed where values
differ. Each call waits for its checks. A graph runs to its end before they are read: on a GPU, an index that is out of
range only for other values ends the process.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.compiler._trace import Artefact, Run, compile_traced
from fxtrain.compiler._values import CheckedReads, Reads, UncheckedReadError
from fxtrain.core import TrainState
from fxtrain.model import UnseededError
from fxtrain.step import EvalFunction, Step

_log = logging.getLogger(__name__)

Otherwise = Callable[[TrainState, Any], Artefact]
"""From a state and a batch to an artefact that returns a new state."""

_MOST_GRAPHS = 8
_MOST_GRAPHS_BY_NUMBER = 2  # numbers that have differed twice differ all the time


def compile_checked(
    step: Step | EvalFunction,
    state: TrainState,
    batch: Any,
    *,
    mode: str | None,
    in_place: bool,
    otherwise: Otherwise,
    backend: str | Callable[..., Any] | None = None,
) -> Artefact:
    """The step as one graph for each set of values that it reads. Arguments as for ``compile_traced``, and:

    Args:
        otherwise: Compiles the step by a route that is for all values; called at most once.

    Raises:
        UncheckedReadError: If the step reads a floating-point value of its inputs, or draws random numbers of the host,
            which a graph would repeat and later routes draw at each call.
        Exception: If it cannot be traced.
    """
    del in_place  # a state is written over only when the values are known to be the same
    checked = _Checked(step, tree.structure(state), tree.structure(batch), mode, backend, otherwise)
    try:
        checked.add(tree.leaves(state), tree.leaves(batch))
    except UnseededError as error:
        raise UncheckedReadError(str(error)) from error
    return Artefact(checked, None)


@dataclasses.dataclass
class _Graph:
    """A graph, and the values that it is for."""

    run: Run
    reads: Reads


class _Checked:
    """The graphs of a step by what it reads, the one that was used last first."""

    def __init__(self, step: Any, state: Any, batch: Any, mode: Any, backend: Any, otherwise: Any) -> None:
        self._step, self._state, self._batch = step, state, batch
        self._mode, self._backend = mode, backend
        self._otherwise: Otherwise = otherwise
        self._other: Artefact | None = None
        self._graphs: list[_Graph] = []
        self._numbers = 0  # graphs that were made because a number differed

    def add(self, leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> _Graph:
        """Makes the graph for the values that these tensors lead to."""
        given = [*leaves, *inputs]
        known = [graph.reads.values for graph in self._graphs]
        traced = (_ReadingStep if isinstance(self._step, Step) else _ReadingFunction)(self._step, given, known)
        state, batch = tree.unflatten(self._state, leaves), tree.unflatten(self._batch, inputs)
        artefact = compile_traced(traced, state, batch, mode=self._mode, in_place=False, backend=self._backend)
        assert traced.reads is not None
        self._graphs.insert(0, _Graph(artefact.run, traced.reads))
        return self._graphs[0]

    def __call__(self, leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Any]:
        tried: list[tuple[_Graph, int]] = []  # with the place of the first value that differs
        while (graph := self._next(tried)) is not None:
            try:
                new, (output, same) = graph.run(leaves, inputs)
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:  # sizes that do not fit, where values differ
                _log.debug("%r for other values:", self._step, exc_info=error)
                break
            found = same.tolist()
            if all(found):
                self._graphs.remove(graph)
                self._graphs.insert(0, graph)
                return new, output
            tried.append((graph, found.index(False)))
        return self._differing(tried, leaves, inputs)

    def _next(self, tried: list[tuple[_Graph, int]]) -> _Graph | None:
        """A graph that may be for these values: like those tried before their first difference, and unlike there."""
        for graph in self._graphs:
            mine = graph.reads.values
            if all(
                mine[:place] == other.reads.values[:place] and mine[place : place + 1] != [other.reads.values[place]]
                for other, place in tried
            ):
                return graph
        return None

    def _differing(
        self, tried: list[tuple[_Graph, int]], leaves: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Any]:
        self._numbers += any(place in graph.reads.numbers for graph, place in tried) or not tried
        if len(self._graphs) < _MOST_GRAPHS and self._numbers < _MOST_GRAPHS_BY_NUMBER:
            _log.info(
                "%r reads other values: compiling a graph for them, number %d.", self._step, len(self._graphs) + 1
            )
            try:
                new, (output, same) = self.add(leaves, inputs).run(leaves, inputs)
                if bool(same.all()):
                    return new, output
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:
                _log.debug("%r cannot be traced for other values.", self._step, exc_info=error)
        if self._other is None:
            state, batch = tree.unflatten(self._state, leaves), tree.unflatten(self._batch, inputs)
            self._step(state, batch)  # an error of the step's own is raised in its own words
            self._other = self._otherwise(state, batch)
        return self._other.run(leaves, inputs)


class _KnownValuesError(RuntimeError):
    """A trace read the values of an earlier one, although that graph computes others: they differ by rounding."""


class _Reading:
    """A function of a state and a batch that returns whether its reads had the same values beside its result.

    Args:
        function: A step or an evaluation step.
        given: The leaves of the state and the batch that the trace is for.
        known: What earlier traces read.
    """

    def __init__(self, function: Callable[..., Any], given: Sequence[Tensor], known: Sequence[list[Any]]) -> None:
        self._function, self._given, self._known = function, given, known
        self.reads: Reads | None = None

    def result_and_same(self, state: TrainState, batch: Any) -> tuple[Any, Tensor]:
        with CheckedReads(self._given) as checked:
            result = self._function(state, batch)
            same = checked.same(state.step.device)
        self.reads = checked.reads
        if self.reads.values in self._known:
            raise _KnownValuesError
        return result, same

    def __repr__(self) -> str:
        return repr(self._function)


class _ReadingStep(_Reading, Step):
    def __call__(self, state: TrainState, batch: Any) -> Any:
        (new, output), same = self.result_and_same(state, batch)
        return new, (output, same)


class _ReadingFunction(_Reading):
    def __call__(self, state: TrainState, batch: Any) -> Any:
        return self.result_and_same(state, batch)
