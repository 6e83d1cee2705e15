"""A graph pass that recomputes forward values in the backward pass instead of keeping them in memory.

The operations that compute a dropped value are copied to its first reader in the backward pass. A copy begins with
``after``, which makes it depend on a value of the backward pass, so that no compiler merges it with the original or
computes it earlier. Copies compute the same bits, because random samples are functions of their inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph

from fxtrain._torch_internals.dispatch import Operator, argument_of, hides_writes, is_in_place, is_view
from fxtrain._torch_internals.memory import storage_id
from fxtrain.compiler.passes._nodes import is_pointwise, storages_written
from fxtrain.compiler.passes._operators import after, materialize
from fxtrain.core._graph_marks import Pass, join_pass, pass_of, regions_of, set_backward, set_regions

aten = torch.ops.aten

# On GPUs, a batch norm is an operator of cuDNN or MIOpen, with the same arguments.
_BATCH_NORMS = (aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default)
_STATISTICS = slice(3, 5)
"""The arguments of a batch norm that hold its running statistics."""
_IS_TRAINING = 5

# The argument that these add to a product. Compilers add it separately, so its order would not be that of the product.
_BIASES = {aten.addmm.default: 0, aten.baddbmm.default: 0, aten.addmv.default: 0, aten.convolution.default: 2}

# Operators whose results depend on more than their inputs.
_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


def recompute_regions(graph: Graph) -> bool:
    """Recomputes the marked regions of a graph in its backward passes. Returns whether there were any.

    A region keeps its inputs, the values that later parts of the forward pass read, and what its policy selects.

    Args:
        graph: A graph from ``make_fx``. It is modified in place.
    """
    nodes: list[Any] = [node for node in graph.nodes if regions_of(node)]
    made: list[Any] = []
    while nodes:
        inside = set(nodes)

        def is_kept(node: Any, inside: set[Any] = inside) -> bool:
            region = regions_of(node)[0]
            return region.saves(node) or any(
                not is_backward(user) and (user not in inside or regions_of(user)[0] is not region)
                for user in node.users
            )

        copies = recompute(graph, [node for node in nodes if not is_kept(node)])
        made += copies.values()
        # Inner regions are recomputed once more, from their inputs in the copy.
        for node in nodes:
            set_regions(node, ())
        for copy in copies.values():
            set_regions(copy, regions_of(copy)[1:])
        nodes = [copy for copy in copies.values() if regions_of(copy)]
    # From now on, copies are part of the backward pass.
    for copy in made:
        set_backward(copy)
    return bool(made)


def recompute(graph: Graph, dropped: Iterable[Any]) -> dict[Any, Any]:
    """Recomputes forward values where the backward pass reads them. Returns the copies by original node.

    Values that cannot be computed twice with the same result stay in memory: those of in-place and random operators,
    and values without tensors as inputs, such as constants, which compilers do not keep in memory.

    Args:
        graph: A graph from ``make_fx``. It is modified in place.
        dropped: Forward values, in the order of the graph.
    """
    given = droppable(graph, dropped)
    copies: dict[Any, Any] = {}
    kept: dict[Any, None] = {}
    order = {node: index for index, node in enumerate(graph.nodes)}
    tokens: dict[object, Any] = {}
    for node in list(graph.nodes):
        found: Pass | None = pass_of(node)
        if found is None:
            continue
        if found.is_backward:
            inputs = [other for other in node.all_input_nodes if other in given]
            if inputs:
                missing = _missing(inputs, given, copies, order)
                token = _token(node, tokens.get(found.derivative), given)
                for each in missing:
                    copies[each] = _copied(graph, each, node, copies, token, kept)
                for other in inputs:
                    node.replace_input_with(other, copies[other])
        if can_order(node):
            tokens[found.derivative] = node
    for node in kept:
        # Compilers might keep the inputs of a value that copies begin from in memory instead.
        if is_pointwise(node.target, ()):
            materialize(node)
    return copies


def droppable(graph: Graph, nodes: Iterable[Any]) -> dict[Any, None]:
    """Returns those of the nodes, given in order, that can be computed twice, in order."""
    written = storages_written(graph)
    for node in graph.nodes:
        if node.target in _BATCH_NORMS and node.args[_IS_TRAINING]:
            written |= {storage_id(part.meta["val"]) for part in node.args[_STATISTICS] if part is not None}
    found: dict[Any, None] = {}
    given = list(nodes)
    inside = set(given)
    for node in given:
        if node.target is operator.getitem:
            # The other results of an operator are kept with the one that is needed.
            source = node.args[0]
            if source in found and any(part not in inside for part in source.users):
                del found[source]
            if source in found:
                found[node] = None
        elif is_view(node.target):
            # A view of a value in memory takes no memory.
            if node.args[0] in found:
                found[node] = None
        elif _is_repeatable(node, written):
            found[node] = None
    return found


def _is_repeatable(node: Any, written: set[int]) -> bool:
    if not isinstance(node.target, Operator) or not node.all_input_nodes:
        return False
    if node.target in _BATCH_NORMS:
        return bool(node.args[_IS_TRAINING])
    if is_in_place(node.target) or hides_writes(node.target) or _is_random(node):
        return False
    if node.target.namespace in _COLLECTIVES:
        return False
    values = [other.meta.get("val") for other in (node, *node.all_input_nodes)]
    return not any(isinstance(value, Tensor) and storage_id(value) in written for value in values)


def _is_random(node: Any) -> bool:
    """Whether an operator takes random samples. Attention is tagged as random, but without dropout it is not."""
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    return argument_of(node.target, node.args, node.kwargs, "dropout_p") != 0.0


def is_backward(node: Any) -> bool:
    """Whether a node is part of a backward pass."""
    found = pass_of(node)
    return found is not None and found.is_backward


def _missing(
    inputs: Sequence[Any], given: Mapping[Any, None], copies: Mapping[Any, Any], order: Mapping[Any, int]
) -> list[Any]:
    """Returns the values to copy for these inputs, in order."""
    missing, todo = set[Any](), list(inputs)
    while todo:
        node = todo.pop()
        if node in missing or node in copies:
            continue
        missing.add(node)
        todo += [other for other in node.all_input_nodes if other in given]
    return sorted(missing, key=order.__getitem__)


def can_order(node: Any) -> bool:
    """Whether a value can be the second argument of ``after``."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.layout != torch.strided or node.op != "call_function":
        return False
    return isinstance(node.target, Operator) and not is_view(node.target) and not is_in_place(node.target)


