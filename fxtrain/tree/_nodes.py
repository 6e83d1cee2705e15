"""Paths of leaves, and nodes rebuilt with new children.

``fxtrain.tree`` shows only the leaves of a tree. These functions also see where a leaf is and which nodes contain it.
They run while ``torch.compile`` traces, where optree's paths are not available.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor

from fxtrain.core import NODES, Tree

Path = tuple[Hashable, ...]
"""The keys and indices that lead to a leaf."""


class MaskedNode(NamedTuple):
    """A placeholder for a leaf that is left out: a node without leaves."""


def children(node: Tree) -> list[tuple[Hashable, Tree]] | None:
    """Returns the children with their keys or indices, in the order of the leaves, or None for a leaf."""
    if node is None:
        return []
    kind = cast(Any, type(node))
    if kind in NODES:
        return list(enumerate(cast("list[Tree]", NODES[kind][0](node)[0])))
    if isinstance(node, dict):
        entries = cast("dict[Any, Tree]", node)
        return [(key, entries[key]) for key in sorted(entries)]
    if isinstance(node, list | tuple):
        return list(enumerate(cast("list[Tree]", node)))
    return None


def rebuilt(node: Tree, new: Sequence[Tree]) -> Tree:
    """Returns a node of the same type with other children, in the order of ``children``."""
    if node is None:
        return None
    kind = cast(Any, type(node))
    if kind in NODES:
        flatten_node, unflatten_node = NODES[kind]
        return unflatten_node(flatten_node(node)[1], new)
    if isinstance(node, dict):
        filled = dict(zip(sorted(cast("dict[Any, Tree]", node)), new, strict=True))
        return {key: filled[key] for key in cast("dict[Any, Tree]", node)}
    # Of the node and not of its type, which Dynamo of torch 2.11 cannot ask.
    return kind(*new) if hasattr(node, "_fields") else kind(new)


def leaf_paths(node: Tree) -> list[Path]:
    """Returns the path of each leaf, in the order of the leaves."""
    inner = children(node)
    if inner is None:
        return [()]
    paths: list[Path] = []
    for key, child in inner:
        # Tensors are handled here instead of in a recursive call, because Dynamo traces each call. This makes tracing
        # an optimizer over hundreds of leaves much faster. So in the functions below.
        if isinstance(child, Tensor):
            paths.append((key,))
        else:
            paths.extend((key, *rest) for rest in leaf_paths(child))
    return paths


def traced_leaves(node: Tree, is_leaf: Callable[[Tree], bool] | None = None) -> list[Tree]:
    """Returns the leaves, in order."""
    inner = None if is_leaf is not None and is_leaf(node) else children(node)
    if inner is None:
        return [node]
    found: list[Tree] = []
    for _, child in inner:
        if isinstance(child, Tensor):
            found.append(child)
        else:
            found.extend(traced_leaves(child, is_leaf))
    return found


def traced_map(
    function: Callable[..., Any],
    node: Tree,
    rest: tuple[Tree, ...],
    is_leaf: Callable[[Tree], bool] | None = None,
) -> Tree:
    """Applies ``function`` to each leaf of ``node`` and the corresponding leaves of ``rest``."""
    inner = None if is_leaf is not None and is_leaf(node) else children(node)
    if inner is None:
        return function(node, *rest)
    keys = [key for key, _ in inner]
    others: list[list[Tree]] = []
    for other in rest:
        others_inner = children(other)
        if others_inner is None or type(other) is not cast(Any, type(node)) or len(others_inner) != len(inner):
            raise ValueError(f"expected trees of the same structure, got {node} and {other}.")
        others_keys = [key for key, _ in others_inner]
        if keys != others_keys:
            raise ValueError(f"expected trees with the same keys, got {keys} and {others_keys}.")
        others.append([child for _, child in others_inner])
    new: list[Tree] = []
    for i, (_, child) in enumerate(inner):
        beside = tuple(other[i] for other in others)
        new.append(
            function(child, *beside) if isinstance(child, Tensor) else traced_map(function, child, beside, is_leaf)
        )
    return rebuilt(node, new)


def as_name(path: Path) -> str:
    """Returns the path as patterns and masks see it. For the parameters of a module, it is the parameter's name."""
    return ".".join(map(str, path))


def as_code(path: Path) -> str:
    """Returns the path as the subscripts that lead from the tree to the leaf."""
    return "".join(f"[{key!r}]" for key in path)
