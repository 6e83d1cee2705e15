"""The table of a checkpoint's leaves: path, dtype, shape and position in the data files.

A leaf of a sharded state is stored in slices along one axis, in the file of the rank that wrote each. All other leaves
are whole, in ``leaves.bin``.

In each file, leaves and slices are in order of decreasing element size. So each is aligned to its element size without
padding, and every byte of the file is covered by a checksum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

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


class Slice(TypedDict):
    """One slice of a leaf, along the axis of its row."""

    part: int  # number of the file
    start: int  # index of the first row
    length: int  # number of rows
    offset: int
    bytes: int
    xxh3: str


class Leaf(TypedDict):
    """A row of the table. A whole leaf has ``offset`` and ``xxh3``, one in slices has ``axis`` and ``slices``."""

    path: str  # code that accesses the leaf from the root
    entries: list[PathEntry]  # the same as [kind, key] pairs; kind is "attribute", "key" or "index"
    dtype: str
    shape: list[int]
    bytes: int
    offset: NotRequired[int]
    xxh3: NotRequired[str]  # checksum of the bytes, 16 hexadecimal digits
    axis: NotRequired[int]
    slices: NotRequired[list[Slice]]  # in the order of the axis
    elements: NotRequired[list[list[Key]]]  # for a last axis over parameters: their paths


class Sliced(NamedTuple):
    """A leaf that several ranks write.

    Args:
        axis: The axis that is split.
        slices: All slices, in the order of the axis.
    """

    axis: int
    slices: list[Slice]


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


def file_of(part: int) -> str:
    """Returns the name of the data file of a part. Part 0 has the whole leaves."""
    return f"leaves-{part}.bin" if part else "leaves.bin"


def slices_of(row: Leaf) -> list[Slice]:
    """Returns the slices of a leaf. A whole leaf is one slice, of which no row is counted."""
    if "slices" in row:
        return row["slices"]
    assert "offset" in row
    assert "xxh3" in row
    return [Slice(part=0, start=0, length=0, offset=row["offset"], bytes=row["bytes"], xxh3=row["xxh3"])]


def rows(
    structure: PyTreeSpec, placed: Sequence[Place], checksums: Sequence[str], sliced: Mapping[int, Sliced] | None = None
) -> Iterator[Leaf]:
    """Yields the table, in the order of the leaves.

    Args:
        structure: The tree's structure.
        placed: The place of each leaf, or of the first slice of one in slices.
        checksums: The checksum of each leaf.
        sliced: The leaves in slices, by index.

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
        entries, dtype, shape = [_entry_of(entry) for entry in accessor], dtype_name(place.dtype), list(place.shape)
        split = (sliced or {}).get(index)
        if split is None:
            where = {"bytes": place.size, "offset": place.offset, "xxh3": checksum}
        else:
            shape[split.axis] = sum(each["length"] for each in split.slices)
            where = {"bytes": sum(each["bytes"] for each in split.slices), **split._asdict()}
        row = cast(Leaf, {"path": path, "entries": entries, "dtype": dtype, "shape": shape, **where})
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
