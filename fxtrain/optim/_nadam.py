"""NAdam: Adam with Nesterov momentum."""

# pyright: reportIncompatibleMethodOverride=false
# As in optax, states have a field named `count`, which shadows the method of tuples.

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain.core import Scalar, Tree, args_from, check_fraction, check_non_negative
from fxtrain.optim._adam import adam, scale_by_adam
from fxtrain.optim._initial_state import real_full, zeros
from fxtrain.optim._leafwise import map_with_state
from fxtrain.optim._moments import bias_correction, moving_average, squared, widest
from fxtrain.optim._parameter_scalars import PerParameter, per_parameter, start_counts
from fxtrain.optim._scaling import ScalarOrSchedule, scale_by_learning_rate
from fxtrain.optim._transform import GradientTransformation, chain


class ScaleByNadamState(NamedTuple):
    """The state of ``scale_by_nadam``."""

    count: PerParameter  # int64 [parameters]: updates of each
    momentum_product: PerParameter  # float32 or float64 [parameters]: product of the momentum schedule so far
    mu: Tree  # like the parameters: first moment
    nu: Tree  # like the parameters, real, float32 at least: second moment


@args_from(scale_by_adam)
def scale_by_nadam(
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    momentum_decay: Scalar = 4e-3,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Scales updates by NAdam with the momentum schedule of the paper, as in ``torch.optim.NAdam``.

        b(t) = b1 (1 - 1/2 0.96^(t momentum_decay)),    B(t) = b(1) ... b(t)
        m' = b(t+1) m / (1 - B(t+1)) + (1 - b(t)) g / (1 - B(t))
        u = m' / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        b1: Decay rate of the first moment, and the limit of the momentum schedule, in [0, 1).
        momentum_decay: How fast the momentum schedule rises to ``b1``.

    Example:
        >>> tx = scale_by_nadam()
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([ 1.0565, -1.0565])

    References:
        Dozat, Incorporating Nesterov Momentum into Adam, 2016.
    """
    check_fraction(b1=b1, b2=b2)
    check_non_negative(eps=eps, momentum_decay=momentum_decay)

    def init(params: Tree) -> ScaleByNadamState:
        product = per_parameter(params, 1, dtype=widest(params))
        return ScaleByNadamState(start_counts(params), product, zeros(params, dtype=mu_dtype), real_full(params))

    def momentum(count: Tensor, dtype: torch.dtype) -> Tensor:
        # 1 - 0.5 * 0.96^(decay count), by expm1, which is bitwise the same in every loop of a compiled step.
        return b1 * (0.5 - 0.5 * torch.expm1(count.to(dtype) * math.log(0.96) * momentum_decay))

    def update(
        updates: Tree, opt_state: ScaleByNadamState, params: Tree | None = None
    ) -> tuple[Tree, ScaleByNadamState]:
        count = opt_state.count + 1
        previous = opt_state.momentum_product.values
        now, ahead = (momentum(number, previous.dtype) for number in (count.values, count.values + 1))
        product = previous * now
        numbers = (
            (1 - now) / (1 - product),
            ahead / (1 - product * ahead),
            bias_correction(b2, count.values, previous.dtype),
        )

        def rule(
            update: Tensor, mu: Tensor, nu: Tensor, of_update: Tensor, of_mu: Tensor, correction: Tensor
        ) -> tuple[Tensor, ...]:
            mu = moving_average(update, mu, b1)
            nu = moving_average(squared(update), nu, b2)
            return (of_update * update + of_mu * mu) / ((nu / correction).sqrt() + eps), mu, nu

        updates, mu, nu = map_with_state(rule, updates, opt_state.mu, opt_state.nu, numbers=numbers)
        return updates, ScaleByNadamState(count, opt_state.momentum_product.replace(product), mu, nu)

    return GradientTransformation(init, update)


@args_from(adam)
def nadam(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    momentum_decay: Scalar | None = None,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Adam with Nesterov momentum.

        m' = b1 m / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t),    u = -lr m' / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        momentum_decay: None keeps the momentum constant, as in optax. A float selects the paper's schedule; see
            ``scale_by_nadam``. ``torch.optim.NAdam`` has 4e-3.

    Example:
        >>> tx = nadam(0.1)
        >>> params = torch.tensor([3.0, -200.0])
        >>> tx.update(params, tx.init(params), params)[0]
        tensor([-0.1474,  0.1474])

    References:
        Dozat, Incorporating Nesterov Momentum into Adam, 2016.
    """
    if momentum_decay is None:
        return adam(learning_rate, b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype, nesterov=True)
    return chain(
        scale_by_nadam(b1=b1, b2=b2, eps=eps, momentum_decay=momentum_decay, mu_dtype=mu_dtype),
        scale_by_learning_rate(learning_rate),
    )
