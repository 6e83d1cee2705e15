"""AdaGrad: updates divided by the root of the sum of all squares so far."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain.core import Scalar, Tree, args_from, check_non_negative
from fxtrain.optim._initial_state import real_full
from fxtrain.optim._moments import squared
from fxtrain.optim._rules import from_rule
from fxtrain.optim._scaling import ScalarOrSchedule, scale_by_learning_rate
from fxtrain.optim._transform import GradientTransformation, chain


class ScaleByRssState(NamedTuple):
    """The state of ``scale_by_rss``."""

    sum_of_squares: Tree  # like the parameters, real, float32 at least


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
