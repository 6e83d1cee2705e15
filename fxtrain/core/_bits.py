"""The bits of tensors as another dtype, and their memory as bytes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def reinterpreted(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the same bits as another dtype. Under ``vmap`` too, for which torch 2.11 lacks a rule.

    Args:
        x: A tensor. If the dtypes differ in size, its last dimension, which is not batched, changes its length.
        dtype: The other dtype.

    Example:
        >>> reinterpreted(torch.tensor([1.0, -2.0]), torch.int32)
        tensor([ 1065353216, -1073741824], dtype=torch.int32)
    """
    try:
        return x.view(dtype)
    except RuntimeError:
        return cast("Any", _Reinterpreted).apply(x, dtype)


def as_bytes(x: Tensor) -> Tensor:
    """Returns the memory of a contiguous tensor as bytes, uint8 [n], without a copy.

    A tensor of one element is contiguous whatever its strides are, and ``x.view(torch.uint8)`` refuses most of them.

    Example:
        >>> as_bytes(torch.tensor([1, 2, 3], dtype=torch.int16)[::4])
        tensor([1, 0], dtype=torch.uint8)
    """
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)


class _Reinterpreted(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x.view(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, dtype: torch.dtype) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return cast("Any", _Reinterpreted).apply(x.movedim(in_dims[0], 0).contiguous(), dtype), 0
