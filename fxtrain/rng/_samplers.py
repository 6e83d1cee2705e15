"""Random samplers as pure functions of a key, a shape and a site.

If a sample takes ``w`` words, sample ``i`` of a site uses its words ``i * w`` to ``i * w + w - 1``. Shapes are filled
in row-major order. All arithmetic is on integers, or consists of additions, multiplications and divisions in a fixed
order, which IEEE 754 rounds in one way. It avoids ``log``, ``cos`` and ``sqrt``, whose last bit depends on the library
and, in eager mode, on the length of the tensor. Samples are therefore bitwise equal in every mode on one kind of
device. A GPU compiler that contracts ``a * b + c`` may change the last bit of floating-point samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxtrain.rng._arithmetic import Form, form_of, negative_log, point_on_circle, sqrt
from fxtrain.rng._philox import MASK, Key, blocks


def bits(
    key: Key, shape: Sequence[int], *, site: int = 0, width: int = 32, device: torch.device | str | None = None
) -> Tensor:
    """Samples random bits as int64: 32 bits, in [0, 2^32), or all 64.

    Args:
        key: The position in the run.
        shape: The shape of the result.
        site: The sampling call for this key, 0 to 2^24 - 1. Two calls with one site return the same samples.
        width: 32 or 64.
        device: The device of the result. Defaults to the key's.

    Example:
        >>> from fxtrain import rng
        >>> rng.bits(rng.key(0), [3])
        tensor([1601156873,  227098468, 1326587777])
    """
    if width == 32:
        return _fill(key, shape, site, device, 4, lambda *words: words)
    if width == 64:
        return _fill(key, shape, site, device, 2, lambda a, b, c, d: (a << 32 | b, c << 32 | d))
    raise ValueError(f"expected width to be 32 or 64, got {width}.")


def uniform(
    key: Key,
    shape: Sequence[int],
    *,
    site: int = 0,
    low: float = 0.0,
    high: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Samples uniformly from [low, high).

    On [0, 1), samples are the multiples of 2^-b, all equally likely, where b is the number of significand bits of the
    dtype: 53, 24, 11 (float16) or 8 (bfloat16). The result is ``low + (high - low) * u``, with values that round to
    ``high`` replaced by ``low``.

    Args:
        key: The position in the run.
        shape: The shape of the result.
        site: The sampling call for this key, 0 to 2^24 - 1.
        low: The lower bound, inclusive.
        high: The upper bound, exclusive.
        dtype: float64, float32, float16 or bfloat16.
        device: The device of the result. Defaults to the key's.

    Example:
        >>> from fxtrain import rng
        >>> rng.uniform(rng.key(0), [3], low=-1.0)
        tensor([-0.2544, -0.8942, -0.3823])
    """
    form = form_of(dtype)
    if high < low:
        raise ValueError(f"expected low to be at most high, got low={low} and high={high}.")

    integer = _integers(key, shape, site, device, form)
    unit = (integer >> form.width - form.significand).to(form.compute) * 2.0**-form.significand
    if low == 0.0 and high == 1.0:
        return unit.to(dtype)
    value = (unit * (high - low) + low).to(dtype)
    return torch.where(value < high, value, torch.full_like(value, low))


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

    # As in ``_integers``, both pairs of words are stacked, so that the graph has each operation once.
    def pairs(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        if form.width == 32:
            integer, turn = torch.stack([a, c], -1), torch.stack([b, d], -1)
        else:
            integer, turn = _join(a, b), _join(c, d)
        radius = sqrt(2.0 * negative_log(integer, form), form)
        x, y = point_on_circle(turn, form)
        return radius * x, radius * y

    unit = _fill(key, shape, site, device, 4 if form.width == 32 else 2, pairs)
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

    integer = _integers(key, shape, site, device, form)
    return (negative_log(integer, form) * (1.0 / rate)).to(dtype).clamp(min=least)


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


def randint(
    key: Key,
    shape: Sequence[int],
    *,
    high: int,
    low: int = 0,
    site: int = 0,
    dtype: torch.dtype = torch.int64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Samples integers uniformly from [low, high).

    The result is low + floor(x * (high - low) / 2^64), with x of 64 random bits, so no probability is off by more than
    2^-64.

    Args:
        key: The position in the run.
        shape: The shape of the result.
        high: The upper bound, exclusive.
        low: The lower bound, inclusive.
        site: The sampling call for this key, 0 to 2^24 - 1.
        dtype: The dtype of the result, which must represent ``high - 1``.
        device: The device of the result. Defaults to the key's.

    Example:
        >>> from fxtrain import rng
        >>> rng.randint(rng.key(0), [5], high=100)
        tensor([37, 30, 59, 34, 24])
    """
    span = high - low
    if span <= 0:
        raise ValueError(f"expected low to be below high, got low={low} and high={high}.")
    if not dtype.is_floating_point and high - 1 > largest_count(dtype):
        raise ValueError(f"expected a dtype that represents high - 1 = {high - 1}, got {dtype}. Use a wider one.")
    upper, lower = span >> 32, span & MASK

    def scaled(a: Tensor, b: Tensor) -> Tensor:
        # The upper half of a 64 by 64 bit product, from four products of words that wrap around as in Philox.
        p, q, r = a * lower, b * upper, b * lower
        carry = (p & MASK) + (q & MASK) + (r >> 32 & MASK)
        return low + a * upper + (p >> 32 & MASK) + (q >> 32 & MASK) + (carry >> 32)

    return _fill(key, shape, site, device, 2, lambda a, b, c, d: (scaled(a, b), scaled(c, d))).to(dtype)


def permutation(key: Key, n: int, *, site: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Samples a random permutation of 0 to n - 1: int64 [n].

    Sorts 64 random bits per entry. The sort is stable. The probability of a tie is about n^2 / 2^65.

    Args:
        key: The position in the run.
        n: The number of entries.
        site: The sampling call for this key, 0 to 2^24 - 1.
        device: The device of the result. Defaults to the key's.

    Example:
        >>> from fxtrain import rng
        >>> rng.permutation(rng.key(0), 5)
        tensor([2, 4, 1, 3, 0])
    """
    return torch.sort(bits(key, [n], site=site, width=64, device=device), stable=True).indices


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

    def sample(word: Tensor) -> Tensor:
        return (word - below >> 63).to(torch.int8).neg()

    return _fill(key, shape, site, device, 4, lambda *words: [sample(word) for word in words])


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

    x, y = point_on_circle(_integers(key, shape, site, device, form), form)
    return (y / x * scale + median).to(dtype)


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


def largest_count(dtype: torch.dtype) -> int:
    """Returns the largest n such that the dtype represents all integers from 0 to n."""
    if dtype.is_floating_point:
        return 2 ** form_of(dtype).significand
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max


def _fill(
    key: Key,
    shape: Sequence[int],
    site: int,
    device: torch.device | str | None,
    per_block: int,
    samples_of: Callable[[Tensor, Tensor, Tensor, Tensor], Sequence[Tensor]],
) -> Tensor:
    """Fills the shape with the ``per_block`` samples that ``samples_of`` computes from each block of four words."""
    count = 1
    for size in shape:  # torch.Size(shape).numel() would specialize symbolic sizes
        count *= size
    where = key.seed.device if device is None else torch.device(device)
    words = blocks(key, -(-count // per_block), site=site, device=where)
    return torch.stack(list(samples_of(*words)), -1).flatten()[:count].reshape(shape)


def _integers(key: Key, shape: Sequence[int], site: int, device: torch.device | str | None, form: Form) -> Tensor:
    """Fills the shape with integers of ``form.width`` random bits.

    Later operations then apply to all samples together. Handling the words separately would multiply compile time.
    """
    if form.width == 32:
        return bits(key, shape, site=site, device=device)
    return _fill(key, shape, site, device, 2, lambda a, b, c, d: (_join(a, b), _join(c, d)))


def _join(a: Tensor, b: Tensor) -> Tensor:
    """Returns the upper 53 bits of two words."""
    return a << 21 | b >> 11
