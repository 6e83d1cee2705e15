"""Merges exchanges of rows between ranks into one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph
from torch.fx.node import map_arg

from fxtrain.compiler.passes._transfer_buckets import wait_of

aten = torch.ops.aten


def exchange_together(graph: Graph, starts: Sequence[Any], order: dict[Any, int]) -> tuple[list[Any], list[Any]]:
    """Replaces exchanges by one of all rows side by side. What was received is taken apart after one wait.

    Args:
        graph: The graph, modified in place.
        starts: Exchanges of one dtype and group, each of rows [ranks, values] as one vector. All precede their waits.
        order: The positions of all nodes. Those of the new nodes after the wait are added.

    Returns:
        The new nodes before the transfer, in order, and a list of the transfer.
    """
    if len(starts) == 1:
        return [], list(starts)
    target, group = starts[0].target, starts[0].args[3]
    ranks, counts = len(starts[0].args[1]), [start.args[1][0] for start in starts]
    total, waits = sum(counts), [wait_of(start) for start in starts]

    def call(operator: Any, *args: Any) -> Any:
        node = graph.call_function(operator, args)
        values = map_arg(args, lambda each: each.meta["val"])
        node.meta.update({**starts[0].meta, "val": operator(*values)})
        return node

    with graph.inserting_before(starts[-1]):
        rows = [
            call(aten.view.default, start.args[0], [ranks, count]) for start, count in zip(starts, counts, strict=True)
        ]
        table = call(aten.cat.default, rows, 1)
        sent = call(aten.view.default, table, [-1])
        transfer = call(target, sent, [total] * ranks, [total] * ranks, group)
    first = min(waits, key=order.__getitem__)
    with graph.inserting_before(first):
        whole = call(first.target, transfer)
        received = call(aten.view.default, whole, [ranks, total])
        order[whole] = order[received] = order[first]
        end = 0
        for wait, count in zip(waits, counts, strict=True):
            part = call(aten.slice.Tensor, received, 1, end, end + count)
            vector = call(aten.reshape.default, part, [-1])
            order[part] = order[vector] = order[wait]
            wait.replace_all_uses_with(vector)
            end += count
    for node in (*waits, *starts):
        graph.erase_node(node)
    return [*rows, table, sent], [transfer]
