"""Samples of discrete distributions: coins, categories, counts, and masks of dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fxtrain.rng._continuous import exponential
from fxtrain.rng._philox import Key
from fxtrain.rng._uniform import bits, fill, uniform


def bernoulli(
    key: Key,
    shape: Sequence[int],
    *,
    site: int = 0,
    p: float | Tensor = 0.5,
    device: torch.device | str | None = None,
) -> Tensor:
    """Samples True with probability ``p``, to within 2^-32.

    Args:
        key: The position in the run.
        shape: The shape of the result.
        site: The sampling call for this key, 0 to 2^24 - 1.
        p: A scalar, or a tensor that broadcasts to ``shape``. Tensor values are not checked.
        device: The device of the result. Defaults to the key's.

    Example:
        >>> from fxtrain import rng
        >>> rng.bernoulli(rng.key(0), [4], p=0.25)
        tensor([False,  True, False, False])
    """
    return indicator(key, shape, site=site, p=p, device=device).to(torch.bool)


def categorical(key: Key, logits: Tensor, *, site: int = 0) -> Tensor:
    """Samples indices along the last axis with probabilities softmax(logits): int64 [...].

    Args:
        key: The position in the run.
        logits: float [..., categories].
        site: The sampling call for this key, 0 to 2^24 - 1.

    Example:
        >>> from fxtrain import rng
        >>> rng.categorical(rng.key(0), torch.tensor([[0.0, 3.0], [3.0, 0.0]]))
        tensor([1, 0])
    """
    return multinomial(key, logits.softmax(-1), num_samples=1, site=site).squeeze(-1)


def multinomial(key: Key, weights: Tensor, *, num_samples: int, replacement: bool = False, site: int = 0) -> Tensor:
    """Samples indices along the last axis in proportion to the weights: int64 [..., num_samples].

    A single sample, or samples without replacement, are the indices with the shortest exponential waiting times, whose
    rates are the weights. Otherwise inverts the cumulative weights in float64.

    Args:
        key: The position in the run.
        weights: float [..., categories], nonnegative. They need not sum to 1.
        num_samples: The number of samples. Without replacement, at most the number of positive weights.
        replacement: Whether an index may be sampled more than once.
        site: The sampling call for this key, 0 to 2^24 - 1.

    Example:
        >>> from fxtrain import rng
        >>> rng.multinomial(rng.key(0), torch.tensor([0.0, 1.0, 9.0]), num_samples=2)
        tensor([2, 1])
    """
    categories = weights.shape[-1]
    if not replacement and num_samples > categories:
        raise ValueError(
            f"expected num_samples to be at most {categories}, the number of categories, got {num_samples}. Use "
            "replacement=True to sample more."
        )
    if num_samples == 1 or not replacement:
        dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
        waits = exponential(key, weights.shape, site=site, dtype=dtype, device=weights.device)
        return torch.topk(weights / waits, num_samples).indices
    cumulative = weights.to(torch.float64).cumsum(-1)
    shape = (*weights.shape[:-1], num_samples)
    at = uniform(key, shape, site=site, dtype=torch.float64, device=weights.device) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, at, right=True).clamp(max=categories - 1)


def dropout(key: Key, x: Tensor, *, p: float, site: int = 0, shape: Sequence[int] | None = None) -> Tensor:
    """Zeroes each element of ``x`` with probability ``p``, and divides the others by 1 - p.

    Args:
        key: The position in the run.
        x: float [...].
        p: The probability of 0, between 0 and 1.
        site: The sampling call for this key, 0 to 2^24 - 1.
        shape: The shape of the mask, with size 1 along axes that share it. Defaults to the shape of ``x``.

    Example:
        >>> from fxtrain import rng
        >>> rng.dropout(rng.key(0), torch.ones(6), p=0.5)
        tensor([0., 0., 0., 0., 2., 2.])
    """
    kept = 1 - indicator(key, x.shape if shape is None else shape, site=site, p=p, device=x.device)
    # In this order, half precision is rounded once, compiled or not. Multiplying by the mask keeps NaN.
    return x * kept * (1.0 / (1.0 - p) if p < 1.0 else 0.0)


def indicator(
    key: Key, shape: Sequence[int], *, site: int, p: float | Tensor, device: torch.device | str | None
) -> Tensor:
    """Samples like ``bernoulli``, but returns int8: 1 with probability ``p``, otherwise 0."""
    # Takes the sign of a difference instead of comparing, because on CPUs Inductor stores bools made from int64 slowly,
    # lane by lane.
    if isinstance(p, Tensor):
        # Multiplying by a power of two keeps the significand, so only bits below 2^-32 are lost.
        wide = torch.promote_types(p.dtype, torch.float32)
        threshold = (p.to(wide) * 2.0**32).to(torch.int64)
        return (bits(key, shape, site=site, device=device) - threshold >> 63).to(torch.int8).neg()
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"expected p to be between 0 and 1, got {p}.")
    below = round(p * 2.0**32)
    return fill(
        key, shape, site, device, 4, lambda *words: [(word - below >> 63).to(torch.int8).neg() for word in words]
    )


def geometric(
    key: Key,
    shape: Sequence[int],
    *,
    p: float,
    site: int = 0,
    dtype: torch.dtype = torch.int64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Samples the number of trials up to the first success, each with probability ``p``.

    The result is 1 + floor(e / -log(1 - p)), with e exponential.
    """
    if not 0.0 < p <= 1.0:
        raise ValueError(f"expected p to be above 0 and at most 1, got {p}.")
    rate = -math.log1p(-p) if p < 1.0 else math.inf
    wide = dtype if dtype.is_floating_point else torch.float64
    waits = exponential(key, shape, site=site, dtype=torch.promote_types(wide, torch.float32), device=device)
    return (waits * (1.0 / rate)).floor().add(1.0).to(dtype)
