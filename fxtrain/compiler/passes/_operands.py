"""What a part of a graph reads from the rest, and whether parts can share compiled code."""

from __future__ import annotations

import operator
from collections.abc import Container, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from fxtrain._torch_internals.collectives import is_collective
from fxtrain._torch_internals.dispatch import is_view

_RANGES = {torch.ops.aten.slice.Tensor, torch.ops.aten.split_with_sizes.default}


class Element(NamedTuple):
    """One of the values in a computed tensor, such as the bias correction of one parameter or one dropout mask.

    Args:
        tensor: The tensor.
        index: The index of the value in its first dimension.
        value: The node of the value.
    """

    tensor: Node
    index: int
    value: Node


def is_taken_again(node: Node) -> bool:
    """Whether each part of a graph that reads a node takes it by itself: a view of one tensor, or a constant.

    So parts exchange whole tensors.
    """
    if node.op != "call_function":
        return False
    if not node.all_input_nodes:
        return True
    if node.target is operator.getitem:
        return is_taken_again(node.all_input_nodes[0])
    return is_view(node.target) and node.all_input_nodes == [node.args[0]] and not _is_of_received(node)


def _is_of_received(node: Node) -> bool:
    """Whether a view is a range of a tensor that was transferred and that packs values of several readers.

    The ranges differ, so readers that take them by themselves would not be equal.
    """
    if node.target not in _RANGES:
        return False
    base = node.args[0]
    while isinstance(base, Node) and is_view(base.target):
        base = base.args[0]
    return isinstance(base, Node) and is_collective(base.target)


def element_of(node: Node) -> Element | None:
    """Returns the tensor and the index of a value in it, if a node is one."""
    if node.target is operator.getitem and node.all_input_nodes[0].target is torch.ops.aten.unbind.int:
        (tensor, *dimension), index = node.all_input_nodes[0].args, node.args[1]
    elif node.target is torch.ops.aten.select.int:
        tensor, *dimension, index = node.args
    else:
        return None
    if dimension not in ([], [0]) or not isinstance(tensor, Node) or not isinstance(index, int):
        return None
    base = tensor
    while is_taken_again(base) and base.all_input_nodes:
        base = base.all_input_nodes[0]
    return Element(tensor, index, node) if base.all_input_nodes else None


def operands(node: Node, local: Container[Node], inlined: Container[Node | Element] = ()) -> Iterator[Node | Element]:
    """Yields what an operation reads from outside of a part, in the order of its arguments.

    Args:
        node: The operation.
        local: The operations of the part.
        inlined: Operations that each part computes by itself as well.
    """
    for other in _nodes_in((node.args, node.kwargs)):
        if other in local:
            continue
        element = element_of(other)
        if element is not None:
            yield element
        elif other in inlined or is_taken_again(other):
            yield from operands(other, local, inlined)
        else:
            yield other


def structure(nodes: Sequence[Node]) -> Hashable:
    """Returns a value that is equal for lists of operations that can share compiled code."""
    local = {node: index for index, node in enumerate(nodes)}

    def described(value: Any) -> Hashable:
        if isinstance(value, Node):
            if value in local:
                return ("local", local[value])
            element = element_of(value)
            if element is not None:
                return ("element", _layout(element.value))
            if is_taken_again(value):
                return ("view", str(value.target), described((value.args, value.kwargs)))
            return _layout(value)
        if isinstance(value, list | tuple):
            return tuple(map(described, value))
        if isinstance(value, dict):
            return tuple((name, described(item)) for name, item in value.items())
        return (type(value).__name__, repr(value))

    return tuple((str(node.target), _layout(node), described((node.args, node.kwargs))) for node in nodes)


def _layout(node: Node) -> Hashable:
    return _layout_of(node.meta.get("val"))


def _layout_of(value: object) -> Hashable:
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.device)
    return tuple(map(_layout_of, value)) if isinstance(value, list | tuple) else repr(value)


def _nodes_in(value: Any) -> Iterator[Node]:
    """Yields the nodes in nested arguments, in order and as often as they occur."""
    if isinstance(value, Node):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _nodes_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _nodes_in(item)
