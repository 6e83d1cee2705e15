"""Passes on the numbers in a graph: constants that a trace keeps as tensors, and factors of zero."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from fxtrain._torch_internals.dispatch import without_dispatch_modes
from fxtrain.compiler.passes._nodes import replace

_PRODUCTS = (torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar)
_COPY = torch.ops.aten.lift_fresh_copy.default


def replace_constants(graph: GraphModule) -> GraphModule:
    """Replaces copies of constants of one element by their number.

    A graph with constants needs torch's wrappers at each call, and its compiled code cannot be saved.

    Args:
        graph: A graph from ``make_fx``. It is modified in place and returned.
    """
    for node in graph.graph.find_nodes(op="get_attr"):
        constant = getattr(graph, node.target, None)
        copies = list(node.users)
        if not isinstance(constant, Tensor) or constant.numel() != 1 or any(copy.target != _COPY for copy in copies):
            continue
        if constant.device.type != "cpu" or constant.layout != torch.strided or constant.dtype.is_complex:
            continue
        with without_dispatch_modes():
            number = constant.item()
        for copy in copies:
            options = {"dtype": constant.dtype, "device": constant.device, "pin_memory": False}
            with graph.graph.inserting_before(copy):
                value = graph.graph.call_function(torch.ops.aten.full.default, (list(constant.shape), number), options)
            replace(copy, value)
        graph.graph.erase_node(node)
        if not any(other.target == node.target for other in graph.graph.find_nodes(op="get_attr")):
            delattr(graph, node.target)
    return graph


def detach_constants(graph: GraphModule) -> GraphModule:
    """Replaces constants that require gradients, such as the weights of a teacher, by detached views of their memory.

    The graph has its own backward pass. Autograd would record it once more at each call.

    Args:
        graph: A graph from ``make_fx``. It is modified in place and returned.
    """
    for name in {node.target for node in graph.graph.find_nodes(op="get_attr")}:
        constant = getattr(graph, name, None)
        if isinstance(constant, Tensor) and constant.requires_grad:
            delattr(graph, name)
            graph.register_buffer(name, constant.detach())
    return graph


def keep_products_with_zero(graph: Graph) -> None:
    """Writes an integer 0 that multiplies floating values as 0.0.

    Inductor replaces a product with the integer by zeros, even where it is nan.

    Args:
        graph: A graph from ``make_fx``. It is modified in place.
    """
    for product in _PRODUCTS:
        for node in graph.find_nodes(op="call_function", target=product):
            value, factor = node.meta.get("val"), node.args[1]
            if isinstance(factor, int) and not factor and isinstance(value, Tensor) and value.is_floating_point():
                node.update_arg(1, 0.0)
