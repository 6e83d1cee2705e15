"""A graph pass that moves the collectives of sharded parameters and gradients next to where they are needed."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph

from fxtrain._torch_internals.collectives import is_all_gather, is_exchange, is_reduce_scatter
from fxtrain.compiler.passes._gathers import place_gathers
from fxtrain.compiler.passes._scatters import place_scatters
from fxtrain.compiler.passes._transfer_buckets import Reshard
from fxtrain.core._graph_marks import Transfers, transfers_of


def place_transfers(graph: Graph, reshard: Reshard) -> None:
    """Moves the collectives of sharded parameters and gradients, and merges them into buckets.

    A trace gathers all parameters before the forward pass and scatters all gradients after the backward pass, by one
    collective per tensor. All values stay the same. The result depends on the graph alone, so all ranks start their
    collectives in the same order.

    Args:
        graph: A graph from ``make_fx``. It is modified in place.
        reshard: As in ``compile``. ``"off"`` only merges.
    """
    gathers, scatters = dict[Transfers, list[Any]](), dict[Transfers, list[Any]]()
    for node in graph.nodes:
        transfers = transfers_of(node)
        if transfers is None:
            continue
        if transfers.is_gather and is_all_gather(node.target):
            gathers.setdefault(transfers, []).append(node)
        elif not transfers.is_gather and (is_reduce_scatter(node.target) or is_exchange(node.target)):
            scatters.setdefault(transfers, []).append(node)
    for starts in scatters.values():
        place_scatters(graph, starts, reshard)
    for starts in gathers.values():
        place_gathers(graph, starts, reshard)
