"""fxtrain's own operators in graphs for Inductor. They are registered on first use."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from fxtrain._torch_internals.dispatch import ctc_loss, linear_by_onednn
from fxtrain._torch_internals.inductor import loop_operators, pointwise, register_lowering


@functools.cache
def once() -> Any:
    """``once(x)``: the identity, materialized in memory.

    Inductor would otherwise recompute ``x`` in each of its readers.
    """
    _library().define("once(Tensor x) -> Tensor")
    _library().impl("once", torch.clone, "CPU")
    torch.library.register_fake("fxtrain::once", torch.empty_like)

    def lowered(x: Any) -> Any:
        x.realize()
        return x

    register_lowering(torch.ops.fxtrain.once.default, lowered)
    return torch.ops.fxtrain.once.default


@functools.cache
def expm1() -> Any:
    """``expm1(x)`` from float64 additions and multiplications, which give the same bits in every loop.

    Inductor calls the C library for scalars and computes ``exp(x) - 1`` for vectors. Which of them a tensor gets
    depends on the other operations of its loop, and the second loses half of the digits near 0.
    """
    ops = loop_operators()
    _library().define("expm1(Tensor x) -> Tensor")
    _library().impl("expm1", torch.expm1, "CPU")
    torch.library.register_fake("fxtrain::expm1", torch.empty_like)

    def arithmetic(dtype: torch.dtype, x: Any) -> Any:
        def number(value: float) -> Any:
            return ops.constant(value, torch.float64)

        x = ops.maximum(ops.to_dtype(x, torch.float64), number(_MIN_EXPONENT))
        x = ops.mul(x, number(0.5**_DOUBLINGS))
        series = number(1 / math.factorial(_TERMS))
        for power in reversed(range(1, _TERMS)):
            series = ops.add(ops.mul(series, x), number(1 / math.factorial(power)))
        value = ops.mul(series, x)
        for _ in range(_DOUBLINGS):  # expm1(2 x) = expm1(x) (expm1(x) + 2)
            value = ops.mul(value, ops.add(value, number(2.0)))
        return ops.to_dtype(value, dtype)

    def lowered(x: Any) -> Any:
        return pointwise(functools.partial(arithmetic, x.get_dtype()))(x)

    register_lowering(torch.ops.fxtrain.expm1.default, lowered)
    return torch.ops.fxtrain.expm1.default


_MIN_EXPONENT = -750.0  # exp of less is 0 in float64
_DOUBLINGS, _TERMS = 16, 7  # exact to 1e-14


@functools.cache
def linear() -> Any:
    """``linear(x, weight, bias)``: x weight^T + bias, by oneDNN.

    Shapes: x [n, k], weight [m, k], bias [m] or None, result [n, m].
    """
    _library().define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    _library().impl("linear", linear_by_onednn, "CPU")
    torch.library.register_fake("fxtrain::linear", lambda x, weight, bias: x.new_empty((len(x), len(weight))))
    return torch.ops.fxtrain.linear.default


@functools.cache
def ctc() -> Any:
    """``ctc(scores, targets, inputs, lengths, blank, zero_infinity)``: CTC losses with their gradients.

    Takes scores [time, batch, classes], targets as in ``torch.nn.functional.ctc_loss``, and integer lengths of inputs
    and targets [batch]. Returns losses [batch] and their gradients with respect to the scores [time, batch, classes].
    """

    def computed(
        scores: Tensor, targets: Tensor, inputs: Tensor, lengths: Tensor, blank: int, zero_infinity: bool
    ) -> tuple[Tensor, Tensor]:
        losses, slopes = ctc_loss(scores, targets, inputs.tolist(), lengths.tolist(), blank, zero_infinity)
        if zero_infinity:
            losses = losses.masked_fill(losses == torch.inf, 0.0)
        return losses.clone(), slopes.contiguous()

    def shapes(scores: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return scores.new_empty(scores.shape[1]), scores.new_empty(scores.shape)

    arguments = "Tensor scores, Tensor targets, Tensor inputs, Tensor lengths, int blank, bool zero_infinity"
    _library().define(f"ctc({arguments}) -> (Tensor, Tensor)")
    for device in ("CPU", "CUDA"):
        _library().impl("ctc", computed, device)
    torch.library.register_fake("fxtrain::ctc", shapes)
    return torch.ops.fxtrain.ctc.default


# Cached, because operators are removed when their library is.
@functools.cache
def _library() -> torch.library.Library:
    return torch.library.Library("fxtrain", "DEF")
