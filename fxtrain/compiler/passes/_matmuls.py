"""A graph pass that makes matmuls on a CPU faster.

*Biases* are added where the product is read. torch copies the bias into the result first, which slows down small
matmuls.

*Large float32 matmuls* call oneDNN on processors where its vectors are longer. torch calls MKL, which uses 256-bit
vectors on processors other than Intel's. AMD cores execute 512-bit vectors at full width from family 26 (Zen 5) on,
where oneDNN takes about half the time. On earlier families, both libraries reach the peak of the core, and MKL is
faster for the transposed matmuls of a backward pass. A call of oneDNN has a higher overhead, so small matmuls stay with
MKL. The choice depends only on sizes and processor, so a repeated run is bitwise the same.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxtrain.compiler.passes._nodes import replace
from fxtrain.compiler.passes._operators import linear, once

aten = torch.ops.aten

_MIN_ONEDNN_FLOPS = 4_000_000
_FIRST_FULL_WIDTH_FAMILY = 26  # the first AMD family that executes 512-bit vectors at full width


def speed_up_matmuls(graph: Graph) -> Graph:
    """Replaces matmuls on a CPU with faster equivalents.

    Args:
        graph: A graph from ``make_fx``. It is modified in place and returned.
    """
    for node in list(graph.nodes):
        if node.target == aten.mm.default:
            x, other = node.args
            bias = None
        elif node.target == aten.addmm.default and not node.kwargs and node.args[0].meta["val"].ndim == 1:
            bias, x, other = node.args
        else:
            continue
        if not _is_exact(x.meta["val"], other.meta["val"]):
            continue
        with graph.inserting_before(node):
            if _pays() and _is_large(x.meta["val"], other.meta["val"]):
                product = _by_onednn(node, x, other, bias)
            elif bias is not None:
                product = _with_separate_bias(node, x, other, bias)
            else:
                continue
        replace(node, product)
    return graph


def _by_onednn(node: Node, x: Any, other: Any, bias: Any) -> Any:
    graph = node.graph
    weight = _like(node, graph.call_function(aten.t.default, (other,)), other.meta["val"].t())
    if not x.meta["val"].is_contiguous():
        # oneDNN would copy a strided input. Inductor can fuse this copy with the operation that computes the input.
        copy = graph.call_function(aten.clone.default, (x,), {"memory_format": torch.contiguous_format})
        x = _like(node, copy, x.meta["val"].contiguous())
    return graph.call_function(linear(), (x, weight, bias))


def _with_separate_bias(node: Node, x: Any, other: Any, bias: Any) -> Any:
    graph, value = node.graph, node.meta["val"]
    product = _like(node, graph.call_function(aten.mm.default, (x, other)), value)
    # ``once`` keeps Inductor from fusing the two into ``addmm`` again.
    kept = _like(node, graph.call_function(once(), (product,)), value)
    return graph.call_function(aten.add.Tensor, (kept, bias))


def _like(node: Node, part: Node, value: Tensor) -> Node:
    """Gives a node that replaces part of another one its place in the step, which later passes read."""
    part.meta.update({**node.meta, "val": value})
    return part


def _is_exact(x: Tensor, other: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == other.dtype and x.dtype in (torch.float32, torch.float64)


def _is_large(x: Tensor, other: Tensor) -> bool:
    return x.dtype == torch.float32 and 2 * x.shape[0] * x.shape[1] * other.shape[1] >= _MIN_ONEDNN_FLOPS


@functools.cache
def _pays() -> bool:
    information = Path("/proc/cpuinfo")
    both = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return both and information.exists() and _is_full_width(information.read_text())


def _is_full_width(processor: str) -> bool:
    """Whether the text of /proc/cpuinfo describes such an AMD processor."""
    family = re.search(r"^cpu family\s*: (\d+)$", processor, re.MULTILINE)
    return "AuthenticAMD" in processor and family is not None and int(family[1]) >= _FIRST_FULL_WIDTH_FAMILY
