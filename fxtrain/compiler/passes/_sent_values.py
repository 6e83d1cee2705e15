"""Keeps what a transfer sends in memory until the transfer ends, also where another part of a program waits for it.

Inductor keeps it where it compiles both the start and the wait. A part that only starts a transfer would reuse the
memory for later results, unless it returns what is sent as well.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, Node

from fxtrain._torch_internals.collectives import is_all_reduce, is_collective, is_wait
from fxtrain.compiler.passes._operands import is_taken_again
from fxtrain.compiler.passes._operators import after, arrived, sendable


def keep_sent(graph: Graph) -> None:
    """Makes each wait for a transfer read what was sent, from memory that nothing overwrites.

    Args:
        graph: A graph that writes its inputs only by copies, after all other operations. It is modified in place.
    """
    for wait in [node for node in graph.nodes if is_wait(node.target)]:
        received: Any = wait.args[0]
        start: Any = received.args[0] if received.target is operator.getitem else received
        if is_sent_kept(wait) or not is_collective(start.target):
            continue
        sent = start.args[0] if start is received else start.args[0][received.args[1]]
        with graph.inserting_before(start):
            # An update may overwrite an input, but not a copy of it.
            owned = graph.call_function(after(), (sent, sent)) if _is_of_input(sent) else sent
            kept = graph.call_function(sendable(), (owned,))
        for node in {owned, kept} - {sent}:
            node.meta.update({**start.meta, "val": sent.meta["val"]})
        start.replace_input_with(sent, kept)
        wait.target, wait.args = arrived(), (received, kept)


def is_sent_kept(node: Node) -> bool:
    """Whether parts of a graph can start and end the transfer that a node waits for, if it waits for one."""
    # Sums over all ranks are sent from the memory of the result.
    return not is_wait(node.target) or (isinstance(node.args[0], Node) and is_all_reduce(node.args[0].target))


def _is_of_input(node: Node) -> bool:
    """Whether a node is an input of the graph, or a view of one."""
    while is_taken_again(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.op == "placeholder"
