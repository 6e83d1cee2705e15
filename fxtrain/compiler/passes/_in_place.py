"""Finds the storages that a graph overwrites before its end, where the order of operations matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxtrain._torch_internals.dispatch import Operator, is_in_place
from fxtrain._torch_internals.memory import storage_id


def storages_written(graph: Graph) -> set[int]:
    """Returns the storages, as from ``storage_id``, of all tensors in in-place operations of a graph from ``make_fx``.

    The final update of the state is excluded, because it comes after all reads.
    """
    return {
        storage_id(other.meta["val"])
        for node in graph.nodes
        if _writes(node)
        for other in node.all_input_nodes
        if isinstance(other.meta.get("val"), Tensor)
    }


def _writes(node: Node) -> bool:
    if not isinstance(node.target, Operator) or not is_in_place(node.target):
        return False
    written: Any = node.args[0]
    return node.target != torch.ops.aten.copy_.default or written.op != "placeholder"
