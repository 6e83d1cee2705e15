"""Finds the lines of user code that keep a step from being one graph."""

from __future__ import annotations

import traceback
import types
from collections.abc import Iterable, Mapping

import torch

from fxtrain._torch_internals.dispatch import Operator, TorchDispatchMode
from fxtrain._torch_internals.dynamo import explaining_backend
from fxtrain.compiler.lowering._graph_breaks import SHAPE, VALUE, Break, break_at, break_from_error, first_line
from fxtrain.core import Batch, StepFn, TrainState
from fxtrain.step import EvalFunction

_BY_TAG = {torch.Tag.data_dependent_output: VALUE, torch.Tag.dynamic_output_shape: SHAPE}


def found_by_running(step: StepFn | EvalFunction, state: TrainState, batch: Batch) -> list[Break]:
    """Runs a step uncompiled and returns every place where it depends on the values of tensors.

    The tracer stops at the first one.
    """
    with _Watch() as watch:
        step(state, batch)
    return [each for each in watch.breaks if each.where]


class _Watch(TorchDispatchMode):
    """Records each operation that cannot be part of a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.breaks: list[Break] = []

    def __torch_dispatch__(
        self,
        func: Operator,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        reason = next((explanation for tag, explanation in _BY_TAG.items() if tag in func.tags), None)
        if reason is not None:
            self.breaks.append(break_at(traceback.extract_stack(), reason))
        return func(*args, **(kwargs or {}))


def found_by_dynamo(step: StepFn | EvalFunction, state: TrainState, batch: Batch) -> tuple[int, list[Break]]:
    """Returns how many graphs Dynamo makes of a step if it may make several, and the breaks between them.

    Runs the step. Within ``torch.func.grad``, Dynamo gives up at the first break.
    """
    # torch._dynamo.explain would discard everything that this process has compiled.
    explain = explaining_backend()

    def run(state: TrainState, batch: Batch) -> object:
        return step(state, batch)

    # A copy of the code, because Dynamo caches graphs per code object.
    own = types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
    try:
        torch.compile(own, backend=explain)(state, batch)
    except Exception as error:
        return 0, [break_from_error(error)]
    output = explain.output()
    return output.graph_count, [break_at(each.user_stack, first_line(each.reason)) for each in output.break_reasons]


def joined(breaks: Iterable[Break]) -> tuple[Break, ...]:
    """Returns the first break of each place."""
    places: dict[str, Break] = {}
    for each in breaks:
        places.setdefault(each.where or each.reason, each)
    return tuple(places.values())
