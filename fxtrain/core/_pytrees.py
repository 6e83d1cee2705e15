"""Registration: one call makes a class a node for optree and for torch's own pytree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch.utils._pytree as torch_pytree  # torch.func flattens with it, and torch has no public door for static data

NAMESPACE = "fxtrain"
"""The optree namespace in which fxtrain's nodes are registered."""

NODES: dict[type[Any], tuple[Callable[..., Any], Callable[..., Any]]] = {}
"""The registered classes, with how to take each apart and put it together."""

ops: Any = optree
"""optree, untyped: its annotations speak of collections, and a frozen dataclass is none."""


def register_node(
    cls: type[Any],
    flatten: Callable[[Any], tuple[Sequence[Any], Any]],
    unflatten: Callable[[Any, Sequence[Any]], Any],
    *,
    fields: Sequence[str] | None = None,
) -> None:
    """Makes ``cls`` a pytree node.

    Args:
        cls: The class.
        flatten: From an instance to its children and its static context, which must compare and hash.
        unflatten: From the context and the children to an instance. Transforms call it with children that are
            no tensors, so it checks nothing.
        fields: The attributes that hold the children, where each is one; paths then read ``x.name``.
    """

    NODES[cls] = (flatten, unflatten)

    def flatten_for_optree(node: Any) -> tuple[Any, ...]:
        children, context = flatten(node)
        return (children, context) if fields is None else (children, context, tuple(fields))

    ops.register_pytree_node(
        cls,
        flatten_for_optree,
        unflatten,
        path_entry_type=optree.FlattenedEntry if fields is None else optree.GetAttrEntry,
        namespace=NAMESPACE,
    )

    def flatten_for_torch(node: Any) -> tuple[list[Any], Any]:
        children, context = flatten(node)
        return list(children), context

    torch_pytree.register_pytree_node(
        cls,
        flatten_for_torch,
        lambda children, context: unflatten(context, list(children)),
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )
