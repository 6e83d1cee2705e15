"""Generates functions that flatten a tree of known structure.

A generic flatten dispatches on the type of each node. The generated code accesses each leaf directly and checks the
structure on the way, which takes a fraction of the time.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, cast

from optree import is_namedtuple_class
from torch import Tensor

from fxtrain.core import NODES, TrainState, Tree
from fxtrain.core._state import FIELDS
from fxtrain.tree._generated_code import CodeWriter
from fxtrain.tree._map import accessors

Flatten = Callable[[Tree], tuple[list[Tensor], list[object]]]
"""From a tree to its leaves, in order, and its containers. Raises ``OtherStructureError`` for other structures."""


class OtherStructureError(Exception):
    """The tree does not have the structure that the function was generated for."""


def generate_flatten(
    tree: Tree, *, without: frozenset[str] = frozenset(), slots: frozenset[str] | None = None, exact: bool = False
) -> Flatten | None:
    """Generates a function from a tree with the structure of ``tree`` to its leaves, in order, and its containers.

    Args:
        tree: A state, or any pytree of tensors.
        without: Fields of a state to skip.
        slots: The slots of a state to include, by default all. Other slots may be added or removed.
        exact: Whether to check the shape, dtype, strides and device of each leaf too.

    Returns:
        The function, or None if the type of a node is not supported. It raises ``OtherStructureError`` for a tree of
        another structure.
    """
    writer = _Writer(without, slots, exact)
    if not writer.node(tree, "root"):
        return None
    body = "\n".join(f"        {line}" for line in writer.lines)
    source = (
        f"def flatten(root):\n    try:\n{body or '        pass'}\n"
        "    except (KeyError, AttributeError, IndexError, TypeError):\n        raise OtherStructureError from None\n"
        f"    return [{', '.join(writer.leaves)}], [{', '.join(writer.containers)}]\n"
    )
    names: dict[str, object] = {"OtherStructureError": OtherStructureError, "Tensor": Tensor, **writer.constants}
    exec(compile(source, "<generated flatten>", "exec"), names)
    flatten = names["flatten"]
    assert isinstance(flatten, types.FunctionType)
    return flatten


class _Writer(CodeWriter):
    """Writes the lines that flatten one tree."""

    def __init__(self, without: frozenset[str], slots: frozenset[str] | None, exact: bool) -> None:
        super().__init__()
        self._without, self._slots, self._exact = without, slots, exact
        self.lines: list[str] = []
        self.leaves: list[str] = []
        self.containers: list[str] = []
        self._count = 0

    def node(self, node: Tree, name: str) -> bool:
        """Adds lines for the node in the variable ``name``. Returns False if its type is not supported."""
        kind = cast(Any, type(node))
        if node is None:
            self._unless(f"{name} is None")
            return True
        if kind is TrainState:
            model = self.constant(node.model)
            same = f"({name}.model is {model} or {name}.model == {model})"
            self._unless(f"type({name}) is {self.constant(kind)} and {same}")
            fields = [field for field in FIELDS if field not in self._without]
            return all(
                self._some_slots(node.slots, f"{name}.slots", self._slots)
                if field == "slots" and self._slots is not None
                else self._child(getattr(node, field), f"{name}.{field}")
                for field in fields
            )
        if kind in NODES:
            return self._registered(node, name)
        if kind is dict:
            self._unless(f"type({name}) is dict and len({name}) == {len(node)}")
            self.containers.append(name)
            return all(self._child(node[key], f"{name}[{self.key(key)}]") for key in _ordered(node))
        if kind in (list, tuple) or is_namedtuple_class(kind):
            self._unless(f"type({name}) is {self.constant(kind)} and len({name}) == {len(node)}")
            if node:
                # The empty tuple is a singleton, so its reference count tells nothing about this tree.
                self.containers.append(name)
            return all(self._child(child, f"{name}[{index}]") for index, child in enumerate(node))
        if not isinstance(node, Tensor):
            return False
        self._unless(f"isinstance({name}, Tensor)")
        if self._exact:
            shape, dtype, stride, device = map(self.constant, (node.shape, node.dtype, node.stride(), node.device))
            self._unless(
                f"{name}.shape == {shape} and {name}.dtype is {dtype} and {name}.stride() == {stride} "
                f"and {name}.device == {device}"
            )
        self.leaves.append(name)
        return True

    def _registered(self, node: Tree, name: str) -> bool:
        kind = cast(Any, type(node))
        flatten = NODES[kind][0]
        children, context = flatten(node)
        self._unless(f"type({name}) is {self.constant(kind)}")
        self.containers.append(name)
        parts = self._variable()
        self.lines.append(f"{parts} = {self.constant(flatten)}({name})")
        self._unless(f"{parts}[1] == {self.constant(context)} and len({parts}[0]) == {len(children)}")
        return all(self._child(child, f"{parts}[0][{index}]") for index, child in enumerate(children))

    def _some_slots(self, slots: dict[str, Tree], reached: str, chosen: frozenset[str]) -> bool:
        name = self._variable()
        self.lines.append(f"{name} = {reached}")
        self._unless(f"type({name}) is dict")
        self.containers.append(name)
        return all(self._child(slots[key], f"{name}[{key!r}]") for key in _ordered(slots) if key in chosen)

    def _child(self, child: Tree, reached: str) -> bool:
        name = self._variable()
        self.lines.append(f"{name} = {reached}")
        return self.node(child, name)

    def _unless(self, condition: str) -> None:
        self.lines.append(f"if not ({condition}): raise OtherStructureError")

    def _variable(self) -> str:
        self._count += 1
        return f"n{self._count}"


def _ordered(node: Mapping[str, Tree]) -> list[str]:
    """Returns the keys in the order of the leaves."""
    return [accessor[0].entry for accessor in accessors(node, is_leaf=lambda part: part is not node)]
