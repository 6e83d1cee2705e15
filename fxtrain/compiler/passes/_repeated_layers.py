"""Finds parts of forward and backward passes that are the same operations on other tensors, such as layers."""

from __future__ import annotations

import itertools
from collections.abc import Container, Hashable, Sequence

from torch import Tensor
from torch.fx import Graph, Node

from fxtrain._torch_internals.dispatch import is_last_write
from fxtrain.compiler.passes._nodes import numel
from fxtrain.compiler.passes._operands import Element, operands, structure
from fxtrain.compiler.passes._repeats import Run, runs
from fxtrain.core._graph_marks import pass_of

_MAX_TRIED = 8


def repeated_layers(graph: Graph, others: Container[Node], min_elements: int) -> list[list[list[Node]]]:
    """Returns ranges of forward and backward passes that are the same operations on other tensors.

    Args:
        graph: A graph that writes its inputs only by copies, after all other operations. It may have one pass only,
            without marks.
        others: Operations to leave out.
        min_elements: How many elements one instance computes at least, so that the call of it costs little.

    Returns:
        Lists of instances. An instance is the list of its operations, in the same order as in the other instances.
    """
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    inside = _inside(nodes)
    kinds = dict[Hashable, int]()
    sequence = [
        kinds.setdefault(node if node in others or index not in inside else structure([node]), len(kinds))
        for index, node in enumerate(nodes)
    ]
    living = _living(nodes)
    found: list[list[list[Node]]] = []
    for run in runs(sequence, [1] * len(nodes), list(map(numel, nodes)), min_elements):
        # Parts that are cut where few values live exchange the fewest.
        starts = range(run.start, run.start + min(run.slack, run.period - 1) + 1)
        for start in sorted(starts, key=lambda start: sum(living[at] for at in _cuts(run, start)))[:_MAX_TRIED]:
            instances = [list(nodes[a:b]) for a, b in itertools.pairwise(_cuts(run, start))]
            if len({structure(instance) for instance in instances}) == 1 and all(map(_reads_tensors, instances)):
                found.append(instances)
                break
    return found


def _inside(nodes: Sequence[Node]) -> range:
    """Returns the places of forward and backward passes and of the transfers during them, which have no marks."""
    marked = [index for index, node in enumerate(nodes) if pass_of(node)]
    if marked:
        return range(marked[0], marked[-1] + 1)
    return range(0) if any(map(is_last_write, nodes)) else range(len(nodes))


def _cuts(run: Run, start: int) -> range:
    return range(start, start + run.period * run.repeats + 1, run.period)


def _living(nodes: Sequence[Node]) -> list[int]:
    """Returns for each operation how many results of earlier ones it or a later one reads, and one more for the end."""
    position = {node: index for index, node in enumerate(nodes)}
    changes = [0] * (len(nodes) + 2)
    for index, node in enumerate(nodes):
        last = max((position[user] for user in node.users if user in position), default=index)
        changes[index + 1] += 1
        changes[last + 1] -= 1
    return list(itertools.accumulate(changes))


def _reads_tensors(nodes: Sequence[Node]) -> bool:
    """Whether operations read only tensors from others, and no lists of them."""
    local = set(nodes)
    read = (operand for node in nodes for operand in operands(node, local))
    return all(isinstance(each, Element) or isinstance(each.meta.get("val"), Tensor) for each in read)
