"""Counts the operations, the FLOPs and the memory traffic of a traced step, without running it."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.dispatch import attention_on_cpu, is_view
from fxtrain._torch_internals.tracing import make_fx, new_fake_mode
from fxtrain.compiler.lowering._compile_thread import compiler_lock
from fxtrain.compiler.lowering._function_modes import KnownLiterals, OpaqueCTC
from fxtrain.compiler.lowering._side_effects import detecting_side_effects
from fxtrain.core import Batch, TrainState, compiling
from fxtrain.step import EvalFunction, Step

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from fxtrain._torch_internals.tracing import FakeTensor


class Counts(NamedTuple):
    """The counts of a graph. ``Explanation`` describes the fields."""

    operations: int
    flops: dict[str, int]
    least_traffic: int
    most_traffic: int


def trace(step: Step | EvalFunction, state: TrainState, batch: Batch) -> GraphModule:
    """Traces the step with fake tensors and returns its graph.

    Raises:
        Exception: The step reads a value, or does something else that cannot be traced.
    """
    leaves, state_structure = tree.flatten(state)
    inputs, batch_structure = tree.flatten(batch)
    count = len(leaves)

    def flat(*tensors: Tensor) -> list[Tensor]:
        result = step(
            tree.unflatten(state_structure, tensors[:count]), tree.unflatten(batch_structure, tensors[count:])
        )
        return tree.leaves(result)

    # Without symbols for unknown values, a read raises at its line, and not later in the compiler.
    mode = new_fake_mode()
    fakes = [mode.from_tensor(leaf) for leaf in (*leaves, *inputs)]
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
    )


def _flops(graph: GraphModule, fakes: list[FakeTensor]) -> dict[str, int]:
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    # torch's table lacks attention on a CPU.
    attention, backward = attention_on_cpu()
    on_cpu = {
        attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
    }
    mode = next(fake.fake_mode for fake in fakes)
    with mode, FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        graph(*fakes)
    found = counter.get_flop_counts().get("Global", {})
    return {str(packet).removeprefix("aten."): int(count) for packet, count in found.items()}


def _bytes(values: object) -> int:
    """Returns the bytes of memory in all tensors. Expanded dimensions take none."""
    if isinstance(values, Tensor):
        return min(values.nbytes, values.untyped_storage().nbytes())
    return sum(map(_bytes, values)) if isinstance(values, Iterable) else 0
