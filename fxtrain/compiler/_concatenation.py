"""Concatenations with empty tensors, as in the first step of a cache: one tensor remains, and is copied densely.

``torch.cat`` of one tensor and empty ones returns a dense tensor, and so does its trace. Inductor's decomposition
replaces it by a clone, which keeps the strides of what it copies. A view that the trace took of the dense tensor is
then refused: "Cannot view a tensor with shape ...".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def with_dense_concatenations(graph: Any) -> Any:
    """Replaces each ``cat`` that has one tensor with elements by a copy with the strides of the result.

    Args:
        graph: From ``make_fx``. It is changed in place and returned.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # with the tracer, which is loaded by now

    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.target != aten.cat.default:
            continue
        full = [part for part in node.args[0] if not statically_known_true(part.meta["val"].numel() == 0)]
        found: Tensor = node.meta["val"]
        if len(full) != 1 or full[0].meta["val"].dtype != found.dtype or not found.is_contiguous():
            continue
        with graph.inserting_before(node):
            copy = graph.call_function(aten.clone.default, tuple(full), {"memory_format": torch.contiguous_format})
        copy.meta.update(node.meta)
        node.replace_all_uses_with(copy)
        graph.erase_node(node)
    return graph
