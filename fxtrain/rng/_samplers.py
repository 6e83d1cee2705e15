"""Distributions: pure functions of a key, a shape and a site.

Number ``i`` of a site is made from its words ``i * w`` to ``i * w + w - 1``, if a number takes ``w`` words; a shape
is filled in row-major order. Everything is integer arithmetic, or additions, products and quotients in a fixed
order, which IEEE 754 rounds in one way: no ``log``, ``cos`` or ``sqrt``, whose last bit depends on the library, and in
eager mode on the length of the tensor. So the numbers are the same bits in every mode on one kind of device; a GPU
compiler that contracts ``a * b + c`` may change the last bit of floating-point ones.
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
    """Random bits as int64: 32 of them, in [0, 2^32), or all 64.

    Args:
        key: Where in the run.
        shape: Of the result.
        site: Which draw of this key, 0 to 2^24 - 1. Two draws from one site are the same numbers.
        width: 32 or 64.
        device: Of the result; the key's, if not given.
    """
    if width == 32:
        return _fill(key, shape, site, device, 4, lambda *words: words)
    if width == 64:
        return _fill(key, shape, site, device, 2, lambda a, b, c, d: (a << 32 | b, c << 32 | d))
    raise ValueError(f"width is 32 or 64, and {width} came.")


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
    """Uniform numbers in [low, high).

    On [0, 1) they are the multiples of 2^-b, all equally likely, where b is the significand of the dtype in bits: 53,
    24, 11 (float16) or 8 (bfloat16). Then ``low + (high - low) * u``, and what rounds to ``high`` becomes ``low``.

    Example:
        >>> from fxtrain import rng
        >>> rng.uniform(rng.key(0), [3], low=-1.0)
        tensor([-0.2544, -0.8942, -0.3823])
    """
    form = form_of(dtype)
    if high < low:
        raise ValueError(f"uniform draws from [low, high), and low={low} is above high={high}.")

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
    """Normal numbers, by Box and Muller: sqrt(2 e) cos(a) and sqrt(2 e) sin(a), with e exponential and a uniform.

    The tail reaches 6.7 standard deviations (8.6 in float64), beyond which lie 2e-11 (6e-18) of the distribution.

    Example:
        >>> from fxtrain import rng
        >>> rng.normal(rng.key(0), [3], dtype=torch.float64)
        tensor([-0.5670,  1.2853, -0.1911], dtype=torch.float64)

    References:
        Box and Muller, "A note on the generation of random normal deviates", 1958.
    """
    form = form_of(dtype)

    # As in ``_integers``: what is made of both pairs of words is made at once.
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
    """Exponential numbers, -log(u) / rate. Above 0, and below 23 / rate (38 / rate in float64)."""
    form = form_of(dtype)
    if not rate > 0.0:
        raise ValueError(f"exponential takes a rate above 0, and {rate} came.")
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # what float16 would round to 0

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
    """True with probability ``p``, to within 2^-32.

    Args:
        key: Where in the run.
        shape: Of the result.
        site: Which draw of this key.
        p: A number, or a tensor that broadcasts to the shape. Values of a tensor are not checked.
        device: Of the result; the key's, if not given.

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
    """Uniform integers in [low, high): low + floor(x * (high - low) / 2^64), with x of 64 random bits.

    No value is off its probability by more than 2^-64.

    Example:
        >>> from fxtrain import rng
        >>> rng.randint(rng.key(0), [5], high=100)
        tensor([37, 30, 59, 34, 24])
    """
    span = high - low
    if span <= 0:
        raise ValueError(f"randint draws from [low, high), and [{low}, {high}) is empty.")
    if not dtype.is_floating_point and high - 1 > largest_count(dtype):
        raise ValueError(f"{dtype} has no {high - 1}, the largest that randint was to draw: take a wider dtype.")
    upper, lower = span >> 32, span & MASK

    def scaled(a: Tensor, b: Tensor) -> Tensor:
        # The high half of a 64 by 64 bit product, from four products of words that wrap around as in Philox.
        p, q, r = a * lower, b * upper, b * lower
        carry = (p & MASK) + (q & MASK) + (r >> 32 & MASK)
        return low + a * upper + (p >> 32 & MASK) + (q >> 32 & MASK) + (carry >> 32)

    return _fill(key, shape, site, device, 2, lambda a, b, c, d: (scaled(a, b), scaled(c, d))).to(dtype)


def permutation(key: Key, n: int, *, site: int = 0, device: torch.device | str | None = None) -> Tensor:
    """A random order of 0 to n - 1: int64 [n]. A stable sort of 64 random bits each; a tie has odds of n^2 / 2^65.

    Example:
        >>> from fxtrain import rng
        >>> rng.permutation(rng.key(0), 5)
        tensor([2, 4, 1, 3, 0])
    """
    return torch.sort(bits(key, [n], site=site, width=64, device=device), stable=True).indices


def categorical(key: Key, logits: Tensor, *, site: int = 0) -> Tensor:
    """Indices along the last axis, with the probabilities softmax(logits): int64 [...].

    Args:
        key: Where in the run.
        logits: float [..., categories].
        site: Which draw of this key.
    """
    return multinomial(key, logits.softmax(-1), num_samples=1, site=site).squeeze(-1)


