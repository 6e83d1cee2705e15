"""Matmul: large products of float32 matrices on a CPU by oneDNN, where MKL does not know the processor.

torch calls MKL, which on processors that are not Intel's reaches half of what oneDNN does. Measured on AMD EPYC: 64 x
2048 x 2048 in 3.9 ms against 1.8 on two threads, 512 x 128 x 384 in 0.53 ms against 0.25 on one. A call of oneDNN takes
longer than one of MKL, so small products stay where they are. Which of them it is depends on sizes and processor alone:
the same run has the same bits again.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LEAST = 4_000_000  # floating point operations that are worth a call


def with_faster_products(graph: Any) -> Any:
    """The graph, from ``make_fx``, with large products by oneDNN where that is faster. It is changed in place."""
    if not _pays():
        return graph
    aten, nodes = torch.ops.aten, graph.graph
    for node in list(nodes.nodes):
        if node.target == aten.mm.default:
            x, other = node.args
            bias = None
        elif node.target == aten.addmm.default and not node.kwargs and node.args[0].meta["val"].ndim == 1:
            bias, x, other = node.args
        else:
            continue
        if not _is_large(x.meta["val"], other.meta["val"]):
            continue
        with nodes.inserting_before(node):
            weight = nodes.call_function(aten.t.default, (other,))
            weight.meta["val"] = other.meta["val"].t()
            if not x.meta["val"].is_contiguous():
                # oneDNN's own operator would copy it, and Inductor does that on the way to it.
                x = nodes.call_function(aten.clone.default, (x,), {"memory_format": torch.contiguous_format})
            product = nodes.call_function(_linear(), (x, weight, bias))
        product.meta.update(node.meta)
        node.replace_all_uses_with(product)
        nodes.erase_node(node)
    graph.recompile()
    return graph


def _is_large(x: Tensor, other: Tensor) -> bool:
    fit = x.device.type == "cpu" and x.dtype == other.dtype == torch.float32
    return fit and 2 * x.shape[0] * x.shape[1] * other.shape[1] >= _LEAST


@functools.cache
def _pays() -> bool:
    information = Path("/proc/cpuinfo")
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkl.is_available() or not information.exists():
        return False
    return "AuthenticAMD" in information.read_text()


@functools.cache
def _linear() -> Any:
    """An operator of torch's: x weight^T + bias, of [n, k], [m, k] and [m]: [n, m]."""
    library = torch.library.Library("fxtrain", "DEF")
    library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    library.impl("linear", linear, "CPU")
    torch.library.register_fake("fxtrain::linear", lambda x, weight, bias: x.new_empty((len(x), len(weight))))
    _kept.append(library)  # an operator goes when its library does
    return torch.ops.fxtrain.linear.default


_kept: list[Any] = []
