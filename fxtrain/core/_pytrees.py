"""Registration of pytree nodes, with optree and with torch's own pytree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import optree

from fxtrain._torch_internals.pytree import register_pytree_node
from fxtrain.core._types import Tree

T = TypeVar("T")

NAMESPACE = "fxtrain"
"""The optree namespace in which fxtrain's nodes are registered."""

NODES: dict[type[Any], tuple[Callable[..., Any], Callable[..., Any]]] = {}
"""The flatten and unflatten functions of each registered class."""

ops: Any = optree
"""optree without its types, which accept collections only and so reject frozen dataclasses."""


def register_node(
    cls: type[T],
    flatten: Callable[[T], tuple[Sequence[Tree], object]],
    unflatten: Callable[[Any, Sequence[Tree]], T],
    *,
    fields: Sequence[str] | None = None,
) -> None:
    """Registers ``cls`` as a pytree node.

    Args:
        cls: The class.
        flatten: Maps an instance to its children and its static context, which must be comparable and hashable.
        unflatten: Maps the context and the children to an instance. Transforms also call it with children that are
            not tensors, so it must not validate them.
        fields: The attributes that hold the children, if there is one for each. Paths then read ``x.name``.
    """

    NODES[cls] = (flatten, unflatten)

    def flatten_for_optree(node: T) -> tuple[object, ...]:
        return (*flatten(node), fields)

    ops.register_pytree_node(
        cls,
        flatten_for_optree,
        unflatten,
        path_entry_type=optree.FlattenedEntry if fields is None else optree.GetAttrEntry,
        namespace=NAMESPACE,
    )
    name = f"{cls.__module__}.{cls.__qualname__}"
    register_pytree_node(cls, flatten, lambda children, context: unflatten(context, children), name)
