"""The parts of a sharded state's checkpoint: which rank writes which slice of each leaf."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from fxtrain import tree
from fxtrain.checkpoint._errors import CheckpointError
from fxtrain.checkpoint._leaf_files import Rows
from fxtrain.checkpoint._leaf_table import Slice, Sliced
from fxtrain.core import Tree
from fxtrain.core._shard import Shard, is_shard


class Extent(NamedTuple):
    """What a rank has of a leaf.

    Args:
        rows: The rows.
        size: The number of all rows of the leaf.
    """

    rows: Rows
    size: int


Layout = list[Extent | None]
"""What a rank has of each leaf, None for a leaf that all ranks have whole."""


class Written(NamedTuple):
    """A leaf or a slice in a data file."""

    offset: int
    size: int
    xxh3: str


class OtherParts(Protocol):
    """The other ranks, as seen from rank 0 while it writes a checkpoint."""

    def announce(self) -> None:
        """Waits until all ranks have copied their slices.

        Raises:
            CheckpointError: If one of them cannot.
        """
        ...

    def writing(self, folder: pathlib.Path) -> AbstractContextManager[object]:
        """A context during which the other ranks write to a folder. It ends once they have ended."""
        ...

    def sliced(self, folder: pathlib.Path, own: Sequence[Written]) -> dict[int, Sliced]:
        """Waits for the other ranks, and returns the leaves in slices by index.

        Args:
            folder: That given to ``writing``.
            own: What rank 0 has written.

        Raises:
            CheckpointError: If a rank cannot write its part.
        """
        ...

    def close(self) -> None:
        """Lets the other ranks know that nothing is written, unless something was."""
        ...


def rows_of(shard: Shard) -> Rows:
    """Returns the rows of a shard's whole tensor that this rank has."""
    length = shard.local.shape[shard.axis]
    return Rows(shard.axis, shard.mesh.rank * length, length)


def layout_of(state: Tree) -> Layout:
    """Returns what this rank has of each leaf."""
    leaves = tree.leaves(state, is_leaf=is_shard)
    return [Extent(rows_of(leaf), leaf.shape[leaf.axis]) if is_shard(leaf) else None for leaf in leaves]


def local_state(state: Tree) -> Tree:
    """Returns a state with the slices of this rank in place of its shards."""
    return tree.map(lambda leaf: leaf.local if is_shard(leaf) else leaf, state, is_leaf=is_shard)


def leaves_of_part(layouts: Sequence[Layout], rank: int) -> list[int]:
    """Returns the indices of the leaves of which a rank writes its slice.

    Of ranks with the same slice, the first one writes it.

    Args:
        layouts: The layouts of all ranks.
        rank: The rank.
    """
    return [
        index
        for index, extent in enumerate(layouts[rank])
        if extent is not None and all(layout[index] != extent for layout in layouts[:rank])
    ]


def sliced(layouts: Sequence[Layout], written: Sequence[Sequence[Written]]) -> dict[int, Sliced]:
    """Returns the leaves in slices by index.

    Args:
        layouts: The layouts of all ranks.
        written: What each rank has written, in the order of ``leaves_of_part``.

    Raises:
        CheckpointError: If the slices of a leaf overlap or leave a gap.
    """
    found: dict[int, Sliced] = {}
    sizes: dict[int, int] = {}
    for part, reports in enumerate(written):
        for index, (offset, size, xxh3) in zip(leaves_of_part(layouts, part), reports, strict=True):
            extent = layouts[part][index]
            assert extent is not None
            axis, start, length = extent.rows
            piece = Slice(part=part, start=start, length=length, offset=offset, bytes=size, xxh3=xxh3)
            found.setdefault(index, Sliced(axis, [])).slices.append(piece)
            sizes[index] = extent.size
    for index, (axis, slices) in found.items():
        slices.sort(key=lambda piece: piece["start"])
        ends = list(itertools.accumulate((piece["length"] for piece in slices), initial=0))
        if ends != [*(piece["start"] for piece in slices), sizes[index]]:
            ranges = [(piece["start"], piece["start"] + piece["length"]) for piece in slices]
            raise CheckpointError(
                f"expected slices of all {sizes[index]} rows of leaf {index} along axis {axis}, each once, got "
                f"{ranges}. Shard the state equally on all ranks."
            )
    return found
