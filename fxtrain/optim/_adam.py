"""Adam and its variants: bias-corrected moving averages of updates and of their squares.

Defaults and meanings of arguments are those of optax. Second moments are kept in float32 at least, first moments in the
parameters' dtype unless ``mu_dtype`` is given. The second moment of a complex parameter is that of its absolute value.
``split_real_and_imaginary`` treats the two parts as independent real values, as torch does.
"""

# pyright: reportIncompatibleMethodOverride=false
# As in optax, states have a field named `count`, which shadows the method of tuples.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain.core import Scalar, Tree, args_from, check_fraction, check_non_negative
from fxtrain.optim._leafwise import bias_correction, bias_corrections, debiased, moving_average, squared
from fxtrain.optim._masking import Mask
from fxtrain.optim._scaling import ScalarOrSchedule, add_decayed_weights, scale_by_learning_rate
from fxtrain.optim._state import PerParameter, real_full, start_counts, zeros
from fxtrain.optim._transform import GradientTransformation, chain, described, from_counted_rule


class ScaleByAdamState(NamedTuple):
    """The state of ``scale_by_adam`` and ``scale_by_radam``."""

    count: PerParameter  # int64 [parameters]: updates of each
    mu: Tree  # like the parameters: first moment
    nu: Tree  # like the parameters, real, float32 at least: second moment


class ScaleByAmsgradState(NamedTuple):
    """The state of ``scale_by_amsgrad``."""

    count: PerParameter  # int64 [parameters]: updates of each
    mu: Tree  # like the parameters: first moment
    nu: Tree  # like the parameters, real, float32 at least: second moment
    nu_max: Tree  # like nu: its largest value so far


@described
def scale_by_adam(
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    nesterov: bool = False,
) -> GradientTransformation:
    """Divides the first moment by the root of the second, both bias-corrected; see ``adam``.

    Args:
        b1: Decay rate of the first moment, in [0, 1).
        b2: Decay rate of the second moment, in [0, 1).
        eps: Added to the denominator, outside the square root.
        eps_root: Added inside the square root. Pass a value above 0 to differentiate through the update.
        mu_dtype: Dtype of the first moment. Defaults to the parameters' dtype.
        nesterov: Whether to use Nesterov momentum; see ``nadam``.

    Example:
        >>> tx = scale_by_adam()
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([ 1.0000, -1.0000])
    """
    check_fraction(b1=b1, b2=b2)
    check_non_negative(eps=eps, eps_root=eps_root)

    def rule(update: Tensor, mu: Tensor, nu: Tensor, second: Tensor, *first: Tensor) -> tuple[Tensor, ...]:
        mu = moving_average(update, mu, b1)
        nu = moving_average(squared(update), nu, b2)
        return debiased(update, mu, b1, *first) / ((nu / second + eps_root).sqrt() + eps), mu, nu

    def numbers(count: Tensor, dtype: torch.dtype) -> list[Tensor]:
        return [bias_correction(b2, count, dtype), *bias_corrections(b1, count, dtype, nesterov)]

    return from_counted_rule(lambda params: start_moments(params, mu_dtype), rule, numbers)


@described
@args_from(scale_by_adam)
def scale_by_amsgrad(
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    correct_maximum: bool = False,
) -> GradientTransformation:
    """Like ``scale_by_adam``, but divides by the root of the largest second moment so far.

    Args:
        correct_maximum: Whether to correct the bias after taking the maximum, as in ``torch.optim.Adam``, or before, as
            in optax.

    Example:
        >>> tx = scale_by_amsgrad()
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([ 1.0000, -1.0000])

    References:
        Reddi et al., On the Convergence of Adam and Beyond, 2018.
    """
    check_fraction(b1=b1, b2=b2)
    check_non_negative(eps=eps, eps_root=eps_root)

    def init(params: Tree) -> ScaleByAmsgradState:
        return ScaleByAmsgradState(*start_moments(params, mu_dtype), real_full(params))

    def rule(
        update: Tensor, mu: Tensor, nu: Tensor, nu_max: Tensor, first: Tensor, second: Tensor
    ) -> tuple[Tensor, ...]:
        mu = moving_average(update, mu, b1)
        nu = moving_average(squared(update), nu, b2)
        nu_max = torch.maximum(nu_max, nu if correct_maximum else nu / second)
        root = (nu_max / second if correct_maximum else nu_max) + eps_root
        return mu / first / (root.sqrt() + eps), mu, nu, nu_max

    return from_counted_rule(
        init, rule, lambda count, dtype: [bias_correction(decay, count, dtype) for decay in (b1, b2)]
    )


