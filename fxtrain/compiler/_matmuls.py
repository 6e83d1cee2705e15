"""Matmul: products of matrices on a CPU as they are fastest.

*A bias* is added where the product is read: torch copies it into the result first, which takes a third of a small
product's time (32 x 64 x 64: 14 us, and 10 without).

*Large products of float32 matrices* go to oneDNN where that has the longer vectors. torch calls MKL, which on
processors that are not Intel's uses vectors of 256 bits. Where AMD's cores take 512 at once, from family 26 on (Zen 5),
oneDNN needs half of the time: 64 x 2048 x 2048 in 1.8 ms against 3.9 on two threads, 512 x 128 x 384 in 0.25 ms against
0.53 on one. On those before, both reach what the core can, and the transposed products of a backward pass are MKL's: at
family 25, model 1, a small GPT was trained in 1.12 times the time by oneDNN. A call of oneDNN takes longer than one of
MKL, so small products stay where they are. Which of them it is depends on sizes and processor alone: the same run has
the same bits again.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxtrain.compiler._operators import linear, once

_LEAST = 4_000_000  # floating point operations that are worth a call
_FULL_WIDTH = 26  # the family of AMD's processors since which vectors of 512 bits are not taken in halves


def with_faster_products(graph: Any) -> Any:
    """The graph, of ``make_fx``, with its products on a CPU as they are fastest. It is changed in place."""
    aten = torch.ops.aten
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
                product = _by_onednn(graph, x, other, bias)
            elif bias is not None:
                product = _bias_apart(graph, x, other, bias)
            else:
                continue
        product.meta.update(node.meta)
        node.replace_all_uses_with(product)
        graph.erase_node(node)
    return graph


def _by_onednn(graph: Any, x: Any, other: Any, bias: Any) -> Any:
    aten = torch.ops.aten
    weight = graph.call_function(aten.t.default, (other,))
    weight.meta["val"] = other.meta["val"].t()
    if not x.meta["val"].is_contiguous():
        # oneDNN's own operator would copy it, and Inductor does that on the way to it.
        x = graph.call_function(aten.clone.default, (x,), {"memory_format": torch.contiguous_format})
    return graph.call_function(linear(), (x, weight, bias))


def _bias_apart(graph: Any, x: Any, other: Any, bias: Any) -> Any:
    aten = torch.ops.aten
    product = graph.call_function(aten.mm.default, (x, other))
    product.meta["val"] = x.meta["val"] @ other.meta["val"]
    # Kept, or Inductor would put the two together again.
    return graph.call_function(aten.add.Tensor, (graph.call_function(once(), (product,)), bias))


def _is_exact(x: Tensor, other: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == other.dtype and x.dtype in (torch.float32, torch.float64)


def _is_large(x: Tensor, other: Tensor) -> bool:
    return x.dtype == torch.float32 and 2 * x.shape[0] * x.shape[1] * other.shape[1] >= _LEAST


@functools.cache
def _pays() -> bool:
    information = Path("/proc/cpuinfo")
    both = torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
    return both and information.exists() and _is_full_width(information.read_text())


def _is_full_width(processor: str) -> bool:
    """Whether these lines of /proc/cpuinfo are of such a processor of AMD's."""
    family = re.search(r"^cpu family\s*: (\d+)$", processor, re.MULTILINE)
    return "AuthenticAMD" in processor and family is not None and int(family[1]) >= _FULL_WIDTH
