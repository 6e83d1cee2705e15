"""Generates functions that build a tree of known structure from its leaves.

The counterpart of ``generate_flatten``. Immutable subtrees without leaves are built once.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, cast

from optree import PyTreeSpec, is_namedtuple_class

from fxtrain.core import NODES, Tree
from fxtrain.tree._generated_code import CodeWriter
from fxtrain.tree._map import leaves, unflatten

Unflatten = Callable[[Sequence[Any]], Tree]


def generate_unflatten(structure: PyTreeSpec) -> Unflatten:
    """Returns a function that builds a tree from its leaves, in order.

    Args:
        structure: The structure, from ``flatten``.

    Example:
        >>> from fxtrain.tree import structure
        >>> unflatten = generate_unflatten(structure({"a": 0, "b": (1, [])}))
        >>> unflatten([10, 11])
        {'a': 10, 'b': (11, [])}
    """
    count = structure.num_leaves
    places = [_Place(index) for index in range(count)]
    writer = _Writer()
    expression = writer.node(unflatten(structure, places))
    if expression is None:
        return lambda new_leaves: unflatten(structure, new_leaves)
    source = f"def unflatten(leaves):\n    return {expression}\n"
    exec(compile(source, "<generated unflatten>", "exec"), writer.constants)
    generated = writer.constants["unflatten"]
    assert isinstance(generated, types.FunctionType)
    return generated


class _Place:
    """Marks the position of a leaf in a tree."""

    def __init__(self, index: int) -> None:
        self.index = index


class _Writer(CodeWriter):
    """Writes the expression that builds a tree."""

    def node(self, node: Tree) -> str | None:
        """Returns the expression that builds ``node``, or None if its type is not supported."""
        kind = cast(Any, type(node))
        if node is None:
            return "None"
        if kind is _Place:
            return f"leaves[{node.index}]"
        if kind in NODES:
            if not leaves(node):
                return self.constant(node)  # registered nodes are frozen, so they can be shared
            flatten_node, unflatten_node = NODES[kind]
            children, context = flatten_node(node)
            parts = self._parts(children)
            return parts and f"{self.constant(unflatten_node)}({self.constant(context)}, [{parts}])"
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
        if is_namedtuple_class(kind):
            return self._within(f"{self.constant(kind)}({{}})", node)
        return None

    def _within(self, template: str, children: Sequence[Tree]) -> str | None:
        parts = self._parts(children)
        return None if parts is None else template.format(parts)

    def _parts(self, children: Sequence[Tree]) -> str | None:
        parts = [self.node(child) for child in children]
        return None if None in parts else ", ".join(part for part in parts if part is not None)
