"""torch_geometric graphs as pytree nodes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import optree

from fxtrain import tree
from fxtrain.core import Batch, Tree

Parts = tuple[Sequence[Tree], object, Sequence[object]]
"""The children of a pytree node, its static context, and the keys or names of the children."""


Graph = Any
"""A graph object of torch_geometric. Each of its ``stores`` holds the attributes of the nodes or edges of one type."""


def is_graph(node: object) -> bool:
    """Whether this is a torch_geometric graph, whose tensors have no common first dimension."""
    return _is_graph_class(type(node))


def holds_graph(batch: Batch) -> bool:
    """Whether a batch contains a torch_geometric graph."""
    return any(map(is_graph, tree.leaves(batch, is_leaf=is_graph)))


class GraphShell:
    """A graph object without its tensors, as the static part of a pytree node.

    Two shells are equal if their class, attribute names and Python numbers are equal.

    Args:
        data: The graph object, with None in place of each child.
        where: For each child, the index of the store that contains it, and its name.
        numbers: Python numbers by store index and name, such as the node and graph counts by which a model slices. They
            stay Python numbers.
    """

    def __init__(self, data: Graph, where: Sequence[tuple[int, str]], numbers: Mapping[tuple[int, str], float]) -> None:
        self.data, self.where, self.numbers = data, tuple(where), numbers
        self._identity = type(data), tuple(getattr(store, "_key", None) for store in data.stores), self.where

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GraphShell) and self._identity == other._identity and self.numbers == other.numbers

    def __hash__(self) -> int:
        return hash(self._identity)

    def __repr__(self) -> str:
        counted = ", ".join(f"{name}={value}" for (_, name), value in self.numbers.items())
        return f"{type(self.data).__name__}({counted})"


class StoreEntry(optree.PyTreeEntry):
    """The path entry of a graph's attribute: the key of its store, or None, and its name."""

    def codify(self, /, node: str = "") -> str:
        key, name = self.entry
        return f"{node}.{name}" if key is None else f"{node}[{key!r}].{name}"


_STORE_INTERNALS = ("_mapping", "_parent", "_key")


def graph_parts(data: Graph) -> Parts:
    children: list[Tree] = []
    where: list[tuple[int, str]] = []
    numbers: dict[tuple[int, str], Tree] = {}
    shell = copy.copy(data)
    for index, store in enumerate(shell.stores):
        beside = {name: value for name, value in store.__dict__.items() if name not in _STORE_INTERNALS}
        for held, entries in ((store._mapping, dict(store._mapping)), (store.__dict__, beside)):
            for name, value in entries.items():
                is_public = held is not store.__dict__ or name == "_num_graphs"
                if is_public and _is_count(value):
                    numbers[index, name] = value
                elif value is not None:
                    children.append(value)
                    where.append((index, name))
                    held[name] = None
    keys = [getattr(store, "_key", None) for store in shell.stores]
    return children, GraphShell(shell, where, numbers), [(keys[index], name) for index, name in where]


def graph_of(shell: GraphShell, children: Sequence[Tree]) -> Graph:
    data = copy.copy(shell.data)
    stores = data.stores
    for (index, name), value in zip(shell.where, children, strict=True):
        store = stores[index]
        held = store._mapping if name in store._mapping else store.__dict__
        held[name] = value
    return data


def _is_count(value: object) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_count, value))
    return type(value) in (bool, int, float)


@functools.cache
def _is_graph_class(kind: type) -> bool:
    return any((base.__module__, base.__name__) == ("torch_geometric.data.data", "BaseData") for base in kind.__mro__)
