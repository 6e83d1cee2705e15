"""Moving averages with bias correction, squares and norms, in float32 or wider."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Scalar, Tree


def wide(leaf: Tensor) -> Tensor:
    """Returns the leaf in float32 or complex64, or as it is if it is wider."""
    return leaf if leaf.dtype in _EXACT else leaf.to(torch.promote_types(leaf.dtype, torch.float32))


def widest(values: Tree) -> torch.dtype:
    """Returns the real dtype in which every leaf is exact: float32 or float64."""
    dtypes = {leaf.dtype for leaf in tree.leaves(values)}
    return torch.float64 if torch.float64 in dtypes or torch.complex128 in dtypes else torch.float32


def squared(update: Tensor) -> Tensor:
    """Returns the elementwise squared absolute value, which is real."""
    if update.is_complex():
        return update.real.square() + update.imag.square()
    return update.square()


def moving_average(value: Tensor, average: Tensor, decay: Scalar) -> Tensor:
    """Returns ``decay * average + (1 - decay) * value``."""
    if isinstance(decay, Tensor) or value.dtype != average.dtype:
        return decay * average + (1 - decay) * value
    return torch.lerp(average, value, 1 - decay)  # one operation instead of three


def mixed(value: Tensor, average: Tensor, share: Tensor) -> Tensor:
    """Returns ``(1 - share) * average + share * value``, accurately even if ``1 - share`` rounds to 1."""
    return average + share * (value - average)


def log_decay(decay: Scalar) -> Scalar:
    """Returns the logarithm of a decay rate, or minus infinity for 0."""
    if isinstance(decay, Tensor):
        return decay.log()
    return math.log(decay) if decay > 0 else -math.inf


def bias_correction(decay: Scalar, count: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``1 - decay^count``, elementwise: the divisor that corrects the bias of an average that starts at zero.

    Computed as ``-expm1(count log(decay))``, because the direct difference loses precision in float32 at small counts.
    """
    return -torch.expm1(count.to(dtype) * log_decay(decay))


def bias_corrections(decay: Scalar, count: Tensor, dtype: torch.dtype, nesterov: bool) -> list[Tensor]:
    """Returns the corrections for ``debiased``: at this count and, for Nesterov momentum, at the next."""
    counts = (count, count + 1) if nesterov else (count,)
    return [bias_correction(decay, number, dtype) for number in counts]


def debiased(update: Tensor, average: Tensor, decay: Scalar, correction: Tensor, ahead: Tensor | None = None) -> Tensor:
    """Returns the bias-corrected average, which already includes the update. ``ahead`` selects Nesterov momentum."""
    if ahead is None:
        return average / correction
    return moving_average(update / correction, average / ahead, decay)


def at_least(value: Tensor, bound: Scalar) -> Tensor:
    """Returns the elementwise maximum."""
    limit: Any = bound
    return value.clamp(min=limit)


def at_most(value: Tensor, bound: Scalar) -> Tensor:
    """Returns the elementwise minimum."""
    limit: Any = bound
    return value.clamp(max=limit)


def root_mean_square(leaf: Tensor) -> Tensor:
    """Returns the root mean square of the absolute values: []. Zero for a tensor without elements."""
    return (squared(leaf).sum() / max(leaf.numel(), 1)).sqrt()


def norm(leaf: Tensor) -> Tensor:
    """Returns the root of the sum of squared absolute values: []."""
    return squared(leaf).sum().sqrt()


_EXACT = {torch.float32, torch.float64, torch.complex64, torch.complex128}
