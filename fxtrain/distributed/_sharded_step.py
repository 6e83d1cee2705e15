"""The steps of a sharded state: parameters are gathered before the forward pass, and gradients scattered after it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.collectives import reduce_scatter
from fxtrain._torch_internals.tracing import is_traced
from fxtrain.core import StepOutput, TrainState, Tree
from fxtrain.core._graph_marks import Transfers, marking_transfers
from fxtrain.core._shard import Shard, full_tensor, shards_in
from fxtrain.distributed._mesh import Mesh
from fxtrain.distributed._opened import Opened, dtensor, seeing_dtensors
from fxtrain.distributed._reduce import concatenated, split, transfer_buckets
from fxtrain.distributed._shards import axis_moved, whole


class Placed:
    """One step of a state whose tensors may be sharded.

    Args:
        state: The state before the step.
        mesh: The ranks of the step.

    Attributes:
        whole: The state for the forward pass, with whole parameters.
        opened: The state for the optimizer and callbacks, with DTensors.
        keeps_parts: Whether each rank keeps a part of the averaged gradient, so that averaging frees memory.

    Raises:
        ValueError: If the state is sharded over another mesh.
    """

    def __init__(self, state: TrainState, mesh: Mesh) -> None:
        self._mesh, self._state = mesh, state
        self.whole = self.opened = state
        self.keeps_parts = False
        # Dynamo cannot trace the search. A step that it compiles refuses sharded states before.
        shards = [] if torch.compiler.is_dynamo_compiling() else shards_in(state)
        self._is_sharded = bool(shards)
        if not shards:
            return
        refuse_other_mesh(shards, mesh)
        self._open = Opened(state)
        self.opened = self._open.tree
        # The forward pass uses no other tensors that are sharded.
        slots = {name: slot for name, slot in state.slots.items() if not shards_in(slot)}
        # Modules that are split by a plan compute with their parts.
        self.keeps_parts = shards[0].mesh is not mesh.model
        params = whole(state.params) if self.keeps_parts else state.params
        self.whole = state.replace(params=params, opt_state={}, slots=slots)

    def averaged(self, found: Any) -> Any:
        """Returns the average of a gradient over all ranks, of which each keeps its part.

        Raises:
            TypeError: If the forward pass has written a frozen parameter of a sharded state.
        """
        from fxtrain.distributed._averaged import averaged_onto

        if not self._is_sharded:
            return averaged_onto(found, self._mesh, None)
        if tree.leaves(found.written):
            raise TypeError(
                "expected a forward pass that writes no frozen parameters of a sharded state, got one that does. Keep "
                "them in buffers, which are not sharded, or train with a replicated state."
            )
        return averaged_onto(found, self._mesh, _trainable(self._state))

    def reading(self) -> AbstractContextManager[object]:
        """Returns the context in which callbacks and the optimizer see the opened state."""
        return seeing_dtensors(reads=not is_traced()) if self._is_sharded else nullcontext()

    def closed(self, state: TrainState, output: StepOutput) -> tuple[TrainState, StepOutput]:
        """Returns the new state, sharded as before, and the output with whole tensors."""
        if not self._is_sharded:
            return state, output
        return self._open.close(state), tree.map(full_tensor, output)


def gathered_params(state: TrainState, mesh: Mesh) -> TrainState:
    """Returns a state with whole parameters, for an evaluation. It can be traced.

    A state that is split by a plan is returned as it is.

    Raises:
        ValueError: If the state is sharded over another mesh.
    """
    shards = shards_in(state.params)
    refuse_other_mesh(shards, mesh)
    return state if shards[0].mesh is mesh.model else state.replace(params=whole(state.params))


def _trainable(state: TrainState) -> Tree:
    return state.params if state.model is None else state.model.split(state.params, None)


def refuse_other_mesh(shards: Sequence[Shard], mesh: Mesh | None) -> None:
    """Raises ValueError if shards are those of another mesh, or of any mesh if ``mesh`` is None."""
    axes = () if mesh is None else (mesh, mesh.model)
    if any(each.mesh not in axes for each in shards):
        raise ValueError(
            "expected a state that is sharded over the mesh of the step, got one of another mesh. Give the same mesh "
            "to fxtrain.shard, train_step, eval_step and fit."
        )


def summed_parts(tensors: Sequence[Tensor], shards: Sequence[Shard]) -> list[Tensor]:
    """Returns the sums of whole tensors over ranks as DTensors, of which each rank keeps its part.

    Args:
        tensors: Floating or complex tensors, of equal shapes and dtypes on all ranks.
        shards: The placement of each sum.
    """
    if not tensors:
        return []
    with marking_transfers(Transfers(is_gather=False)):
        parts = _scattered(tensors, shards)
    return [dtensor(shard.with_local(part)) for shard, part in zip(shards, parts, strict=True)]


def _scattered(tensors: Sequence[Tensor], shards: Sequence[Shard]) -> list[Tensor]:
    mesh: Mesh = shards[0].mesh
    moved = [axis_moved(tensor, shard.axis, 0) for tensor, shard in zip(tensors, shards, strict=True)]
    real = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in moved]
    grouped = transfer_buckets(real)
    flat = [concatenated([real[index].reshape(mesh.size, -1) for index in bucket], 1) for bucket in grouped]
    found: dict[int, Tensor] = {}
    exchanges = dist.get_backend(mesh.group) == "gloo"
    scattered = reduce_scatter(flat, mesh.group.group_name, mesh.size, exchanges=exchanges)
    for bucket, sums in zip(grouped, scattered, strict=True):
        parts = split(sums, [real[index].numel() // mesh.size for index in bucket])
        for index, part in zip(bucket, parts, strict=True):
            own = part.view(real[index].shape[0] // mesh.size, *real[index].shape[1:])
            own = torch.view_as_complex(own) if moved[index].is_complex() else own
            found[index] = axis_moved(own, 0, shards[index].axis).contiguous()
    return [found[index] for index in range(len(tensors))]
