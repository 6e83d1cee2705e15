"""Relatives of Adam: Adamax, NAdam, RAdam and LAMB."""

# pyright: reportIncompatibleMethodOverride=false
# As in optax, states have a field named `count`, which shadows the method of tuples.

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain.core import Scalar, Tree, args_from, check_fraction, check_non_negative, wide_dtype
from fxtrain.optim._adam import adam, adamw, scale_by_adam, start_moments
from fxtrain.optim._leafwise import bias_correction, map_with_state, moving_average, squared, widest
from fxtrain.optim._masking import Mask
from fxtrain.optim._scaling import ScalarOrSchedule, add_decayed_weights, scale_by_learning_rate, scale_by_trust_ratio
from fxtrain.optim._state import PerParameter, per_parameter, real_full, start_counts, zeros
from fxtrain.optim._transform import GradientTransformation, chain, described, from_counted_rule


class ScaleByAdamaxState(NamedTuple):
    """The state of ``scale_by_adamax``."""

    count: PerParameter  # int64 [parameters]: updates of each
    mu: Tree  # like the parameters: first moment
    nu: Tree  # like the parameters, real, float32 at least: decaying maximum


@described
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


@described
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


class ScaleByNadamState(NamedTuple):
    """The state of ``scale_by_nadam``."""

    count: PerParameter  # int64 [parameters]: updates of each
    momentum_product: PerParameter  # float32 or float64 [parameters]: product of the momentum schedule so far
    mu: Tree  # like the parameters: first moment
    nu: Tree  # like the parameters, real, float32 at least: second moment


@described
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


@described
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


@described
@args_from(scale_by_adam)
def scale_by_radam(
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    threshold: Scalar = 5.0,
    mu_dtype: torch.dtype | None = None,
    correct_eps: bool = False,
) -> GradientTransformation:
    """Scales updates by rectified Adam, or by the first moment alone in the first steps; see ``radam``.

    Args:
        threshold: The length rho(t) of the average of squares below which the first moment alone is used.
        correct_eps: Whether to correct the bias of the second moment after adding ``eps`` to its root, as in
            ``torch.optim.RAdam``, or before, as in optax.

    Example:
        >>> tx = scale_by_radam()
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([   3., -200.])
    """
    check_fraction(b1=b1, b2=b2)
    check_non_negative(eps=eps, eps_root=eps_root, threshold=threshold)
    longest = 2 / (1 - b2) - 1

    def numbers(count: Tensor, dtype: torch.dtype) -> list[Tensor]:
        first, second = (bias_correction(decay, count, dtype) for decay in (b1, b2))
        # A small difference of two large values, which needs more precision than float32.
        wide = wide_dtype(count.device)
        unbiased = bias_correction(b2, count, wide)
        length = longest - 2 * count.to(wide) * (1 - unbiased) / unbiased
        rectified = length >= threshold
        # Avoids the square root of a negative value where the factor is not used.
        safe = torch.where(rectified, length, longest)
        factor = ((safe - 4) * (safe - 2) * longest / ((longest - 4) * (longest - 2) * safe)).sqrt().to(dtype)
        return [first, second, rectified, factor]

    def rule(
        update: Tensor, mu: Tensor, nu: Tensor, first: Tensor, second: Tensor, rectified: Tensor, factor: Tensor
    ) -> tuple[Tensor, ...]:
        mu = moving_average(update, mu, b1)
        nu = moving_average(squared(update), nu, b2)
        direction = mu / first
        root = (nu / second + eps_root).sqrt()
        scale = root + (eps / second.sqrt() if correct_eps else eps)
        return torch.where(rectified, factor * direction / scale, direction), mu, nu

    return from_counted_rule(lambda params: start_moments(params, mu_dtype), rule, numbers)


@described
@args_from(scale_by_radam, scale_by_learning_rate)
def radam(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    threshold: Scalar = 5.0,
    mu_dtype: torch.dtype | None = None,
    correct_eps: bool = False,
) -> GradientTransformation:
    """Rectified Adam: Adam with a built-in warmup while its second moment averages only a few squares.

        rho(t) = rho - 2 t b2^t / (1 - b2^t),    rho = 2 / (1 - b2) - 1
        u = -lr r m' / (sqrt(v' + eps_root) + eps)    where rho(t) >= threshold, and u = -lr m' elsewhere
        r^2 = (rho(t) - 4) (rho(t) - 2) rho / ((rho - 4) (rho - 2) rho(t))

    Example:
        >>> tx = radam(0.1)
        >>> params = torch.tensor([3.0, -200.0])
        >>> tx.update(params, tx.init(params), params)[0]
        tensor([-0.3000, 20.0000])

    References:
        Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, 2020.
    """
    return chain(
        scale_by_radam(
            b1=b1, b2=b2, eps=eps, eps_root=eps_root, threshold=threshold, mu_dtype=mu_dtype, correct_eps=correct_eps
        ),
        scale_by_learning_rate(learning_rate),
    )


@described
@args_from(adamw)
def lamb(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    eps_root: Scalar = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """LAMB: AdamW with each leaf's step scaled to the norm of its parameter, for training with large batches.

        d = adam(g) + weight_decay p,    u = -lr |p| / |d| d

    Args:
        weight_decay: Coefficient of decoupled weight decay.

    Example:
        >>> import torch
        >>> tx = lamb(0.1)
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([-14.1437,  14.1437])

    References:
        You et al., Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, 2020.
    """
    return chain(
        scale_by_adam(b1=b1, b2=b2, eps=eps, eps_root=eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_trust_ratio(),
        scale_by_learning_rate(learning_rate),
    )
