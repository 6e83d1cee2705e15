"""Estimates which values of a graph are in memory at which operation, before and after a recomputation."""

from __future__ import annotations

import functools
import operator
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph

from fxtrain._torch_internals.dispatch import Operator, is_view, operator_name
from fxtrain.compiler.passes._nodes import is_pointwise
from fxtrain.core._graph_marks import Pass, pass_of, transfers_of

_REDUCTIONS = {
    "sum",
    "mean",
    "var_mean",
    "var",
    "amax",
    "amin",
    "max",
    "min",
    "argmax",
    "native_layer_norm",
    "any",
    "all",
}
_ELEMENTWISE = {
    "_to_copy",
    "clone",
    "expand",
    "permute",
    "squeeze",
    "transpose",
    "unsqueeze",
    "_unsafe_view",
    "full",
    "_softmax",
    "_softmax_backward_data",
    "_log_softmax",
    "_log_softmax_backward_data",
    "nll_loss_backward",
}
"""Operators whose result Inductor computes element by element, from their inputs and from sums of a few elements."""


class Peak(NamedTuple):
    """The largest total of the values that live at one time.

    Args:
        nbytes: Their bytes.
        index: The operation at which they live, as an index of the timeline.
        live: The values, as nodes of the graph.
    """

    nbytes: int
    index: int
    live: list[Any]


class Timeline:
    """The operations of a graph, with the values of its passes as they would be if some were recomputed.

    Elementwise operations count as fused with their readers, as Inductor compiles them: they take no memory, and their
    inputs live until the reader. Inputs of the graph are left out. So are gradients of parameters after the last
    operation of the backward pass that reads them, because compilers order the updates.

    Args:
        graph: A graph from ``make_fx``.
        has_transfers: Whether transfers are where they start and end, so that their values count.
    """

    def __init__(self, graph: Graph, *, has_transfers: bool = False) -> None:
        self.nodes: list[Any] = list(graph.nodes)
        self.order: dict[Any, int] = {node: index for index, node in enumerate(self.nodes)}
        self.inputs: list[list[int]] = [[self.order[other] for other in node.all_input_nodes] for node in self.nodes]
        self.passes: list[Pass | None] = [pass_of(node) for node in self.nodes]
        self.is_counted = [
            pass_of(node) is not None or (has_transfers and transfers_of(node) is not None) for node in self.nodes
        ]
        self.is_stored = [is_stored(node) for node in self.nodes]
        self.nbytes = [_nbytes(node) for node in self.nodes]

    @functools.cached_property
    def bases(self) -> Mapping[int, int]:
        """For each value, the value whose memory it shares. Cached, because a plan asks for each of its cuts."""
        found: dict[int, int] = {}
        for index, node in enumerate(self.nodes):
            shares = node.op == "call_function" and is_view(node.target) and self.inputs[index]
            found[index] = found[self.inputs[index][0]] if shares else index
        return found

    def is_forward(self, index: int) -> bool:
        """Whether an operation is part of a forward pass."""
        found = self.passes[index]
        return found is not None and not found.is_backward

    def operations(self, dropped: Container[int]) -> list[tuple[int, bool]]:
        """Returns the order of operations if these values are recomputed: indices, and whether each is a copy."""
        found: list[tuple[int, bool]] = []
        copied = set[int]()
        for index, each in enumerate(self.passes):
            if each is not None and each.is_backward:
                missing, todo = set[int](), [other for other in self.inputs[index] if other in dropped]
                while todo:
                    other = todo.pop()
                    if other not in missing and other not in copied:
                        missing.add(other)
                        todo += [part for part in self.inputs[other] if part in dropped]
                found += [(other, True) for other in sorted(missing)]
                copied |= missing
            found.append((index, False))
        return found

    def peak(
        self, dropped: Container[int] = (), kept: Container[int] = (), ends: Mapping[int, int] | None = None
    ) -> Peak:
        """Returns when the values of forward and backward passes, kept or recomputed, take most memory.

        Args:
            dropped: Values that are recomputed.
            kept: Values that are stored even if they are elementwise.
            ends: Operations until which values live at least.
        """
        operations = self.operations(dropped)
        last: dict[tuple[int, bool], int] = {}
        copied = {index for index, is_copy in operations if is_copy}
        for position in range(len(operations) - 1, -1, -1):
            index, is_copy = operations[position]
            each = self.passes[index]
            reads_copies = is_copy or (each is not None and each.is_backward)
            stored = self.is_stored[index] or (index in kept and not is_copy)
            until = position if stored else last.get((index, is_copy), position)
            for other in self.inputs[index] if self.is_counted[index] else ():
                key = other, reads_copies and other in copied
                if last.get(key, -1) < until:
                    last[key] = until
        changes = [0] * (len(operations) + 1)
        lives: list[tuple[int, int, int]] = []
        for position, (index, is_copy) in enumerate(operations):
            stored = self.is_stored[index] or (index in kept and not is_copy)
            if not stored or not self.is_counted[index]:
                continue
            end = max(last.get((index, is_copy), position), (ends or {}).get(index, 0))
            changes[position] += self.nbytes[index]
            changes[end + 1] -= self.nbytes[index]
            lives.append((position, end, index))
        best = total = at = 0
        for position, change in enumerate(changes):
            total += change
            if total > best:
                best, at = total, position
        live = [self.nodes[index] for begin, end, index in lives if begin <= at <= end]
        return Peak(best, operations[min(at, len(operations) - 1)][0], live)


