"""Rank 0's tensors on all ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from fxtrain import tree
from fxtrain.core import TrainState, first_names
from fxtrain.core._bits import as_bytes
from fxtrain.distributed._mesh import Mesh


def check_same_leaves(state: TrainState, mesh: Mesh) -> None:
    """Raises ValueError if the states of ranks differ in structure, shapes or dtypes. All ranks must call it.

    Args:
        state: The state of this rank, with whole tensors.
        mesh: The ranks.

    Raises:
        ValueError: If they differ.
        LostRankError: If another rank does not take part in time.
    """
    leaves = zip(tree.paths(state, "state"), tree.leaves(state), strict=True)
    tables = mesh.gather({path: (leaf.dtype, tuple(leaf.shape)) for path, leaf in leaves}, "shapes of states")
    names = dict.fromkeys(path for table in tables for path in table)
    other = [path for path in names if len({table.get(path) for table in tables}) > 1]
    if other:
        raise ValueError(
            f"expected states with the same leaves on all ranks, got others at {first_names(other, 3)}. Make the same "
            "module and the same optimizer in all processes."
        )


def of_main(leaf: Tensor, mesh: Mesh) -> Tensor:
    """Returns a copy of rank 0's tensor, with the strides of this rank's. All ranks must call it."""
    copied = leaf.clone()
    if leaf.numel():
        # A buffer of bytes, because gloo does not send all dtypes, and only contiguous tensors.
        dense = copied.contiguous()
        dist.broadcast(as_bytes(dense), src=0, group=mesh.world_group if leaf.is_cuda else mesh.control)
        copied.copy_(dense)
    return copied