def multinomial(key: Key, weights: Tensor, *, num_samples: int, replacement: bool = False, site: int = 0) -> Tensor:
    """Indices along the last axis, in proportion to the weights: int64 [..., num_samples].

    Without replacement, each index waits an exponential time of its weight as rate, and the first to arrive are
    taken. With replacement, the inverse of the cumulative weights, in float64.

    Args:
        key: Where in the run.
        weights: float [..., categories], 0 or more; they need not sum to 1.
        num_samples: How many, at most the number of weights above 0 if without replacement.
        replacement: Whether an index may come twice.
        site: Which draw of this key.

    Example:
        >>> from fxtrain import rng
        >>> rng.multinomial(rng.key(0), torch.tensor([0.0, 1.0, 9.0]), num_samples=2)
        tensor([2, 1])
    """
    categories = weights.shape[-1]
    if not replacement and num_samples > categories:
        raise ValueError(
            f"{num_samples} of {categories} categories cannot be drawn without replacement: draw fewer, or with it."
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
    """``x`` with each number set to 0 with probability ``p``, and the others divided by 1 - p.

    Args:
        key: Where in the run.
        x: float [...].
        p: The probability of 0, between 0 and 1.
        site: Which draw of this key.
        shape: Of the mask, if it is to be shared along the axes where this is 1.

    Example:
        >>> from fxtrain import rng
        >>> rng.dropout(rng.key(0), torch.ones(6), p=0.5)
        tensor([0., 0., 0., 0., 2., 2.])
    """
    kept = 1 - indicator(key, x.shape if shape is None else shape, site=site, p=p, device=x.device)
    # In this order, so that half precision is rounded once, compiled or not; a product, so that NaN stays NaN.
    return x * kept * (1.0 / (1.0 - p) if p < 1.0 else 0.0)


def indicator(
    key: Key, shape: Sequence[int], *, site: int, p: float | Tensor, device: torch.device | str | None
) -> Tensor:
    """As ``bernoulli``, as int8: 1 with probability ``p``, and else 0."""
    # The sign of a difference, and not a comparison: on a CPU, Inductor stores a bool made from int64 lane by lane,
    # 8 ms a million numbers against 1.5.
    if isinstance(p, Tensor):
        # A power of two changes no significand: nothing is rounded but what is below 2^-32.
        wide = torch.promote_types(p.dtype, torch.float32)
        threshold = (p.to(wide) * 2.0**32).to(torch.int64)
        return (bits(key, shape, site=site, device=device) - threshold >> 63).to(torch.int8).neg()
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"A probability lies between 0 and 1, and {p} came.")
    below = round(p * 2.0**32)

    def number(word: Tensor) -> Tensor:
        return (word - below >> 63).to(torch.int8).neg()

    return _fill(key, shape, site, device, 4, lambda *words: [number(word) for word in words])


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
    """Cauchy numbers: median + scale tan(a), with a uniform angle a."""
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
    """The number of trials up to the first success, each with probability ``p``: 1 + floor(e / -log(1 - p))."""
    if not 0.0 < p <= 1.0:
        raise ValueError(f"geometric takes a probability above 0 and up to 1, and {p} came.")
    rate = -math.log1p(-p) if p < 1.0 else math.inf
    wide = dtype if dtype.is_floating_point else torch.float64
    waits = exponential(key, shape, site=site, dtype=torch.promote_types(wide, torch.float32), device=device)
    return (waits * (1.0 / rate)).floor().add(1.0).to(dtype)


def largest_count(dtype: torch.dtype) -> int:
    """The largest integer up to which a dtype holds every one."""
    if dtype.is_floating_point:
        return 2 ** form_of(dtype).significand
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max


def _fill(
    key: Key,
    shape: Sequence[int],
    site: int,
    device: torch.device | str | None,
    per_block: int,
    numbers: Callable[[Tensor, Tensor, Tensor, Tensor], Sequence[Tensor]],
) -> Tensor:
    """The shape filled with what ``numbers`` makes of each block of four words, ``per_block`` at a time."""
    count = 1
    for size in shape:  # torch.Size(shape).numel() would fix sizes that are symbols
        count *= size
    where = key.seed.device if device is None else torch.device(device)
    words = blocks(key, -(-count // per_block), site=site, device=where)
    return torch.stack(list(numbers(*words)), -1).flatten()[:count].reshape(shape)


def _integers(key: Key, shape: Sequence[int], site: int, device: torch.device | str | None, form: Form) -> Tensor:
    """The shape filled with integers of ``form.width`` random bits.

    What is made of them is made of all at once: a compiler takes as long for each word that comes by itself.
    """
    if form.width == 32:
        return bits(key, shape, site=site, device=device)
    return _fill(key, shape, site, device, 2, lambda a, b, c, d: (_join(a, b), _join(c, d)))


def _join(a: Tensor, b: Tensor) -> Tensor:
    """53 bits of two words."""
    return a << 21 | b >> 11
