"""Pytrees: optree in fxtrain's namespace, and paths that read as code.

Dictionaries, lists, tuples and named tuples are nodes, and so are ``TrainState``, ``Control`` and metrics.
``None`` is an empty node. Dictionaries are flattened in the order of their sorted keys.

Inside ``torch.compile`` the same trees are walked by the few functions at the end: Dynamo's own version of optree
folds an empty dictionary that is an input into a constant that it then cannot wrap (torch 2.13, optree 0.20).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from optree import PyTreeSpec
from torch import Tensor

from fxtrain.core import NAMESPACE, NODES, ops


def map(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:  # noqa: A001
    """``function`` of each leaf of ``tree`` and of the leaves at the same places of ``rest``.

    Raises:
        ValueError: If a tree of ``rest`` has another structure.

    Example:
        >>> map(lambda a, b: a + b, {"x": 1, "y": [2]}, {"x": 10, "y": [20]})
        {'x': 11, 'y': [22]}
    """
    if torch.compiler.is_dynamo_compiling():
        return _traced_map(function, tree, rest)
    return ops.tree_map(function, tree, *rest, namespace=NAMESPACE)


def map_with_path(function: Callable[..., Any], tree: Any, *rest: Any, root: str = "") -> Any:
    """As ``map``, with each leaf's path, written as code, as the first argument.

    Example:
        >>> map_with_path(lambda path, leaf: path, {"x": [0, 0]}, root="tree")
        {'x': ["tree['x'][0]", "tree['x'][1]"]}
    """

    def with_code(accessor: Any, *leaves: Any) -> Any:
        return function(accessor.codify(root), *leaves)

    return ops.tree_map_with_accessor(with_code, tree, *rest, namespace=NAMESPACE)


def leaves(tree: Any) -> list[Any]:
    """The leaves, in order."""
    if torch.compiler.is_dynamo_compiling():
        return _traced_leaves(tree)
    return ops.tree_leaves(tree, namespace=NAMESPACE)


def paths(tree: Any, root: str = "") -> list[str]:
    """The leaves' paths, written as code that reaches them from ``root``.

    Example:
        >>> paths({"layer.weight": 0, "scale": [1.0, 2.0]}, root="params")
        ["params['layer.weight']", "params['scale'][0]", "params['scale'][1]"]
    """
    return [accessor.codify(root) for accessor in ops.tree_accessors(tree, namespace=NAMESPACE)]


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """The leaves, and the structure that ``unflatten`` takes."""
    if torch.compiler.is_dynamo_compiling():
        return _traced_leaves(tree), tree
    return ops.tree_flatten(tree, namespace=NAMESPACE)


def unflatten(structure: Any, new_leaves: Any) -> Any:
    """The tree of this structure with these leaves."""
    if torch.compiler.is_dynamo_compiling():
        remaining = iter(new_leaves)

        def take(_: Any) -> Any:
            return next(remaining)

        return _traced_map(take, structure, ())
    return ops.tree_unflatten(structure, new_leaves)


def structure(tree: Any) -> PyTreeSpec:
    """The tree without its leaves: comparable and hashable."""
    return ops.tree_structure(tree, namespace=NAMESPACE)


def where(condition: Tensor, tree: Any, other: Any) -> Any:
    """Leaf by leaf, ``tree`` where ``condition`` (bool []) holds, and ``other`` elsewhere.

    A leaf that is the same tensor in both stays that tensor.
    """

    def select(a: Tensor, b: Tensor) -> Tensor:
        return a if a is b else torch.where(condition, a, b)

    return map(select, tree, other)


def clone(tree: Any) -> Any:
    """The same values in memory of their own."""
    return map(torch.clone, tree)


def zeros_like(tree: Any) -> Any:
    """A tensor of zeros for each leaf."""
    return map(torch.zeros_like, tree)


def global_norm(tree: Any) -> Tensor:
    """The square root of the sum of all leaves' squared absolute values: a 0-d tensor.

    The sum is taken in float32 at least, so that half-precision leaves do not overflow.
    """
    squares = [_squared_norm(leaf) for leaf in leaves(tree)]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


def _squared_norm(leaf: Tensor) -> Tensor:
    real = torch.view_as_real(leaf) if leaf.is_complex() else leaf
    wide = torch.promote_types(real.dtype, torch.float32)
    return real.to(wide).square().sum()


# Tensors are told apart from nodes before recursing, which saves Dynamo a call for each leaf: tracing an optimizer
# over 300 leaves took 9 s with this, and 15 s without.


def _traced_map(function: Callable[..., Any], node: Any, rest: tuple[Any, ...]) -> Any:
    parts = _take_apart(node)
    if parts is None:
        return function(node, *rest)
    children, put_together = parts
    others: list[list[Any]] = []
    for other in rest:
        other_parts = _take_apart(other)
        if other_parts is None or type(other) is not cast(Any, type(node)) or len(other_parts[0]) != len(children):
            raise ValueError(f"The trees differ in structure: {node} and {other}.")
        if isinstance(other, dict) and _keys(node) != _keys(other):
            raise ValueError(f"The trees differ in their keys: {_keys(node)} and {_keys(other)}.")
        others.append(other_parts[0])
    new: list[Any] = []
    for i, child in enumerate(children):
        beside = [other[i] for other in others]
        new.append(
            function(child, *beside) if isinstance(child, Tensor) else _traced_map(function, child, tuple(beside))
        )
    return put_together(new)


def _traced_leaves(node: Any) -> list[Any]:
    parts = _take_apart(node)
    if parts is None:
        return [node]
    found: list[Any] = []
    for child in parts[0]:
        if isinstance(child, Tensor):
            found.append(child)
        else:
            found.extend(_traced_leaves(child))
    return found


def _take_apart(node: Any) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """The children of a node, and the function that makes it of new ones; None for a leaf."""
    if isinstance(node, Tensor):
        return None
    kind = cast(Any, type(node))
    if node is None:
        return [], lambda _: None
    if kind in NODES:
        flatten_node, unflatten_node = NODES[kind]
        children, context = flatten_node(node)
        return list(children), lambda new: unflatten_node(context, new)
    if isinstance(node, dict):
        entries = cast(dict[Any, Any], node)
        keys = _keys(entries)

        def fill(new: list[Any]) -> dict[Any, Any]:
            filled = dict(zip(keys, new, strict=True))
            return {key: filled[key] for key in entries}

        return [entries[key] for key in keys], fill
    if isinstance(node, tuple) and hasattr(cast(Any, node), "_fields"):
        return list(cast(tuple[Any, ...], node)), lambda new: kind(*new)
    if isinstance(node, list | tuple):
        return list(cast(list[Any], node)), kind
    return None


def _keys(node: Any) -> list[Any]:
    return sorted(node)
