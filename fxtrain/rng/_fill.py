"""Fills a shape with samples of a key and a site.

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

from fxtrain.rng._arithmetic import Form
from fxtrain.rng._philox import Key, blocks


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
    count = 1
    for size in shape:  # torch.Size(shape).numel() would specialize symbolic sizes
        count *= size
    where = key.seed.device if device is None else torch.device(device)
    words = blocks(key, -(-count // per_block), site=site, device=where)
    return torch.stack(list(samples_of(*words)), -1).flatten()[:count].reshape(shape)


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