@described
@args_from(scale_by_adam, scale_by_learning_rate)
def adam(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    nesterov: bool = False,
    amsgrad: bool = False,
) -> GradientTransformation:
    """Adam: the size of steps is set by the learning rate, independent of the scale of the gradients.

        m = b1 m + (1 - b1) g,              v = b2 v + (1 - b2) |g|^2
        u = -lr m' / (sqrt(v' + eps_root) + eps),    m' = m / (1 - b1^t),    v' = v / (1 - b2^t)

    Args:
        amsgrad: Whether to use the largest second moment so far; see ``scale_by_amsgrad``.

    Raises:
        ValueError: If a hyperparameter is out of range, or both ``nesterov`` and ``amsgrad`` are set.

    Example:
        >>> tx = adam(0.1)
        >>> params = torch.tensor([3.0, -200.0])
        >>> tx.update(params, tx.init(params), params)[0]
        tensor([-0.1000,  0.1000])

    References:
        Kingma and Ba, Adam: A Method for Stochastic Optimization, 2015.
    """
    return chain(_adam(b1, b2, eps, eps_root, mu_dtype, nesterov, amsgrad), scale_by_learning_rate(learning_rate))


@described
@args_from(adam, add_decayed_weights)
def adamw(
    learning_rate: ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: torch.dtype | None = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask | None = None,
    nesterov: bool = False,
    amsgrad: bool = False,
) -> GradientTransformation:
    """Adam with decoupled weight decay: ``u = -lr (adam(g) + weight_decay p)``.

    Args:
        weight_decay: A float, a tensor of shape [], or a schedule. It is multiplied by the learning rate, and so also
            follows the learning rate's schedule. Defaults to 1e-4 as in optax; ``torch.optim.AdamW`` has 1e-2.

    Raises:
        ValueError: If a hyperparameter is out of range, or both ``nesterov`` and ``amsgrad`` are set.

    Example:
        >>> tx = adamw(3e-4, weight_decay=0.1, mask=lambda path, leaf: leaf.ndim > 1)
        >>> params = {"bias": torch.zeros(2), "weight": torch.zeros(2, 2)}
        >>> state = tx.init(params)
        >>> state[0].count.values, sorted(state[0].mu)
        (tensor([0, 0]), ['bias', 'weight'])

    References:
        Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019.
    """
    return chain(
        _adam(b1, b2, eps, eps_root, mu_dtype, nesterov, amsgrad),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def _adam(
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    eps_root: Scalar,
    mu_dtype: torch.dtype | None,
    nesterov: bool,
    amsgrad: bool,
) -> GradientTransformation:
    if not amsgrad:
        return scale_by_adam(b1=b1, b2=b2, eps=eps, eps_root=eps_root, mu_dtype=mu_dtype, nesterov=nesterov)
    if nesterov:
        raise ValueError("expected nesterov or amsgrad, got both. Choose one.")
    return scale_by_amsgrad(b1=b1, b2=b2, eps=eps, eps_root=eps_root, mu_dtype=mu_dtype)


def start_moments(params: Tree, mu_dtype: torch.dtype | None) -> ScaleByAdamState:
    """Returns counts and moments before the first update. ``mu_dtype`` is the dtype of the first moments."""
    return ScaleByAdamState(start_counts(params), zeros(params, dtype=mu_dtype), real_full(params))
