"""Graphs as programs: several smaller graphs that are called in turn, some of them more than once.

The time of Inductor grows with the number of operations that it compiles. Where a graph repeats the same operations on
other tensors, as in the layers of a model and in the updates of its parameters, a program compiles them once.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fxtrain._torch_internals.dispatch import is_last_write
from fxtrain.compiler.passes._operands import element_of
from fxtrain.compiler.passes._sent_values import is_sent_kept
from fxtrain.compiler.passes._units import Repeat, Slice, Unit, Value, by_template, node_of, units_of


class Call(NamedTuple):
    """One call of a graph of a program. Slots hold the inputs of the program, followed by the results of its calls.

    Args:
        graph: The index of the graph.
        reads: The slots of its inputs.
        frees: The slots that no later call reads, without those of the program's inputs and outputs.
    """

    graph: int
    reads: Sequence[int]
    frees: Sequence[int]


class Program(NamedTuple):
    """Graphs, and the calls of them that together compute one graph.

    Args:
        graphs: The graphs.
        calls: The calls, in order.
        outputs: The slots of the outputs.
    """

    graphs: list[GraphModule]
    calls: list[Call]
    outputs: Sequence[int]


def program_of(graph: GraphModule, layers: Sequence[Repeat], updates: Sequence[Repeat]) -> Program | None:
    """Returns a program that computes the same as a graph.

    None if a part would exchange anything but tensors, or if what a transfer sends could be freed before it ends.

    Args:
        graph: A graph after ``keep_sent``, that writes its inputs only by copies, after all other operations.
        layers: Repeated parts, of which each instance is a range of the graph.
        updates: Repeated updates as from ``repeated_updates``.
    """
    nodes = list(graph.graph.nodes)
    returned: Any = graph.graph.output_node().args[0]
    units = units_of(nodes, layers, updates)
    results = _results(units, returned)
    if results is None or not all(map(is_sent_kept, nodes)):
        return None
    # Some parts are only views and constants, which others take by themselves.
    idle = [not some and not any(map(is_last_write, unit.nodes)) for unit, some in zip(units, results, strict=True)]
    units = [unit for unit, is_idle in zip(units, idle, strict=True) if not is_idle]
    results = [some for some, is_idle in zip(results, idle, strict=True) if not is_idle]
    if not all(unit.reads for unit in units):
        return None
    inputs = [node for node in nodes if node.op == "placeholder"]
    slots: dict[Value, int] = {node: index for index, node in enumerate(inputs)}
    for values in results:
        slots |= zip(values, itertools.count(len(slots)), strict=False)
    outputs = [slots[node] for node in returned]
    reads = [[slots[value] for value in unit.reads] for unit in units]
    ready = itertools.accumulate(map(len, results), initial=len(inputs))
    assert all(max(some) < count for some, count in zip(reads, ready, strict=False)), "a call reads later results"
    # A result that only other instances of a part are asked for is freed after the call.
    last = {slots[value]: index + 1 for index, values in enumerate(results) for value in values}
    last |= {slot: index for index, some in enumerate(reads) for slot in some if slot >= len(inputs)}
    frees: list[list[int]] = [[] for _ in range(len(units) + 1)]
    for slot in last.keys() - set(outputs):
        frees[last[slot]].append(slot)
    templates = {unit.template: (unit, some) for unit, some in zip(units, results, strict=True)}
    number = {template: index for index, template in enumerate(templates)}
    calls = [Call(number[unit.template], *slots) for unit, *slots in zip(units, reads, frees, strict=False)]
    return Program([_graph(unit, some) for unit, some in templates.values()], calls, outputs)


def _results(units: Sequence[Unit], returned: Sequence[object]) -> list[list[Value]] | None:
    """Returns what each unit has to return, in the same order for units that share a graph."""
    home = {node: index for index, unit in enumerate(units) for node in unit.nodes}
    results: list[list[Value]] = [[] for _ in units]
    for value in dict.fromkeys(itertools.chain(returned, *(unit.reads for unit in units))):
        if not isinstance(value, Node | Slice) or not isinstance(node_of(value).meta.get("val"), Tensor):
            return None
        if node_of(value) in home:
            results[home[node_of(value)]].append(value)
    for group in by_template(units).values():
        if len(group) == 1:
            continue
        if any(isinstance(value, Slice) for index in group for value in results[index]):
            return None
        wanted = {units[index].nodes.index(value) for index in group for value in results[index]}
        for index in group:
            results[index] = [units[index].nodes[place] for place in sorted(wanted)]
    return results


def _graph(unit: Unit, results: Sequence[Value]) -> GraphModule:
    """Returns the graph of a unit."""
    graph, copies = Graph(), dict[Any, Node]()

    def added(node: Node, value: Any) -> Node:
        node.meta["val"] = value
        return node

    for index, read in enumerate(unit.reads):
        copies[read] = added(graph.placeholder(f"input_{index}"), _fake(read))
    for read in unit.reads:
        if isinstance(read, Slice):
            scalars = list(copies[read].meta["val"].unbind())
            split = added(graph.call_function(torch.ops.aten.unbind.int, (copies[read],)), scalars)
            for index, scalar in enumerate(scalars):
                picked = graph.call_function(operator.getitem, (split, index))
                copies[read.vector, read.start + index] = added(picked, scalar)

    def copied(node: Node) -> Node:
        element = element_of(node) if node not in copies else None
        if element is not None and (element.tensor, element.index) in copies:
            return copies[element.tensor, element.index]
        if node not in copies:
            copies[node] = graph.node_copy(node, copied)
        return copies[node]

    for node in unit.nodes:
        copied(node)
    returned: list[Node] = []
    for value in results:
        node = copied(node_of(value))
        if isinstance(value, Slice):
            part = graph.call_function(torch.ops.aten.slice.Tensor, (node, 0, value.start, value.stop))
            node = added(part, _fake(value))
        returned.append(node)
    graph.output(returned)
    graph.eliminate_dead_code()
    return GraphModule(torch.nn.Module(), graph)


def _fake(value: Value) -> Tensor:
    fake = node_of(value).meta["val"]
    return fake[value.start : value.stop] if isinstance(value, Slice) else fake
