"""The table of a checkpoint: which bytes of its one file are whose.

Leaves lie one after another, the widest elements first: so each begins at a multiple of its element's size, without
padding, and there is no byte that no checksum covers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypedDict

import optree
import torch
from torch import Tensor

from fxtrain.checkpoint.errors import CheckpointError
from fxtrain.core import TrainState


class Leaf(TypedDict):
    """One row."""

    path: str  # code that reaches the leaf from the root
    entries: list[list[Any]]  # the same as [kind, key] pairs; kind is "attribute", "key" or "index"
    dtype: str
    shape: list[int]
    offset: int
    bytes: int
    xxh3: str  # of the bytes: 16 hexadecimal digits


class Place(NamedTuple):
    """Where a leaf's bytes are to be."""

    dtype: torch.dtype
    shape: torch.Size
    offset: int
    size: int  # bytes


def places(leaves: Sequence[Tensor]) -> list[Place]:
    """A place for each leaf, in the order of the leaves."""
    order = sorted(range(len(leaves)), key=lambda index: -leaves[index].element_size())
    offsets, offset = [0] * len(leaves), 0
    for index in order:
        offsets[index] = offset
        offset += leaves[index].nbytes
    return [Place(leaf.dtype, leaf.shape, offset, leaf.nbytes) for leaf, offset in zip(leaves, offsets, strict=True)]


def rows(structure: Any, placed: Sequence[Place], checksums: Sequence[str]) -> Iterator[Leaf]:
    """The table, in the order of the leaves.

    Raises:
        CheckpointError: If two leaves have one path.
    """
    root = root_of(structure)
    seen: set[str] = set()
    for accessor, place, checksum in zip(structure.accessors(), placed, checksums, strict=True):
        path = accessor.codify(root)
        if path in seen:
            raise CheckpointError(f"Two leaves have one path, {path}: rename a key.")
        seen.add(path)
        yield Leaf(
            path=path,
            entries=[entry_of(entry) for entry in accessor],
            dtype=name_of(place.dtype),
            shape=list(place.shape),
            offset=place.offset,
            bytes=place.size,
            xxh3=checksum,
        )


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
            return ["attribute", entry.entry]
