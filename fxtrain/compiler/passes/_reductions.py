"""A graph pass for reductions of values that matmuls read too, such as the gradients of biases.

A matmul reads its inputs from memory. If Inductor meets a reduction of the same value first, the reduction computes the
value itself, in an order that suits the value's own inputs. So the bits of a sum would depend on the rest of the graph,
such as on which activations are recomputed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Graph

from fxtrain._torch_internals.dispatch import Operator, is_view, operator_name
from fxtrain._torch_internals.memory import storage_id
from fxtrain.compiler.passes._nodes import numel, storages_written
from fxtrain.compiler.passes._operators import materialize

_REDUCTIONS = ("sum", "mean", "var", "var_mean", "amax", "amin", "linalg_vector_norm")
_MATMULS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward")


def reduce_from_memory(graph: Graph) -> Graph:
    """Materializes values that both matmuls and reductions read, before either does.

    Args:
        graph: A graph from ``make_fx``. It is modified in place and returned.
    """
    written = storages_written(graph)
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor) or _is_view(node) or _name(node) in _MATMULS:
            continue
        names = set(map(_name, _readers(node)))
        if names.isdisjoint(_REDUCTIONS) or names.isdisjoint(_MATMULS) or storage_id(value) in written:
            continue
        materialize(node)
    return graph


def _readers(node: Any) -> list[Any]:
    """Returns the nodes that read all elements of a value, or a view of them."""
    found, todo = list[Any](), [node]
    while todo:
        source = todo.pop()
        for user in source.users:
            if not _is_view(user):
                found.append(user)
            elif numel(user) == numel(source):
                todo.append(user)
    return found


def _name(node: Any) -> str | None:
    return operator_name(node.target) if isinstance(node.target, Operator) else None


def _is_view(node: Any) -> bool:
    return is_view(node.target) or _name(node) == "_unsafe_view"
