"""The same state on all ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from fxtrain import tree
from fxtrain.core import TrainState, first_names
from fxtrain.core._bits import as_bytes
from fxtrain.distributed._mesh import Mesh


def replicated(state: TrainState, mesh: Mesh) -> TrainState:
    """Returns rank 0's state on all ranks.

    A module has other parameters in each process, unless all processes seed torch alike before they make it. All ranks
    of a data parallel run must begin with the same state, which ``fit`` checks.

    Args:
        state: The state of this rank, such as a new one from ``fxtrain.init``. It is not modified.
        mesh: The ranks.

    Raises:
        ValueError: If the states of ranks differ in structure, shapes or dtypes.
        LostRankError: If another rank does not take part in time.

    Example:
        >>> import torch, fxtrain as fx
        >>> mesh = fx.distributed.mesh()
        >>> state = fx.distributed.replicated(fx.init({"w": torch.tensor(2.0)}), mesh)
        >>> state.params
        {'w': tensor(2.)}
    """
    leaves, structure = tree.flatten(state)
    paths = tree.paths(state, "state")
    kinds = {path: (leaf.dtype, tuple(leaf.shape)) for path, leaf in zip(paths, leaves, strict=True)}
    tables = mesh.gather(kinds, "shapes of states")
    names = dict.fromkeys(path for table in tables for path in table)
    other = [path for path in names if len({table.get(path) for table in tables}) > 1]
    if other:
        raise ValueError(
            f"expected states with the same leaves on all ranks, got others at {first_names(other, 3)}. Make the same "
            "module and the same optimizer in all processes."
        )
    with mesh.collective("broadcast of the state"):
        return tree.unflatten(structure, [_of_main(leaf, mesh) for leaf in leaves])


def _of_main(leaf: Tensor, mesh: Mesh) -> Tensor:
    copied = leaf.clone()
    if leaf.numel():
        # A buffer of bytes, because gloo does not send all dtypes, and only contiguous tensors.
        dense = copied.contiguous()
        dist.broadcast(as_bytes(dense), src=0, group=mesh.world_group if leaf.is_cuda else mesh.control)
        copied.copy_(dense)
    return copied
