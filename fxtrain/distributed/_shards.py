"""States on several ranks: each has the whole tensors, or a slice of every large one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.collectives import all_gather_all
from fxtrain.core import TrainState, Tree, check_train_state, describe
from fxtrain.core._graph_marks import Transfers, marking_transfers
from fxtrain.core._shard import Shard, full_tensor, is_shard, shards_in
from fxtrain.distributed._broadcast import check_same_leaves, of_main
from fxtrain.distributed._layouts import FullySharded, Layout, TensorParallel
from fxtrain.distributed._mesh import Mesh
from fxtrain.distributed._plan import axes_of
from fxtrain.distributed._reduce import concatenated, split, transfer_buckets


def shard(state: TrainState, mesh: Mesh, layout: Layout | None = None) -> TrainState:
    """Returns rank 0's state, placed on all ranks: whole on each of them, or of large tensors a part on each.

    A module has other parameters in each process, unless all processes seed torch alike before they make it. All ranks
    must begin with the same state, which ``fit`` checks, so the values of rank 0 are sent to the others.

    Without a layout, each rank has the whole state: data parallel training. ``fsdp`` splits large parameters among the
    ranks that split the batch, and ``tensor_parallel`` splits modules among the ranks of a model. Each split leaf
    becomes a ``Shard``, a node of the tree with this rank's slice. The step keeps the layout of all leaves. The
    optimizer and callbacks see DTensors, so elementwise operations run on the parts, and norms and other reductions are
    those of all ranks. An operation that DTensor does not support raises.

    Everything that needs whole tensors in one process, such as ``fxtrain.view`` or ``fxtrain.state_dict``, raises
    TypeError: see ``gathered``. In a checkpoint of ``fit``, each rank writes its slices, so the folder must be on a
    file system that all ranks share. It is restored with any layout and any number of ranks. A rank that writes longer
    than the timeout of the mesh counts as lost.

    Args:
        state: The state of this rank, such as a new one from ``fxtrain.init``, or one with another layout. It is not
            modified.
        mesh: The ranks, as given to ``train_step``, ``eval_step`` and ``fit``.
        layout: From ``fxtrain.distributed.fsdp`` or ``tensor_parallel``. None leaves all tensors whole.

    Returns:
        The state of this rank. If no other rank shares the split tensors, they stay whole.

    Raises:
        TypeError: If the plan of ``tensor_parallel`` has a module that is not a ``Linear``.
        ValueError: If the states of ranks differ in structure, shapes or dtypes. With ``fsdp``, if a model has several
            ranks. With ``tensor_parallel``, if a pattern matches no module, a module is both "column" and "row", the
            size of a parameter is not a multiple of the number of ranks, or another module has the same parameter.
        LostRankError: If another rank does not take part in time.

    Example:
        >>> import torch, fxtrain as fx
        >>> mesh = fx.distributed.mesh()
        >>> state = fx.shard(fx.init({"w": torch.tensor(2.0)}), mesh)
        >>> state.params
        {'w': tensor(2.)}
    """
    check_train_state(state, "shard(state, mesh)", takes_shards=True)
    state = gathered(state)
    split = _splitting(layout, state, mesh)
    check_same_leaves(state, mesh)
    leaves, structure = tree.flatten(state)
    with mesh.collective("broadcast of the state"):
        parts = [
            _part(of_main(leaf, mesh), split(path, leaf))
            for path, leaf in zip(tree.paths(state, "state"), leaves, strict=True)
        ]
    return tree.unflatten(structure, parts)


_Split = tuple[int, Mesh] | None
"""The axis along which a leaf is split, and the ranks that share it."""


def _splitting(layout: Layout | None, state: TrainState, mesh: Mesh) -> Callable[[str, Tensor], _Split]:
    """Returns a function from the path of a leaf, and the leaf, to how it is split."""
    if layout is None:
        return lambda path, leaf: None
    if isinstance(layout, FullySharded):
        return _splitting_by_size(layout, state, mesh)
    if isinstance(layout, TensorParallel):  # pyright: ignore[reportUnnecessaryIsInstance]
        return _splitting_by_plan(layout, state, mesh)
    raise TypeError(
        f"expected layout to be from fxtrain.distributed.fsdp or tensor_parallel, got {describe(layout)}. Write "
        "fx.shard(state, mesh, fx.distributed.fsdp()), or leave it out so that each rank has the whole state."
    )


def _splitting_by_size(layout: FullySharded, state: TrainState, mesh: Mesh) -> Callable[[str, Tensor], _Split]:
    if mesh.model is not None:
        raise ValueError(
            f"expected the layout tensor_parallel for a mesh with {mesh.model.size} ranks per model, got fsdp. Name "
            "the modules to split, as in tensor_parallel({'blocks.*.up': 'column', 'blocks.*.out': 'row'}), or leave "
            "out model= of the mesh. Large parameters are not split among both data and model ranks."
        )
    if mesh.size == 1:
        return lambda path, leaf: None
    device_mesh(mesh)  # made now, because it holds a tensor that a trace would make fake
    shapes = {leaf.shape for leaf in tree.leaves(state.params) if leaf.numel() >= layout.least}
    axes = {shape: axis for shape in shapes if (axis := _axis(shape, mesh.size)) is not None}
    return lambda path, leaf: (axes[leaf.shape], mesh) if leaf.shape in axes and _is_of_params(path) else None


def _splitting_by_plan(layout: TensorParallel, state: TrainState, mesh: Mesh) -> Callable[[str, Tensor], _Split]:
    axes = axes_of(layout.plan, state, mesh.ranks_per_model)
    ranks = mesh.model
    if ranks is None:
        return lambda path, leaf: None
    device_mesh(ranks)  # as above

    def split(path: str, leaf: Tensor) -> _Split:
        # The optimizer state of a parameter, and averages of it, are at paths that end like its own.
        ends = ((axis, ranks) for end, shape, axis in axes if path.endswith(end) and leaf.shape == shape)
        return next(ends, None) if _is_of_params(path) else None

    return split


def _is_of_params(path: str) -> bool:
    """Returns whether a leaf belongs to a parameter: the parameter, its optimizer state, or an average of it."""
    return path.startswith(("state.params", "state.opt_state", "state.slots"))


def _part(leaf: Tensor, split: _Split) -> Tree:
    if split is None:
        return leaf
    axis, ranks = split
    return Shard(sliced(leaf, axis, ranks).clone(), axis, ranks)


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
    moved = [axis_moved(each.local, each.axis, 0) for each in shards]
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
            found[index] = axis_moved(full, 0, shards[index].axis).contiguous()
    return [found[index] for index in range(len(shards))]


def axis_moved(tensor: Tensor, axis: int, position: int) -> Tensor:
    """Returns ``tensor.movedim(axis, position)``, which adds no operation to a trace if it changes nothing."""
    return tensor if axis == position else tensor.movedim(axis, position)


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
