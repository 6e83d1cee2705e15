"""What the passes ask of the nodes of a graph, and how they replace one."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxtrain._torch_internals.dispatch import Operator, is_in_place, operator_name
from fxtrain._torch_internals.memory import storage_id


def storages_written(graph: Graph) -> set[int]:
    """Returns the storages, as from ``storage_id``, of all tensors in in-place operations of a graph from ``make_fx``.

    Where they are written, the order of operations matters. The final update of the state is excluded, because it comes
    after all reads.
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


def numel(node: Node) -> int:
    """Returns the number of elements of a node's value."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else (value,)
    return sum(each.numel() for each in values if isinstance(each, Tensor))


def is_pointwise(target: object, others: Container[str]) -> TypeGuard[Operator]:
    """Whether the target of a node is an elementwise operator of torch, or one of the operators with these names."""
    return isinstance(target, Operator) and (torch.Tag.pointwise in target.tags or operator_name(target) in others)


def replace(node: Node, other: Node) -> None:
    """Replaces a node with another one of the same value."""
    other.meta.update(node.meta)
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)
