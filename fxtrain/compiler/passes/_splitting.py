"""Decides which repeated parts of a graph are compiled once."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxtrain._torch_internals.dispatch import Operator, argument_of, hides_writes, is_in_place, is_last_write
from fxtrain._torch_internals.memory import storage_id
from fxtrain.compiler.passes._liveness import Timeline
from fxtrain.compiler.passes._programs import Program, program_of
from fxtrain.compiler.passes._repeated_layers import repeated_layers
from fxtrain.compiler.passes._repeated_updates import keep_small_inputs, repeated_updates
from fxtrain.compiler.passes._units import Repeat, node_of, units_of
from fxtrain.core._graph_marks import transfers_of

# A call takes about as long as the smallest kernels, which work on this many elements.
_MIN_ELEMENTS = 2**15
# How much more memory a program may take at its peak: relative to the whole graph and its inputs, and in bytes that do
# not matter.
_MAX_MORE, _FREE_BYTES = 0.05, 2**20


def split(graph: GraphModule) -> Program | None:
    """Returns a program that computes the same as a graph and takes less time to compile, if there is one.

    It takes at most a little more memory.

    Args:
        graph: A graph from ``make_fx``. Operations may be added that keep the old values of small inputs.
    """
    if not _is_simple(graph):
        return None
    updates = repeated_updates(graph.graph, _MIN_ELEMENTS)
    layers = repeated_layers(graph.graph, {node for nodes in _instances(updates) for node in nodes}, _MIN_ELEMENTS)
    timeline = Timeline(graph.graph)
    whole = timeline.peak().nbytes
    limit = whole + _MAX_MORE * (whole + _input_bytes(graph)) + _FREE_BYTES
    choices: list[tuple[list[Repeat], list[Repeat]]] = [([*layers], [*updates]), ([*layers], []), ([], [*updates])]
    for some_layers, some_updates in choices:
        if (some_layers or some_updates) and _peak(timeline, some_layers, some_updates) <= limit:
            keep_small_inputs(graph.graph)
            return program_of(graph, some_layers, some_updates)
    return None


def _input_bytes(graph: GraphModule) -> int:
    values = (node.meta.get("val") for node in graph.graph.find_nodes(op="placeholder"))
    return sum({storage_id(value): value.nbytes for value in values if isinstance(value, Tensor)}.values())


def _is_simple(graph: GraphModule) -> bool:
    """Whether a graph has neither constants nor random numbers, and writes only its inputs, after everything else.

    Sharded steps are left out, because estimates of memory do not count what they transfer.
    """
    operations = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
    if any(map(transfers_of, operations)):
        return False
    before = itertools.dropwhile(is_last_write, reversed(operations))
    return all(node.target is operator.getitem or _is_pure(node) for node in before)


def _is_pure(node: Node) -> bool:
    if not isinstance(node.target, Operator) or is_in_place(node.target) or hides_writes(node.target):
        return False
    # Attention is tagged as random even without dropout.
    is_random = torch.Tag.nondeterministic_seeded in node.target.tags
    return not is_random or argument_of(node.target, node.args, node.kwargs, "dropout_p") == 0


def _instances(repeats: Iterable[Repeat]) -> Iterable[Sequence[Node]]:
    return itertools.chain.from_iterable(repeats)


def _peak(timeline: Timeline, layers: Sequence[Repeat], updates: Sequence[Repeat]) -> int:
    """Estimates the peak of a program, whose units keep what they exchange until the end of a unit."""
    units = units_of(timeline.nodes, layers, updates)
    of_updates = {id(nodes) for nodes in _instances(updates)}
    kept, ends, end = set[int](), dict[int, int](), 0
    for unit in units:
        places = [timeline.order[node] for node in unit.nodes]
        if id(unit.nodes) not in of_updates:
            end = max((place for place in places if timeline.passes[place] is not None), default=end)
        for value in unit.reads:
            node = node_of(value)
            if node.op != "placeholder" and isinstance(node.meta["val"], Tensor):
                kept.add(timeline.order[node])
                ends[timeline.order[node]] = end
    return timeline.peak(kept=kept, ends=ends).nbytes
