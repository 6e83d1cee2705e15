"""AdaDelta: updates rescaled by the ratio of two moving averages."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fxtrain.core import Scalar, Tree, args_from, check_fraction, check_non_negative
from fxtrain.optim._decay import add_decayed_weights
from fxtrain.optim._initial_state import real_full
from fxtrain.optim._masking import Mask
from fxtrain.optim._moments import moving_average, squared
from fxtrain.optim._rules import from_rule
from fxtrain.optim._scaling import ScalarOrSchedule, scale_by_learning_rate
from fxtrain.optim._transform import GradientTransformation, chain


class ScaleByAdaDeltaState(NamedTuple):
    """The state of ``scale_by_adadelta``."""

    e_g: Tree  # like the parameters, real, float32 at least: average of squared incoming updates
    e_x: Tree  # like the parameters, real, float32 at least: average of squared outgoing updates


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
