"""Checksums of batches, which detect data that differs when it is read again."""

from __future__ import annotations

import warnings

import numpy as np
import torch
import xxhash
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Batch

# Of a leaf larger than 1 MiB, only 256 chunks of 4096 bytes are read.
_CHUNK_COUNT, _CHUNK_BYTES = 256, 4096


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
    warnings.warn(
        f"expected batch {index} of {name} to be the same as before the checkpoint, got a different one. The resumed "
        "run differs from an uninterrupted one. Make the data repeatable: derive random samples from the sample index "
        "or the epoch, seed the shuffling, or include generators in the state_dict.",
        UserWarning,
        stacklevel=3,
    )


def _is_numeric(leaf: object) -> bool:
    return isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "biufc" and leaf.dtype.isnative


def _bytes(leaf: Tensor) -> Tensor:
    """Returns the bytes to hash, uint8 [n] on the host."""
    flat = leaf.detach().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8)
    if len(flat) > _CHUNK_COUNT * _CHUNK_BYTES:
        pieces = len(flat) // _CHUNK_COUNT
        flat = flat[: pieces * _CHUNK_COUNT].view(_CHUNK_COUNT, pieces)[:, :_CHUNK_BYTES]
    return flat.cpu().contiguous()
