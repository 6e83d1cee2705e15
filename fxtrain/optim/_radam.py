"""RAdam: Adam that adapts its steps only once the variance of the second moment is tractable."""

from __future__ import annotations

import torch
from torch import Tensor

from fxtrain.core import Scalar, args_from, check_fraction, check_non_negative, wide_dtype
from fxtrain.optim._adam import scale_by_adam, start_moments
from fxtrain.optim._moments import bias_correction, moving_average, squared
from fxtrain.optim._rules import from_counted_rule
from fxtrain.optim._scaling import ScalarOrSchedule, scale_by_learning_rate
from fxtrain.optim._transform import GradientTransformation, chain


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
