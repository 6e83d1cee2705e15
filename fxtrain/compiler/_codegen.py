"""Generates functions that build a tree of known structure from its leaves.

The counterpart of ``walk_like``. Immutable subtrees without leaves are built once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fxtrain import tree
from fxtrain.compiler._constants import Constants
from fxtrain.core import NODES

Assembler = Callable[[Sequence[Any]], Any]


def assembler(structure: Any) -> Assembler:
    """Returns a function that builds a tree from its leaves, in order.

    Args:
        structure: A tree structure from ``fxtrain.tree``.

    Example:
        >>> make = assembler(tree.structure({"a": 0, "b": (1, [])}))
        >>> make([10, 11])
        {'a': 10, 'b': (11, [])}
    """
    count = structure.num_leaves
    places = [_Place(index) for index in range(count)]
    writer = _Writer()
    expression = writer.node(tree.unflatten(structure, places))
    if expression is None:
        return lambda leaves: tree.unflatten(structure, leaves)
    exec(compile(f"def assemble(leaves):\n    return {expression}\n", "<assembly>", "exec"), writer.constants)
    return writer.constants["assemble"]


class _Place:
    """Marks the position of a leaf in a tree."""

    def __init__(self, index: int) -> None:
        self.index = index


class _Writer(Constants):
    """Writes the expression that builds a tree."""

    def node(self, node: Any) -> str | None:
        """Returns the expression that builds ``node``, or None if its type is not supported."""
        kind = type(node)
        if node is None:
            return "None"
        if kind is _Place:
            return f"leaves[{node.index}]"
        if kind in NODES:
            if not tree.leaves(node):
                return self.constant(node)  # registered nodes are frozen, so they can be shared
            flatten, unflatten = NODES[kind]
            children, context = flatten(node)
            parts = self._parts(children)
            return parts and f"{self.constant(unflatten)}({self.constant(context)}, [{parts}])"
        if kind is dict:
            keys = [self.key(key) for key in node]
            parts = [self.node(value) for value in node.values()]
            if None in parts:
                return None
            return f"{{{', '.join(f'{key}: {part}' for key, part in zip(keys, parts, strict=True))}}}"
        if kind is list:
            return self._within("[{}]", node)
        if kind is tuple:
            return self._within("({},)", node) if node else "()"
        if isinstance(node, tuple) and hasattr(kind, "_fields"):
            return self._within(f"{self.constant(kind)}({{}})", node)
        return None

    def _within(self, template: str, children: Sequence[Any]) -> str | None:
        parts = self._parts(children)
        return None if parts is None else template.format(parts)

    def _parts(self, children: Sequence[Any]) -> str | None:
        parts = [self.node(child) for child in children]
        return None if None in parts else ", ".join(part for part in parts if part is not None)
