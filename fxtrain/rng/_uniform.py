"""Uniform samples: bits, floating-point numbers, integers and permutations, and the order in which bits fill a shape.

If a sample takes ``w`` words, sample ``i`` of a site uses its words ``i * w`` to ``i * w + w - 1``. Shapes are filled
in row-major order. All arithmetic is on integers, or consists of additions, multiplications and divisions in a fixed
order, which IEEE 754 rounds in one way. It avoids ``log``, ``cos`` and ``sqrt``, whose last bit depends on the library
and, in eager mode, on the length of the tensor. Samples are therefore bitwise equal in every mode on one kind of
device. A GPU compiler that contracts ``a * b + c`` may change the last bit of floating-point samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fxtrain.rng._arithmetic import Form, form_of
from fxtrain.rng._philox import MASK, Key, Rows, blocks


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
        return fill(key, shape, site, device, 4, lambda *words: words)
    if width == 64:
        return fill(key, shape, site, device, 2, lambda a, b, c, d: (a << 32 | b, c << 32 | d))
    raise ValueError(f"expected width to be 32 or 64, got {width}.")


def fill(
    key: Key,
    shape: Sequence[int],
    site: int,
    device: torch.device | str | None,
    per_block: int,
    samples_of: Callable[[Tensor, Tensor, Tensor, Tensor], Sequence[Tensor]],
) -> Tensor:
    """Fills the shape with the ``per_block`` samples that ``samples_of`` computes from each block of four words."""
    count = _product(shape)
    where = key.seed.device if device is None else torch.device(device)
    if key.rows is not None and len(shape) and shape[0] == key.rows.count and count:
        return _fill_rows(key, key.rows, shape, _product(shape[1:]), site, where, per_block, samples_of)
    total = -(-count // per_block)
    words = blocks(key, torch.arange(total, device=where), total, site=site)
    return torch.stack(list(samples_of(*words)), -1).flatten()[:count].reshape(shape)


def _product(sizes: Sequence[int]) -> int:
    count = 1
    for size in sizes:  # torch.Size(sizes).numel() would specialize symbolic sizes
        count *= size
    return count


def _fill_rows(
    key: Key,
    rows: Rows,
    shape: Sequence[int],
    size: int,
    site: int,
    device: torch.device,
    per_block: int,
    samples_of: Callable[[Tensor, Tensor, Tensor, Tensor], Sequence[Tensor]],
) -> Tensor:
    """Returns the rows of this rank, of ``size`` samples each, from what ``fill`` returns for those of all ranks."""
    count, ranks = rows.count, rows.ranks
    total = count * ranks * size // per_block + 2
    row = torch.arange(count, device=device) * ranks + rows.rank.to(device)

    def samples(start: Tensor, width: int) -> Tensor:
        index = (start[:, None] + torch.arange(width, device=device)).flatten()
        return torch.stack(list(samples_of(*blocks(key, index, total, site=site))), -1)

    if size % per_block == 0:
        width = size // per_block
        return samples(row * width, width).reshape(shape)
    # A row that does not begin with a block reaches into one more.
    start, width = row * size // per_block, (size + per_block - 2) // per_block + 1
    places = (row * size - start * per_block)[:, None] + torch.arange(size, device=device)
    return samples(start, width).reshape(count, width * per_block).gather(1, places).reshape(shape)


def integers(key: Key, shape: Sequence[int], site: int, device: torch.device | str | None, form: Form) -> Tensor:
    """Fills the shape with integers of ``form.width`` random bits.

    Later operations then apply to all samples together. Handling the words separately would multiply compile time.
    """
    if form.width == 32:
        return bits(key, shape, site=site, device=device)
    return fill(key, shape, site, device, 2, lambda a, b, c, d: (join(a, b), join(c, d)))


def join(a: Tensor, b: Tensor) -> Tensor:
    """Returns the upper 53 bits of two words."""
    return a << 21 | b >> 11


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

    integer = integers(key, shape, site, device, form)
    unit = (integer >> form.width - form.significand).to(form.compute) * 2.0**-form.significand
    if low == 0.0 and high == 1.0:
        return unit.to(dtype)
    value = (unit * (high - low) + low).to(dtype)
    return torch.where(value < high, value, torch.full_like(value, low))


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

    return fill(key, shape, site, device, 2, lambda a, b, c, d: (scaled(a, b), scaled(c, d))).to(dtype)


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


def largest_count(dtype: torch.dtype) -> int:
    """Returns the largest n such that the dtype represents all integers from 0 to n."""
    if dtype.is_floating_point:
        return 2 ** form_of(dtype).significand
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max
