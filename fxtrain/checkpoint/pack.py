"""Pack: the leaves of a tree as a few byte arrays, and a table that says which bytes are whose.

Few large arrays cost less than many small ones: the number of leaves, not of bytes, is what a checkpoint library's
time goes to. Bytes have no dtype to be cast, and a checksum for each leaf finds what the disk changed.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import optree
import torch
from torch import Tensor

from fxtrain.core import NAMESPACE, ops

ARENA_BYTES = 256 * 2**20  # an arena is closed when it has so many
_ALIGN = 64  # bytes; where a leaf begins


class CheckpointError(Exception):
    """A checkpoint cannot be written, or cannot be read as what it is wanted for."""


class Leaf(TypedDict):
    """One row of the table."""

    path: str  # code that reaches the leaf from `state`
    entries: list[list[Any]]  # the same as [kind, key] pairs; kind is "attribute", "key" or "index"
    dtype: str
    shape: list[int]
    arena: int
    offset: int
    bytes: int
    crc32: int


def pack(tree: Any) -> tuple[dict[str, np.ndarray], list[Leaf]]:
    """The leaves of ``tree`` as uint8 arrays by name, copied, and their table."""
    accessors, leaves, _ = ops.tree_flatten_with_accessor(tree, namespace=NAMESPACE)
    placed: list[tuple[int, int]] = []
    sizes = [0]
    for leaf in leaves:
        if sizes[-1] and sizes[-1] + leaf.nbytes > ARENA_BYTES:
            sizes.append(0)
        placed.append((len(sizes) - 1, sizes[-1]))
        sizes[-1] += -(-leaf.nbytes // _ALIGN) * _ALIGN
    arenas = {f"arena_{index}": np.zeros(max(size, 1), dtype=np.uint8) for index, size in enumerate(sizes)}
    table: list[Leaf] = []
    for accessor, leaf, (arena, offset) in zip(accessors, leaves, placed, strict=True):
        content = _as_bytes(leaf)
        arenas[f"arena_{arena}"][offset : offset + content.size] = content
        table.append(
            Leaf(
                path=_path(accessor),
                entries=[_entry(entry) for entry in accessor],
                dtype=str(leaf.dtype).removeprefix("torch."),
                shape=list(leaf.shape),
                arena=arena,
                offset=offset,
                bytes=content.size,
                crc32=zlib.crc32(content.data),
            )
        )
    paths = [row["path"] for row in table]
    if len(set(paths)) != len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise CheckpointError(f"Two leaves have one path, {twice}: rename a key.")
    return arenas, table


def unpack(row: Leaf, arenas: Mapping[str, np.ndarray]) -> Tensor:
    """One leaf, verified, in memory of its own.

    Raises:
        CheckpointError: If its bytes are not those that were written.
    """
    arena = arenas.get(f"arena_{row['arena']}")
    content = None if arena is None else arena[row["offset"] : row["offset"] + row["bytes"]]
    if (
        content is None
        or content.size != row["bytes"]
        or zlib.crc32(np.ascontiguousarray(content).data) != row["crc32"]
    ):
        raise CheckpointError(f"{row['path']} is damaged: its bytes are not those that were written.")
    # A copy, because the kernels of the same operation differ with the alignment of their inputs, to the bit.
    flat = torch.empty(row["bytes"], dtype=torch.uint8)
    flat.numpy()[:] = content
    return flat.view(getattr(torch, row["dtype"])).reshape(row["shape"])


def rebuild(rows: Sequence[tuple[list[list[Any]], Tensor]]) -> Any:
    """A tree from leaves and the rest of their paths: dictionaries and lists, or ``Unclaimed`` where there were
    classes, which are not stored."""
    if len(rows) == 1 and not rows[0][0]:
        return rows[0][1]
    if any(kind == "attribute" for entries, _ in rows for kind, _ in entries):
        return Unclaimed({_code(entries): leaf for entries, leaf in rows})
    groups: dict[Any, list[tuple[list[list[Any]], Tensor]]] = {}
    for entries, leaf in rows:
        groups.setdefault(entries[0][1], []).append((entries[1:], leaf))
    built = {key: rebuild(group) for key, group in groups.items()}
    return [built[i] for i in sorted(built)] if rows[0][0][0][0] == "index" else built


class Unclaimed(dict[str, Tensor]):
    """The memory of a callback that is not there, by the code of each leaf's path below its slot.

    It is kept and saved again under the same paths, so the callback finds it when it comes back.
    """


class _CodeEntry(optree.PyTreeEntry):
    def codify(self, /, node: str = "") -> str:
        return f"{node}{self.entry}"


ops.register_pytree_node(
    Unclaimed,
    lambda node: (list(node.values()), tuple(node), tuple(node)),
    lambda paths, leaves: Unclaimed(zip(paths, leaves, strict=True)),
    path_entry_type=_CodeEntry,
    namespace=NAMESPACE,
)


def _entry(entry: Any) -> list[Any]:
    match entry:
        case optree.NamedTupleEntry():
            return ["attribute", entry.field]
        case optree.SequenceEntry():
            return ["index", entry.index]
        case optree.MappingEntry():
            return ["key", entry.key]
        case optree.GetAttrEntry():
            return ["attribute", entry.name]
        case _:
            return ["attribute", entry.entry]


def _path(accessor: Any) -> str:
    return accessor.codify("state")


def _code(entries: list[list[Any]]) -> str:
    def one(kind: str, key: Any) -> str:
        if kind == "attribute":
            return key if isinstance(key, str) and key[:1] in ".[" else f".{key}"
        return f"[{key!r}]"

    return "".join(one(kind, key) for kind, key in entries)


def _as_bytes(leaf: Tensor) -> np.ndarray:
    dense = leaf.detach().cpu().contiguous().reshape(-1)
    dense = torch.view_as_real(dense.resolve_conj()).reshape(-1) if dense.is_complex() else dense
    return dense.view(torch.uint8).numpy()
