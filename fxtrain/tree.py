"""Pytree functions: optree in fxtrain's namespace, with paths written as code.

Dictionaries, lists, tuples and named tuples are nodes, as are ``TrainState``, ``Control`` and metrics. ``None`` is an
empty node. Dictionaries are flattened in the order of their sorted keys.

Inside ``torch.compile``, trees are flattened by the functions at the end of this file instead, because Dynamo's version
of optree fails on an input that is an empty dictionary (torch 2.13, optree 0.20).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from optree import PyTreeSpec
from torch import Tensor

from fxtrain.core import NAMESPACE, NODES, ops


def map(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:  # noqa: A001
    """Applies ``function`` to each leaf of ``tree`` and the corresponding leaves of ``rest``.

    Args:
        function: Called with one leaf of each tree.
        tree: The tree that determines the structure of the result.
        rest: More trees of the same structure.

    Raises:
        ValueError: If a tree of ``rest`` has a different structure.

    Example:
        >>> map(lambda a, b: a + b, {"x": 1, "y": [2]}, {"x": 10, "y": [20]})
        {'x': 11, 'y': [22]}
    """
    if torch.compiler.is_dynamo_compiling():
        return _traced_map(function, tree, rest)
    return ops.tree_map(function, tree, *rest, namespace=NAMESPACE)


def map_with_path(function: Callable[..., Any], tree: Any, *rest: Any, root: str = "") -> Any:
    """Like ``map``, but also passes each leaf's path, as the first argument.

    Args:
        function: Called with the path, written as code, and one leaf of each tree.
        tree: The tree that determines the structure of the result.
        rest: More trees of the same structure.
        root: The name of the tree, with which paths begin.

    Example:
        >>> map_with_path(lambda path, leaf: path, {"x": [0, 0]}, root="tree")
        {'x': ["tree['x'][0]", "tree['x'][1]"]}
    """

    def with_code(accessor: Any, *leaves: Any) -> Any:
        return function(accessor.codify(root), *leaves)

    return ops.tree_map_with_accessor(with_code, tree, *rest, namespace=NAMESPACE)


def leaves(tree: Any) -> list[Any]:
    """Returns the leaves, in order."""
    if torch.compiler.is_dynamo_compiling():
        return _traced_leaves(tree)
    return ops.tree_leaves(tree, namespace=NAMESPACE)


def paths(tree: Any, root: str = "") -> list[str]:
    """Returns the path of each leaf, written as code that accesses it from ``root``.

    Args:
        tree: The tree.
        root: The name of the tree, with which paths begin.

    Example:
        >>> paths({"layer.weight": 0, "scale": [1.0, 2.0]}, root="params")
        ["params['layer.weight']", "params['scale'][0]", "params['scale'][1]"]
    """
    return [accessor.codify(root) for accessor in ops.tree_accessors(tree, namespace=NAMESPACE)]


def flatten(tree: Any) -> tuple[list[Any], Any]:
    """Returns the leaves and the structure, from which ``unflatten`` rebuilds the tree."""
    if torch.compiler.is_dynamo_compiling():
        return _traced_leaves(tree), tree
    return ops.tree_flatten(tree, namespace=NAMESPACE)


def unflatten(structure: Any, new_leaves: Any) -> Any:
    """Builds a tree from its structure and new leaves.

    Args:
        structure: The structure, from ``flatten``.
        new_leaves: As many leaves as the structure has, in order.

    Example:
        >>> leaves, structure = flatten({"x": 1, "y": [2]})
        >>> unflatten(structure, [10, 20])
        {'x': 10, 'y': [20]}
    """
    if torch.compiler.is_dynamo_compiling():
        remaining = iter(new_leaves)

        def take(_: Any) -> Any:
            return next(remaining)

        return _traced_map(take, structure, ())
    return ops.tree_unflatten(structure, new_leaves)


def structure(tree: Any) -> PyTreeSpec:
    """Returns the structure of the tree, which is comparable and hashable."""
    return ops.tree_structure(tree, namespace=NAMESPACE)


def where(condition: Tensor, tree: Any, other: Any) -> Any:
    """Selects the leaves of ``tree`` if ``condition`` holds and those of ``other`` if not.

    A leaf that is the same tensor in both trees is returned as it is.

    Args:
        condition: bool [].
        tree: A tree of tensors.
        other: A tree of the same structure, shapes and dtypes.

    Example:
        >>> where(torch.tensor(False), {"x": torch.tensor(1)}, {"x": torch.tensor(2)})
        {'x': tensor(2)}
    """

    def select(a: Tensor, b: Tensor) -> Tensor:
        return a if a is b else torch.where(condition, a, b)

    return map(select, tree, other)


def clone(tree: Any) -> Any:
    """Clones every leaf."""
    return map(torch.clone, tree)


def zeros_like(tree: Any) -> Any:
    """Returns a tree of zeros with the shapes and dtypes of ``tree``."""
    return map(torch.zeros_like, tree)


def global_norm(tree: Any) -> Tensor:
    """Returns the L2 norm over all elements of all leaves: a 0-d tensor, float32 or wider.

    Squares are summed in float32 or wider, so that half-precision leaves do not overflow.

    Example:
        >>> global_norm({"weight": torch.tensor([3.0]), "bias": torch.tensor([4.0])})
        tensor(5.)
    """
    squares = [_squared_norm(leaf) for leaf in leaves(tree)]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


def _squared_norm(leaf: Tensor) -> Tensor:
    real = torch.view_as_real(leaf) if leaf.is_complex() else leaf
    wide = torch.promote_types(real.dtype, torch.float32)
    return real.to(wide).square().sum()


# Tensors are recognized before recursing, because Dynamo traces each call: this makes tracing an optimizer over
# hundreds of leaves much faster.


def _traced_map(function: Callable[..., Any], node: Any, rest: tuple[Any, ...]) -> Any:
    parts = _take_apart(node)
    if parts is None:
        return function(node, *rest)
    children, put_together = parts
    others: list[list[Any]] = []
    for other in rest:
        other_parts = _take_apart(other)
        if other_parts is None or type(other) is not cast(Any, type(node)) or len(other_parts[0]) != len(children):
            raise ValueError(f"expected trees of the same structure, got {node} and {other}.")
        if isinstance(other, dict) and _keys(node) != _keys(other):
            raise ValueError(f"expected trees with the same keys, got {_keys(node)} and {_keys(other)}.")
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
    """Returns the children of a node and a function that rebuilds it from new ones; None for a leaf."""
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