def _token(reader: Any, latest: Any, given: Mapping[Any, None]) -> Any:
    """Returns a value of the backward pass that the copies for a reader wait for: its own gradient if it has one."""
    for other in reader.all_input_nodes:
        if other not in given and is_backward(other) and can_order(other):
            return other
    return latest


def _copied(graph: Graph, node: Any, reader: Any, copies: Mapping[Any, Any], token: Any, kept: dict[Any, None]) -> Any:
    """Copies one operation to the place before a reader."""
    with graph.inserting_before(reader):
        copy: Any = graph.node_copy(node, lambda other: copies.get(other, other))
        if node.target in _BATCH_NORMS:
            statistics = (None, None)
            copy.args = (*copy.args[: _STATISTICS.start], *statistics, *copy.args[_STATISTICS.stop :])
        for other in copy.all_input_nodes:
            if other.op != "placeholder" and not is_backward(other):
                kept[_base(other)] = None
        if token is not None and not any(other in copies for other in node.all_input_nodes):
            with graph.inserting_before(copy):
                _begin_after(graph, copy, token, reader)
    return copy


def _begin_after(graph: Graph, copy: Any, token: Any, reader: Any) -> None:
    """Makes a copy, for a reader in the backward pass, depend on the token through one of its inputs."""
    bias = copy.args[_BIASES[copy.target]] if copy.target in _BIASES else None
    inputs = [x for x in copy.all_input_nodes if x is not bias and isinstance(x.meta.get("val"), Tensor)]
    if not inputs:
        return
    chosen = min(inputs, key=lambda other: _size(other.meta["val"]))
    # A copy of the base, because a copy of the view would have other strides.
    views: list[Any] = []
    base = chosen
    while base.op == "call_function" and is_view(base.target):
        views.append(base)
        base = base.args[0]
    ordered = graph.call_function(after(), (base, token))
    ordered.meta.update(base.meta)
    join_pass(ordered, reader)
    for view in reversed(views):
        made = graph.node_copy(view, lambda other, base=base, ordered=ordered: ordered if other is base else other)
        base, ordered = view, made
    copy.replace_input_with(chosen, ordered)


def _base(node: Any) -> Any:
    while node.op == "call_function" and is_view(node.target):
        node = node.args[0]
    return node


def _size(value: Tensor) -> Any:
    size = value.numel()
    return size if isinstance(size, int) else 0
