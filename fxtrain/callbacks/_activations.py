"""Summary statistics of module outputs."""

from __future__ import annotations

import torch
from torch import Tensor


def activation_stats(output: Tensor) -> dict[str, Tensor]:
    """Returns the mean, standard deviation, fraction of exact zeros and largest absolute value of a module's output.

    Pass it to ``fx.tap`` to log them.

    Args:
        output: Real tensor of any shape.

    Returns:
        ``"mean"``, ``"std"``, ``"zeros"`` and ``"max"``: float32 [] each.

    Example:
        >>> import fxtrain as fx
        >>> activation_stats(torch.tensor([0.0, 4.0]))
        {'mean': tensor(2.), 'std': tensor(2.), 'zeros': tensor(0.5000), 'max': tensor(4.)}
        >>> loss_fn = fx.tap(lambda model, batch: model(batch).sum(), "*.relu", activation_stats)
    """
    values = output.to(torch.promote_types(output.dtype, torch.float32))
    mean = values.mean()
    return {
        "mean": mean.float(),
        "std": (values - mean).square().mean().sqrt().float(),
        "zeros": (values == 0).float().mean(),
        "max": values.abs().amax().float(),
    }