def is_stored(node: Any) -> bool:
    """Whether Inductor stores a value in memory of its own."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor) or is_view(node.target):
        return False
    if not is_pointwise(node.target, _ELEMENTWISE):
        return True
    todo, seen = list(node.users), set[Any]()
    while todo:
        user = todo.pop()
        if user in seen:
            continue
        seen.add(user)
        if user.op == "call_function" and is_view(user.target):
            todo += user.users
        elif not _is_loop(user):
            return True
    return False


def _is_loop(node: Any) -> bool:
    """Whether Inductor fuses an operation with the elementwise operations before it."""
    if node.op != "call_function" or node.target is operator.getitem:
        return node.op == "call_function"
    if is_pointwise(node.target, _ELEMENTWISE):
        return True
    if node.target is torch.ops.aten.copy_.default:
        return node.args[0].op == "placeholder"
    return isinstance(node.target, Operator) and operator_name(node.target) in _REDUCTIONS


def _nbytes(node: Any) -> int:
    value = node.meta.get("val")
    return value.nbytes if isinstance(value, Tensor) else 0


def crossing(timeline: Timeline, forward: Sequence[int]) -> list[int]:
    """Returns for each operation of a forward pass how many bytes of its values later operations of it read."""
    inside, last = set(forward), dict[int, int]()
    base = timeline.bases
    for index in forward:
        for other in timeline.inputs[index]:
            if base[other] in inside:
                last[base[other]] = index
    changes: dict[int, int] = {}
    for index, end in last.items():
        # A cut between an operator of several results and the results would keep all of them.
        value = timeline.nodes[index].meta.get("val")
        results = value if isinstance(value, tuple | list) else (value,)
        nbytes = sum(part.nbytes for part in results if isinstance(part, Tensor))
        changes[index] = changes.get(index, 0) + nbytes
        changes[end] = changes.get(end, 0) - nbytes
    total, found = 0, list[int]()
    for index in forward:
        total += changes.get(index, 0)
        found.append(total)
    return found


def crossing_values(timeline: Timeline, forward: Sequence[int], cut: int) -> set[int]:
    """Returns the values up to the operation ``cut`` of a forward pass that later operations of it read."""
    inside, base = set(forward), timeline.bases
    later = (index for index in forward if index > cut)
    return {base[other] for index in later for other in timeline.inputs[index] if base[other] <= cut} & inside
