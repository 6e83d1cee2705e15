"""Sharded states: each rank has a slice of every large tensor."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.collectives import all_gather_all
from fxtrain.core import TrainState, Tree, check_int, check_train_state
from fxtrain.core._graph_marks import Transfers, marking_transfers
from fxtrain.core._shard import Shard, full_tensor, is_shard, shards_in
from fxtrain.distributed._mesh import Mesh
from fxtrain.distributed._reduce import concatenated, split, transfer_buckets


def shard(state: TrainState, mesh: Mesh, *, least: int = 2**16) -> TrainState:
    """Returns a state of which each rank keeps its part: fully sharded data parallel training.

    Parameters with ``least`` elements or more are split evenly along their first axis whose size the number of ranks
    divides. Optimizer state and slots with the shape of such a parameter, such as moments and averages, are split like
    it. All other leaves, and all buffers, stay on all ranks. Each split leaf becomes a ``Shard``, a node of the tree
    with this rank's slice.

    ``train_step(mesh=mesh)`` gathers the parameters before the forward pass and sums each gradient to the rank that
    has its part. A compiled step does so bucket by bucket, which takes less memory: see ``reshard`` of ``compile``. The
    optimizer and callbacks see DTensors, so elementwise operations run on the parts, and norms and
    other reductions are those of all ranks. An operation that DTensor does not support raises. The step keeps the
    placement of all leaves. ``eval_step(mesh=mesh)`` gathers parameters too.

    Everything that needs whole tensors in one process, such as ``fxtrain.view`` or ``fxtrain.state_dict``, raises
    TypeError: see ``gathered``. Checkpoints of ``fit`` contain whole tensors, and are restored with any placement and
    any number of ranks.

    Args:
        state: The state of this rank, the same on all ranks, see ``replicated``. It is not modified.
        mesh: The ranks, as given to ``train_step``, ``eval_step`` and ``fit``.
        least: The number of elements from which a parameter is split.

    Returns:
        The sharded state. With one rank, an equal state without shards.

    Example:
        >>> import torch, fxtrain as fx
        >>> mesh = fx.distributed.mesh()
        >>> state = fx.init(torch.nn.Linear(512, 512), fx.optim.adamw(1e-3))
        >>> state = fx.distributed.shard(fx.distributed.replicated(state, mesh), mesh)
        >>> fx.distributed.gathered(state).params["weight"].shape
        torch.Size([512, 512])
    """
    check_train_state(state, "shard(state, mesh)", takes_shards=True)
    check_int("least", least, minimum=1)
    state = gathered(state)
    shapes = {leaf.shape for leaf in tree.leaves(state.params) if leaf.numel() >= least}
    axes = {shape: axis for shape in shapes if (axis := _axis(shape, mesh.size)) is not None}

    def placed(leaf: Tensor) -> Tree:
        axis = axes.get(leaf.shape)
        return leaf.clone() if axis is None else Shard(sliced(leaf, axis, mesh).clone(), axis, mesh)

    if mesh.size == 1:
        return state.copy()
    device_mesh(mesh)  # made now, because it holds a tensor that a trace would make fake
    parts = {name: tree.map(placed, getattr(state, name)) for name in ("params", "opt_state", "slots")}
    return state.copy().replace(**parts)


def gathered(state: TrainState) -> TrainState:
    """Returns a state with whole tensors on all ranks. All ranks must call it.

    Args:
        state: A sharded state, from ``shard`` or a run, or any other.

    Returns:
        The state in which each shard is replaced by the whole tensor on the rank's device.

    Raises:
        LostRankError: If another rank does not take part in time.

    Example:
        >>> import torch, fxtrain as fx
        >>> state = fx.init(torch.nn.Linear(2, 2))
        >>> fx.distributed.gathered(state) is state
        True
    """
    check_train_state(state, "gathered(state)", takes_shards=True)
    found = shards_in(state)
    if not found:
        return state
    with found[0].mesh.collective("gathering of a sharded state"):
        return whole(state)


def whole(node: Tree) -> Tree:
    """Returns a tree in which shards, and DTensors of callbacks, are replaced by whole tensors. It can be traced.

    Args:
        node: Any tree, with the same shards on all ranks.
    """
    leaves, structure = tree.flatten(node, is_leaf=is_shard)
    indices = [index for index, leaf in enumerate(leaves) if is_shard(leaf)]
    if indices:
        for index, full in zip(indices, _all_whole([leaves[index] for index in indices]), strict=True):
            leaves[index] = full
    return tree.unflatten(structure, map(full_tensor, leaves))


def _all_whole(shards: Sequence[Shard]) -> list[Tensor]:
    """Returns the whole tensors of shards, gathered in buckets, which ``compile`` chooses for a step that it traces."""
    with marking_transfers(Transfers(is_gather=True)):
        return _gathered(shards)


def _gathered(shards: Sequence[Shard]) -> list[Tensor]:
    mesh: Mesh = shards[0].mesh
    moved = [each.local.movedim(each.axis, 0) for each in shards]
    bits = [torch.view_as_real(local) if local.is_complex() else local for local in moved]
    grouped = transfer_buckets(bits)
    flat = [concatenated([bits[index].reshape(-1) for index in bucket]) for bucket in grouped]
    found: dict[int, Tensor] = {}
    for bucket, rows in zip(grouped, all_gather_all(flat, mesh.group.group_name, mesh.size), strict=True):
        parts = split(rows, [bits[index].numel() for index in bucket], 1)
        for index, part in zip(bucket, parts, strict=True):
            shape = bits[index].shape
            full = part.reshape(mesh.size * shape[0], *shape[1:])
            full = torch.view_as_complex(full) if moved[index].is_complex() else full
            found[index] = full.movedim(0, shards[index].axis).contiguous()
    return [found[index] for index in range(len(shards))]


def on_main(state: TrainState) -> TrainState:
    """Returns a state on rank 0 whose shards are whole tensors on the host, and the state itself on the others.

    All ranks must call it. Tensors are gathered one by one, so other ranks and devices need memory for one slice. The
    checkpointer copies the result, so the host of rank 0 holds the whole state twice for the time of the copy.

    Args:
        state: A sharded state.
    """
    mesh: Mesh = shards_in(state)[0].mesh

    def on_host(leaf: Tree) -> Tree:
        if not is_shard(leaf):
            return leaf
        # Bytes, because gloo does not send all dtypes.
        local: Tensor = leaf.local.detach().movedim(leaf.axis, 0).cpu().contiguous()
        flat = local.reshape(-1).view(torch.uint8)
        full = local.new_empty(mesh.size * local.shape[0], *local.shape[1:]) if mesh.is_main else None
        rows = None if full is None else list(full.reshape(-1).view(torch.uint8).chunk(mesh.size))
        dist.gather(flat, rows, dst=0, group=mesh.control)
        return leaf.local[:0] if full is None else full.movedim(0, leaf.axis).contiguous()

    with mesh.collective("gathering of a sharded state for a checkpoint"):
        full = tree.map(on_host, state, is_leaf=is_shard)
    return full if mesh.is_main else state


def template(state: TrainState) -> TrainState:
    """Returns a state like a sharded one to restore into: without memory on the host for each shard."""
    return tree.map(_placeholder, state, is_leaf=is_shard)


def _placeholder(leaf: Tree) -> Tree:
    return torch.zeros((), dtype=leaf.dtype, device="cpu").expand(leaf.shape) if is_shard(leaf) else leaf


def placed_like(restored: TrainState, read_into: TrainState, like: TrainState) -> TrainState:
    """Returns a restored state whose tensors are sharded as those of another state.

    Args:
        restored: The state with whole tensors.
        read_into: The ``template`` of ``like``, which the state was restored into.
        like: The sharded state.
    """
    shards = dict(zip(tree.paths(like, is_leaf=is_shard), tree.leaves(like, is_leaf=is_shard), strict=True))
    blanks = dict(zip(tree.paths(read_into), tree.leaves(read_into), strict=True))

    def placed(path: str, leaf: Tensor) -> Tree:
        own = shards.get(path)
        if not is_shard(own):
            return leaf
        if leaf is blanks[path]:  # the checkpoint does not have it
            return own
        return own.with_local(sliced(leaf, own.axis, own.mesh).clone().to(own.device))

    return tree.map_with_path(placed, restored)


def sliced(leaf: Tensor, axis: int, mesh: Mesh) -> Tensor:
    """Returns this rank's part of a tensor."""
    rows = leaf.shape[axis] // mesh.size
    return leaf.narrow(axis, mesh.rank * rows, rows)


def _axis(shape: torch.Size, size: int) -> int | None:
    return next((axis for axis, length in enumerate(shape) if length and length % size == 0), None)


@functools.cache
def device_mesh(mesh: Mesh) -> object:
    """Returns torch's mesh of the ranks, for DTensors."""
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(mesh.group, mesh.device.type)
