"""Sharded states as the optimizer and callbacks see them: with DTensors, whose reductions are those of all ranks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.collectives import waited
from fxtrain._torch_internals.dispatch import ITEM, TorchDispatchMode
from fxtrain.core import TrainState, Tree
from fxtrain.core._shard import Shard, full_tensor, holds_shards, is_dtensor, is_shard
from fxtrain.distributed._mesh import Mesh
from fxtrain.distributed._shards import device_mesh, sliced

T = TypeVar("T")


class Opened:
    """A tree with shards, opened: each shard is replaced by a DTensor that shares the memory of its slice.

    Args:
        closed: The tree with shards.

    Attributes:
        tree: The tree with DTensors.
    """

    def __init__(self, closed: Tree) -> None:
        self._shards: dict[int, tuple[Tensor, Shard]] = {}
        self._mesh: Mesh | None = None
        self._closed = closed
        self.tree: Tree = tree.map(self._open, closed, is_leaf=is_shard)
        paths, leaves = tree.paths(closed, is_leaf=is_shard), tree.leaves(closed, is_leaf=is_shard)
        self._placed = dict(zip(paths, leaves, strict=True))

    def _open(self, leaf: Tree) -> Tree:
        if not is_shard(leaf):
            return leaf
        self._mesh = leaf.mesh
        opened = dtensor(leaf)
        self._shards[id(opened)] = (opened, leaf)
        return opened

    def close(self, new: Tree) -> Tree:
        """Returns a tree with shards for one with DTensors.

        Leaves keep the placement of those at the same path. Others, such as new slots, keep their own.

        Args:
            new: The tree that a callback or an optimizer made of ``self.tree``.
        """
        if new is self.tree:  # the same object, by which the loop knows whether it is on disk
            return self._closed
        leaves, structure = tree.flatten(new)
        if not self._shards:
            return new
        paths = tree.paths(new)
        return tree.unflatten(
            structure, [self._close(leaf, self._placed.get(path)) for leaf, path in zip(leaves, paths, strict=True)]
        )

    def _close(self, leaf: Tensor, before: Tree) -> Tree:
        known = self._shards.get(id(leaf))
        if known is not None and (before is None or before is known[1]):
            return known[1]
        assert self._mesh is not None
        if is_shard(before):
            return before.with_local(_local(leaf, before.axis, before.mesh))
        if isinstance(before, Tensor):
            return full_tensor(leaf)
        axis = _axis_of(leaf)
        if axis is None or leaf.shape[axis] % self._mesh.size:
            return full_tensor(leaf)
        return Shard(_local(leaf, axis, self._mesh), axis, self._mesh)


class WholeScalars(TorchDispatchMode):
    """Reads of a DTensor's value on the host, as ``float(norm)``, are of all ranks. torch reads the part of the rank.

    Not in a trace, which refuses such reads.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ITEM.get() and is_dtensor(args[0]):
            return args[0].full_tensor().item()
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def seeing_dtensors(*, reads: bool = True) -> Iterator[None]:
    """A context for callbacks and optimizers that see DTensors.

    Args:
        reads: Whether values may be read on the host, which a trace refuses.
    """
    try:
        with WholeScalars() if reads else contextlib.nullcontext():
            yield
    except Exception as error:
        if "DTensor" in str(error) or "harding" in str(error):
            error.add_note(
                "The state is sharded, so callbacks and the optimizer see DTensors. Where torch refuses an operation "
                "on them, apply it to the whole tensor, leaf.full_tensor(), or train with a replicated state."
            )
        raise


def on_opened(state: TrainState, function: Callable[[TrainState], T]) -> T:
    """Returns ``function(state)`` for a function that is called with DTensors in place of shards.

    Args:
        state: A state, sharded or not.
        function: A function of the loop or of callbacks, which returns such a state or None. All ranks must call it.
    """
    if not holds_shards(state.params):
        return function(state)
    opened = Opened(state)
    with seeing_dtensors():
        return opened.close(function(opened.tree))


def abstract(state: TrainState) -> TrainState:
    """Returns a state for observers, which run on one rank: whole tensors without values in place of shards."""

    def described(leaf: Tree) -> Tree:
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") if is_shard(leaf) else leaf

    return tree.map(described, state, is_leaf=is_shard)


def dtensor(shard: Shard) -> Tensor:
    """Returns a DTensor with the memory of a shard's slice."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Shard as Placement

    mesh: Any = device_mesh(shard.mesh)
    shape = shard.shape
    # Computed, because an empty tensor would be an operation of a trace.
    stride = tuple(math.prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))
    with torch.no_grad():
        return DTensor.from_local(
            shard.local, mesh, [Placement(shard.axis)], run_check=False, shape=shape, stride=stride
        )


def _local(leaf: Any, axis: int, mesh: Mesh) -> Tensor:
    """Returns this rank's part along an axis, of a DTensor of any placement or a whole tensor."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor import Shard as Placement

    if not isinstance(leaf, DTensor):
        return sliced(leaf, axis, mesh).contiguous()
    with torch.no_grad():
        return waited(leaf.redistribute(placements=[Placement(axis)]).to_local())


def _axis_of(leaf: Any) -> int | None:
    """Returns the axis along which a DTensor is split, if any."""
    placements = getattr(leaf, "placements", None)
    return getattr(placements[0], "dim", None) if placements else None
