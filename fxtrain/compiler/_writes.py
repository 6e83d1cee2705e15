"""Finds the storages that a graph overwrites before its end, where the order of operations matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def written_over(graph: Any) -> set[int]:
    """Returns the storages, as from ``memory_of``, of all tensors in in-place operations of a graph from ``make_fx``.

    The final update of the state is excluded, because it comes after all reads.
    """
    return {
        memory_of(other.meta["val"])
        for node in graph.nodes
        if _writes(node)
        for other in node.all_input_nodes
        if isinstance(other.meta.get("val"), Tensor)
    }


def memory_of(tensor: Tensor) -> int:
    """Returns an identifier of a tensor's storage, which is the same for all views of it."""
    return tensor.untyped_storage()._cdata


def _writes(node: Any) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return False
    return node.target != torch.ops.aten.copy_.default or node.args[0].op != "placeholder"
