"""The average of a gradient over the ranks of a mesh."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.tracing import is_traced
from fxtrain.core import Batch, Metrics, Tree, describe
from fxtrain.core._shard import is_shard
from fxtrain.data._batch_weight import batch_weight
from fxtrain.distributed._examples import scalar, wide
from fxtrain.distributed._mesh import Mesh
from fxtrain.distributed._opened import dtensor
from fxtrain.distributed._reduce import gathered, summed
from fxtrain.distributed._sharded_step import summed_parts
from fxtrain.metrics import Metric

G = TypeVar("G")


def averaged(gradient: G, mesh: Mesh) -> G:
    """Returns the average of a gradient over all ranks, the same bits on each. For hand-written steps.

        g = sum_r w_r g_r / sum_r w_r        w_r = the examples of rank r, or its weight from fxtrain.weighted

    So the result is that of one process with all examples, if the loss is a mean over examples. It comes before the
    event ``Gradients``, so a callback that skips the update, as for nan on one rank, does so on all ranks.

    Loss and 0-d metrics are averaged in the same way, and ``fxtrain.metrics`` are merged. A parameter is used if any
    rank uses it. A traced step cannot exchange this, and keeps what the trace of each rank finds.

    Floating buffers, such as the statistics of batch norms, move by the weighted mean of the changes of all ranks. For
    a batch norm, this leaves out the variance between ranks: use ``sync_batch_norm`` to include it. Other buffers must
    change alike on all ranks, as counters do, and so must frozen parameters that the forward pass writes. Outputs stay
    those of the rank.

    Of modules that are split by a plan, the gradients are ``Shard`` nodes with the part of the rank.

    Args:
        gradient: The result of ``fxtrain.gradients(loss_fn, mesh=mesh)``, or its average over microbatches.
        mesh: The ranks.

    Raises:
        TypeError: If ``gradient`` comes from ``fxtrain.gradients`` without ``mesh``, or a metric grows with the data.

    Example:
        >>> import torch, fxtrain as fx
        >>> mesh = fx.distributed.mesh()
        >>> find = fx.gradients(lambda model, batch: (model["w"] * batch).mean(), mesh=mesh)
        >>> found = find(fx.init({"w": torch.tensor(1.0)}), torch.tensor([2.0, 4.0]))
        >>> fx.distributed.averaged(found, mesh).grads
        {'w': tensor(3.)}
    """
    return averaged_onto(gradient, mesh, None)


def averaged_onto(gradient: G, mesh: Mesh, placed: Tree | None) -> G:
    """Returns the average, of which this rank keeps a part if the parameters are sharded.

    Gradients of parameters that are split by a plan are ``Shard`` nodes, of which only the ranks with the same part are
    averaged.

    Args:
        gradient: As for ``averaged``.
        mesh: The ranks.
        placed: A tree like the gradients, whose shards have DTensors for gradients. None if nothing is sharded.

    Raises:
        TypeError: As for ``averaged``.
    """
    found: Any = gradient
    local = getattr(found, "local", None)
    if local is None:
        raise TypeError(
            f"expected a gradient that knows its examples, got {describe(gradient)} without them. Compute it with "
            "fxtrain.gradients(loss_fn, mesh=mesh)."
        )
    weight = local.examples if found.weight is None else found.weight
    used, used_structure = tree.flatten(found.used, is_leaf=is_shard)
    used = list(map(_local, used))
    if used and not torch.compiler.is_dynamo_compiling() and not is_traced():
        # Through the host, because the read of a flag on the device would wait for it, and for lost ranks.
        # Not by ``mesh.maximum``, whose error would hide the name and the step that callers give to their collectives.
        flags = torch.tensor(used, dtype=torch.int32, device="cpu")
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=mesh.control)
        used = list(map(bool, flags.tolist()))
    metrics, weights = gathered(found.metrics, weight, mesh)

    def parts(values: list[Tensor], share: Tensor = weights.share) -> list[Tensor]:
        has_examples = share > 0
        # One of each per dtype, because each operation of a graph is compiled.
        shares = {dtype: share.to(dtype) for dtype in dict.fromkeys(map(_share_dtype, values))}
        zeros = {dtype: share.new_zeros((), dtype=dtype) for dtype in dict.fromkeys(value.dtype for value in values)}
        # A rank without examples has nan for a mean.
        return [torch.where(has_examples, value * shares[_share_dtype(value)], zeros[value.dtype]) for value in values]

    grads, structure = tree.flatten(found.grads, is_leaf=is_shard)
    split = {index: leaf for index, leaf in enumerate(grads) if is_shard(leaf)}
    grads = list(map(_local, grads))
    before, buffers = tree.leaves(local.buffers), tree.leaves(found.buffers)
    moving = [index for index, buffer in enumerate(buffers) if buffer.is_floating_point()]
    # The change of a constant is exactly 0, and its mean is too.
    changes = [buffers[index] - before[index] for index in moving]
    shards = {} if placed is None else dict(enumerate(tree.leaves(placed, is_leaf=is_shard)))
    shards = {index: leaf for index, leaf in shards.items() if is_shard(leaf) and index not in split}
    # Ranks that share a model have these gradients up to rounding. Their mean has the same bits on all.
    share = weights.share / mesh.ranks_per_model if mesh.ranks_per_model > 1 else weights.share
    whole = [value for index, value in enumerate(grads) if index not in shards and index not in split]
    sums = iter(summed(parts([*whole, *changes], share), mesh.world_group))
    scattered = iter(summed_parts(parts([grads[index] for index in shards]), list(shards.values())))
    of_parts = parts([grads[index] for index in split])
    of_parts = iter(of_parts if mesh.size == 1 else summed(of_parts, mesh.group))
    for index in range(len(grads)):
        if index in split:
            own = split[index].with_local(next(of_parts))
            grads[index] = own if placed is None else dtensor(own)
        else:
            grads[index] = next(scattered if index in shards else sums)
    if placed is None:
        used = [split[index].with_local(flag) if index in split else flag for index, flag in enumerate(used)]
    for index, change in zip(moving, sums, strict=True):
        buffers[index] = before[index] + change
    return dataclasses.replace(
        found,
        loss=metrics["loss"],
        metrics=metrics,
        grads=tree.unflatten(structure, grads),
        buffers=_with_leaves(found.buffers, buffers),
        used=tree.unflatten(used_structure, used),
        weight=None if found.weight is None else weights.total,
        local=local._replace(examples=weights.total if found.weight is None else local.examples),
    )


def averaged_metrics(
    metrics: Metrics, weight: Tensor | None, batch: Batch, mesh: Mesh, device: torch.device
) -> tuple[Metrics, Tensor | None]:
    """Returns the metrics of an evaluation batch over all ranks, and the sum of the weights of all ranks.

    Args:
        metrics: 0-d tensors and ``fxtrain.metrics``.
        weight: The weight from ``fxtrain.weighted``. None for that of the batch, which ``fxtrain.evaluate`` describes.
        batch: The part of this rank.
        mesh: The ranks.
        device: The device of the state.

    Returns:
        The metrics, and their weight. None if all metrics have weights of their own.
    """
    has_own = all(isinstance(value, Metric) for value in metrics.values())
    if weight is None:
        counted = 1 if has_own else batch_weight(batch)
        weight = wide(counted, device)[0] if isinstance(counted, Tensor) else scalar(counted, device)
    merged, weights = gathered(metrics, weight, mesh)
    return merged, None if has_own else weights.total


def _local(leaf: Any) -> Any:
    return leaf.local if is_shard(leaf) else leaf


def _share_dtype(value: Tensor) -> torch.dtype:
    return value.real.dtype if value.is_complex() else value.dtype


def _with_leaves(like: Tree, leaves: list[Tensor]) -> Tree:
    return tree.unflatten(tree.flatten(like)[1], leaves)
