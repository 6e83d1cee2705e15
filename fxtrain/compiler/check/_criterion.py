"""Decides whether two results of a step differ by more than rounding.

A tolerance per dtype is either too wide or too narrow for a training step. At the first step of Adam, an update is the
sign of its gradient times the learning rate: a gradient that is zero up to rounding, such as that of the bias of keys
in an attention layer, moves its parameter by the full learning rate in either direction. A wrong update at a learning
rate of 1e-5, in contrast, changes a parameter in the fifth digit. Two criteria follow each other.

1. **Rounding**, cheap. A leaf passes if its difference, beyond one or two rounding errors of each element, is tiny
   compared with the leaf's *change* in this step (for outputs, compared with the output): 64 rounding errors in the
   Euclidean norm. Integers and bools must be equal.
2. **Sensitivity**, for the leaves that fail. The uncompiled step is repeated with noise of a few rounding errors in
   each operation (``RoundingNoise``), in pairs of opposite noise. An element is explained if its difference is at most
   four times the largest deviation that the noise caused there, or in half of the leaf. The factor is 64 for leaves
   that noise changes by half or more, such as a gradient that is zero but for rounding, and its square. A leaf passes
   if at most a twentieth of its suspicious elements is unexplained, by count and by energy. Sums over many elements,
   ties of an ``argmax``, counts of correct answers, flags at a threshold and chaotic losses all vary under noise, so
   they are explained as far as they vary.

NaN equals NaN, and an infinity equals an infinity of the same sign.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ROUNDING_ERRORS = 2.0
"""Rounding errors allowed for each element: a fused multiply-add saves one, and a stored value has one."""
_NORM_ERRORS = 64.0
"""Rounding errors of a whole leaf, relative to its change."""
_LOW_NORM_ERRORS = 4.0
"""The same for dtypes of at most 16 bits."""
_LOW_EPS = 1e-4
_SENSITIVITIES = 4.0
"""Differences allowed, as multiples of the deviation under noise."""
_NOISE_SENSITIVITIES = 64.0
"""The same for leaves that consist of rounding errors, of which only the order of magnitude is known."""
_NOISE = 0.5
"""Deviation under noise, relative to the leaf's change, from which on a leaf consists of rounding errors."""
_UNEXPLAINED = 0.05
"""Fraction of the suspicious elements that may be unexplained, because noise was small there by chance."""


class Difference(NamedTuple):
    """How a leaf of one result differs from that of another.

    Args:
        index: The index of the element that differs most beyond its tolerance.
        expected: Its value in the reference.
        found: Its other value.
        tolerance: Its tolerance.
    """

    index: tuple[int, ...]
    expected: float | int | bool
    found: float | int | bool
    tolerance: float


def is_rounding(old: Tensor | None, expected: Tensor, found: Tensor) -> bool:
    """Returns whether a leaf differs by rounding errors only. A pair that fails may still be explained by noise.

    Args:
        old: The leaf before the step, or None for an output.
        expected: The leaf after the reference step.
        found: The same leaf of the other result.

    Example:
        >>> import torch
        >>> one = torch.ones(3)
        >>> is_rounding(None, one, one + 1e-7), is_rounding(None, one, one + 1e-3)
        (True, False)
        >>> is_rounding(one, one + 1e-5, one)  # a lost update
        False
    """
    if torch.equal(expected, found):
        return True
    excess = (_distance(expected, found) - _allowed(old, expected, found)).clamp(min=0)
    return bool(excess.square().sum().sqrt() <= _norm_errors(expected) * _change(old, expected).square().sum().sqrt())


def deviation(expected: Tensor, found: Tensor, before: Tensor | None) -> Tensor:
    """Returns the absolute difference of each element, or ``before`` where that is larger. Float64, unless on MPS."""
    distance = _distance(expected, found)
    return distance if before is None else torch.maximum(distance, before)


def change_size(old: Tensor | None, expected: Tensor) -> Tensor:
    """Returns the root mean square of a leaf's change in the reference step, or of an output. A scalar."""
    return _change(old, expected).square().mean().sqrt()


