"""Batch norms whose statistics are those of the examples of all ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxtrain._torch_internals.collectives import all_gather, all_reduce, rank
from fxtrain._torch_internals.modules import batch_norms
from fxtrain.core import name_of
from fxtrain.distributed._mesh import Mesh

M = TypeVar("M", bound=nn.Module)


def sync_batch_norm(module: M, mesh: Mesh) -> M:
    """Returns a copy of a module whose batch norms use the statistics of the examples of all ranks.

    In training mode, the copy computes what the module computes in one process with the whole batch, gradients
    included, also if ranks have different numbers of examples. Each batch norm adds a small all-gather to the forward
    pass and an all-reduce to the backward pass. All ranks must call the module equally often in training mode.

    Names and shapes of parameters and buffers stay the same, so checkpoints and state dicts fit both modules.

    Args:
        module: A module with ``BatchNorm1d``, ``2d``, ``3d`` or ``SyncBatchNorm``. It is not modified.
        mesh: The ranks, as given to ``train_step``.

    Raises:
        TypeError: If a batch norm is of another class.

    Example:
        >>> import torch, fxtrain as fx
        >>> mesh = fx.distributed.mesh()
        >>> fx.distributed.sync_batch_norm(torch.nn.BatchNorm2d(3), mesh)
        SyncedBatchNorm(3, eps=1e-05, momentum=0.1, affine=True, ...)
    """
    # deepcopy puts the objects in this memo in place of the batch norms, wherever and however often these occur.
    memo: dict[int, Any] = {}
    for norm in batch_norms(module):
        if not isinstance(norm, SyncedBatchNorm):
            memo[id(norm)] = _synced(norm, mesh, memo)
    return copy.deepcopy(module, memo)


def _synced(norm: nn.Module, mesh: Mesh, memo: dict[int, Any]) -> SyncedBatchNorm:
    if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        raise TypeError(
            f"expected batch norms of class BatchNorm1d, BatchNorm2d or BatchNorm3d, got a {name_of(type(norm))}. "
            "Replace it by one of these first."
        )
    # The process group of a SyncBatchNorm cannot be copied.
    attributes = {name: value for name, value in vars(norm).items() if name != "process_group"}
    made = SyncedBatchNorm.__new__(SyncedBatchNorm)
    made.__dict__.update(copy.deepcopy(attributes, memo))
    made.group, made.ranks, made.ranks_per_model = mesh.group.group_name, mesh.size, mesh.ranks_per_model
    return made


class SyncedBatchNorm(nn.BatchNorm1d):
    """A batch norm over the examples of all ranks, of any number of dimensions. Made by ``sync_batch_norm``."""

    group: str
    """The name of the process group."""
    ranks: int
    """Number of its ranks."""
    ranks_per_model: int
    """Number of neighboring processes with the same examples."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 -- as in torch
        if not self.training and self.running_mean is not None:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        mean, variance, count = self._statistics(wide)
        if self.training and self.running_mean is not None:
            self._track(mean.detach(), variance.detach(), count)
        shape = [1, -1, *[1] * (input.ndim - 2)]
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        result = (wide - mean.view(shape)) * scale.view(shape)
        if self.bias is not None:
            result = result + self.bias.view(shape)
        return result.to(input.dtype)

    def _statistics(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns mean and biased variance of each channel over all ranks, and the number of values of a channel.

        Chan et al., "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
        """
        axes = [axis for axis in range(values.ndim) if axis != 1]
        shape = [1, -1, *[1] * (values.ndim - 2)]
        channels = values.shape[1]
        size = values.numel() // channels
        own = values.sum(axes) / max(size, 1)
        squares = (values - own.view(shape)).square().sum(axes)
        row = torch.cat([own, squares, torch.full_like(own[:1], size)])
        means, squares, counts = self._gathered(row).split([channels, channels, 1], 1)
        count = counts.detach().sum()
        mean = (means * counts).sum(0) / count
        squares = (squares + counts * (means - mean).square()).sum(0)
        return mean, squares / count, count

    def _gathered(self, row: Tensor) -> Tensor:
        found: Any = _Gathered.apply(row, self.group, self.ranks, self.ranks_per_model)
        return found

    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        tracked: Any = self.num_batches_tracked
        tracked.add_(1)
        factor = 1.0 / tracked.to(mean.dtype) if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            assert running is not None
            running.copy_((1 - factor) * running + factor * new)


class _Summed(torch.autograd.Function):
    """The sum over ranks. Each rank's result depends on the values of all ranks, so the derivative is a sum as well."""

    @staticmethod
    def forward(values: Tensor, group: str) -> Tensor:
        return all_reduce([values], group)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Summed.apply(grad, ctx.group), None


class _Gathered(torch.autograd.Function):
    """The rows of all ranks: [ranks, values]."""

    @staticmethod
    def forward(row: Tensor, group: str, ranks: int, ranks_per_model: int) -> Tensor:
        return all_gather(row, group, ranks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group, _, ctx.ranks_per_model = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        total: Any = _Summed.apply(grad, ctx.group)
        own = rank(grad.detach(), ctx.ranks_per_model).reshape(1)
        return total.index_select(0, own).squeeze(0), None, None, None


def is_synced(modules: Iterable[nn.Module]) -> bool:
    """Whether one of the modules is a batch norm over all ranks."""
    return any(isinstance(module, SyncedBatchNorm) for module in modules)
