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
from fxtrain.compiler.passes._nodes import numel
from fxtrain.compiler.passes._operators import sendable
from fxtrain.compiler.passes._programs import Program, program_of
from fxtrain.compiler.passes._repeated_layers import repeated_layers
from fxtrain.compiler.passes._repeated_updates import keep_small_inputs, repeated_updates
from fxtrain.compiler.passes._repeats import MAX_CALLS
from fxtrain.compiler.passes._sent_values import keep_sent
from fxtrain.compiler.passes._units import Repeat, node_of, units_of

# A call takes about as long as the smallest kernels, which work on this many elements. In a graph that computes very
# many more, parts may be of any size.
_MIN_ELEMENTS, _ANY_SIZE_FACTOR = 2**15, 100 * MAX_CALLS
# How much more memory a program may take at its peak: relative to the whole graph and its inputs, and in bytes that do
# not matter.
_MAX_MORE, _FREE_BYTES = 0.05, 2**20


def split(graph: GraphModule) -> Program | None:
    """Returns a program that computes the same as a graph and takes less time to compile, if there is one.

    It takes at most a little more memory.

    Args:
        graph: A graph from ``make_fx``. Operations may be added that keep what transfers send, and the old values of
            small inputs.
    """
    if not _is_simple(graph):
        return None
    keep_sent(graph.graph)
    is_any_size = sum(map(numel, graph.graph.nodes)) > _ANY_SIZE_FACTOR * _MIN_ELEMENTS
    min_elements = 1 if is_any_size else _MIN_ELEMENTS
    updates = repeated_updates(graph.graph, min_elements)
    layers = repeated_layers(graph.graph, {node for nodes in _instances(updates) for node in nodes}, min_elements)
    timeline = Timeline(graph.graph, has_transfers=True)
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
    """Whether a graph has neither constants nor random numbers, and writes only its inputs, after everything else."""
    operations = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
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
    """Estimates the peak of a program, whose units keep their results until the end of a unit."""
    units = units_of(timeline.nodes, layers, updates)
    of_updates = {id(nodes) for nodes in _instances(updates)}
    ready, ends, end = dict[Node, int](), dict[int, int](), 0
    for unit in units:
        is_update = id(unit.nodes) in of_updates
        if not is_update:
            places = [timeline.order[node] for node in unit.nodes]
            end = max((place for place in places if timeline.is_counted[place]), default=end)
        ready |= dict.fromkeys(unit.nodes, end)
        for node in map(node_of, unit.reads):
            if node.op != "placeholder" and isinstance(node.meta["val"], Tensor):
                # What was sent is read by no kernel, and so lives as long as the unit that waits.
                is_read_last = is_update or node.target == sendable()
                place = timeline.order[node]
                ends[place] = max(ends.get(place, 0), end if is_read_last else ready[node])
    return timeline.peak(kept=ends.keys(), ends=ends).nbytes
