"""Trees node by node: the paths of leaves, and nodes that are made anew with other children.

``fxtrain.tree`` walks trees by their leaves. Here it matters where a leaf is and what stands around it, and it must
be found out while ``torch.compile`` traces, which knows no paths.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor

from fxtrain.core import NODES

Path = tuple[Any, ...]
"""The keys and indices that lead to a leaf."""


class MaskedNode(NamedTuple):
    """What stands in a tree in the place of a leaf that is left out: a node without leaves."""


def children(node: Any) -> list[tuple[Any, Any]] | None:
    """The children with their keys or indices, in the order of the leaves; None for a leaf."""
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
    """A node of the same kind with other children, in the order that ``children`` has."""
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
    """The path of each leaf, in the order of the leaves."""
    inner = children(values)
    if inner is None:
        return [()]
    paths: list[Path] = []
    for key, child in inner:
        # Looking here, and not in a call, halves the time that the tracer takes for a tree.
        if isinstance(child, Tensor):
            paths.append((key,))
        else:
            paths.extend((key, *rest) for rest in leaf_paths(child))
    return paths


def as_name(path: Path) -> str:
    """The path as patterns and masks see it: for the parameters of a module, the parameter's name."""
    return ".".join(map(str, path))


def as_code(path: Path) -> str:
    """The path as it is written behind the name of the tree."""
    return "".join(f"[{key!r}]" for key in path)
