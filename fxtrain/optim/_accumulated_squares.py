"""Updates divided by the root of accumulated squares: AdaGrad, RMSProp and AdaDelta."""

# pyright: reportIncompatibleMethodOverride=false
# As in optax, states have a field named `count`, which shadows the method of tuples.

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import Scalar, Tree, args_from, check_fraction, check_non_negative
from fxtrain.optim._leafwise import bias_correction, moving_average, squared, wide
from fxtrain.optim._masking import Mask
from fxtrain.optim._momentum import trace
from fxtrain.optim._scaling import ScalarOrSchedule, add_decayed_weights, scale_by_learning_rate
from fxtrain.optim._state import PerParameter, real_full, start_counts, zeros
from fxtrain.optim._transform import GradientTransformation, Rule, chain, described, from_counted_rule, from_rule


class ScaleByRssState(NamedTuple):
    """The state of ``scale_by_rss``."""

    sum_of_squares: Tree  # like the parameters, real, float32 at least


@described
def scale_by_rss(
    *, initial_accumulator_value: Scalar = 0.1, eps: Scalar = 1e-7, eps_in_sqrt: bool = True
) -> GradientTransformation:
    """Divides updates by the root of the sum of all their squares so far; see ``adagrad``.

    Args:
        initial_accumulator_value: Initial value of the sum. Defaults to 0.1 as in optax; ``torch.optim.Adagrad`` has 0.
        eps: Prevents division by zero. Defaults to 1e-7 as in optax; torch has 1e-10.
        eps_in_sqrt: Whether ``eps`` is added inside the square root, as in optax, or outside, as in torch.

    Example:
        >>> tx = scale_by_rss()
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([ 0.9945, -1.0000])
    """
    check_non_negative(initial_accumulator_value=initial_accumulator_value, eps=eps)

    def rule(update: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        total = total + squared(update)
        scaled = update / ((total + eps).sqrt() if eps_in_sqrt else total.sqrt() + eps)
        return torch.where(total > 0, scaled, torch.zeros_like(scaled)), total

    return from_rule(lambda params: ScaleByRssState(real_full(params, initial_accumulator_value)), rule)


@described
@args_from(scale_by_rss, scale_by_learning_rate)
def adagrad(
    learning_rate: ScalarOrSchedule,
    *,
    initial_accumulator_value: Scalar = 0.1,
    eps: Scalar = 1e-7,
    eps_in_sqrt: bool = True,
) -> GradientTransformation:
    """AdaGrad: ``u = -lr g / sqrt(sum |g|^2 + eps)``, with the sum over all gradients so far.

    Example:
        >>> tx = adagrad(0.1)
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([-0.0994,  0.1000])

    References:
        Duchi et al., Adaptive Subgradient Methods for Online Learning and Stochastic Optimization, 2011.
    """
    return chain(
        scale_by_rss(initial_accumulator_value=initial_accumulator_value, eps=eps, eps_in_sqrt=eps_in_sqrt),
        scale_by_learning_rate(learning_rate),
    )


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


@described
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


@described
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


@described
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


class ScaleByAdaDeltaState(NamedTuple):
    """The state of ``scale_by_adadelta``."""

    e_g: Tree  # like the parameters, real, float32 at least: average of squared incoming updates
    e_x: Tree  # like the parameters, real, float32 at least: average of squared outgoing updates


@described
def scale_by_adadelta(*, rho: Scalar = 0.9, eps: Scalar = 1e-6) -> GradientTransformation:
    """Scales updates by the root mean square of past outgoing updates over that of incoming ones; see ``adadelta``.

    Args:
        rho: Decay rate of both averages, in [0, 1).
        eps: Added to both averages, inside the square roots. It sets the size of the first steps.

    Example:
        >>> import torch
        >>> tx = scale_by_adadelta(eps=0.01)
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([ 0.3145, -0.3162])
    """
    check_fraction(rho=rho)
    check_non_negative(eps=eps)

    def rule(update: Tensor, e_g: Tensor, e_x: Tensor) -> tuple[Tensor, ...]:
        e_g = moving_average(squared(update), e_g, rho)
        update = (e_x + eps).sqrt() / (e_g + eps).sqrt() * update
        return update, e_g, moving_average(squared(update), e_x, rho)

    return from_rule(lambda params: ScaleByAdaDeltaState(real_full(params), real_full(params)), rule)


@described
@args_from(scale_by_adadelta, add_decayed_weights, scale_by_learning_rate)
def adadelta(
    learning_rate: ScalarOrSchedule = 1.0,
    *,
    rho: Scalar = 0.9,
    eps: Scalar = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """AdaDelta: each step is scaled by the size of past steps, so a learning rate of 1 is usually suitable.

        u = -lr sqrt(E[x^2] + eps) / sqrt(E[g^2] + eps) g

    Args:
        weight_decay: Coefficient of L2 regularization, which is added to the gradient.

    Example:
        >>> import torch
        >>> tx = adadelta(eps=0.01)
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([-0.3145,  0.3162])

    References:
        Zeiler, ADADELTA: An Adaptive Learning Rate Method, 2012.
    """
    return chain(
        add_decayed_weights(weight_decay, mask),
        scale_by_adadelta(rho=rho, eps=eps),
        scale_by_learning_rate(learning_rate),
    )
