"""The table of a checkpoint: which bytes of its one file are whose.

Leaves lie one after another, the widest elements first: so each begins at a multiple of its element's size, without
padding, and there is no byte that no checksum covers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

import optree
import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.checkpoint._errors import CheckpointError
from fxtrain.core import NAMESPACE, TrainState, ops
from fxtrain.optim import PerParameter


class Leaf(TypedDict):
    """One row."""

    path: str  # code that reaches the leaf from the root
    entries: list[list[Any]]  # the same as [kind, key] pairs; kind is "attribute", "key" or "index"
    dtype: str
    shape: list[int]
    offset: int
    bytes: int
    xxh3: str  # of the bytes: 16 hexadecimal digits
    elements: NotRequired[list[list[Any]]]  # of a vector over parameters: the path of each element's parameter


class Place(NamedTuple):
    """Where a leaf's bytes are to be."""

    dtype: torch.dtype
    shape: torch.Size
    offset: int
    size: int  # bytes


def places(leaves: Sequence[Tensor]) -> list[Place]:
    """A place for each leaf, in the order of the leaves."""
    starts = offsets([(leaf.element_size(), leaf.nbytes) for leaf in leaves])
    return [Place(leaf.dtype, leaf.shape, start, leaf.nbytes) for leaf, start in zip(leaves, starts, strict=True)]


def offsets(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """The offset of each leaf in the file, by the sizes of its elements and of the whole, in bytes."""
    found, offset = [0] * len(sizes), 0
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index][0]):
        found[index] = offset
        offset += sizes[index][1]
    return found


def rows(structure: Any, placed: Sequence[Place], checksums: Sequence[str]) -> Iterator[Leaf]:
    """The table, in the order of the leaves.

    Raises:
        CheckpointError: If two leaves have one path.
    """
    root, elements = root_of(structure), element_paths(structure)
    seen: set[str] = set()
    for index, (accessor, place, checksum) in enumerate(zip(structure.accessors(), placed, checksums, strict=True)):
        path = accessor.codify(root)
        if path in seen:
            raise CheckpointError(f"Two leaves have one path, {path}: rename a key.")
        seen.add(path)
        row = Leaf(
            path=path,
            entries=[entry_of(entry) for entry in accessor],
            dtype=name_of(place.dtype),
            shape=list(place.shape),
            offset=place.offset,
            bytes=place.size,
            xxh3=checksum,
        )
        if index in elements:
            row["elements"] = [list(element) for element in elements[index]]
        yield row


def element_paths(structure: Any) -> dict[int, Sequence[Sequence[Any]]]:
    """By the index of each leaf that has one element for each parameter, the paths of these parameters."""
    numbered = tree.unflatten(structure, range(structure.num_leaves))
    nodes = ops.tree_leaves(numbered, is_leaf=lambda node: isinstance(node, PerParameter), namespace=NAMESPACE)
    found: dict[Any, Sequence[Sequence[Any]]] = {
        node.values: node.paths for node in nodes if isinstance(node, PerParameter)
    }
    return {
        index: paths
        for index, paths in found.items()
        if all(isinstance(key, str | int) and not isinstance(key, bool) for path in paths for key in path)
    }


def root_of(structure: Any) -> str:
    """What paths begin with: states and other trees are told apart by it."""
    return "state" if structure.type is TrainState else "tree"


def keys_of(entries: Sequence[Sequence[Any]]) -> tuple[str, ...]:
    """The keys of a row's path, without what kind of node holds each."""
    return tuple(str(key) for _, key in entries)


def name_of(dtype: torch.dtype) -> str:
    """As ``float32``."""
    return str(dtype).removeprefix("torch.")


def entry_of(entry: Any) -> list[Any]:
    """One step of an accessor, as JSON holds it."""
    match entry:
        case optree.NamedTupleEntry():
            return ["attribute", entry.field]
        case optree.SequenceEntry():
            return ["index", entry.index]
        case optree.MappingEntry() if isinstance(entry.key, str | int):
            return ["key", entry.key]
        case optree.MappingEntry():  # JSON has no such key: its code stands for it
            return ["attribute", f"[{entry.key!r}]"]
        case optree.GetAttrEntry():
            return ["attribute", entry.name]
        case _:
            return ["attribute", entry.codify("")]


def code_of(entries: Sequence[Sequence[Any]]) -> str:
    """The code that reaches a leaf by the entries of its row."""

    def one(kind: str, key: Any) -> str:
        if kind == "attribute":
            return key if key[:1] in (".", "[") else f".{key}"
        return f"[{key!r}]"

    return "".join(one(kind, key) for kind, key in entries)
