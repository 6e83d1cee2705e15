"""Analyzes a step: its operations, FLOPs and memory traffic, and the lines that keep it from being one graph."""

from __future__ import annotations

import operator
import traceback
import types
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.collectives import NAMESPACE as COLLECTIVES
from fxtrain._torch_internals.collectives import is_wait
from fxtrain._torch_internals.dispatch import Operator, TorchDispatchMode, attention_on_cpu, is_view, operator_name
from fxtrain._torch_internals.dynamo import explaining_backend
from fxtrain._torch_internals.tracing import make_fx, new_fake_mode
from fxtrain.compiler.lowering._compile_thread import compiler_lock
from fxtrain.compiler.lowering._function_modes import KnownLiterals, OpaqueCTC
from fxtrain.compiler.lowering._graph_breaks import SHAPE, VALUE, Break, break_at, break_from_error, first_line
from fxtrain.compiler.lowering._side_effects import detecting_side_effects
from fxtrain.core import Batch, StepFn, TrainState, compiling
from fxtrain.diagnostics._activations import noting_places
from fxtrain.step import EvalFunction, Step

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from fxtrain._torch_internals.tracing import FakeTensor

_BY_TAG = {torch.Tag.data_dependent_output: VALUE, torch.Tag.dynamic_output_shape: SHAPE}


class Counts(NamedTuple):
    """The counts of a graph, or None for a step without a graph. ``Explanation`` describes the fields."""

    operations: int | None = None
    flops: dict[str, int] | None = None
    least_traffic: int | None = None
    most_traffic: int | None = None
    transfers: dict[str, int] | None = None


def trace(step: Step | EvalFunction, state: TrainState, batch: Batch) -> GraphModule:
    """Traces the step with fake tensors and returns its graph.

    Raises:
        Exception: The step reads a value, or does something else that cannot be traced.
    """
    leaves, structure = tree.flatten((state, batch))

    def flat(*tensors: Tensor) -> list[Tensor]:
        with noting_places():
            return tree.leaves(step(*tree.unflatten(structure, tensors)))

    # Without symbols for unknown values, a read raises at its line, and not later in the compiler.
    mode = new_fake_mode()
    fakes = [mode.from_tensor(leaf) for leaf in leaves]
    with compiler_lock(), mode, compiling(), detecting_side_effects(), KnownLiterals(), OpaqueCTC():
        return make_fx(flat, tracing_mode="real")(*fakes)


def counted(graph: GraphModule) -> Counts:
    """Counts the operations, FLOPs and traffic of a graph from ``trace``."""
    calls = [node for node in graph.graph.nodes if node.op == "call_function" and node.target != operator.getitem]
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    read = [node.meta["val"] for node in inputs if node.users]
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    new = {node for node in output.all_input_nodes if node.op != "placeholder"}
    most = sum(
        _bytes(node.meta.get("val")) + sum(_bytes(argument.meta.get("val")) for argument in node.all_input_nodes)
        for node in calls
        if not is_view(node.target)
    )
    return Counts(
        operations=len(calls),
        flops=_flops(graph, [node.meta["val"] for node in inputs]),
        least_traffic=_bytes(read) + _bytes([node.meta["val"] for node in new]),
        most_traffic=most,
        transfers=_transfers(calls),
    )


def _transfers(calls: Iterable[Any]) -> dict[str, int]:
    """Returns the bytes of the whole tensors of collectives, by operator: the result of a gather, or what is summed."""
    found: dict[str, int] = {}
    for node in calls:
        if getattr(node.target, "namespace", None) == COLLECTIVES and not is_wait(node.target):
            name = operator_name(node.target)
            values = [each.meta.get("val") for each in (node, *node.all_input_nodes)]
            found[name] = found.get(name, 0) + max(map(_bytes, values))
    return found


def _flops(graph: GraphModule, fakes: list[FakeTensor]) -> dict[str, int]:
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    # torch's table lacks attention on a CPU.
    attention, backward = attention_on_cpu()
    on_cpu = {
        attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
    }
    with fakes[0].fake_mode, FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        graph(*fakes)
    found = counter.get_flop_counts().get("Global", {})
    return {str(packet).removeprefix("aten."): int(count) for packet, count in found.items()}


def _bytes(values: object) -> int:
    """Returns the bytes of memory in all tensors. Expanded dimensions take none."""
    if isinstance(values, Tensor):
        return min(values.nbytes, values.untyped_storage().nbytes())
    return sum(map(_bytes, values)) if isinstance(values, Iterable) else 0


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
        self, func: Operator, types: object, args: tuple[object, ...] = (), kwargs: Mapping[str, object] | None = None
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
