"""Weighted means over ranks: of scalars and metrics in one all-gather, and of large tensors in one all-reduce each."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain._torch_internals.collectives import all_gather, all_reduce
from fxtrain._torch_internals.tracing import is_traced
from fxtrain.core import Metrics, Tree
from fxtrain.distributed._examples import wide
from fxtrain.distributed._mesh import Mesh
from fxtrain.metrics import Metric

_BUCKET_BYTES = 25 * 2**20
"""Size at which a bucket is full. Transfers of several buckets overlap."""


class Weights(NamedTuple):
    """The weights of all ranks in a mean.

    Args:
        total: float64 []. Their sum.
        share: float64 []. The part of this rank in the sum, or 1 / ranks if it is 0.
    """

    total: Tensor
    share: Tensor


def gathered(metrics: Metrics, weight: Tensor, mesh: Mesh) -> tuple[Metrics, Weights]:
    """Returns the metrics of the data of all ranks, in one all-gather.

    Ranks that share a model have the same data. Those of the first of them are used on all, so that all processes have
    the same bits.

    Args:
        metrics: 0-d tensors, whose weighted mean is returned, and ``fxtrain.metrics``, which are merged in the order of
            ranks.
        weight: float64 []. The weight of this rank.
        mesh: The ranks.

    Returns:
        The metrics and the weights.

    Raises:
        TypeError: If a metric grows with the data.
    """
    _refuse_growing(metrics)
    leaves, structure = tree.flatten(metrics)
    row = [weight, *leaves]
    sizes = [value.numel() for value in row]
    own = torch.cat([wide(value, weight.device) for value in row])
    table = all_gather(own, mesh.world_group.group_name, mesh.world_size)[:: mesh.ranks_per_model]
    weights, *columns = table.split(sizes, 1)
    weights = weights[:, 0]
    total = weights.sum()
    share = torch.where(total > 0, weight / torch.where(total > 0, total, 1), 1 / mesh.size)
    of_ranks: Metrics = tree.unflatten(structure, columns)
    merged: Metrics = {}
    for name, value in metrics.items():
        if isinstance(value, Metric):
            merged[name] = _merged(value, of_ranks[name], mesh.size)
        else:
            dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
            merged[name] = _mean(of_ranks[name][:, 0], weights, total).to(dtype)
    return merged, Weights(total, share)


def _merged(metric: Metric, of_ranks: Tree, size: int) -> Metric:
    """Returns the merged metrics of all ranks, from a tree like ``metric`` with leaves float64 [ranks, values]."""

    def of_rank(number: int) -> Tree:
        return tree.map(
            lambda leaf, column: column[number].reshape(leaf.shape).to(leaf.dtype),  # pyright: ignore[reportUnknownLambdaType]
            metric,
            of_ranks,
        )

    return functools.reduce(lambda one, other: one.merge(other), map(of_rank, range(size)))


def _mean(values: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    """Returns the weighted mean, to which values of weight 0 do not contribute, even if they are nan."""
    part = torch.where(weights > 0, values * weights, 0).sum()
    return torch.where(total > 0, part / torch.where(total > 0, total, 1), 0)


def summed(tensors: Sequence[Tensor], group: Any) -> list[Tensor]:
    """Returns the sums of tensors over ranks, in buckets by dtype.

    Args:
        tensors: Floating or complex tensors, of equal shapes and dtypes on all ranks.
        group: The process group of the ranks.
    """
    real = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
    grouped = list(buckets(real))
    flat = [torch.cat([real[index].reshape(-1) for index in bucket]) for bucket in grouped]
    found: dict[int, Tensor] = {}
    for bucket, sums in zip(grouped, all_reduce(flat, group.group_name), strict=True):
        parts = sums.split([real[index].numel() for index in bucket])
        found |= {index: part.view(real[index].shape) for index, part in zip(bucket, parts, strict=True)}
    return [
        torch.view_as_complex(found[index]) if tensor.is_complex() else found[index]
        for index, tensor in enumerate(tensors)
    ]


def buckets(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Returns the indices of the tensors of each bucket, by dtype and device."""
    found: list[list[int]] = []
    kinds = dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors)
    for kind in kinds:
        bucket: list[int] = []
        size = 0
        for index, tensor in enumerate(tensors):
            if (tensor.dtype, tensor.device) != kind:
                continue
            if bucket and size + tensor.numel() * tensor.itemsize > _BUCKET_BYTES:
                found.append(bucket)
                bucket, size = [], 0
            bucket.append(index)
            size += tensor.numel() * tensor.itemsize
        found.append(bucket)
    return found


def transfer_buckets(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Returns ``buckets``, or one bucket for each tensor in a trace, whose buckets a graph pass chooses."""
    return [[index] for index in range(len(tensors))] if is_traced() else buckets(tensors)


def concatenated(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Returns the concatenation of tensors, without a copy of a single one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), axis)


def split(tensor: Tensor, sizes: Sequence[int], axis: int = 0) -> Sequence[Tensor]:
    """Returns the parts of a tensor along an axis, as views."""
    return [tensor] if len(sizes) == 1 else tensor.split(list(sizes), axis)


def _refuse_growing(metrics: Mapping[str, object]) -> None:
    for name, value in metrics.items():
        if isinstance(value, Metric) and value.growing:
            raise TypeError(
                f"expected the metric {name!r} to have a fixed size on all ranks, got {type(value).__name__}, whose "
                f"states {', '.join(value.growing)} grow with the data. Bin it, as thresholds=100 does for curves."
            )
