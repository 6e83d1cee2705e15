"""Momentum: decaying sums and averages of updates. SGD and Lion."""

# pyright: reportIncompatibleMethodOverride=false
# As in optax, states have a field named `count`, which shadows the method of tuples.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain.core import Scalar, Tree, args_from, check_fraction, check_non_negative
from fxtrain.optim._leafwise import bias_correction, debiased, moving_average
from fxtrain.optim._masking import Mask
from fxtrain.optim._scaling import ScalarOrSchedule, add_decayed_weights, scale_by_learning_rate
from fxtrain.optim._state import PerParameter, start_counts, zeros
from fxtrain.optim._transform import GradientTransformation, chain, described, from_counted_rule, from_rule


class TraceState(NamedTuple):
    """The state of ``trace``."""

    trace: Tree  # like the parameters


class DampenedTraceState(NamedTuple):
    """The state of ``trace`` with dampening."""

    count: PerParameter  # int64 [parameters]: updates of each
    trace: Tree  # like the parameters


class EmaState(NamedTuple):
    """The state of ``ema``."""

    count: PerParameter  # int64 [parameters]: updates of each
    ema: Tree  # like the parameters


class ScaleByLionState(NamedTuple):
    """The state of ``scale_by_lion``."""

    mu: Tree  # like the parameters


