"""Buckets of collectives: several tensors that are sent as one transfer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from torch import Tensor
from torch.fx import Graph

from fxtrain._torch_internals.collectives import is_exchange, is_wait, of_many
from fxtrain.compiler.passes._repeats import runs
from fxtrain.core._graph_marks import transfers_of

T = TypeVar("T")

Reshard = Literal["after_forward", "after_backward", "off"]
"""When a step frees the whole parameters of a sharded state: ``compile`` describes the values."""

_MIN_BYTES, _MAX_BYTES, _BUCKETS = 2**20, 25 * 2**20, 12


def bucket_bytes(sizes: Iterable[int], reshard: Reshard) -> int:
    """Returns the bytes of whole tensors at which a bucket is full: about a layer, unless transfers stay in place."""
    return _MAX_BYTES if reshard == "off" else min(max(sum(sizes) // _BUCKETS, _MIN_BYTES), _MAX_BYTES)


def in_buckets(items: Iterable[T], limit: int, size: Callable[[T], int], kind: Callable[[T], object]) -> list[list[T]]:
    """Splits items in order into buckets of at most ``limit`` bytes, or one item, and of one kind.

    Where items repeat, as those of layers do, so do the buckets, so that the code of the layers stays equal.

    Example:
        >>> in_buckets([3, 1, 2, 9, 1], 4, lambda item: item, lambda item: item > 8)
        [[3, 1], [2], [9], [1]]
        >>> in_buckets([20, 40, 60, 40, 60, 40, 60, 20], 100, lambda item: item, lambda item: False)
        [[20], [40, 60], [40, 60], [40, 60], [20]]
    """
    items = list(items)
    sizes = list(map(size, items))
    starts = _starts_of_repeats(sizes, list(map(kind, items)), limit)
    found: list[list[T]] = []
    total = 0
    for index, item in enumerate(items):
        if found and index not in starts and total + sizes[index] <= limit and kind(found[-1][0]) == kind(item):
            found[-1].append(item)
        else:
            found.append([item])
            total = 0
        total += sizes[index]
    return found


def _starts_of_repeats(sizes: Sequence[int], kinds: Sequence[object], limit: int) -> set[int]:
    """Returns where parts that repeat begin, and where they end. Small ones are taken together."""
    numbers = dict[object, int]()
    sequence = [numbers.setdefault(each, len(numbers)) for each in zip(sizes, kinds, strict=True)]
    found = set[int]()
    for run in runs(sequence, sizes, sizes, limit // 2):
        found.update(range(run.start, run.start + run.period * run.repeats + 1, run.period))
    return found


def kind_of(start: Any) -> tuple[object, ...]:
    """Returns what the collectives of one bucket have in common: dtype, device, reduction and group."""
    value: Tensor = start.meta["val"]
    return value.dtype, value.device, *(start.args[3:] if is_exchange(start.target) else start.args[1:])


def wait_of(start: Any) -> Any:
    """Returns the node that waits for the end of a collective."""
    return next(user for user in start.users if is_wait(user.target))


def start_together(graph: Graph, starts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Inserts collectives like those of a bucket, as one transfer, and returns their results in order.

    Args:
        graph: The graph, whose insertion point is used.
        starts: Collectives of one kind.
        inputs: The tensor of each.
    """
    many = of_many(starts[0].target) if len(starts) > 1 else None
    if many is None:
        made = [
            graph.call_function(start.target, (given, *start.args[1:]))
            for start, given in zip(starts, inputs, strict=True)
        ]
    else:
        bucket: Any = graph.call_function(many, (list(inputs), *starts[0].args[1:]))
        bucket.meta["val"] = [start.meta["val"] for start in starts]
        made = [graph.call_function(operator.getitem, (bucket, index)) for index in range(len(starts))]
    for start, node in zip(starts, made, strict=True):
        node.meta.update(start.meta)
    return made


def before(start: Any, order: Mapping[Any, int]) -> list[Any]:
    """Returns what the trace computes for a collective from the tensor that it sends, in order."""
    return _reached(start, lambda node: node.all_input_nodes, order)


def following(start: Any, order: Mapping[Any, int]) -> list[Any]:
    """Returns the wait for a collective, and what the trace makes of the result, in order."""
    return _reached(start, lambda node: node.users, order)


def _reached(start: Any, neighbors: Callable[[Any], Iterable[Any]], order: Mapping[Any, int]) -> list[Any]:
    found, todo = dict[Any, None](), [start]
    while todo:
        for node in neighbors(todo.pop()):
            if node not in found and transfers_of(node) is transfers_of(start):
                found[node] = None
                todo.append(node)
    return sorted(found, key=order.__getitem__)
