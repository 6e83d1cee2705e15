"""Pytree registration of containers that other libraries define: mappings, dataclasses, objects with attributes.

A class is registered in fxtrain's optree namespace when its first instance is seen in a batch. Rebuilt containers keep
their class: a loss function that reads ``batch.x`` gets an object of the same class, with the step's tensors.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optree
from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.pytree import is_leaf, node_of_parts, parts_of
from fxtrain.core import NAMESPACE, Batch, Tree, ops
from fxtrain.data._graphs import Parts, StoreEntry, graph_of, graph_parts, is_graph

_KNOWN: set[type] = {Tensor, np.ndarray, str, bytes, bool, int, float, complex}  # leaves and registered classes


def register_containers(batch: Batch) -> None:
    """Registers the classes of all containers in a batch, so that ``fxtrain.tree`` traverses them."""
    todo = [batch]
    while todo:
        for leaf in tree.leaves(todo.pop()):
            if type(leaf) in _KNOWN or (found := _node_kind(leaf)) is None:
                continue
            flatten, unflatten, entry = found
            _KNOWN.add(type(leaf))
            ops.register_pytree_node(type(leaf), flatten, unflatten, path_entry_type=entry, namespace=NAMESPACE)
            todo.append(leaf)


def count_examples(batch: Batch) -> int | None:
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
    if len(lengths) != 1:
        return None
    # Only now, because len() specializes a symbolic size.
    rows = {len(part) for part in parts if isinstance(part, Tensor) and part.ndim}
    return lengths.pop() if rows <= lengths else None


def _node_kind(node: object) -> tuple[Callable[..., Any], Callable[..., object], type[optree.PyTreeEntry]] | None:
    """Returns (flatten, unflatten, path entry type) for the class of a node; None for a leaf."""
    kind: Any = type(node)
    if isinstance(node, Tensor | type):
        return None
    if is_graph(node):
        return graph_parts, graph_of, StoreEntry
    if not is_leaf(node):
        return parts_of, node_of_parts, optree.FlattenedEntry
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


def _sequence_of(kind: type[list[Tree]] | type[tuple[Tree, ...]], _: None, children: Sequence[Tree]) -> Sequence[Tree]:
    if issubclass(kind, tuple):  # torch.Size cannot contain tensors
        return tuple(children)
    new = kind.__new__(kind)
    list.extend(new, children)
    return new


# Mappings


def _mapping_parts(node: Mapping[object, Tree]) -> Parts:
    keys = tuple(node)
    return [node[key] for key in keys], keys, keys


def _dict_parts(node: dict[object, Tree]) -> Parts:
    """Returns the entries, followed by the instance attributes of a dict subclass."""
    attributes: dict[str, Any] = getattr(node, "__dict__", {})
    # Some dict subclasses, such as EasyDict, mirror each entry as an attribute.
    twice = tuple(name for name in attributes if name in node and node[name] is attributes[name])
    keys, names = tuple(node), tuple(name for name in attributes if name not in twice)
    children = [*(node[key] for key in keys), *(attributes[name] for name in names)]
    return children, (keys, names, twice), (*keys, *names)


def _dict_of(
    kind: type[dict[object, Tree]],
    context: tuple[tuple[object, ...], tuple[str, ...], tuple[str, ...]],
    children: Sequence[Tree],
) -> dict[object, Tree]:
    keys, names, twice = context
    new = kind.__new__(kind)
    dict.update(new, zip(keys, children[: len(keys)], strict=True))
    if names or twice:
        vars(new).update(zip(names, children[len(keys) :], strict=True))
        vars(new).update((name, new[name]) for name in twice)
    return new


def _user_dict_parts(node: collections.UserDict[object, Tree]) -> Parts:
    attributes = {name: value for name, value in vars(node).items() if name != "data"}
    return [*node.data.values(), *attributes.values()], (tuple(node.data), tuple(attributes)), (*node.data, *attributes)


def _user_dict_of(
    kind: type[collections.UserDict[object, Tree]],
    context: tuple[tuple[object, ...], tuple[str, ...]],
    children: Sequence[Tree],
) -> collections.UserDict[object, Tree]:
    keys, names = context
    new = kind.__new__(kind)
    vars(new).update(zip(names, children[len(keys) :], strict=True))
    new.data = dict(zip(keys, children[: len(keys)], strict=True))
    return new


# Objects with attributes


def _attribute_parts(node: object) -> Parts:
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
    names = tuple(sorted(slots | kept))
    return [getattr(node, name) for name in names], names, names


def _slots(kind: type) -> Sequence[str]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _attributes_of(kind: type, names: Sequence[str], children: Sequence[Tree]) -> object:
    new = object.__new__(kind)
    for name, value in zip(names, children, strict=True):
        object.__setattr__(new, name, value)  # works for frozen dataclasses too
    return new
