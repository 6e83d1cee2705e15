"""A rank's part of a tensor that is split among the ranks of a run: a node with one leaf, the tensor of this rank.

Flattened, a sharded state has plain tensors of this rank as leaves. Where they belong is part of its structure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeGuard, cast

import torch
from torch import Tensor

from fxtrain.core._pytrees import NAMESPACE, ops, register_node
from fxtrain.core._types import Tree


@dataclasses.dataclass(frozen=True, eq=False)
class Shard:
    """One rank's part of a tensor: equal slices along one axis, in the order of ranks.

    Made by ``fxtrain.shard``, in place of the large tensors of a state. ``fxtrain.distributed.gathered``
    returns the whole tensors.

    Args:
        local: The slice of this rank.
        axis: The axis that is split.
        mesh: The ranks that have the slices. With a plan, those of a model.

    Example:
        >>> import torch, fxtrain as fx
        >>> mesh = fx.distributed.mesh()
        >>> fx.distributed.Shard(torch.zeros(4, 3), axis=0, mesh=mesh).shape
        torch.Size([4, 3])
    """

    local: Any
    axis: int
    mesh: Any

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole tensor."""
        sizes = list(self.local.shape)
        sizes[self.axis] *= self.mesh.size
        return torch.Size(sizes)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype."""
        return self.local.dtype

    @property
    def device(self) -> torch.device:
        """The device of this rank's slice."""
        return self.local.device

    def with_local(self, local: Any) -> Shard:
        """Returns the shard with another slice of this rank."""
        return Shard(local, self.axis, self.mesh)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"expected an attribute of a shard (local, axis, mesh, shape, dtype, device), got {name!r}. Each rank has "
            "a part of this tensor: call fxtrain.distributed.gathered(state) on all ranks for the whole state."
        )


def _flatten(shard: Shard) -> tuple[list[Any], tuple[int, Any]]:
    return [shard.local], (shard.axis, shard.mesh)


def _unflatten(context: tuple[int, Any], children: Sequence[Any]) -> Shard:
    (local,), (axis, mesh) = children, context
    return Shard(local, axis, mesh)


register_node(Shard, _flatten, _unflatten, fields=("local",))


def is_shard(node: object) -> TypeGuard[Shard]:
    """Whether a node of a tree is a ``Shard``."""
    return type(node) is Shard


def holds_shards(params: Tree) -> bool:
    """Whether there is a shard among parameters. Faster than ``shards_in`` for the flat dict of a module."""
    values: list[Any] = list(cast("dict[str, Any]", params).values()) if type(params) is dict else [params]
    return any(is_shard(value) or (not isinstance(value, Tensor) and bool(shards_in(value))) for value in values)


def shards_in(tree: Tree) -> list[Shard]:
    """Returns the shards in a tree."""
    return [leaf for leaf in ops.tree_leaves(tree, is_leaf=is_shard, namespace=NAMESPACE) if is_shard(leaf)]


def full_tensor(leaf: Tensor) -> Tensor:
    """Returns the whole tensor of a DTensor, and any other tensor as it is."""
    full: Callable[[], Tensor] | None = None if type(leaf) is Tensor else getattr(leaf, "full_tensor", None)
    return leaf if full is None else full()


def is_sharded(tree: Tree) -> bool:
    """Whether a tree has shards, or the DTensors that callbacks see in their place."""
    leaves = ops.tree_leaves(tree, is_leaf=is_shard, namespace=NAMESPACE)
    return any(is_shard(leaf) or is_dtensor(leaf) for leaf in leaves)


def is_dtensor(leaf: object) -> bool:
    """Whether a leaf is a DTensor, the form of a shard that callbacks see."""
    return type(leaf) is not Tensor and hasattr(leaf, "full_tensor")


def refuse_shards(tree: Tree, call: str) -> None:
    """Raises TypeError if a tree has shards, or DTensors of a callback.

    Args:
        tree: A state, or a part of one.
        call: The call that needs whole tensors, for the error.
    """
    if is_sharded(tree):
        raise TypeError(
            f"expected whole tensors in {call}, got a sharded state, of which each rank has a part. Call "
            "fxtrain.distributed.gathered(state) on all ranks first."
        )
