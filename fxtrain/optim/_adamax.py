"""Adamax: Adam with the infinity norm."""

# pyright: reportIncompatibleMethodOverride=false
# As in optax, states have a field named `count`, which shadows the method of tuples.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain.core import Scalar, Tree, args_from, check_fraction, check_non_negative
from fxtrain.optim._adam import scale_by_adam, start_moments
from fxtrain.optim._moments import bias_correction, moving_average
from fxtrain.optim._parameter_scalars import PerParameter
from fxtrain.optim._rules import from_counted_rule
from fxtrain.optim._scaling import ScalarOrSchedule, scale_by_learning_rate
from fxtrain.optim._transform import GradientTransformation, chain


class ScaleByAdamaxState(NamedTuple):
    """The state of ``scale_by_adamax``."""

    count: PerParameter  # int64 [parameters]: updates of each
    mu: Tree  # like the parameters: first moment
    nu: Tree  # like the parameters, real, float32 at least: decaying maximum


@args_from(scale_by_adam)
def scale_by_adamax(*, b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8) -> GradientTransformation:
    """Divides the first moment by a decaying maximum of absolute values; see ``adamax``.

    Args:
        b2: Decay rate of the maximum, in [0, 1).
        eps: Added to the absolute values.

    Example:
        >>> tx = scale_by_adamax()
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([ 1., -1.])
    """
    check_fraction(b1=b1, b2=b2)
    check_non_negative(eps=eps)

    def rule(update: Tensor, mu: Tensor, nu: Tensor, first: Tensor) -> tuple[Tensor, ...]:
        mu = moving_average(update, mu, b1)
        nu = torch.maximum(b2 * nu, update.abs() + eps)
        return mu / first / nu, mu, nu

    def init(params: Tree) -> ScaleByAdamaxState:
        return ScaleByAdamaxState(*start_moments(params, None))

    return from_counted_rule(init, rule, lambda count, dtype: [bias_correction(b1, count, dtype)])


@args_from(scale_by_adamax, scale_by_learning_rate)
def adamax(
    learning_rate: ScalarOrSchedule, *, b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-8
) -> GradientTransformation:
    """Adam with the infinity norm: ``u = -lr m / (1 - b1^t) / v``, with ``v = max(b2 v, |g| + eps)``.

    Example:
        >>> tx = adamax(0.1)
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([-0.1000,  0.1000])

    References:
        Kingma and Ba, Adam: A Method for Stochastic Optimization, 2015.
    """
    return chain(scale_by_adamax(b1=b1, b2=b2, eps=eps), scale_by_learning_rate(learning_rate))
