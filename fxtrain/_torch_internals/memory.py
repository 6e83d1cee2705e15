"""Memory: the identity and the use counts of storages, copies of many at once, and snapshots of CUDA devices."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch import Tensor, UntypedStorage

from fxtrain._torch_internals.dispatch import NO_FUNCTION_MODES
from fxtrain._torch_internals.interface import Interface

ADDRESS = Interface("torch.UntypedStorage._cdata", "telling which tensors share memory")
USE_COUNT = Interface("torch._C._storage_Use_Count", "donating buffers that nothing else references")
VERSION = Interface("torch.Tensor._version", "noticing in-place writes")
COPY_ALL = Interface("torch._foreach_copy_", "fast snapshots of states")
RECORD = Interface("torch.cuda.memory._record_memory_history", "memory snapshots in profiles")
DUMP = Interface("torch.cuda.memory._dump_snapshot", "memory snapshots in profiles")

_address = operator.attrgetter("_cdata")


def storage_id(tensor: Tensor) -> int:
    """Returns the identity of a tensor's storage, which all of its views share.

    Example:
        >>> import torch
        >>> x = torch.ones(2, 3)
        >>> storage_id(x) == storage_id(x.t()) != storage_id(x.clone())
        True
    """
    # Function modes that look for reads of values would take this for one.
    with NO_FUNCTION_MODES.get()() if NO_FUNCTION_MODES.exists else contextlib.nullcontext():
        return tensor.untyped_storage()._cdata


def storage_use_counter() -> Callable[[Iterable[UntypedStorage]], Iterable[int]]:
    """Returns a function that counts how many tensors and other objects of torch use each storage.

    It yields -1 where torch cannot count. The interfaces are looked up once, because each step counts.
    """
    if not (USE_COUNT.exists and ADDRESS.exists):
        return lambda storages: itertools.repeat(-1, len(list(storages)))
    count = USE_COUNT.get()
    return lambda storages: map(count, map(_address, storages))


def write_count(tensor: Tensor) -> int:
    """Returns how often a tensor, one of its views or its base has been written in place.

    Example:
        >>> import torch
        >>> x = torch.ones(2)
        >>> before = write_count(x)
        >>> write_count(x.add_(1)) - before
        1
    """
    return tensor._version


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor], *, non_blocking: bool) -> None:
    """Copies each source into its target, in a single call of torch where it can.

    Args:
        targets: The tensors that are written.
        sources: Tensors of the same shapes.
        non_blocking: As in ``torch.Tensor.copy_``.
    """
    if COPY_ALL.exists and targets:  # which refuses empty lists
        COPY_ALL.get()(list(targets), list(sources), non_blocking=non_blocking)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=non_blocking)


def start_memory_history(max_entries: int) -> None:
    """Records allocations, with their Python stacks.

    Args:
        max_entries: The number of allocations and deallocations that are kept.
    """
    RECORD.get()(max_entries=max_entries)


def stop_memory_history() -> None:
    """Ends the recording."""
    RECORD.get()(None)


def write_memory_snapshot(path: Path) -> None:
    """Writes the recorded allocations to a file for https://docs.pytorch.org/memory_viz."""
    DUMP.get()(str(path))
