"""Comparison of a batch with earlier ones: structure, dtypes and shapes, and checksums of the values."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeGuard

import numpy as np
import torch
import xxhash
from optree import PyTreeSpec
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Batch, Tree, describe, warn
from fxtrain.core._bits import as_bytes
from fxtrain.data._graphs import is_graph
from fxtrain.data._placeholders import for_step

# Of a leaf larger than 1 MiB, only 256 chunks of 4096 bytes enter the checksum.
_CHUNK_COUNT, _CHUNK_BYTES = 256, 4096

ALL_DIMS = 64  # the maximum rank of a tensor, so that all dimensions may change size

REMEDY = (
    "Batches must have one shape, so that a step compiles once. Drop a short batch with drop_last=True, or pad it with "
    'fxtrain.data.batches(..., drop_last="pad"). For many sizes, use fxtrain.data.bucketed, which pads to a few, or '
    "pass dynamic=True both to the source, as in fxtrain.data.from_loader(loader, dynamic=True), and to "
    "fxtrain.compile(step, dynamic=True)."
)


def check_batch(batch: Batch, like: Batch, *, dynamic_dims: int = 0) -> bool:
    """Raises unless a batch matches another one in structure, dtypes and shapes.

    Two kinds of parts may change size in any batch: graphs, and lists of elements that agree in structure and dtypes,
    such as images of different sizes. The length of a list counts as its first dimension.

    Args:
        batch: Pytree of tensors.
        like: Pytree of tensors to compare with. Only dtypes and shapes are compared.
        dynamic_dims: Number of leading dimensions that may differ in size.

    Returns:
        Whether all sizes are equal, except those that may change in any batch.

    Raises:
        ValueError: If they differ. The message has the path of the first leaf that differs, and both sides.

    Example:
        >>> import torch
        >>> check_batch({"x": torch.zeros(3, 2)}, {"x": torch.zeros(4, 2)}, dynamic_dims=1)
        False
        >>> check_batch({"x": torch.zeros(3, 2)}, {"x": torch.zeros(4, 2)})
        Traceback (most recent call last):
        ...
        ValueError: expected batch['x'] to be a float32 tensor of shape [4, 2] as before, got a float32 tensor ...
    """
    return _is_alike(for_step(batch), for_step(like), dynamic_dims, "batch")


def _is_alike(part: Tree, like: Tree, dynamic_dims: int, path: str) -> bool:
    if is_graph(part) and type(part) is type(like):
        attributes, before = (dict(zip(tree.paths(data), tree.leaves(data), strict=True)) for data in (part, like))
        _is_alike(attributes, before, ALL_DIMS, path)
        return True
    leaves, structure = _opened(part)
    like_leaves, like_structure = _opened(like)
    if structure != like_structure:
        raise _other_structure(part, like, path)
    same = True
    for index, (leaf, was) in enumerate(zip(leaves, like_leaves, strict=True)):
        if isinstance(leaf, Tensor) and isinstance(was, Tensor):
            casts = leaf.dtype != was.dtype
            if casts or leaf.ndim != was.ndim or leaf.shape[dynamic_dims:] != was.shape[dynamic_dims:]:
                remedy = "Convert it with data.map." if casts else REMEDY
                here = f"{path}{_path(part, index)}"
                raise ValueError(f"expected {here} to be {describe(was)} as before, got {describe(leaf)}. {remedy}")
            same = same and leaf.shape == was.shape
            continue
        here = f"{path}{_path(part, index)}"
        if _is_many(leaf) and _is_many(was):
            if not dynamic_dims and len(leaf) != len(was):
                raise ValueError(f"expected {here} to have {len(was)} elements as before, got {len(leaf)}. {REMEDY}")
            _is_alike(leaf[0], was[0], ALL_DIMS, f"{here}[0]")
            same = same and len(leaf) == len(was)
        elif type(leaf) is type(was):
            same = _is_alike(leaf, was, dynamic_dims, here) and same
        else:
            raise _other_structure(leaf, was, here)
    return same


def _opened(part: Tree) -> tuple[list[Tree], PyTreeSpec]:
    """Returns the leaves and the structure of a part, with nested graphs and lists as leaves."""
    return tree.flatten(part, is_leaf=lambda node: node is not part and _is_graph_or_list(node))


def _path(part: Tree, index: int) -> str:
    return tree.paths(part, is_leaf=lambda node: node is not part and _is_graph_or_list(node))[index]


def _is_graph_or_list(node: object) -> bool:
    return (type(node) in (list, tuple) and bool(node)) or is_graph(node)


def _is_many(node: object) -> TypeGuard[Sequence[Tree]]:
    """Whether this is a list of similar elements, so that its length may vary."""
    if not isinstance(node, list | tuple) or type(node) not in (list, tuple) or not node:
        return False
    first = _signature(node[0])
    return all(_signature(element) == first for element in node[1:])


def _signature(part: Tree) -> Hashable:
    """Returns the properties on which elements of a list must agree: structure, dtypes and ranks, but not sizes."""
    if is_graph(part):
        return type(part)
    leaves, structure = _opened(part)
    return structure, [
        (leaf.dtype, leaf.ndim)
        if isinstance(leaf, Tensor)
        else ("many", _signature(leaf[0]))
        if _is_many(leaf)
        else _signature(leaf)
        for leaf in leaves
    ]


def _other_structure(batch: Tree, like: Tree, path: str) -> ValueError:
    found, was = tree.paths(batch, path), tree.paths(like, path)
    gone, added = [p for p in was if p not in found], [p for p in found if p not in was]
    return ValueError(
        "expected the same structure as in earlier batches, got another: "
        + " and ".join(
            [f"{', '.join(gone)} missing"] * bool(gone) + [f"{', '.join(added)} added"] * bool(added)
            or [f"{tree.structure(batch)} instead of {tree.structure(like)}"]
        )
        + ". Give all batches the same structure, for example with data.map."
    )


def checksum(batch: Batch) -> int:
    """Returns a signed 64-bit hash of a batch.

    The hash covers paths, shapes, dtypes and values. Of a leaf larger than 1 MiB, it covers evenly spaced chunks.

    Args:
        batch: Pytree of tensors on any device, arrays, numbers, strings and other values with a ``repr``.

    Example:
        >>> checksum({"x": torch.ones(2)}) == checksum({"x": torch.ones(2)})
        True
        >>> checksum({"x": torch.ones(2)}) == checksum({"x": torch.zeros(2)})
        False
    """
    hashed = xxhash.xxh3_64()
    for path, leaf in zip(tree.paths(batch, "batch"), tree.leaves(batch), strict=True):
        value = torch.as_tensor(leaf) if _is_numeric(leaf) else leaf
        hashed.update(path.encode())
        if isinstance(value, Tensor):
            hashed.update(f"{value.dtype}{list(value.shape)}".encode())
            if value.layout == torch.strided:
                hashed.update(_bytes(value).numpy().data)
        else:
            text = repr(value.tolist() if isinstance(value, np.ndarray) else value)
            if " at 0x" not in text:  # addresses differ between processes
                hashed.update(text.encode())
    return hashed.intdigest() - 2**63


def warn_of_another_batch(index: int, name: str) -> None:
    """Warns that a batch differs from the one read at the same position before the checkpoint."""
    warn(
        f"expected batch {index} of {name} to be the same as before the checkpoint, got a different one. The resumed "
        "run differs from an uninterrupted one. Make the data repeatable: derive random samples from the sample index "
        "or the epoch, seed the shuffling, or include generators in the state_dict.",
        UserWarning,
    )


def _is_numeric(leaf: object) -> bool:
    return isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "biufc" and leaf.dtype.isnative


def _bytes(leaf: Tensor) -> Tensor:
    """Returns the bytes to hash, uint8 [n] on the host."""
    flat = as_bytes(leaf.detach().resolve_conj().resolve_neg().contiguous())
    if len(flat) > _CHUNK_COUNT * _CHUNK_BYTES:
        pieces = len(flat) // _CHUNK_COUNT
        flat = flat[: pieces * _CHUNK_COUNT].view(_CHUNK_COUNT, pieces)[:, :_CHUNK_BYTES]
    return flat.cpu().contiguous()
