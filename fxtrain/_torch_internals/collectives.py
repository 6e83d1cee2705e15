"""Collectives as pure functions, which ``make_fx`` records and Inductor compiles, and the rank as a tensor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fxtrain._torch_internals.interface import Interface

# Importing the module registers the shapes of the operators' results, which a trace needs.
MODULE = Interface("torch.distributed._functional_collectives", "collectives in a graph")
ALL_REDUCE = Interface("torch.ops._c10d_functional.all_reduce", "collectives in a graph")
ALL_GATHER = Interface("torch.ops._c10d_functional.all_gather_into_tensor", "collectives in a graph")
REDUCE_SCATTER = Interface("torch.ops._c10d_functional.reduce_scatter_tensor", "collectives in a graph")
ALL_TO_ALL = Interface("torch.ops._c10d_functional.all_to_all_single", "sums of sharded gradients by gloo")
ALL_GATHER_MANY = Interface(
    "torch.ops._c10d_functional.all_gather_into_tensor_coalesced", "buckets of a sharded step's transfers"
)
REDUCE_SCATTER_MANY = Interface(
    "torch.ops._c10d_functional.reduce_scatter_tensor_coalesced", "buckets of a sharded step's transfers"
)
WAIT = Interface("torch.ops._c10d_functional.wait_tensor", "collectives in a graph")

NAMESPACE = "_c10d_functional"
"""The namespace of the operators."""


# A group is given by its name, which can be copied and pickled. Without the operators, the group is that registered
# under this name, or the default group, which has the same ranks.

_groups: dict[str, Any] = {}


def register_group(group: Any) -> None:
    """Registers a process group of some ranks, for use without the operators."""
    _groups[group.group_name] = group


def all_reduce(tensors: Sequence[Tensor], group: str) -> list[Tensor]:
    """Returns the sums of tensors over all ranks of a group. All transfers start before the first is waited for.

    Args:
        tensors: Floating or integer tensors, of equal shapes and dtypes on all ranks.
        group: The name of the process group.
    """
    if not _has_operators():
        sums = [tensor.clone() for tensor in tensors]
        for each in sums:
            dist.all_reduce(each, group=_groups.get(group))
        return sums
    start, wait = ALL_REDUCE.get(), WAIT.get()
    started = [start(tensor.contiguous(), "sum", group) for tensor in tensors]
    return [wait(each) for each in started]


def all_gather(tensor: Tensor, group: str, size: int) -> Tensor:
    """Returns the tensors of all ranks of a group, stacked in the order of ranks: [size, ...].

    Args:
        tensor: Of equal shape and dtype on all ranks.
        group: The name of the process group.
        size: Number of its ranks.
    """
    shape = (size, *tensor.shape)
    if not _has_operators():
        parts = [torch.empty_like(tensor) for _ in range(size)]
        dist.all_gather(parts, tensor.contiguous(), group=_groups.get(group))
        return torch.stack(parts)
    return WAIT.get()(ALL_GATHER.get()(tensor.contiguous().reshape(-1), size, group)).reshape(shape)


def all_gather_all(tensors: Sequence[Tensor], group: str, size: int) -> list[Tensor]:
    """Returns ``all_gather`` of each tensor. All transfers start before the first is waited for."""
    if not _has_operators():
        return [all_gather(tensor, group, size) for tensor in tensors]
    start, wait = ALL_GATHER.get(), WAIT.get()
    started = [start(tensor.contiguous().reshape(-1), size, group) for tensor in tensors]
    return [wait(each).reshape(size, *tensor.shape) for each, tensor in zip(started, tensors, strict=True)]


def reduce_scatter(tensors: Sequence[Tensor], group: str, size: int, *, exchanges: bool = False) -> list[Tensor]:
    """Returns this rank's row of the sums over all ranks. All transfers start before the first is waited for.

    Args:
        tensors: One row per rank each, [size, values], of equal shapes and dtypes on all ranks.
        group: The name of the process group.
        size: Number of its ranks.
        exchanges: Whether each rank sends its rows of the others to them, and adds what it receives in the order of
            ranks. gloo's own collective sums all rows on all ranks, and so transfers twice as much.
    """
    if not _has_operators():
        rows = [torch.empty_like(tensor[0]) for tensor in tensors]
        for row, tensor in zip(rows, tensors, strict=True):
            dist.reduce_scatter_tensor(row, tensor.contiguous().reshape(-1), group=_groups.get(group))
        return rows
    wait = WAIT.get()
    if exchanges and ALL_TO_ALL.exists:
        start, counts = ALL_TO_ALL.get(), [[tensor.shape[1]] * size for tensor in tensors]
        started = [
            start(tensor.contiguous().reshape(-1), each, each, group)
            for tensor, each in zip(tensors, counts, strict=True)
        ]
        return [wait(each).reshape(size, -1).sum(0) for each in started]
    start = REDUCE_SCATTER.get()
    started = [start(tensor.contiguous().reshape(-1), "sum", size, group) for tensor in tensors]
    return [wait(each) for each in started]


def is_all_gather(target: object) -> bool:
    """Whether the target of a graph's node is the all-gather of one tensor that ``all_gather`` and others start."""
    return _is(target, ALL_GATHER)


