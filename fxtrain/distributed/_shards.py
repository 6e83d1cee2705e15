"""Sharded states: each rank has a slice of every large tensor."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.collectives import all_gather_all
from fxtrain.core import TrainState, Tree, check_int, check_train_state
from fxtrain.core._graph_marks import Transfers, marking_transfers
from fxtrain.core._shard import Shard, full_tensor, is_shard, shards_in
from fxtrain.distributed._mesh import Mesh
from fxtrain.distributed._plan import Plan, axes_of
from fxtrain.distributed._reduce import concatenated, split, transfer_buckets


def shard(state: TrainState, mesh: Mesh, *, least: int = 2**16, plan: Plan | None = None) -> TrainState:
    """Returns a state of which each rank keeps its part: fully sharded data parallel, or tensor parallel training.

    Parameters with ``least`` elements or more are split evenly along their first axis whose size the number of ranks
    divides. Optimizer state and slots with the shape of such a parameter, such as moments and averages, are split like
    it. All other leaves, and all buffers, stay on all ranks. Each split leaf becomes a ``Shard``, a node of the tree
    with this rank's slice.

    ``train_step(mesh=mesh)`` gathers the parameters before the forward pass and sums each gradient to the rank that
    has its part. A compiled step does so bucket by bucket, which takes less memory: see ``reshard`` of ``compile``. The
    optimizer and callbacks see DTensors, so elementwise operations run on the parts, and norms and
    other reductions are those of all ranks. An operation that DTensor does not support raises. The step keeps the
    placement of all leaves. ``eval_step(mesh=mesh)`` gathers parameters too.

    With a plan, the ranks of ``mesh.model`` have the model together: tensor parallel training. The plan lists modules
    of class ``Linear`` by their names or shell patterns. Of a "column" module, each rank has some of the outputs, and
    of a "row" module some of the inputs, which are the outputs of the column modules called before it:

        column:  y_r = x A_r^T + b_r            [..., features / ranks]
        row:     z = sum_r y_r B_r^T + c        [..., features], on all ranks

    No tensor is gathered. Each row module adds an all-reduce to the forward pass, and each input of column modules one
    to the backward pass. Between the two, a model must take the number of features or heads from its tensors, which are
    parts, and may neither sample, as dropout does, nor use parameters that are not split, both of which raise. It must
    call the modules: code that reads their weights gets parts. All else stays on all ranks, which must read the same
    examples if they share a model. The optimizer and callbacks see DTensors as above. A plan does not combine with the
    splitting of large parameters.

    Everything that needs whole tensors in one process, such as ``fxtrain.view`` or ``fxtrain.state_dict``, raises
    TypeError: see ``gathered``. In a checkpoint of ``fit``, each rank writes its slices, so the folder must be on a
    file system that all ranks share. It is restored with any placement and any number of ranks. A rank that writes
    longer than the timeout of the mesh counts as lost.

    Args:
        state: The state of this rank, the same on all ranks, see ``replicated``. It is not modified.
        mesh: The ranks, as given to ``train_step``, ``eval_step`` and ``fit``.
        least: The number of elements from which a parameter is split. Not used with a plan.
        plan: Maps module names or patterns to "column" or "row".

    Returns:
        The sharded state. With one rank, or one per model with a plan, an equal state without shards.

    Raises:
        TypeError: If the plan has a module that is not a ``Linear``, or another value than "column" or "row".
        ValueError: If a pattern matches no module, a module matches both, the size of a parameter is not a multiple of
            the number of ranks, or another module has the same parameter. Without a plan, if a model has several ranks.

    Example:
        >>> import torch, fxtrain as fx
        >>> mesh = fx.distributed.mesh()
        >>> state = fx.init(torch.nn.Linear(512, 512), fx.optim.adamw(1e-3))
        >>> state = fx.distributed.shard(fx.distributed.replicated(state, mesh), mesh)
        >>> fx.distributed.gathered(state).params["weight"].shape
        torch.Size([512, 512])

        A multilayer perceptron of which each rank has some hidden features:

        >>> network = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
        >>> mesh = fx.distributed.mesh(model=1)  # the number of ranks of the model
        >>> state = fx.distributed.shard(fx.init(network), mesh, plan={"0": "column", "2": "row"})

    References:
        Shoeybi et al. 2019, "Megatron-LM: training multi-billion parameter language models using model parallelism"
        (arXiv:1909.08053).
    """
    check_train_state(state, "shard(state, mesh)", takes_shards=True)
    check_int("least", least, minimum=1)
    state = gathered(state)
    if plan is not None:
        return _split_by(plan, state, mesh)
    if mesh.model is not None:
        raise ValueError(
            f"expected a plan for a mesh with {mesh.model.size} ranks per model, got none. Give the modules to split, "
            "as in shard(state, mesh, plan={'blocks.*.up': 'column', 'blocks.*.out': 'row'}), or leave out model= of "
            "the mesh. Large parameters are not split among both data and model ranks."
        )
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


def _split_by(plan: Plan, state: TrainState, mesh: Mesh) -> TrainState:
    """Returns a state whose modules are split by a plan."""
    ranks = mesh.model
    axes = axes_of(plan, state, mesh.ranks_per_model)
    if ranks is None:
        return state.copy()
    device_mesh(ranks)  # as above

    def placed(path: str, leaf: Tensor) -> Tree:
        # The optimizer state of a parameter, and averages of it, are at paths that end like its own.
        axis = next((axis for end, shape, axis in axes if path.endswith(end) and leaf.shape == shape), None)
        return leaf.clone() if axis is None else Shard(sliced(leaf, axis, ranks).clone(), axis, ranks)

    parts = {name: tree.map_with_path(placed, getattr(state, name)) for name in ("params", "opt_state", "slots")}
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
