"""Finds updates of parameters that are the same operations on other tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from fxtrain._torch_internals.dispatch import is_last_write
from fxtrain._torch_internals.memory import storage_id
from fxtrain.compiler.passes._nodes import is_pointwise, numel
from fxtrain.compiler.passes._operands import is_taken_again, operands, structure
from fxtrain.compiler.passes._operators import once
from fxtrain.compiler.passes._repeats import runs
from fxtrain.core._graph_marks import pass_of

_MIN_ELEMENTS = 8
_LAYOUT_ONLY = {"_to_copy", "clone", "expand"}


def repeated_updates(graph: Graph, min_elements: int) -> list[list[list[Node]]]:
    """Returns the same elementwise operations on other tensors that compute only new values of a state.

    Args:
        graph: A graph that writes its inputs only by copies, after all other operations.
        min_elements: How many elements one instance updates at least, so that the call of it costs little.

    Returns:
        Lists of instances. An instance is the list of its operations, in the same order as in the other instances.
        Only the graph's output reads their results.
    """
    updates = _updates(graph)
    kinds = dict[Hashable, int]()
    sequence = [kinds.setdefault(structure(nodes), len(kinds)) for nodes in updates]
    elements = [sum(map(numel, filter(_is_final, nodes))) for nodes in updates]
    found: list[list[list[Node]]] = []
    for run in runs(sequence, [len(nodes) for nodes in updates], elements, min_elements):
        bounds = range(run.start, run.start + run.period * run.repeats + 1, run.period)
        parts = [list(itertools.chain(*updates[start:stop])) for start, stop in itertools.pairwise(bounds)]
        found.append([sorted(nodes, key=is_last_write) for nodes in parts])
    return found


def keep_small_inputs(graph: Graph) -> None:
    """Makes all that reads a small input, such as a flag, independent of when the input is overwritten.

    Args:
        graph: A graph that writes its inputs only by copies, after all other operations. It is modified in place.
    """
    for write in list(filter(is_last_write, graph.nodes)):
        old: Any = write.args[0]
        readers = [reader for reader in old.users if not is_last_write(reader) and reader.target != once()]
        if readers and _is_small(old):
            with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
                kept = graph.call_function(once(), (old,))
            kept.meta.update(old.meta)
            for reader in readers:
                reader.replace_input_with(old, kept)


def _is_small(node: Node) -> bool:
    return numel(node) < _MIN_ELEMENTS


def _updates(graph: Graph) -> list[list[Node]]:
    """Returns the operations of each update, in the order in which they can be done.

    What shares an operation is one update.
    """
    leaders: dict[Node, Node] = {}

    def leader(node: Node) -> Node:
        while leaders[node] is not node:
            leaders[node] = node = leaders[leaders[node]]
        return node

    for node in reversed(graph.nodes):
        readers = [reader for reader in node.users if reader.op != "output"]
        if is_last_write(node):
            leaders[node] = node
        # Sums of a parameter's gradients are part of the backward pass.
        elif (
            node.users
            and pass_of(node) is None
            and _is_elementwise(node)
            and all(reader in leaders and numel(reader) == numel(node) for reader in readers)
        ):
            leaders[node] = node
            for reader in readers:
                leaders[leader(reader)] = node
    # An update that reads what another one overwrites must be done in one call with it.
    written = {storage_id(_value(node.args[0])): node for node in leaders if is_last_write(node)}
    for node in list(leaders):
        for operand in operands(node, leaders):
            if isinstance(operand, Node) and operand.op == "placeholder" and not _is_small(operand):
                other = written.get(storage_id(_value(operand)), node)
                leaders[leader(other)] = leader(node)
    updates: dict[Node, list[Node]] = {leader(node): [] for node in graph.nodes if node in leaders and _is_final(node)}
    taken = set[Node]()
    for node in graph.nodes:
        if node in leaders:
            # Views of what others compute may be among their operations, and are taken again where they are read.
            if is_taken_again(node) and all(other in taken or other not in leaders for other in node.all_input_nodes):
                taken.add(node)
            else:
                updates[leader(node)].append(node)
    # Copies of what others compute are left to them. Small values take longer to call than to compute.
    found = (nodes for nodes in updates.values() if nodes)
    found = (nodes for nodes in found if all(_computed(node) in leaders and not _is_small(node) for node in nodes))
    found = (nodes for nodes in found if not _is_done_by_others(nodes))
    return sorted(found, key=_readiness(graph))


def _is_done_by_others(nodes: list[Node]) -> bool:
    """Whether an update is one operation on elementwise results of others, such as a choice between old and new values.

    The kernel that computes these writes the update as well, where a call of its own would read them from memory.
    """
    computed = set(map(_computed, filter(_is_final, nodes)))
    if not all(node in computed for node in nodes if not is_last_write(node)):
        return False
    read = (operand for node in computed for operand in operands(node, computed))
    return any(isinstance(operand, Node) and is_pointwise(operand.target, _LAYOUT_ONLY) for operand in read)


def _readiness(graph: Graph) -> Callable[[list[Node]], int]:
    """Returns a function that returns the last operation of a graph that computes a gradient of an update.

    In this order, the updates that are done by one call wait for one another the least.
    """
    position = {node: index for index, node in enumerate(graph.nodes)}

    def last_gradient(nodes: list[Node]) -> int:
        local = set(nodes)
        read = (operand for node in nodes for operand in operands(node, local))
        # Small values, such as bias corrections, are computed early.
        return max((position[each] for each in read if isinstance(each, Node) and not _is_small(each)), default=0)

    return last_gradient


def _is_final(node: Node) -> bool:
    return is_last_write(node) or any(reader.op == "output" for reader in node.users)


def _is_elementwise(node: Node) -> bool:
    return is_pointwise(node.target, _LAYOUT_ONLY) or is_taken_again(node)


def _computed(node: Node) -> Any:
    """Returns what a write writes, or a node itself."""
    return node.args[1] if is_last_write(node) else node


def _value(node: Any) -> Tensor:
    return node.meta["val"]
