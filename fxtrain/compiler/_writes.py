"""Writes: which memory is written over in the midst of a graph, where the order of its operations matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def written_over(graph: Any) -> set[int]:
    """The memory, as ``memory_of`` tells it, of all that takes part in such an operation of a graph from ``make_fx``.

    A new state written over the old one is not among it: that comes last, when all is read.
    """
    return {
        memory_of(other.meta["val"])
        for node in graph.nodes
        if _writes(node)
        for other in node.all_input_nodes
        if isinstance(other.meta.get("val"), Tensor)
    }


def memory_of(tensor: Tensor) -> int:
    """The same for all views of the same memory."""
    return tensor.untyped_storage()._cdata


def _writes(node: Any) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return False
    return node.target != torch.ops.aten.copy_.default or node.args[0].op != "placeholder"
