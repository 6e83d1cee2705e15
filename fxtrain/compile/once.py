"""Once: an operator whose operand is kept in memory, where Inductor would compute it anew for each reader."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def once() -> Any:
    """``fxtrain::once(Tensor x) -> Tensor``, in graphs for Inductor."""
    from torch._inductor.lowering import register_lowering

    library = torch.library.Library("fxtrain", "FRAGMENT")
    library.define("once(Tensor x) -> Tensor")
    library.impl("once", torch.clone, "CPU")
    torch.library.register_fake("fxtrain::once", torch.empty_like)
    _kept.append(library)  # an operator goes when its library does

    def lowered(x: Any) -> Any:
        x.realize()
        return x

    register_lowering(torch.ops.fxtrain.once.default)(lowered)
    return torch.ops.fxtrain.once.default


_kept: list[Any] = []
