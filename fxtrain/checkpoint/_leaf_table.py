"""The table of a checkpoint's leaves: path, dtype, shape and position in ``leaves.bin``.

Leaves are stored in order of decreasing element size. So each leaf is aligned to its element size without padding, and
every byte of the file is covered by a checksum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

import optree
import torch
from optree import PyTreeSpec
from torch import Tensor

from fxtrain import tree
from fxtrain.checkpoint._errors import CheckpointError
from fxtrain.core import TrainState, Tree, dtype_name
from fxtrain.optim import PerParameter

Key = str | int
PathEntry = list[Key]
"""The kind and the key of one step of a path."""


class Leaf(TypedDict):
    """A row of the table."""

    path: str  # code that accesses the leaf from the root
    entries: list[PathEntry]  # the same as [kind, key] pairs; kind is "attribute", "key" or "index"
    dtype: str
    shape: list[int]
    offset: int
    bytes: int
    xxh3: str  # checksum of the bytes, 16 hexadecimal digits
    elements: NotRequired[list[list[Key]]]  # for a vector over parameters: the path of each element's parameter


class Place(NamedTuple):
    """The dtype, shape and position of a leaf in the file."""

    dtype: torch.dtype
    shape: torch.Size
    offset: int
    size: int  # bytes


def places(leaves: Sequence[Tensor]) -> list[Place]:
    """Returns the place of each leaf, in the order of the leaves."""
    starts = offsets([(leaf.element_size(), leaf.nbytes) for leaf in leaves])
    return [Place(leaf.dtype, leaf.shape, start, leaf.nbytes) for leaf, start in zip(leaves, starts, strict=True)]


def offsets(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Returns the offset of each leaf in the file, given its element size and total size in bytes."""
    found, offset = [0] * len(sizes), 0
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index][0]):
        found[index] = offset
        offset += sizes[index][1]
    return found


def rows(structure: PyTreeSpec, placed: Sequence[Place], checksums: Sequence[str]) -> Iterator[Leaf]:
    """Yields the table, in the order of the leaves.

    Args:
        structure: The tree's structure.
        placed: The place of each leaf.
        checksums: The checksum of each leaf.

    Raises:
        CheckpointError: If two leaves have the same path.
    """
    root, elements = root_of(structure), _element_paths(structure)
    seen: set[str] = set()
    for index, (accessor, place, checksum) in enumerate(zip(structure.accessors(), placed, checksums, strict=True)):
        path = accessor.codify(root)
        if path in seen:
            raise CheckpointError(f"expected a unique path for each leaf, got two leaves at {path}. Rename a key.")
        seen.add(path)
        row = Leaf(
            path=path,
            entries=[_entry_of(entry) for entry in accessor],
            dtype=dtype_name(place.dtype),
            shape=list(place.shape),
            offset=place.offset,
            bytes=place.size,
            xxh3=checksum,
        )
        if index in elements:
            row["elements"] = [list(element) for element in elements[index]]
        yield row


def rows_of(like: Tree) -> Iterator[Leaf]:
    """Yields the table of a checkpoint of ``like``, without checksums."""
    leaves, structure = tree.flatten(like)
    return rows(structure, places(leaves), [""] * len(leaves))


def _element_paths(structure: PyTreeSpec) -> dict[int, Sequence[Sequence[Key]]]:
    """Returns the parameter paths of each leaf that has one element per parameter, by the index of the leaf."""
    numbered = tree.unflatten(structure, range(structure.num_leaves))
    nodes = tree.leaves(numbered, is_leaf=lambda node: isinstance(node, PerParameter))
    found: dict[Any, Sequence[Sequence[Any]]] = {
        node.values: node.paths for node in nodes if isinstance(node, PerParameter)
    }
    return {
        index: paths
        for index, paths in found.items()
        if all(isinstance(key, str | int) and not isinstance(key, bool) for path in paths for key in path)
    }


def root_of(structure: PyTreeSpec) -> str:
    """Returns the first word of all paths: ``"state"`` for states and ``"tree"`` for other trees."""
    return "state" if structure.type is TrainState else "tree"


def keys_of(entries: Sequence[PathEntry]) -> tuple[str, ...]:
    """Returns the keys of a row's path as text, without the kinds of nodes."""
    return tuple(str(key) for _, key in entries)


def _entry_of(entry: optree.PyTreeEntry) -> PathEntry:
    """Returns one entry of an accessor as a ``[kind, key]`` pair for JSON."""
    match entry:
        case optree.NamedTupleEntry():
            return ["attribute", entry.field]
        case optree.SequenceEntry():
            return ["index", entry.index]
        case optree.MappingEntry() if isinstance(entry.key, str | int):
            return ["key", entry.key]
        case optree.MappingEntry():  # JSON cannot represent the key, so its code is stored
            return ["attribute", f"[{entry.key!r}]"]
        case optree.GetAttrEntry():
            return ["attribute", entry.name]
        case _:
            return ["attribute", entry.codify("")]


def code_of(entries: Sequence[PathEntry]) -> str:
    """Returns the code that accesses a leaf, given the entries of its row."""

    def one(kind: Key, key: Key) -> str:
        if kind == "attribute":
            return str(key) if str(key)[:1] in (".", "[") else f".{key}"
        return f"[{key!r}]"

    return "".join(one(kind, key) for kind, key in entries)
