"""torch's own pytrees, which ``torch.func`` flattens its arguments by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fxtrain._torch_internals.interface import Interface

REGISTER = Interface("torch.utils._pytree.register_pytree_node", "states as arguments of torch.func")
IS_LEAF = Interface("torch.utils._pytree.tree_is_leaf", "batches of classes registered with torch")
FLATTEN = Interface("torch.utils._pytree.tree_flatten", "batches of classes registered with torch")
UNFLATTEN = Interface("torch.utils._pytree.tree_unflatten", "batches of classes registered with torch")


def register_pytree_node(
    cls: type[Any],
    flatten: Callable[[Any], tuple[Sequence[Any], object]],
    unflatten: Callable[[Sequence[Any], Any], object],
    name: str,
) -> None:
    """Registers a class as a node of torch's pytrees.

    Args:
        cls: The class.
        flatten: Maps an instance to its children and its static context.
        unflatten: Maps the children and the context to an instance.
        name: The name of the class in exported programs.
    """
    if REGISTER.exists:
        REGISTER.get()(cls, flatten, unflatten, serialized_type_name=name)


def is_leaf(node: object) -> bool:
    """Whether a value is a leaf of torch's pytrees: of no registered class. True where torch cannot tell."""
    return not IS_LEAF.exists or IS_LEAF.get()(node)


def parts_of(node: object) -> tuple[list[Any], Any]:
    """Returns the children of a node, and what ``node_of_parts`` needs besides them."""
    return FLATTEN.get()(node, is_leaf=lambda part: part is not node)


def node_of_parts(context: object, children: Sequence[object]) -> Any:
    """Returns the node with these children."""
    return UNFLATTEN.get()(list(children), context)
