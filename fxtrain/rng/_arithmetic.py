"""Logarithm, sine, cosine and square root from additions, multiplications and divisions alone.

IEEE 754 rounds these operations in exactly one way, so results are bitwise equal in every mode. The last bit of
``log``, ``cos`` and even ``sqrt`` depends on the math library and, in eager mode, on the length of the tensor. A
compiler that contracts ``a * b + c``, as GPU compilers may, can still change the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxtrain.core._bits import reinterpreted


class Form(NamedTuple):
    """How floating-point samples of a dtype are computed: in float64 for float64, otherwise in float32."""

    significand: int  # bits of the sampled dtype, including the hidden bit
    width: int  # random bits per sample
    compute: torch.dtype
    integer: torch.dtype  # same width as ``compute``
    mantissa: int  # bits of ``compute``, excluding the hidden bit
    bias: int  # exponent bias of ``compute``
    terms: int  # of a power series, until further ones vanish in ``compute``


_FORMS = {
    torch.float64: Form(53, 53, torch.float64, torch.int64, 52, 1023, 11),
    torch.float32: Form(24, 32, torch.float32, torch.int32, 23, 127, 6),
    torch.float16: Form(11, 32, torch.float32, torch.int32, 23, 127, 6),
    torch.bfloat16: Form(8, 32, torch.float32, torch.int32, 23, 127, 6),
}


def form_of(dtype: torch.dtype) -> Form:
    if dtype not in _FORMS:
        raise TypeError(f"expected dtype to be float64, float32, float16 or bfloat16, got {dtype}.")
    return _FORMS[dtype]


def negative_log(integer: Tensor, form: Form) -> Tensor:
    """Returns -log of the fraction (2 integer + 1) / 2^(width + 1), which is neither 0 nor 1.

    With 2^e the power of two nearest to x = 2 integer + 1, log(x / 2^e) = 2 artanh((x - 2^e) / (x + 2^e)). The
    difference is computed in integers, so small results have the same relative precision as large ones.
    """
    x = 2 * integer + 1
    exponent = reinterpreted(x.to(form.compute) * math.sqrt(2.0), form.integer) >> form.mantissa
    exponent = exponent.to(torch.int64) - form.bias
    power = torch.ones_like(x) << exponent
    ratio = (x - power).to(form.compute) / (x + power).to(form.compute)
    artanh = ratio * _series(ratio * ratio, [1.0 / (2 * n + 1) for n in range(form.terms)])
    return (form.width + 1 - exponent).to(form.compute) * math.log(2.0) - 2.0 * artanh


def point_on_circle(integer: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Returns the coordinates of a point on the unit circle, uniform in its angle.

    The lower bits give an angle between -45 and 45 degrees. The upper two bits move the point to one of four sectors.
    """
    steps = 1 << form.width - 2
    centred = (integer & steps - 1) - steps // 2
    angle = (centred.to(form.compute) + 0.5) * (math.pi / 2 / steps)
    square = angle * angle
    sine = angle * _series(square, [(-1.0) ** n / math.factorial(2 * n + 1) for n in range(form.terms)])
    cosine = _series(square, [(-1.0) ** n / math.factorial(2 * n) for n in range(form.terms)])
    corner = integer >> form.width - 2
    cosine = cosine * (1 - (corner & 2)).to(form.compute)
    turned = (corner & 1).to(torch.bool)
    return torch.where(turned, sine, cosine), torch.where(turned, cosine, sine)


def sqrt(x: Tensor, form: Form) -> Tensor:
    """Returns the square root by Heron's method.

    Halving the exponent gives an initial relative error of 0.06. Each iteration squares the error.
    """
    half = (reinterpreted(x, form.integer) >> 1) + (form.bias << form.mantissa - 1)
    root = reinterpreted(half, form.compute)
    for _ in range(3 if form.width == 32 else 4):
        root = 0.5 * (root + x / root)
    return root


def _series(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Evaluates the polynomial with these coefficients, constant term first."""
    value: Any = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value
