"""Paths of leaves, and nodes rebuilt with new children.

``fxtrain.tree`` sees only the leaves of a tree. These functions also see where a leaf is and which nodes contain it.
They run while ``torch.compile`` traces, where optree's paths are not available.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor

from fxtrain.core import NODES

Path = tuple[Any, ...]
"""The keys and indices that lead to a leaf."""


class MaskedNode(NamedTuple):
    """A placeholder for a leaf that is left out: a node without leaves."""


def children(node: Any) -> list[tuple[Any, Any]] | None:
    """Returns the children with their keys or indices, in the order of the leaves, or None for a leaf."""
    if node is None:
        return []
    if isinstance(node, dict):
        entries = cast(dict[Any, Any], node)
        return [(key, entries[key]) for key in sorted(entries)]
    if isinstance(node, list | tuple):
        return list(enumerate(cast(list[Any], node)))
    kind = cast(Any, type(node))
    if kind not in NODES:
        return None
    of_node = cast(list[Any], NODES[kind][0](node)[0])
    return list(enumerate(of_node))


def rebuilt(node: Any, new: list[Any]) -> Any:
    """Returns a node of the same type with other children, in the order of ``children``."""
    if node is None:
        return None
    if isinstance(node, dict):
        filled = dict(zip(sorted(cast(dict[Any, Any], node)), new, strict=True))
        return {key: filled[key] for key in cast(dict[Any, Any], node)}
    kind = cast(Any, type(node))
    if isinstance(node, list | tuple):
        return kind(*new) if hasattr(cast(Any, node), "_fields") else kind(new)
    flatten_node, unflatten_node = NODES[kind]
    return unflatten_node(flatten_node(node)[1], new)


def leaf_paths(values: Any) -> list[Path]:
    """Returns the path of each leaf, in the order of the leaves."""
    inner = children(values)
    if inner is None:
        return [()]
    paths: list[Path] = []
    for key, child in inner:
        # Handled here instead of in a recursive call, because calls slow down tracing.
        if isinstance(child, Tensor):
            paths.append((key,))
        else:
            paths.extend((key, *rest) for rest in leaf_paths(child))
    return paths


def as_name(path: Path) -> str:
    """Returns the path as patterns and masks see it. For the parameters of a module, it is the parameter's name."""
    return ".".join(map(str, path))


def as_code(path: Path) -> str:
    """Returns the path as the subscripts that lead from the tree to the leaf."""
    return "".join(f"[{key!r}]" for key in path)
