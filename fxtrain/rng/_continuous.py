"""Samples of continuous distributions, computed from uniform bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxtrain.rng._arithmetic import form_of, negative_log, point_on_circle, sqrt
from fxtrain.rng._philox import Key
from fxtrain.rng._uniform import fill, integers, join


def normal(
    key: Key,
    shape: Sequence[int],
    *,
    site: int = 0,
    mean: float | Tensor = 0.0,
    std: float | Tensor = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Samples from a normal distribution by the Box-Muller method.

    A pair of samples is sqrt(2 e) cos(a) and sqrt(2 e) sin(a), with e exponential and a uniform. The tails end at 6.7
    standard deviations (8.6 in float64), which omits 2e-11 (6e-18) of the distribution.

    Args:
        key: The position in the run.
        shape: The shape of the result.
        site: The sampling call for this key, 0 to 2^24 - 1.
        mean: A scalar, or a tensor that broadcasts to ``shape``.
        std: The standard deviation: a scalar, or a tensor that broadcasts to ``shape``.
        dtype: float64, float32, float16 or bfloat16.
        device: The device of the result. Defaults to the key's.

    Example:
        >>> from fxtrain import rng
        >>> rng.normal(rng.key(0), [3], dtype=torch.float64)
        tensor([-0.5670,  1.2853, -0.1911], dtype=torch.float64)

    References:
        Box and Muller, "A note on the generation of random normal deviates", 1958.
    """
    form = form_of(dtype)

    # As in ``integers``, both pairs of words are stacked, so that the graph has each operation once.
    def pairs(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        if form.width == 32:
            integer, turn = torch.stack([a, c], -1), torch.stack([b, d], -1)
        else:
            integer, turn = join(a, b), join(c, d)
        radius = sqrt(2.0 * negative_log(integer, form), form)
        x, y = point_on_circle(turn, form)
        return radius * x, radius * y

    unit = fill(key, shape, site, device, 4 if form.width == 32 else 2, pairs)
    return (unit * std + mean).to(dtype)


def exponential(
    key: Key,
    shape: Sequence[int],
    *,
    site: int = 0,
    rate: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Samples -log(u) / rate, with u uniform. Samples lie above 0 and below 23 / rate (38 / rate in float64).

    Args:
        key: The position in the run.
        shape: The shape of the result.
        site: The sampling call for this key, 0 to 2^24 - 1.
        rate: The inverse of the mean, above 0.
        dtype: float64, float32, float16 or bfloat16.
        device: The device of the result. Defaults to the key's.

    Example:
        >>> from fxtrain import rng
        >>> rng.exponential(rng.key(0), [3], rate=2.0)
        tensor([0.4934, 1.4699, 0.5874])
    """
    form = form_of(dtype)
    if not rate > 0.0:
        raise ValueError(f"expected rate to be above 0, got {rate}.")
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # float16 would round smaller samples to 0
    waits = negative_log(integers(key, shape, site, device, form), form)
    return (waits * (1.0 / rate)).to(dtype).clamp(min=least)


def cauchy(
    key: Key,
    shape: Sequence[int],
    *,
    site: int = 0,
    median: float = 0.0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Samples from a Cauchy distribution: median + scale tan(a), with a uniform angle a."""
    form = form_of(dtype)

    x, y = point_on_circle(integers(key, shape, site, device, form), form)
    return (y / x * scale + median).to(dtype)
