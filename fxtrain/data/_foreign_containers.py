"""Pytree registration of containers that other libraries define: mappings, dataclasses, graphs.

A class is registered in fxtrain's optree namespace when its first instance is seen in a batch. Rebuilt containers keep
their class: a loss function that reads ``batch.x`` gets an object of the same class, with the step's tensors.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optree
import torch.utils._pytree as torch_pytree  # torch.utils.pytree does not see classes registered here
from torch import Tensor

from fxtrain import tree
from fxtrain.core import NAMESPACE, ops

Parts = tuple[Sequence[Any], Any, Sequence[Any]]  # children, static context, keys or names of the children

_KNOWN: set[type[Any]] = {Tensor, np.ndarray, str, bytes, bool, int, float, complex}  # leaves and registered classes


def register_containers(batch: Any) -> None:
    """Registers the classes of all containers in a batch, so that ``fxtrain.tree`` traverses them."""
    todo = [batch]
    while todo:
        for leaf in tree.leaves(todo.pop()):
            if type(leaf) not in _KNOWN and _register(leaf):
                todo.append(leaf)


def is_graph(node: Any) -> bool:
    """Whether this is a torch_geometric graph, whose tensors have no common first dimension."""
    return _is_graph_class(type(node))


def holds_graph(batch: Any) -> bool:
    """Whether a batch contains a torch_geometric graph."""
    found = False

    def look(node: Any) -> bool:
        nonlocal found
        found = found or is_graph(node)
        return found

    tree.leaves(batch, is_leaf=look)
    return found


def count_examples(batch: Any) -> int | None:
    """Returns the number of examples in a graph batch, or in a batch of per-example lists; None for other batches.

    In a graph batch, the examples are its graphs, or the seed nodes that its loader sampled. A single graph is one
    example.
    """
    if is_graph(batch):
        count = getattr(batch, "batch_size", None)
        return count if isinstance(count, int) else 1
    parts: Any = batch.values() if isinstance(batch, Mapping) else batch
    if not isinstance(batch, list | tuple | Mapping):
        return None
    lists = [part for part in parts if isinstance(part, list | tuple) and tree.leaves(part)]
    elements = [element for part in lists for element in part]
    firsts = {element.shape[:1] for element in elements if isinstance(element, Tensor)}
    if len(firsts) == 1 and len(elements) > len(lists) and all(isinstance(element, Tensor) for element in elements):
        return None  # a record, such as a pair of inputs, whose tensors have a row per example
    lengths = {len(part) for part in lists}
    rows = {len(part) for part in parts if isinstance(part, Tensor) and part.ndim}
    return lengths.pop() if len(lengths) == 1 and rows <= lengths else None


def _register(node: Any) -> bool:
    kind: Any = type(node)
    found = _node_kind(node)
    if found is None:
        return False
    flatten, unflatten, entry = found
    _KNOWN.add(kind)
    ops.register_pytree_node(kind, flatten, unflatten, path_entry_type=entry, namespace=NAMESPACE)
    return True


def _node_kind(node: Any) -> tuple[Callable[[Any], Any], Callable[..., Any], Any] | None:
    """Returns (flatten, unflatten, path entry type) for the class of a node; None for a leaf."""
    kind: Any = type(node)
    if isinstance(node, Tensor | type):
        return None
    if is_graph(node):
        return _graph_parts, _graph_of, StoreEntry
    if not torch_pytree.tree_is_leaf(node):
        return _torch_parts, _torch_node, optree.FlattenedEntry
    if isinstance(node, list | tuple):
        return lambda node: (list(node), None), functools.partial(_sequence_of, kind), optree.SequenceEntry
    if isinstance(node, dict):
        return _dict_parts, functools.partial(_dict_of, kind), optree.MappingEntry
    if isinstance(node, collections.UserDict):
        return _user_dict_parts, functools.partial(_user_dict_of, kind), optree.MappingEntry
    if isinstance(node, Mapping):
        return _mapping_parts, lambda keys, children: dict(zip(keys, children, strict=True)), optree.MappingEntry
    if dataclasses.is_dataclass(node) or hasattr(kind, "__attrs_attrs__"):
        return _attribute_parts, functools.partial(_attributes_of, kind), optree.GetAttrEntry
    return None


def _sequence_of(kind: Any, _: Any, children: Sequence[Any]) -> Any:
    if issubclass(kind, tuple):  # torch.Size cannot contain tensors
        return tuple(children)
    new = kind.__new__(kind)
    list.extend(new, children)
    return new


# Mappings


def _mapping_parts(node: Any) -> Parts:
    keys = tuple(node)
    return [node[key] for key in keys], keys, keys


def _dict_parts(node: Any) -> Parts:
    """Returns the entries, followed by the instance attributes of a dict subclass."""
    attributes: dict[str, Any] = getattr(node, "__dict__", {})
    # Some dict subclasses, such as EasyDict, mirror each entry as an attribute.
    twice = tuple(name for name in attributes if name in node and node[name] is attributes[name])
    keys, names = tuple(node), tuple(name for name in attributes if name not in twice)
    children = [*(node[key] for key in keys), *(attributes[name] for name in names)]
    return children, (keys, names, twice), (*keys, *names)


def _dict_of(kind: Any, context: Any, children: Sequence[Any]) -> Any:
    keys, names, twice = context
    new = kind.__new__(kind)
    dict.update(new, zip(keys, children[: len(keys)], strict=True))
    if names or twice:
        vars(new).update(zip(names, children[len(keys) :], strict=True))
        vars(new).update((name, new[name]) for name in twice)
    return new


def _user_dict_parts(node: Any) -> Parts:
    attributes = {name: value for name, value in vars(node).items() if name != "data"}
    return [*node.data.values(), *attributes.values()], (tuple(node.data), tuple(attributes)), (*node.data, *attributes)


def _user_dict_of(kind: Any, context: Any, children: Sequence[Any]) -> Any:
    keys, names = context
    new = kind.__new__(kind)
    vars(new).update(zip(names, children[len(keys) :], strict=True))
    new.data = dict(zip(keys, children[: len(keys)], strict=True))
    return new


# Objects with attributes


def _attribute_parts(node: Any) -> Parts:
    names = tuple(sorted(_attributes(node)))
    return [getattr(node, name) for name in names], names, names


def _attributes(node: Any) -> set[str]:
    slots = {
        name
        for kind in type(node).__mro__
        for name in _slots(kind)
        if name not in ("__dict__", "__weakref__") and hasattr(node, name)
    }
    kept = {
        name
        for name in getattr(node, "__dict__", {})
        if not isinstance(getattr(type(node), name, None), functools.cached_property)
    }
    return slots | kept


def _slots(kind: type[Any]) -> Sequence[str]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _attributes_of(kind: Any, names: Any, children: Sequence[Any]) -> Any:
    new = object.__new__(kind)
    for name, value in zip(names, children, strict=True):
        object.__setattr__(new, name, value)  # works for frozen dataclasses too
    return new


# Classes registered with torch's pytree


def _torch_parts(node: Any) -> tuple[Sequence[Any], Any]:
    children, spec = torch_pytree.tree_flatten(node, is_leaf=lambda part: part is not node)
    return children, spec


def _torch_node(spec: Any, children: Sequence[Any]) -> Any:
    return torch_pytree.tree_unflatten(list(children), spec)


# torch_geometric graphs


class Shell:
    """A graph object without its tensors, as the static part of a pytree node.

    Two shells are equal if their class, attribute names and Python numbers are equal.

    Args:
        data: The graph object, with None in place of each child.
        where: For each child, the index of the store that contains it, and its name.
        numbers: Python numbers by store index and name, such as the node and graph counts by which a model slices. They
            stay Python numbers.
    """

    def __init__(self, data: Any, where: Sequence[tuple[int, str]], numbers: Mapping[tuple[int, str], Any]) -> None:
        self.data, self.where, self.numbers = data, tuple(where), numbers
        keys = tuple(getattr(store, "_key", None) for store in data.stores)
        self._identity = type(data), keys, self.where

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shell) and self._identity == other._identity and self.numbers == other.numbers

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
_STORE_COUNTS = ("_num_graphs",)


def _graph_parts(data: Any) -> Parts:
    children: list[Any] = []
    where: list[tuple[int, str]] = []
    numbers: dict[tuple[int, str], Any] = {}
    shell = copy.copy(data)
    for index, store in enumerate(shell.stores):
        beside = {name: value for name, value in store.__dict__.items() if name not in _STORE_INTERNALS}
        for held, entries in ((store._mapping, dict(store._mapping)), (store.__dict__, beside)):
            for name, value in entries.items():
                is_public = held is not store.__dict__ or name in _STORE_COUNTS
                if is_public and _is_count(value):
                    numbers[index, name] = value
                elif value is not None:
                    children.append(value)
                    where.append((index, name))
                    held[name] = None
    keys = [getattr(store, "_key", None) for store in shell.stores]
    return children, Shell(shell, where, numbers), [(keys[index], name) for index, name in where]


def _graph_of(shell: Shell, children: Sequence[Any]) -> Any:
    data = copy.copy(shell.data)
    stores = data.stores
    for (index, name), value in zip(shell.where, children, strict=True):
        store = stores[index]
        held = store._mapping if name in store._mapping else store.__dict__
        held[name] = value
    return data


def _is_count(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_count, value))
    return type(value) in (bool, int, float)


@functools.cache
def _is_graph_class(kind: type[Any]) -> bool:
    return any((base.__module__, base.__name__) == ("torch_geometric.data.data", "BaseData") for base in kind.__mro__)