def unexplained(old: Tensor | None, expected: Tensor, found: Tensor, sensitivity: Tensor | None) -> Difference | None:
    """Returns the largest difference of a leaf if noise does not explain it, or None if it does.

    Args:
        old: The leaf before the step, or None for an output.
        expected: The leaf after the reference step.
        found: The same leaf of the other result.
        sensitivity: The largest deviation of each element under noise. None if it could not be measured. Integers then
            pass, and the square root of a rounding error, relative to the leaf's change, is allowed for other numbers.

    Example:
        >>> import torch
        >>> one, two = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.5])
        >>> unexplained(None, one, two, torch.tensor([0.0, 0.4])) is None
        True
        >>> unexplained(None, one, two, torch.tensor([0.4, 0.0])).index
        (1,)
    """
    distance, allowed = _distance(expected, found), _allowed(old, expected, found)
    change = _change(old, expected)
    size = change_size(old, expected)
    if sensitivity is None:
        if not _is_float(expected):
            return None
        tolerance = allowed + torch.finfo(expected.dtype).eps ** 0.5 * (size + change)
        energy = torch.zeros_like(size)
    else:
        allowed = allowed + _norm_errors(expected) * size
        # Where most elements consist of rounding errors, a small deviation of one element is chance.
        sensitivity = sensitivity.clamp(min=float(sensitivity.median())) if sensitivity.numel() else sensitivity
        is_noise = bool(sensitivity.square().sum() >= _NOISE**2 * change.square().sum())
        tolerance = allowed + (_NOISE_SENSITIVITIES if is_noise else _SENSITIVITIES) * sensitivity
        energy = torch.where(sensitivity.isfinite(), sensitivity, 0).square().sum()
    is_beyond = distance > tolerance
    if not is_beyond.any():
        return None
    excess = torch.where(is_beyond, distance - tolerance, 0)
    is_rare = is_beyond.sum() <= _UNEXPLAINED * (distance > allowed).sum()
    if bool(is_rare & (excess.square().sum() <= _UNEXPLAINED * energy)):
        return None
    worst = int(excess.argmax())
    element = _elements(expected)[worst].item(), _elements(found)[worst].item()
    index = torch.unravel_index(torch.tensor(worst), expected.shape) if expected.ndim else ()
    return Difference(tuple(int(each) for each in index), *element, float(tolerance[worst]))


def _is_float(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _elements(value: Tensor) -> Tensor:
    return value.detach().reshape(-1)


def _wide(value: Tensor) -> Tensor:
    """Returns the elements as float64 magnitudes that can be subtracted. Complex numbers stay complex."""
    value = _elements(value)
    if value.is_complex():
        return value.to(torch.complex128)
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)


def _distance(expected: Tensor, found: Tensor) -> Tensor:
    ones, twos = _wide(expected), _wide(found)
    is_same = (ones == twos) | (ones.isnan() & twos.isnan())
    distance = torch.where(is_same, 0, (ones - twos).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    if not _is_float(expected):
        # Large integers that differ may be equal as floats.
        distance = torch.where(_elements(expected) != _elements(found), distance.clamp(min=1), 0)
    return distance


def _allowed(old: Tensor | None, expected: Tensor, found: Tensor) -> Tensor:
    size = torch.maximum(_finite(expected), _finite(found))
    if old is not None:
        size = torch.maximum(size, _finite(old))
    if not _is_float(expected):
        return torch.zeros_like(size)
    limits = torch.finfo(expected.dtype)
    return size * (_ROUNDING_ERRORS * limits.eps) + limits.tiny


def _change(old: Tensor | None, expected: Tensor) -> Tensor:
    new = _wide(expected)
    change = (new if old is None else new - _wide(old)).abs()
    return torch.where(change.isfinite(), change, 0)


def _finite(value: Tensor) -> Tensor:
    size = _wide(value).abs()
    return torch.where(size.isfinite(), size, 0)


def _norm_errors(value: Tensor) -> float:
    if not _is_float(value):
        return 0.0
    eps = torch.finfo(value.dtype).eps
    return eps * (_LOW_NORM_ERRORS if eps > _LOW_EPS else _NORM_ERRORS)
