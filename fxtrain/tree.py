"""Pytrees: optree in fxtrain's namespace, and paths that read as code.

Dictionaries, lists, tuples and named tuples are nodes, and so are ``TrainState``, ``Control`` and metrics.
``None`` is an empty node. Dictionaries are flattened in the order of their sorted keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from optree import PyTreeSpec
from torch import Tensor

from fxtrain.core import NAMESPACE, ops


def map(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:  # noqa: A001
    """``function`` of each leaf of ``tree`` and of the leaves at the same places of ``rest``.

    Raises:
        ValueError: If a tree of ``rest`` has another structure.

    Example:
        >>> map(lambda a, b: a + b, {"x": 1, "y": [2]}, {"x": 10, "y": [20]})
        {'x': 11, 'y': [22]}
    """
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
    return ops.tree_leaves(tree, namespace=NAMESPACE)


def paths(tree: Any, root: str = "") -> list[str]:
    """The leaves' paths, written as code that reaches them from ``root``.

    Example:
        >>> paths({"layer.weight": 0, "scale": [1.0, 2.0]}, root="params")
        ["params['layer.weight']", "params['scale'][0]", "params['scale'][1]"]
    """
    return [accessor.codify(root) for accessor in ops.tree_accessors(tree, namespace=NAMESPACE)]


def flatten(tree: Any) -> tuple[list[Any], PyTreeSpec]:
    """The leaves, and the structure that ``unflatten`` takes."""
    return ops.tree_flatten(tree, namespace=NAMESPACE)


def unflatten(structure: PyTreeSpec, new_leaves: Any) -> Any:
    """The tree of this structure with these leaves."""
    return ops.tree_unflatten(structure, new_leaves)


def structure(tree: Any) -> PyTreeSpec:
    """The tree without its leaves: comparable and hashable."""
    return ops.tree_structure(tree, namespace=NAMESPACE)


def where(condition: Tensor, tree: Any, other: Any) -> Any:
    """Leaf by leaf, ``tree`` where ``condition`` (bool []) holds, and ``other`` elsewhere."""

    def select(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(condition, a, b)

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


def devices(tree: Any) -> set[torch.device]:
    """The devices that hold the leaves."""
    return {leaf.device for leaf in leaves(tree)}
