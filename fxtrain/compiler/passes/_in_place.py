"""Replaces operations that write into intermediate results, so that the order of operations no longer matters."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node, map_arg

from fxtrain._torch_internals.dispatch import (
    Operator,
    arguments_kept,
    is_in_place,
    is_last_write,
    is_view,
    out_of_place,
    pure_batch_norm,
)

_BATCH_NORM = torch.ops.aten.native_batch_norm.default


def replace_in_place(graph: Graph) -> Graph:
    """Replaces in-place operations on intermediate results of which there are no views yet.

    The derivatives of some functions contain them, such as that of ``silu``. So do batch norms.

    Args:
        graph: A graph from ``make_fx``. It is modified in place and returned.
    """
    norm, position = pure_batch_norm(), {node: index for index, node in enumerate(graph.nodes)}

    def is_alone(node: object, at: Node) -> bool:
        """Whether nothing else is in the memory of a value when the operation ``at`` is reached."""
        if not isinstance(node, Node) or not isinstance(node.target, Operator) or is_view(node.target):
            return False
        before = (user for user in node.users if position[user] < position[at])
        return not any(is_view(user.target) or user.target is operator.getitem for user in before)

    def replace_later(old: Node, new: Node, at: Node) -> None:
        position[new] = position[at]
        for reader in list(old.users):
            if position[reader] > position[at]:
                reader.replace_input_with(old, new)

    for node in list(graph.nodes):
        is_training = node.target is _BATCH_NORM and node.args[5]
        if norm is not None and is_training and all(is_alone(part, node) for part in node.args[3:5]):
            with graph.inserting_before(node):
                pure = graph.call_function(norm, node.args)
                new = [graph.call_function(operator.getitem, (pure, index)) for index in (3, 4)]
            statistics = [part.meta["val"] for part in node.args[3:5]]
            pure.meta.update({**node.meta, "val": (*node.meta["val"], *statistics)})
            replace_later(node, pure, node)
            for old, part, value in zip(node.args[3:5], new, statistics, strict=True):
                part.meta.update({**node.meta, "val": value})
                replace_later(old, part, node)
            graph.erase_node(node)
        elif (found := _out_of_place(node)) is not None and is_alone(node.args[0], node):
            with graph.inserting_before(node):
                value = graph.call_function(found, node.args, node.kwargs)
            value.meta.update(node.meta)
            replace_later(node.args[0], value, node)
            replace_later(node, value, node)
            graph.erase_node(node)
    return graph


def _out_of_place(node: Node) -> Operator | None:
    """Returns the operator that computes what an operation writes into its first argument, if nothing else differs."""
    if not isinstance(node.target, Operator) or not is_in_place(node.target) or is_last_write(node):
        return None
    kept, found = arguments_kept(node.target), out_of_place(node.target)
    if found is None or kept[0] or not all(kept[1:]):
        return None
    # An in-place operation keeps the dtype and the strides of what it writes.
    arguments: Any = map_arg((node.args, node.kwargs), lambda other: other.meta["val"])
    (old, *others), kwargs = arguments
    new: Tensor = found(old, *others, **kwargs)
    is_same = (old.shape, old.dtype, old.stride()) == (new.shape, new.dtype, new.stride())
    return found if is_same else None
