"""Scatters the gradients of sharded parameters as soon as they are complete, which frees whole gradients early."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph

from fxtrain._torch_internals.collectives import is_exchange
from fxtrain._torch_internals.dispatch import Operator, is_in_place
from fxtrain.compiler.passes._exchanges import exchange_together
from fxtrain.compiler.passes._transfer_buckets import (
    Reshard,
    bucket_bytes,
    following,
    in_buckets,
    kind_of,
    start_together,
)
from fxtrain.core._graph_marks import pass_of


def place_scatters(graph: Graph, starts: Sequence[Any], reshard: Reshard) -> None:
    """Scatters gradients in buckets. Each transfer is waited for when the next one has started.

    Args:
        graph: The graph, modified in place.
        starts: The collectives of one call in the trace, each of one gradient, in order: reduce-scatters or exchanges.
        reshard: As in ``compile``.
    """
    nodes: list[Any] = list(graph.nodes)
    order = {node: index for index, node in enumerate(nodes)}
    place = order if reshard == "off" else _complete(nodes, order)
    limit = bucket_bytes(map(_nbytes, starts), reshard)
    end = max(graph.find_nodes(op="placeholder"), key=order.__getitem__)
    reached, moved, started = order[end], set[Any](), list[Any]()
    for bucket in in_buckets(sorted(starts, key=place.__getitem__), limit, _nbytes, kind_of):
        position = max(place[start] for start in bucket)
        first, results = _started(graph, bucket, order)
        if reshard == "off":
            continue
        if position > reached:
            end, reached = nodes[position], position
        needed = [node for node in _ancestors(results, order) if order[node] > reached and node not in moved]
        moved.update(needed)
        end = _move(dict.fromkeys((*needed, *first, *results)), end)
        end = _finish(started, end, order)
        started = results
    _finish(started, end, order)


def _started(graph: Graph, bucket: Sequence[Any], order: dict[Any, int]) -> tuple[list[Any], list[Any]]:
    """Replaces collectives by one transfer. Returns its new nodes, and their results."""
    if is_exchange(bucket[0].target):
        return exchange_together(graph, bucket, order)
    with graph.inserting_before(bucket[-1]):
        results = start_together(graph, bucket, [start.args[0] for start in bucket])
    for start, result in zip(bucket, results, strict=True):
        start.replace_all_uses_with(result)
        graph.erase_node(start)
    return [result.args[0] for result in results if result.target is operator.getitem], results


def _finish(results: Sequence[Any], end: Any, order: Mapping[Any, int]) -> Any:
    """Moves the waits for collectives, and what the trace makes of their results, behind a node. Returns the last."""
    for result in results:
        end = _move(following(result, order), end)
    return end


def _move(nodes: Iterable[Any], end: Any) -> Any:
    """Moves nodes behind a node, in order. Returns the last one."""
    for node in nodes:
        end.append(node)
        end = node
    return end


def _nbytes(start: Any) -> int:
    return start.args[0].meta["val"].nbytes


def _complete(nodes: Sequence[Any], order: Mapping[Any, int]) -> dict[Any, int]:
    """Returns the position of the last value of a pass, or other value that cannot be moved, that each needs."""
    found: dict[Any, int] = {}
    for node in nodes:
        is_fixed = pass_of(node) is not None or not _is_movable(node)
        found[node] = order[node] if is_fixed else max((found[other] for other in node.all_input_nodes), default=0)
    return found


def _is_movable(node: Any) -> bool:
    if node.op == "get_attr" or node.target is operator.getitem:
        return True
    if not isinstance(node.target, Operator) or is_in_place(node.target):
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags


def _ancestors(results: Sequence[Any], order: Mapping[Any, int]) -> list[Any]:
    """Returns all that results depend on, in order, without nodes that are not in ``order``."""
    found, todo = dict[Any, None](), list(results)
    while todo:
        for node in todo.pop().all_input_nodes:
            if node not in found:
                found[node] = None
                todo.append(node)
    return sorted((node for node in found if node in order), key=order.__getitem__)
