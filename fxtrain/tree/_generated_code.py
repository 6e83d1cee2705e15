"""Generates functions that flatten a tree of known structure, or build it from its leaves.

A generic flatten dispatches on the type of each node. The generated code accesses each leaf directly and checks the
structure on the way, which takes a fraction of the time. A tree is built from its leaves in the same way, and its
immutable subtrees without leaves are built once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, cast

from optree import PyTreeSpec, is_namedtuple_class
from torch import Tensor

from fxtrain.core import NODES, TrainState, Tree
from fxtrain.core._state import FIELDS
from fxtrain.tree._map import accessors, leaves, unflatten


class _CodeWriter:
    """Collects the values to which generated code refers, and defines the function."""

    def __init__(self) -> None:
        self._namespace: dict[str, Any] = {"OtherStructureError": OtherStructureError, "Tensor": Tensor}

    def constant(self, value: object) -> str:
        """Adds a value to the namespace and returns its name."""
        name = f"c{len(self._namespace)}"
        self._namespace[name] = value
        return name

    def define(self, name: str, source: str) -> Any:
        """Returns the function ``name`` that ``source`` defines."""
        exec(compile(source, f"<generated {name}>", "exec"), self._namespace)
        return self._namespace[name]

    def key(self, key: Hashable) -> str:
        """Returns the code of a dict key."""
        return repr(key) if type(key) in (str, int) else self.constant(key)


Flatten = Callable[[Tree], tuple[list[Tensor], list[object]]]
"""From a tree to its leaves, in order, and its containers. Raises ``OtherStructureError`` for other structures."""


class OtherStructureError(Exception):
    """The tree does not have the structure that the function was generated for."""


def generate_flatten(
    tree: Tree,
    *,
    without: frozenset[str] = frozenset(),
    slots: frozenset[str] | None = None,
    exact: bool = False,
    ordered: bool = False,
) -> Flatten | None:
    """Generates a function from a tree with the structure of ``tree`` to its leaves, in order, and its containers.

    Args:
        tree: A state, or any pytree of tensors.
        without: Fields of a state to skip.
        slots: The slots of a state to include, by default all. Other slots may be added or removed.
        exact: Whether to check the shape, dtype, strides and device of each leaf too.
        ordered: Whether to check the order of keys too, which code that iterates over a dict sees.

    Returns:
        The function, or None if the type of a node is not supported. It raises ``OtherStructureError`` for a tree of
        another structure.
    """
    writer = _FlattenWriter(without, slots, exact, ordered)
    if not writer.node(tree, "root"):
        return None
    body = "\n".join(f"        {line}" for line in writer.lines)
    source = (
        f"def flatten(root):\n    try:\n{body or '        pass'}\n"
        "    except (KeyError, AttributeError, IndexError, TypeError):\n        raise OtherStructureError from None\n"
        f"    return [{', '.join(writer.leaves)}], [{', '.join(writer.containers)}]\n"
    )
    return writer.define("flatten", source)


class _FlattenWriter(_CodeWriter):
    """Writes the lines that flatten one tree."""

    def __init__(self, without: frozenset[str], slots: frozenset[str] | None, exact: bool, ordered: bool) -> None:
        super().__init__()
        self._without, self._slots, self._exact, self._ordered = without, slots, exact, ordered
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
            keys = f"[*{name}] == {self.constant([*node])}" if self._ordered else f"len({name}) == {len(node)}"
            self._unless(f"type({name}) is dict and {keys}")
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
                f"and {name}.device == {device} and not {name}.is_neg() and not {name}.is_conj()"
            )
        self.leaves.append(name)
        return True

    def _registered(self, node: Tree, name: str) -> bool:
        kind = cast(Any, type(node))
        flatten = NODES[kind][0]
        children, context = flatten(node)
        self._unless(f"type({name}) is {self.constant(kind)}")
        self.containers.append(name)
        parts = self._assigned(f"{self.constant(flatten)}({name})")
        self._unless(f"{parts}[1] == {self.constant(context)} and len({parts}[0]) == {len(children)}")
        return all(self._child(child, f"{parts}[0][{index}]") for index, child in enumerate(children))

    def _some_slots(self, slots: dict[str, Tree], reached: str, chosen: frozenset[str]) -> bool:
        name = self._assigned(reached)
        self._unless(f"type({name}) is dict")
        self.containers.append(name)
        return all(self._child(slots[key], f"{name}[{key!r}]") for key in _ordered(slots) if key in chosen)

    def _child(self, child: Tree, reached: str) -> bool:
        return self.node(child, self._assigned(reached))

    def _unless(self, condition: str) -> None:
        self.lines.append(f"if not ({condition}): raise OtherStructureError")

    def _assigned(self, expression: str) -> str:
        """Adds a line that assigns the expression to a new variable, and returns its name."""
        self._count += 1
        self.lines.append(f"n{self._count} = {expression}")
        return f"n{self._count}"


def _ordered(node: Mapping[str, Tree]) -> list[str]:
    """Returns the keys in the order of the leaves."""
    return [accessor[0].entry for accessor in accessors(node, is_leaf=lambda part: part is not node)]


def generate_unflatten(structure: PyTreeSpec) -> Callable[[Sequence[Any]], Tree]:
    """Returns a function that builds a tree from its leaves, in order.

    Args:
        structure: The structure, from ``flatten``.

    Example:
        >>> from fxtrain.tree import structure
        >>> unflatten = generate_unflatten(structure({"a": 0, "b": (1, [])}))
        >>> unflatten([10, 11])
        {'a': 10, 'b': (11, [])}
    """
    writer = _UnflattenWriter()
    expression = writer.node(unflatten(structure, map(_Place, range(structure.num_leaves))))
    if expression is None:
        return lambda new_leaves: unflatten(structure, new_leaves)
    return writer.define("unflatten", f"def unflatten(leaves):\n    return {expression}\n")


class _Place:
    """Marks the position of a leaf in a tree."""

    def __init__(self, index: int) -> None:
        self.index = index


class _UnflattenWriter(_CodeWriter):
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
            entries = {self.key(key): self.node(value) for key, value in node.items()}
            if None in entries.values():
                return None
            return f"{{{', '.join(f'{key}: {part}' for key, part in entries.items())}}}"
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
