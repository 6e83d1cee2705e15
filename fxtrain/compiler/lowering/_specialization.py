"""Compiles a step into one graph per set of tensor values that Python reads during the trace.

Each call also computes whether these values are still the same. If not, the result is dropped, and the step is traced
again for the new values or compiled by the next route.

These graphs never donate, because the old state is needed if the values turn out to differ. Each call synchronizes with
the device to read its checks. The checks are read after the graph has run, so on a GPU an index that is out of range
for changed values ends the process.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from optree import PyTreeSpec
from torch import Tensor

from fxtrain import tree
from fxtrain.compiler.lowering._executable import Executable, Run
from fxtrain.compiler.lowering._trace import compile_traced
from fxtrain.compiler.lowering._value_reads import CheckedReads, ElementReads, Reads, UncheckedReadError
from fxtrain.core import Batch, TrainState, Tree
from fxtrain.model import UnseededError
from fxtrain.step import EvalFunction, Step

_log = logging.getLogger(__name__)

Otherwise = Callable[[TrainState, Any], Executable]
"""Compiles the step for a state and a batch by a later route. The executable returns a new state."""

_MAX_GRAPHS = 8
# A number that has changed twice is assumed to change with every batch.
_MAX_NUMBER_CHANGES = 2


def compile_specialized(
    step: Step | EvalFunction, state: TrainState, batch: Batch, *, in_place: bool, otherwise: Otherwise, **options: Any
) -> Executable:
    """Compiles a step into one graph per set of values that it reads.

    Takes the arguments of ``trace_step``, and:

    Args:
        otherwise: Compiles the step by a route that holds for all values. It is called at most once.

    Raises:
        UncheckedReadError: The step reads a floating-point value that depends on its inputs, or samples from a host
            random generator. A graph would repeat these samples, while later routes draw new ones at each call.
        Exception: The step cannot be traced.
    """
    # The old state is kept, because it is needed if the values turn out to differ.
    del in_place
    compiler = functools.partial(compile_traced, in_place=False, **options)
    checked = _Specialized(step, tree.structure(state), tree.structure(batch), compiler, otherwise)
    try:
        checked.add(tree.leaves(state), tree.leaves(batch))
    except UnseededError as error:
        raise UncheckedReadError(str(error)) from error
    return Executable(checked, None, graphs=checked)


class _Graph(NamedTuple):
    """A graph and the values that it is specialized for."""

    run: Run
    reads: Reads


class _Specialized:
    """The graphs of a step, one per set of values read, most recently used first."""

    def __init__(
        self,
        step: Step | EvalFunction,
        state: PyTreeSpec,
        batch: PyTreeSpec,
        compiler: Callable[..., Executable],
        otherwise: Otherwise,
    ) -> None:
        self._step, self._state, self._batch = step, state, batch
        self._compiler, self._otherwise = compiler, otherwise
        self._other: Executable | None = None
        self._graphs: list[_Graph] = []
        self._number_changes = 0  # how often a number (not a bool) has changed

    def __len__(self) -> int:
        return len(self._graphs) + (self._other is not None)

    def add(self, leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> _Graph:
        """Compiles the graph for the values that these tensors lead to."""
        given = [*leaves, *inputs]
        known = [graph.reads.values for graph in self._graphs]
        traced = (_ReadingStep if isinstance(self._step, Step) else _ReadingFunction)(self._step, given, known)
        state, batch = tree.unflatten(self._state, leaves), tree.unflatten(self._batch, inputs)
        run = self._compiler(traced, state, batch).run
        assert traced.reads is not None
        self._graphs.insert(0, _Graph(run, traced.reads))
        return self._graphs[0]

    def __call__(self, leaves: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tree]:
        tried: list[tuple[_Graph, int]] = []  # graphs with the index of the first value that differs
        while (graph := self._candidate(tried)) is not None:
            try:
                new, (output, same) = graph.run(leaves, inputs)
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:
                # Sizes may not fit if the values differ.
                _log.debug("%r failed for other values.", self._step, exc_info=error)
                break
            found = same.tolist()
            if all(found):
                self._graphs.remove(graph)
                self._graphs.insert(0, graph)
                return new, output
            tried.append((graph, found.index(False)))
        return self._run_for_new_values(tried, leaves, inputs)

    def _candidate(self, tried: list[tuple[_Graph, int]]) -> _Graph | None:
        """Returns the first graph that may hold for these values, or None.

        Its values agree with those of each tried graph up to the first difference, and differ from them there.
        """
        for graph in self._graphs:
            mine = graph.reads.values
            if all(
                mine[:place] == other.reads.values[:place] and mine[place : place + 1] != [other.reads.values[place]]
                for other, place in tried
            ):
                return graph
        return None

    def _run_for_new_values(
        self, tried: list[tuple[_Graph, int]], leaves: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Tree]:
        self._number_changes += any(place in graph.reads.numbers for graph, place in tried) or not tried
        if len(self._graphs) < _MAX_GRAPHS and self._number_changes < _MAX_NUMBER_CHANGES:
            _log.info("%r reads other values. Compiling graph %d for them.", self._step, len(self._graphs) + 1)
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
            # Raises the step's own error, if it has one.
            self._step(state, batch)
            self._other = self._otherwise(state, batch)
        return self._other.run(leaves, inputs)


class _KnownValuesError(RuntimeError):
    """A trace read the values of an existing graph whose checks failed, which rounding can cause."""


class _Reading:
    """Wraps a function so that it also returns whether its reads have the values of the trace.

    Args:
        function: A step or an evaluation step.
        given: The leaves of the state and of the batch that are traced.
        known: The values read by earlier traces.
    """

    def __init__(self, function: Callable[..., Tree], given: Sequence[Tensor], known: Sequence[list[float]]) -> None:
        self._function, self._given, self._known = function, given, known
        self.reads: Reads | None = None

    def result_and_same(self, state: TrainState, batch: Batch) -> tuple[Any, Tensor]:
        with CheckedReads(self._given) as checked, ElementReads():
            result = self._function(state, batch)
            same = checked.same(state.step.device)
        self.reads = checked.reads
        if self.reads.values in self._known:
            raise _KnownValuesError
        return result, same

    def __repr__(self) -> str:
        return repr(self._function)


class _ReadingStep(_Reading, Step):
    def __call__(self, state: TrainState, batch: Batch) -> Any:
        (new, output), same = self.result_and_same(state, batch)
        return new, (output, same)


class _ReadingFunction(_Reading):
    def __call__(self, state: TrainState, batch: Batch) -> Any:
        return self.result_and_same(state, batch)
