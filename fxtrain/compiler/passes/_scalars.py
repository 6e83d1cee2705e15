"""Graph passes that compute expensive scalars once, not again for each element that uses them.

Inductor inlines the producers of what a loop reads, so a bias correction or a scheduled learning rate is recomputed for
every vector of elements of every parameter. The C++ compiler cannot hoist it out of the loop, because the stores of the
loop might change its inputs. An ``expm1`` in the loop makes AdamW's update compute-bound instead of memory-bound.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxtrain._torch_internals.dispatch import operator_name
from fxtrain._torch_internals.memory import storage_id
from fxtrain.compiler.passes._nodes import is_pointwise, replace, storages_written
from fxtrain.compiler.passes._operators import expm1, materialize

_MIN_ELEMENTS_PER_SCALAR = 8  # the elements of a vector

# Calls of the C library, which take longer than reading a scalar from memory.
_EXPENSIVE = {
    *("exp", "exp2", "expm1", "log", "log10", "log1p", "log2", "pow", "sigmoid", "tanh"),
    *("acos", "asin", "atan", "atan2", "cos", "cosh", "erf", "erfc", "sin", "sinh", "tan"),
}
_LAYOUT_ONLY = {"_to_copy", "_unsafe_view", "clone", "expand", "permute", "squeeze", "transpose", "unsqueeze", "view"}


def hoist_scalars(graph: Graph) -> Any:
    """Materializes expensive scalars on a CPU in memory.

    Tensors that are later overwritten, directly or through a view, are left unchanged.

    Args:
        graph: A graph from ``make_fx``. It is modified in place and returned.
    """
    expensive_nodes, written = set[Any](), storages_written(graph)
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.device.type != "cpu" or not is_pointwise(node.target, _LAYOUT_ONLY):
            continue
        # A float64 scalar in a loop over float32 elements halves its vector width.
        is_double = value.dtype == torch.float64 and value.numel() == 1
        is_expensive = operator_name(node.target) in _EXPENSIVE or is_double
        if not is_expensive and expensive_nodes.isdisjoint(node.all_input_nodes):
            continue
        expensive_nodes.add(node)
        readers = [
            user
            for user in node.users
            if _picks(user) or _size(user) >= _MIN_ELEMENTS_PER_SCALAR * max(value.numel(), 1)
        ]
        if not readers or storage_id(value) in written:
            continue
        materialize(node, readers)
    return graph


def make_bias_corrections_exact(graph: Graph) -> Graph:
    """Makes each ``expm1`` of a vector of counts on a CPU give the same bits in every loop.

    These are the bias corrections of an optimizer, one per parameter. A graph of several steps fuses them with other
    operations than a graph of one step, and the two must agree bitwise.

    Args:
        graph: A graph from ``make_fx``. It is modified in place and returned.
    """
    for node in filter(_is_of_counts, graph.find_nodes(op="call_function", target=torch.ops.aten.expm1.default)):
        with graph.inserting_before(node):
            exact = graph.call_function(expm1(), node.args)
        replace(node, exact)
    return graph


def _is_of_counts(node: Node) -> bool:
    """Whether a vector on a CPU is computed elementwise from integer vectors and scalars only."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.device.type != "cpu" or not value.ndim:
        return False
    if value.dtype not in (torch.float32, torch.float64):
        return False
    todo, seen = list(node.all_input_nodes), set[Any]()
    while todo:
        part = todo.pop()
        value = part.meta.get("val")
        if part in seen or not isinstance(value, Tensor) or not value.ndim or not value.is_floating_point():
            continue
        if part.op == "placeholder" or not is_pointwise(part.target, _LAYOUT_ONLY):
            return False
        seen.add(part)
        todo += part.all_input_nodes
    return True


def _picks(node: Node) -> bool:
    """Whether a node takes single elements out of a vector, such as the bias corrections of all parameters."""
    return node.target in (torch.ops.aten.select.int, torch.ops.aten.unbind.int)


def _size(node: Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0
