"""Keeps Dynamo from compiling functions as separate frames, while tracing still inlines them."""

from __future__ import annotations

from typing import TypeVar

from torch.overrides import TorchFunctionMode

try:
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
except ImportError:  # an untested newer version of torch
    set_code_exec_strategy = None

_Mode = TypeVar("_Mode", bound=type[TorchFunctionMode])


def inlined_only(mode: _Mode) -> _Mode:
    """Keeps Dynamo from compiling a mode's ``__torch_function__`` when no traced function calls it.

    Uncompiled code below ``torch.compile`` makes such calls, for example after a graph break. Their graphs have no
    guard on the called function, so the graph of ``x.mean()`` would be reused for ``x.sum()``. Tracing still inlines
    the method. Has no effect where ``is_safe_below_compile`` returns False.

    Example:
        >>> @inlined_only
        ... class Doubled(TorchFunctionMode):
        ...     def __torch_function__(self, func, types, args=(), kwargs=None):
        ...         return 2 * func(*args, **(kwargs or {}))
    """
    if set_code_exec_strategy is not None:
        # The first action applies to the frame, the second to frames of its callees.
        strategy = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
        set_code_exec_strategy(mode.__torch_function__.__code__, strategy)
    return mode


def is_safe_below_compile() -> bool:
    """Returns whether modes give right values in functions that ``torch.compile`` splits into several graphs."""
    return set_code_exec_strategy is not None
