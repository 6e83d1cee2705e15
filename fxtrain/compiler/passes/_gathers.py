"""Gathers sharded parameters just before a pass uses them, and again for the backward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Graph

from fxtrain._torch_internals.dispatch import Operator, is_view, operator_name
from fxtrain.compiler.passes._nodes import is_pointwise
from fxtrain.compiler.passes._operators import after, once
from fxtrain.compiler.passes._transfer_buckets import (
    Reshard,
    before,
    bucket_bytes,
    following,
    in_buckets,
    kind_of,
    start_together,
    wait_of,
)
from fxtrain.core._graph_marks import Pass, pass_of

_COPIES = ("_to_copy", "clone")


@dataclasses.dataclass
class _Parameter:
    """A gathered parameter.

    Args:
        start: The collective of the trace.
        head: What the trace computes of this rank's part before the collective.
        whole: The wait, and all values that are views, casts and copies of the whole parameter, in order.
    """

    start: Any
    head: list[Any]
    whole: list[Any]

    @property
    def part(self) -> Any:
        """The part of this rank."""
        return (self.head[0] if self.head else self.start).all_input_nodes[0]

    @property
    def nbytes(self) -> int:
        """The bytes of the whole parameter."""
        return self.start.meta["val"].nbytes


@dataclasses.dataclass
class _Use:
    """The uses of a parameter in one part of the step, at whose end it is freed.

    Args:
        parameter: The parameter.
        key: The part of the step.
        first: Position of the first use.
        edges: Pairs of a node and its input, which is one of ``parameter.whole``.
    """

    parameter: _Parameter
    key: object
    first: int
    edges: list[tuple[Any, Any]]


def place_gathers(graph: Graph, starts: Sequence[Any], reshard: Reshard) -> None:
    """Gathers parameters in buckets where they are used. Each transfer starts where the bucket before it is used.

    Args:
        graph: The graph, modified in place.
        starts: The all-gathers of one call in the trace, each of one parameter, in order.
        reshard: As in ``compile``.
    """
    nodes: list[Any] = list(graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    parameters = [_Parameter(start, before(start, order), _whole(start, order)) for start in starts]
    uses = [use for each in parameters for use in _uses(each, order, reshard)]
    uses.sort(key=lambda use: use.first)
    limit = bucket_bytes((each.nbytes for each in parameters), reshard)
    buckets = in_buckets(
        _joined(uses), limit, lambda use: use.parameter.nbytes, lambda use: (use.key, kind_of(use.parameter.start))
    )
    for index, bucket in enumerate(buckets):
        begin = buckets[max(index - 1, 0)][0].first
        if reshard == "off":
            begin = order[bucket[-1].parameter.start]
        # The parts of a later step are computed by the one before it.
        begin = max(begin, *(order[use.parameter.part] + 1 for use in bucket))
        _emit(graph, bucket, nodes[begin], nodes[bucket[0].first], _token(nodes, begin))
    for each in parameters:
        for node in reversed([*each.head, each.start, *each.whole]):
            graph.erase_node(node)


def _whole(start: Any, order: Mapping[Any, int]) -> list[Any]:
    """Returns the wait for a parameter, and all views, casts and copies of the whole parameter, in order."""
    found = dict.fromkeys(following(start, order))
    todo = list(found)
    while todo:
        for user in todo.pop().users:
            if user not in found and _is_copy(user) and all(other in found for other in user.all_input_nodes):
                found[user] = None
                todo.append(user)
    return sorted(found, key=order.__getitem__)


def _is_copy(node: Any) -> bool:
    if node.op != "call_function" or not isinstance(node.target, Operator):
        return False
    return is_view(node.target) or operator_name(node.target) in _COPIES or node.target == once()


def _uses(parameter: _Parameter, order: Mapping[Any, int], reshard: Reshard) -> list[_Use]:
    found: dict[object, _Use] = {}
    inside = set(parameter.whole)
    edges = [(user, node) for node in parameter.whole for user in node.users if user not in inside]
    for user, node in sorted(edges, key=lambda edge: order[edge[0]]):
        key = _part_of_step(user, reshard)
        first = order[wait_of(parameter.start)] if reshard == "off" else order[user]
        found.setdefault(key, _Use(parameter, key, first, [])).edges.append((user, node))
    return list(found.values())


def _part_of_step(node: Any, reshard: Reshard) -> object:
    found = None if reshard == "off" else pass_of(node)
    return found.derivative if found is not None and reshard == "after_backward" else found


def _joined(uses: Sequence[_Use]) -> list[_Use]:
    """Returns the uses in order. The parameter that a forward pass uses last is kept for its backward pass."""
    last: dict[object, _Use] = {}
    for use in uses:
        if isinstance(use.key, Pass) and not use.key.is_backward:
            last[use.key.derivative] = use
    found: list[_Use] = []
    for use in uses:
        kept = last.get(use.key.derivative) if isinstance(use.key, Pass) else None
        if kept is not None and kept is not use and kept.parameter is use.parameter:
            kept.edges += use.edges
        else:
            found.append(use)
    return found


def _token(nodes: Sequence[Any], position: int) -> Any:
    """Returns the last value of a pass before a position that compilers keep in memory, or None."""
    for node in reversed(nodes[:position]):
        value = node.meta.get("val")
        if pass_of(node) is None or not isinstance(value, Tensor) or not isinstance(node.target, Operator):
            continue
        if value.numel() and not _is_copy(node) and not is_pointwise(node.target, ()):
            return node
    return None


def _emit(graph: Graph, bucket: Sequence[_Use], begin: Any, first: Any, token: Any) -> None:
    """Inserts the transfer of a bucket before one node and its end before another."""
    inputs: list[Any] = []
    with graph.inserting_before(begin):
        for use in bucket:
            copies = {}
            part = use.parameter.part
            if token is not None:
                # Otherwise, the compiler could start all transfers at the beginning of the step.
                copies[part] = graph.call_function(after(), (part, token))
                copies[part].meta["val"] = part.meta["val"]
            for node in use.parameter.head:
                copies[node] = _copied(graph, node, copies)
            (sent,) = use.parameter.start.all_input_nodes
            inputs.append(copies.get(sent, sent))
        results = start_together(graph, [use.parameter.start for use in bucket], inputs)
    for use, result in zip(bucket, results, strict=True):
        wait, *_ = use.parameter.whole
        with graph.inserting_before(first):
            copies = {wait: _copied(graph, wait, {use.parameter.start: result})}
        for user, node in use.edges:
            with graph.inserting_before(user):
                for each in _missing(node, copies):
                    copies[each] = _copied(graph, each, copies)
            user.replace_input_with(node, copies[node])


def _copied(graph: Graph, node: Any, copies: Mapping[Any, Any]) -> Any:
    return graph.node_copy(node, lambda other: copies.get(other, other))


def _missing(node: Any, copies: Mapping[Any, Any]) -> list[Any]:
    """Returns the values to copy for one, in order."""
    found: list[Any] = []
    while node not in copies:
        found.append(node)
        (node,) = node.all_input_nodes
    return found[::-1]