def is_reduce_scatter(target: object) -> bool:
    """Whether the target of a graph's node is the collective of ``reduce_scatter`` for one tensor."""
    return _is(target, REDUCE_SCATTER)


def is_exchange(target: object) -> bool:
    """Whether the target of a graph's node is the collective of ``reduce_scatter`` with ``exchanges``."""
    return _is(target, ALL_TO_ALL)


def is_all_reduce(target: object) -> bool:
    """Whether the target of a graph's node is the collective of ``all_reduce``."""
    return _is(target, ALL_REDUCE)


def is_wait(target: object) -> bool:
    """Whether the target of a graph's node waits for a collective."""
    return _is(target, WAIT)


def wait(received: Tensor) -> Tensor:
    """Returns the result of a collective once its transfer has ended."""
    return WAIT.get()(received)


def of_many(target: object) -> Any:
    """Returns the operator for a list of tensors that is one transfer, or None if torch lacks it.

    Args:
        target: An operator of which ``is_all_gather`` or ``is_reduce_scatter`` holds.
    """
    many = ALL_GATHER_MANY if is_all_gather(target) else REDUCE_SCATTER_MANY
    return many.get().default if many.exists else None


def waited(tensor: Tensor) -> Tensor:
    """Returns a tensor once its collective has ended: the plain tensor of an ``AsyncCollectiveTensor``."""
    wait: Callable[[], Tensor] | None = getattr(tensor, "wait", None)
    return tensor if wait is None else wait()


def rank(like: Tensor, ranks_per_model: int = 1) -> Tensor:
    """Returns the rank of this process as a tensor, int64 []. With several ranks per model, that of the model.

    An operator that reads it when it runs, so that all ranks trace the same graph. Call ``register_rank`` first.

    Args:
        like: Any tensor on the device of the result.
        ranks_per_model: Number of neighboring ranks that have one rank among models.

    Example:
        >>> library = register_rank()
        >>> rank(torch.zeros(2))
        tensor(0)
    """
    return torch.ops.fxtrain.rank.default(like, ranks_per_model)


def is_collective(target: object) -> bool:
    """Whether the target of a graph's node is a collective, or the wait for one."""
    return getattr(target, "namespace", None) == NAMESPACE


def is_rank(target: object) -> bool:
    """Whether the target of a graph's node is the operator of ``rank``."""
    return getattr(target, "namespace", None) == "fxtrain" and target == torch.ops.fxtrain.rank.default


# Cached, because operators are removed when their library is.
@functools.cache
def register_rank() -> torch.library.Library:
    """Registers the operator of ``rank``. Dynamo cannot trace this."""
    library = torch.library.Library("fxtrain", "FRAGMENT")
    library.define("rank(Tensor like, int ranks_per_model) -> Tensor")
    library.impl("rank", _rank, "CompositeExplicitAutograd")
    torch.library.register_fake("fxtrain::rank", _fake_rank, lib=library)
    return library


@functools.cache
def _has_operators() -> bool:
    return all(each.exists for each in (MODULE, ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, WAIT))


def _is(target: object, interface: Interface) -> bool:
    packet = getattr(target, "overloadpacket", None)
    return packet is not None and interface.exists and packet is interface.get()


def _rank(like: Tensor, ranks_per_model: int) -> Tensor:
    number = dist.get_rank() // ranks_per_model if dist.is_initialized() else 0
    return torch.full((), number, dtype=torch.int64, device=like.device)


def _fake_rank(like: Tensor, ranks_per_model: int) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=like.device)
