"""The memory of a step: decides which leaves can be donated, and keeps what is freed for the next step.

A compiled step writes the new state into the old state's buffers, which is safe only if nothing else references their
storage. Leaves that are still reachable (through a container, the tensor itself, or a view) are copied first.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.memory import storage_use_counter

_storages = functools.partial(map, Tensor.untyped_storage)
_references: Any = functools.partial(map, sys.getrefcount)
_use_counts = storage_use_counter()

# The reference counts of an object held by one container and by the list being counted, and of a storage held by one
# tensor, and the use count of that storage. Measured here, because they depend on how Python and torch count.
_probe = [torch.empty(1)]
_SOLE = max(_references([_probe[0]]))
_SOLE_STORAGE = max(_references(list(_storages(_probe))))
# If torch cannot count (-1), every storage counts as shared.
_SOLE_USE = max(1, *_use_counts(_storages(_probe)))

# From malloc.h. glibc accepts no larger mmap threshold than 2**25, and always maps larger blocks.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MAX_KEPT_BYTES, _MAX_BLOCK_BYTES = 2**31 - 1, 2**25
_USER_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def is_sole(leaves: list[Tensor], containers: list[object], written: Sequence[int]) -> bool:
    """Whether the leaves and containers of a state have no references besides these two lists.

    Views are detected only for the leaves with indices in ``written``.
    """
    if max(_references(leaves), default=0) > _SOLE or max(_references(containers), default=0) > _SOLE:
        return False
    storages = list(_storages([leaves[index] for index in written]))
    return max(_references(storages), default=0) <= _SOLE_STORAGE and list(_use_counts(storages)) == [_SOLE_USE] * len(
        storages
    )


def shared(leaves: list[Tensor], containers: list[object]) -> list[bool]:
    """Whether each leaf is referenced elsewhere: directly, by a view, or through a container above it."""
    references = list(_references(leaves))
    held = [count > _SOLE for count in _references(containers)]
    exposed = {
        id(leaf)
        for container, elsewhere in zip(containers, held, strict=True)
        if elsewhere
        for leaf in tree.leaves(container)
    }
    storages = list(_storages(leaves))
    in_use = [
        holders > _SOLE_STORAGE or uses != _SOLE_USE
        for holders, uses in zip(_references(storages), _use_counts(storages), strict=True)
    ]
    return [
        count > _SOLE or id(leaf) in exposed or seen
        for leaf, count, seen in zip(leaves, references, in_use, strict=True)
    ]


def is_foreign(leaf: Tensor) -> bool:
    """Whether torch did not allocate the storage: a numpy array or a mapped file, which may have other references."""
    return not leaf.untyped_storage().resizable()


@functools.cache
def keep_freed_memory() -> None:
    """Sets glibc to keep up to 2 GiB of freed memory, in blocks of up to 32 MiB, for later allocations.

    By default, it returns much of this memory to the system at the end of each step, and the next step has to map each
    page and fill it with zeros again. Variables from malloc's manual page take precedence: with
    ``MALLOC_TRIM_THRESHOLD_=131072`` the default stays. Other allocators are not affected.
    """
    if any(name in os.environ for name in _USER_VARIABLES) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        # Not Linux, or another C library.
        return
    mallopt(_MMAP_THRESHOLD, _MAX_BLOCK_BYTES)
    mallopt(_TRIM_THRESHOLD, _MAX_KEPT_BYTES)
