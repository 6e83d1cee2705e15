"""Operators: those of our own in graphs for Inductor. They are defined when a graph needs them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


@functools.cache
def once() -> Any:
    """``once(x)``: what it is given, kept in memory, where Inductor would compute it anew for each of its readers."""
    from torch._inductor.lowering import register_lowering

    _library().define("once(Tensor x) -> Tensor")
    _library().impl("once", torch.clone, "CPU")
    torch.library.register_fake("fxtrain::once", torch.empty_like)

    def lowered(x: Any) -> Any:
        x.realize()
        return x

    register_lowering(torch.ops.fxtrain.once.default)(lowered)
    return torch.ops.fxtrain.once.default


@functools.cache
def linear() -> Any:
    """``linear(x, weight, bias)``: x weight^T + bias by oneDNN, of [n, k], [m, k] and [m] or None: [n, m]."""

    def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    _library().define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    _library().impl("linear", by_onednn, "CPU")
    torch.library.register_fake("fxtrain::linear", lambda x, weight, bias: x.new_empty((len(x), len(weight))))
    return torch.ops.fxtrain.linear.default


@functools.cache  # which keeps it: an operator goes when its library does
def _library() -> torch.library.Library:
    return torch.library.Library("fxtrain", "DEF")