@described
def trace(
    decay: Scalar,
    *,
    nesterov: bool = False,
    dampening: Scalar | None = None,
    accumulator_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Replaces updates by a decaying sum of updates: heavy-ball momentum.

        t = decay t + (1 - dampening) g,    u = t,    or with Nesterov u = g + decay t

    Args:
        decay: Factor of the sum at each step. The sum stays bounded if this is below 1.
        nesterov: Whether to use Nesterov momentum.
        dampening: Dampening of all updates except the first, as in ``torch.optim.SGD``. It adds update counts to the
            state. None disables it.
        accumulator_dtype: Dtype of the momentum. Defaults to the parameters' dtype.

    Raises:
        ValueError: If an argument is out of range, or ``nesterov`` is combined with ``dampening``.

    Example:
        >>> tx = trace(0.9)
        >>> state = tx.init(torch.tensor(0.0))
        >>> first, state = tx.update(torch.tensor(1.0), state)
        >>> second, state = tx.update(torch.tensor(1.0), state)
        >>> float(first), float(second)
        (1.0, 1.899999976158142)

    References:
        Sutskever et al., On the importance of initialization and momentum in deep learning, 2013.
    """
    check_non_negative(decay=decay)
    if dampening is not None:
        return _dampened_trace(decay, dampening, nesterov, accumulator_dtype)

    def rule(update: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        total = update + decay * total
        return (update + decay * total if nesterov else total), total

    return from_rule(lambda params: TraceState(zeros(params, dtype=accumulator_dtype)), rule)


def _dampened_trace(
    decay: Scalar, dampening: Scalar, nesterov: bool, dtype: torch.dtype | None
) -> GradientTransformation:
    check_non_negative(dampening=dampening)
    if nesterov:
        raise ValueError("expected nesterov or dampening, got both. Nesterov momentum is defined without dampening.")

    def init(params: Tree) -> DampenedTraceState:
        return DampenedTraceState(start_counts(params), zeros(params, dtype=dtype))

    def rule(update: Tensor, total: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        total = share * update + decay * total
        return total, total

    return from_counted_rule(init, rule, lambda count, dtype: [1 - dampening * (count > 1).to(dtype)])


@described
def ema(decay: Scalar, *, debias: bool = True, accumulator_dtype: torch.dtype | None = None) -> GradientTransformation:
    """Replaces updates by their exponential moving average.

        m = decay m + (1 - decay) g,    u = m / (1 - decay^t), or u = m without the correction

    Args:
        decay: Decay rate, in [0, 1).
        debias: Whether to correct the bias of the start at zero.
        accumulator_dtype: Dtype of the average. Defaults to the parameters' dtype.

    Example:
        >>> tx = ema(0.5)
        >>> state = tx.init(torch.tensor(0.0))
        >>> first, state = tx.update(torch.tensor(1.0), state)
        >>> second, state = tx.update(torch.tensor(4.0), state)
        >>> float(first), float(second)
        (1.0, 3.0)
    """
    check_fraction(decay=decay)

    def init(params: Tree) -> EmaState:
        return EmaState(start_counts(params), zeros(params, dtype=accumulator_dtype))

    def rule(update: Tensor, average: Tensor, *corrections: Tensor) -> tuple[Tensor, Tensor]:
        average = moving_average(update, average, decay)
        return debiased(update, average, decay, *corrections) if debias else average, average

    def numbers(count: Tensor, dtype: torch.dtype) -> list[Tensor]:
        return [bias_correction(decay, count, dtype)] if debias else []

    return from_counted_rule(init, rule, numbers)


@described
def scale_by_lion(
    *, b1: Scalar = 0.9, b2: Scalar = 0.99, mu_dtype: torch.dtype | None = None
) -> GradientTransformation:
    """Replaces updates by the sign of an average of update and momentum; see ``lion``.

    Args:
        b1: Weight of the momentum in the average whose sign is taken, in [0, 1).
        b2: Decay rate of the momentum, in [0, 1).
        mu_dtype: Dtype of the momentum. Defaults to the parameters' dtype.

    Example:
        >>> tx = scale_by_lion()
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([ 1., -1.])
    """
    check_fraction(b1=b1, b2=b2)

    def rule(update: Tensor, average: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sgn(moving_average(update, average, b1)), moving_average(update, average, b2)

    return from_rule(lambda params: ScaleByLionState(zeros(params, dtype=mu_dtype)), rule)


@described
@args_from(trace, scale_by_learning_rate)
def sgd(
    learning_rate: ScalarOrSchedule,
    *,
    momentum: Scalar | None = None,
    nesterov: bool = False,
    dampening: Scalar | None = None,
    accumulator_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Stochastic gradient descent: ``p = p - learning_rate * trace(g)``.

    Args:
        momentum: ``decay`` of ``trace``. None disables momentum.

    Raises:
        ValueError: If a hyperparameter is out of range, or ``nesterov`` or ``dampening`` is set without ``momentum``.

    Example:
        >>> from fxtrain import optim
        >>> tx = sgd(0.1, momentum=0.9)
        >>> params = torch.tensor(1.0)
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(2 * params, state, params)
        ...     params = optim.apply_updates(params, updates)
        >>> params
        tensor(0.4600)
    """
    if momentum is None:
        if nesterov or dampening is not None:
            raise ValueError("expected momentum with nesterov or dampening, got None. Pass it, as in momentum=0.9.")
        return scale_by_learning_rate(learning_rate)
    return chain(
        trace(momentum, nesterov=nesterov, dampening=dampening, accumulator_dtype=accumulator_dtype),
        scale_by_learning_rate(learning_rate),
    )


@described
@args_from(scale_by_lion, add_decayed_weights)
def lion(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: torch.dtype | None = None,
    weight_decay: ScalarOrSchedule = 1e-3,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Lion: steps of constant size, in the direction of the sign of the momentum.

        u = -lr (sign(b1 m + (1 - b1) g) + weight_decay p),    m = b2 m + (1 - b2) g

    Args:
        learning_rate: A float, a tensor of shape [], or a schedule. Use a value 3 to 10 times smaller than for AdamW,
            and a weight decay larger by the same factor.
        weight_decay: Coefficient of decoupled weight decay, multiplied by the learning rate.

    Example:
        >>> tx = lion(0.1, weight_decay=0.0)
        >>> params = torch.tensor([3.0, -0.5])
        >>> tx.update(params, tx.init(params), params)[0]
        tensor([-0.1000,  0.1000])

    References:
        Chen et al., Symbolic Discovery of Optimization Algorithms, 2023.
    """
    return chain(
        scale_by_lion(b1=b1, b2=b2, mu_dtype=mu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
