"""Flattening, mapping and paths, by optree or, inside ``torch.compile``, by functions that Dynamo traces.

Dynamo's version of optree fails on an input that is an empty dictionary (torch 2.13, optree 0.20).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from optree import PyTreeAccessor, PyTreeSpec

from fxtrain.core import NAMESPACE, Tree, ops
from fxtrain.tree._nodes import traced_leaves, traced_map

IsLeaf = Callable[[Tree], bool]


def map(  # noqa: A001
    function: Callable[..., Any],
    tree: Tree,
    *rest: Tree,
    is_leaf: IsLeaf | None = None,
    none_is_leaf: bool = False,
) -> Tree:
    """Applies ``function`` to each leaf of ``tree`` and the corresponding leaves of ``rest``.

    Args:
        function: Called with one leaf of each tree.
        tree: The tree that determines the structure of the result.
        rest: More trees of the same structure.
        is_leaf: Nodes of ``tree`` for which it returns True are passed to ``function`` as they are.
        none_is_leaf: Whether None is a leaf instead of an empty node.

    Raises:
        ValueError: If a tree of ``rest`` has a different structure.

    Example:
        >>> map(lambda a, b: a + b, {"x": 1, "y": [2]}, {"x": 10, "y": [20]})
        {'x': 11, 'y': [22]}
    """
    if torch.compiler.is_dynamo_compiling():
        return traced_map(function, tree, rest, is_leaf)
    return ops.tree_map(function, tree, *rest, is_leaf=is_leaf, none_is_leaf=none_is_leaf, namespace=NAMESPACE)


def map_with_path(
    function: Callable[..., Any], tree: Tree, *rest: Tree, root: str = "", is_leaf: IsLeaf | None = None
) -> Tree:
    """Like ``map``, but also passes each leaf's path, as the first argument.

    Args:
        function: Called with the path, written as code, and one leaf of each tree.
        tree: The tree that determines the structure of the result.
        rest: More trees of the same structure.
        root: The name of the tree, with which paths begin.
        is_leaf: Nodes of ``tree`` for which it returns True are passed to ``function`` as they are.

    Example:
        >>> map_with_path(lambda path, leaf: path, {"x": [0, 0]}, root="tree")
        {'x': ["tree['x'][0]", "tree['x'][1]"]}
    """

    def with_code(accessor: PyTreeAccessor, *leaves: Any) -> Any:
        return function(accessor.codify(root), *leaves)

    return ops.tree_map_with_accessor(with_code, tree, *rest, is_leaf=is_leaf, namespace=NAMESPACE)


def leaves(tree: Tree, *, is_leaf: IsLeaf | None = None, none_is_leaf: bool = False) -> list[Any]:
    """Returns the leaves, in order.

    Args:
        tree: The tree.
        is_leaf: Nodes for which it returns True are leaves.
        none_is_leaf: Whether None is a leaf instead of an empty node.

    Example:
        >>> leaves({"y": [2, 3], "x": 1})
        [1, 2, 3]
    """
    if torch.compiler.is_dynamo_compiling():
        return traced_leaves(tree, is_leaf)
    return ops.tree_leaves(tree, is_leaf=is_leaf, none_is_leaf=none_is_leaf, namespace=NAMESPACE)


def paths(tree: Tree, root: str = "", *, is_leaf: IsLeaf | None = None) -> list[str]:
    """Returns the path of each leaf, written as code that accesses it from ``root``.

    Args:
        tree: The tree.
        root: The name of the tree, with which paths begin.
        is_leaf: Nodes for which it returns True are leaves.

    Example:
        >>> paths({"layer.weight": 0, "scale": [1.0, 2.0]}, root="params")
        ["params['layer.weight']", "params['scale'][0]", "params['scale'][1]"]
    """
    return [accessor.codify(root) for accessor in accessors(tree, is_leaf=is_leaf)]


def accessors(tree: Tree, *, is_leaf: IsLeaf | None = None) -> list[PyTreeAccessor]:
    """Returns optree's accessor of each leaf: ``.path`` holds its keys, ``.codify(root)`` its path as code.

    Args:
        tree: The tree.
        is_leaf: Nodes for which it returns True are leaves.
    """
    return ops.tree_accessors(tree, is_leaf=is_leaf, namespace=NAMESPACE)


def flatten(tree: Tree, *, is_leaf: IsLeaf | None = None) -> tuple[list[Any], PyTreeSpec]:
    """Returns the leaves and the structure, from which ``unflatten`` rebuilds the tree.

    Args:
        tree: The tree.
        is_leaf: Nodes for which it returns True are leaves.

    Example:
        >>> leaves, structure = flatten({"x": 1, "y": [2]})
        >>> leaves, structure.num_leaves
        ([1, 2], 2)
    """
    if torch.compiler.is_dynamo_compiling():
        traced_structure: Any = tree
        return traced_leaves(tree, is_leaf), traced_structure
    return ops.tree_flatten(tree, is_leaf=is_leaf, namespace=NAMESPACE)


def unflatten(structure: PyTreeSpec, new_leaves: Iterable[Any]) -> Tree:
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

        def take(_: object) -> Any:
            return next(remaining)

        return traced_map(take, structure, ())
    return ops.tree_unflatten(structure, new_leaves)


def structure(tree: Tree) -> PyTreeSpec:
    """Returns the structure of the tree, which is comparable and hashable.

    Example:
        >>> structure({"x": 1}) == structure({"x": 2}), structure({"x": 1}) == structure({"y": 1})
        (True, False)
    """
    if torch.compiler.is_dynamo_compiling():
        return flatten(tree)[1]  # what `unflatten` expects there
    return ops.tree_structure(tree, namespace=NAMESPACE)
