"""A graph pass for concatenations of one tensor with empty ones, as in the first step of a cache.

``torch.cat`` of one non-empty tensor with empty ones returns a contiguous tensor, and so does its trace. Inductor
decomposes it into a clone, which keeps the strides of its input. A view that the trace takes of the contiguous result
then fails with "Cannot view a tensor with shape ...".
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph

from fxtrain._torch_internals.tracing import is_known_true
from fxtrain.compiler.passes._nodes import replace


def replace_trivial_concatenations(graph: Graph) -> Graph:
    """Replaces each ``cat`` that has only one non-empty input with a contiguous copy of it.

    Args:
        graph: A graph from ``make_fx``. It is modified in place and returned.
    """
    aten = torch.ops.aten
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        full = [part for part in node.args[0] if not is_known_true(part.meta["val"].numel() == 0)]
        found: Tensor = node.meta["val"]
        if len(full) != 1 or full[0].meta["val"].dtype != found.dtype or not found.is_contiguous():
            continue
        with graph.inserting_before(node):
            copy = graph.call_function(aten.clone.default, tuple(full), {"memory_format": torch.contiguous_format})
        replace(node, copy)
    return graph
