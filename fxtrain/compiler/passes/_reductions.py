"""Graph passes that make the bits of reductions independent of the rest of the graph.

Inductor computes the input of a reduction in the reduction's own loop, in an order that suits what the loop reads. It
also replaces the arithmetic of patterns that it recognizes. Both depend on which values are in memory and on what else
reads them, so without these passes, bits would depend on which activations are recomputed.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.fx import Graph

from fxtrain._torch_internals.dispatch import Operator, is_view, operator_name
from fxtrain._torch_internals.memory import storage_id
from fxtrain.compiler.passes._nodes import is_pointwise, numel, storages_written
from fxtrain.compiler.passes._operators import after, laid_out, materialize, once, read_through, unrecognized

_SUMS = {"sum", "mean", "var", "var_mean", "amax", "amin", "linalg_vector_norm"}
_NORMS = {"native_layer_norm", "native_group_norm", "native_batch_norm"}
_NORMS_BACKWARD = {f"{name}_backward" for name in _NORMS}
_SOFTMAX = {"_softmax", "_log_softmax"}
_REDUCTIONS = _SUMS | _NORMS | _NORMS_BACKWARD | _SOFTMAX
_MATMULS = {"mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward"}
_PERMUTATIONS = {"permute", "transpose", "t"}
_COPIES = {"clone", "_to_copy"}
_MAXIMA = _SOFTMAX | {"_safe_softmax", "amax"}


def reduce_from_memory(graph: Graph) -> Graph:
    """Materializes values before a reduction reads them, where its loop would otherwise depend on them.

    These are values that matmuls read too, and from memory in any case, values whose elements are permuted, so that a
    loop may follow the memory of the inputs or of the result, and gradients of the results of norms.

    Args:
        graph: A graph from ``make_fx``. It is modified in place and returned.
    """
    written, permuted, identities = storages_written(graph), set[Any](), (once(), after())
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        is_in_loops = _is_view(node) or is_pointwise(node.target, _COPIES) or node.target in identities
        # A second permutation may restore the order.
        inherits = _name(node) not in _PERMUTATIONS and not permuted.isdisjoint(node.all_input_nodes)
        is_permuted = is_in_loops and (inherits or not value.is_contiguous())
        if is_permuted:
            permuted.add(node)
        if _is_view(node) or _name(node) in _MATMULS or storage_id(value) in written:
            continue
        readers = list(_readers(node))
        names = {_name(reader) for reader, _ in readers}
        is_gradient = any(_name(reader) in _NORMS_BACKWARD and reader.args[0] is read for reader, read in readers)
        if is_permuted:
            if names & _REDUCTIONS and _is_dense(value):
                # Inductor would choose a layout that suits the loop.
                read_through(laid_out(), node, value.stride())
                permuted.remove(node)
        elif (is_in_loops and is_gradient) or (names & _SUMS and names & _MATMULS):
            materialize(node)
    return graph


def keep_softmax(graph: Graph) -> Graph:
    """Keeps Inductor from replacing the arithmetic of a scaled softmax, or of attention that is written out.

    Args:
        graph: A graph from ``make_fx``. It is modified in place and returned.
    """
    written = storages_written(graph)
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        if not any(_name(user) in _MAXIMA for user in node.users):
            continue
        if storage_id(value) not in written and _is_dense(value):
            read_through(unrecognized(), node)
    return graph


def _is_dense(value: Tensor) -> bool:
    """Whether the elements fill a range of memory, each once."""
    strides = sorted((stride, size) for stride, size in zip(value.stride(), value.shape, strict=True) if size != 1)
    filled = itertools.accumulate((size for _, size in strides), operator.mul, initial=1)
    return all(stride == place for (stride, _), place in zip(strides, filled, strict=False))


def _readers(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yields the nodes that read all elements of a value, each with the value itself or the view that it reads."""
    todo = [node]
    while todo:
        source = todo.pop()
        for user in source.users:
            if not _is_view(user):
                yield user, source
            elif numel(user) == numel(source):
                todo.append(user)


def _name(node: Any) -> str | None:
    return operator_name(node.target) if isinstance(node.target, Operator) else None


def _is_view(node: Any) -> bool:
    return is_view(node.target) or _name(node) == "_unsafe_view"
