"""Rprop: a step size per element, which grows while the gradient keeps its sign."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain.core import Scalar, Tree, args_from, check_fraction, check_non_negative, check_positive
from fxtrain.optim._leafwise import at_least, at_most
from fxtrain.optim._scaling import scale
from fxtrain.optim._state import real_full, zeros
from fxtrain.optim._transform import GradientTransformation, chain, described, from_rule


class ScaleByRpropState(NamedTuple):
    """The state of ``scale_by_rprop``."""

    step_sizes: Tree  # like the parameters, float32 at least
    previous_sign: Tree  # like the parameters: sign of the last update, or 0 after a change of sign


@described
def scale_by_rprop(
    learning_rate: Scalar,
    *,
    eta_minus: Scalar = 0.5,
    eta_plus: Scalar = 1.2,
    min_step_size: Scalar = 1e-6,
    max_step_size: Scalar = 50.0,
) -> GradientTransformation:
    """Replaces each element by its step size, with the sign of the update; see ``rprop``.

    Args:
        learning_rate: Initial step size of each element: a float or a tensor of shape []. Schedules are not supported.
        eta_minus: Factor of the step size after a change of sign, in [0, 1). That step is skipped.
        eta_plus: Factor of the step size if the sign stays the same, above 0.
        min_step_size: Lower bound of step sizes.
        max_step_size: Upper bound of step sizes.

    Example:
        >>> tx = scale_by_rprop(0.1)
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([ 0.1000, -0.1000])
    """
    check_non_negative(learning_rate=learning_rate, min_step_size=min_step_size)
    check_fraction(eta_minus=eta_minus)
    check_positive(eta_plus=eta_plus, max_step_size=max_step_size)

    def rule(update: Tensor, size: Tensor, previous: Tensor) -> tuple[Tensor, ...]:
        sign = torch.sign(update)
        agreement = sign * previous
        size = torch.where(agreement > 0, size * eta_plus, torch.where(agreement < 0, size * eta_minus, size))
        size = at_most(at_least(size, min_step_size), max_step_size)
        sign = torch.where(agreement < 0, torch.zeros_like(sign), sign)
        return size * sign, size, sign

    return from_rule(lambda params: ScaleByRpropState(real_full(params, learning_rate), zeros(params)), rule)


@described
@args_from(scale_by_rprop)
def rprop(
    learning_rate: Scalar,
    *,
    eta_minus: Scalar = 0.5,
    eta_plus: Scalar = 1.2,
    min_step_size: Scalar = 1e-6,
    max_step_size: Scalar = 50.0,
) -> GradientTransformation:
    """Resilient backpropagation, for full-batch gradients, of which it uses only the signs.

    Steps are those of ``torch.optim.Rprop``. Optax takes each of them one update later.

    Example:
        >>> tx = rprop(0.1)
        >>> grads = torch.tensor([3.0, -200.0])
        >>> tx.update(grads, tx.init(grads), grads)[0]
        tensor([-0.1000,  0.1000])

    References:
        Riedmiller and Braun, A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP Algorithm, 1993.
    """
    return chain(
        scale_by_rprop(
            learning_rate,
            eta_minus=eta_minus,
            eta_plus=eta_plus,
            min_step_size=min_step_size,
            max_step_size=max_step_size,
        ),
        scale(-1.0),
    )
