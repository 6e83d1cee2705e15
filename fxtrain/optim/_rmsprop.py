"""RMSProp: updates divided by the root of a moving average of their squares."""

# pyright: reportIncompatibleMethodOverride=false
# As in optax, states have a field named `count`, which shadows the method of tuples.

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fxtrain import tree
from fxtrain.core import Scalar, Tree, args_from, check_fraction, check_non_negative
from fxtrain.optim._initial_state import real_full, zeros
from fxtrain.optim._moments import bias_correction, moving_average, squared, wide
from fxtrain.optim._momentum import trace
from fxtrain.optim._parameter_scalars import PerParameter, start_counts
from fxtrain.optim._rules import Rule, from_counted_rule, from_rule
from fxtrain.optim._scaling import ScalarOrSchedule, scale_by_learning_rate
from fxtrain.optim._transform import GradientTransformation, chain


class ScaleByRmsState(NamedTuple):
    """The state of ``scale_by_rms``."""

    nu: Tree  # like the parameters, real, float32 at least: average of squares


class ScaleByRmsWithCountState(NamedTuple):
    """The state of ``scale_by_rms`` with bias correction."""

    count: PerParameter  # int64 [parameters]: updates of each
    nu: Tree  # like the parameters, real, float32 at least: average of squares


class ScaleByStddevState(NamedTuple):
    """The state of ``scale_by_stddev``."""

    mu: Tree  # like the parameters: average
    nu: Tree  # like the parameters, real, float32 at least: average of squares


class ScaleByStddevWithCountState(NamedTuple):
    """The state of ``scale_by_stddev`` with bias correction."""

    count: PerParameter  # int64 [parameters]: updates of each
    mu: Tree  # like the parameters: average
    nu: Tree  # like the parameters, real, float32 at least: average of squares


def scale_by_rms(
    *,
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
) -> GradientTransformation:
    """Divides updates by the root of a moving average of their squares; see ``rmsprop``.

    Args:
        decay: Decay rate of the averages, in [0, 1). Defaults to 0.9 as in optax; ``torch.optim.RMSprop`` has 0.99.
        eps: Prevents division by zero.
        initial_scale: Initial value of the average of squares.
        eps_in_sqrt: Whether ``eps`` is added inside the square root, as in optax and TensorFlow, or outside, as in
            torch.
        bias_correction: Whether to correct the bias of the averages.

    Example:
        >>> import torch
        >>> tx = scale_by_rms(decay=0.75, eps=0.0)
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([ 2., -2.])
    """
    _check_rms(decay, eps, initial_scale)

    def init(params: Tree) -> ScaleByRmsState | ScaleByRmsWithCountState:
        nu = real_full(params, initial_scale)
        return ScaleByRmsWithCountState(start_counts(params), nu) if bias_correction else ScaleByRmsState(nu)

    def rule(update: Tensor, nu: Tensor, correction: Scalar = 1.0) -> tuple[Tensor, Tensor]:
        nu = moving_average(squared(update), nu, decay)
        return _over_root(update, nu / correction, eps, eps_in_sqrt), nu

    return _from_averages(init, rule, decay, bias_correction)


@args_from(scale_by_rms)
def scale_by_stddev(
    *,
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
) -> GradientTransformation:
    """Divides updates by their moving standard deviation, without centering them; see ``rmsprop``.

    Example:
        >>> import torch
        >>> tx = scale_by_stddev(decay=0.75, eps=0.0)
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([ 2.3094, -2.3094])
    """
    _check_rms(decay, eps, initial_scale)

    def init(params: Tree) -> ScaleByStddevState | ScaleByStddevWithCountState:
        # The variance is a difference of two averages, so neither may be rounded to half precision.
        mu, nu = zeros(tree.map(wide, params)), real_full(params, initial_scale)
        return (
            ScaleByStddevWithCountState(start_counts(params), mu, nu) if bias_correction else ScaleByStddevState(mu, nu)
        )

    def rule(update: Tensor, mu: Tensor, nu: Tensor, correction: Scalar = 1.0) -> tuple[Tensor, ...]:
        mu, nu = moving_average(update, mu, decay), moving_average(squared(update), nu, decay)
        variance = nu / correction - squared(mu / correction)
        return _over_root(update, variance, eps, eps_in_sqrt), mu, nu

    return _from_averages(init, rule, decay, bias_correction)


@args_from(scale_by_rms, trace, scale_by_learning_rate)
def rmsprop(
    learning_rate: ScalarOrSchedule,
    *,
    decay: Scalar = 0.9,
    eps: Scalar = 1e-8,
    initial_scale: Scalar = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: Scalar | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
) -> GradientTransformation:
    """RMSProp: gradients divided by the root of a moving average of their squares.

        v = decay v + (1 - decay) |g|^2,    u = -lr g / sqrt(v + eps)

    Args:
        centered: Whether to subtract the square of the average gradient from the average of squares.
        momentum: ``decay`` of ``trace``, which is applied after the learning rate. None disables momentum.

    Raises:
        ValueError: If a hyperparameter is out of range, or ``nesterov`` is set without ``momentum``.

    Example:
        >>> import torch
        >>> tx = rmsprop(0.1, decay=0.75, eps=0.0)
        >>> params = torch.tensor([3.0, -200.0])
        >>> tx.update(params, tx.init(params), params)[0]
        tensor([-0.2000,  0.2000])

    References:
        Hinton, Neural Networks for Machine Learning, lecture 6, 2012.
        Graves, Generating Sequences With Recurrent Neural Networks, 2013 (centered).
    """
    if nesterov and momentum is None:
        raise ValueError("expected momentum with nesterov, got None. Pass it, as in momentum=0.9.")
    scale = scale_by_stddev if centered else scale_by_rms
    scaled = scale(
        decay=decay, eps=eps, initial_scale=initial_scale, eps_in_sqrt=eps_in_sqrt, bias_correction=bias_correction
    )
    rate = scale_by_learning_rate(learning_rate)
    return chain(scaled, rate) if momentum is None else chain(scaled, rate, trace(momentum, nesterov=nesterov))


def _check_rms(decay: Scalar, eps: Scalar, initial_scale: Scalar) -> None:
    check_fraction(decay=decay)
    check_non_negative(eps=eps, initial_scale=initial_scale)


def _over_root(update: Tensor, square: Tensor, eps: Scalar, eps_in_sqrt: bool) -> Tensor:
    return update / ((square + eps).sqrt() if eps_in_sqrt else square.sqrt() + eps)


def _from_averages(
    init: Callable[[Tree], tuple[Tree, ...]], rule: Rule, decay: Scalar, correct: bool
) -> GradientTransformation:
    if not correct:
        return from_rule(init, rule)
    return from_counted_rule(init, rule, lambda count, dtype: [bias_correction(decay, count, dtype)])
