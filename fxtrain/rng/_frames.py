"""Functions that Dynamo inlines, and never compiles as frames of their own."""

from __future__ import annotations

from typing import TypeVar

from torch.overrides import TorchFunctionMode

try:
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
except ImportError:  # a torch that is newer than those tested
    set_code_exec_strategy = None

_Mode = TypeVar("_Mode", bound=type[TorchFunctionMode])


def inlined_only(mode: _Mode) -> _Mode:
    """Keeps Dynamo from compiling calls of a mode's ``__torch_function__`` that no traced function makes.

    Such calls come from uncompiled code below ``torch.compile``, as after a graph break. Their graphs have no guard on
    the function that is called: the graph of ``x.mean()`` would be used for ``x.sum()``. Tracing inlines the method as
    before. Without effect where ``is_safe_below_compile`` is False.

    Example:
        >>> @inlined_only
        ... class Doubled(TorchFunctionMode):
        ...     def __torch_function__(self, func, types, args=(), kwargs=None):
        ...         return 2 * func(*args, **(kwargs or {}))
    """
    if set_code_exec_strategy is not None:
        # The first action is for the frame, the second for the frames of the calls that it makes.
        strategy = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
        set_code_exec_strategy(mode.__torch_function__.__code__, strategy)
    return mode


def is_safe_below_compile() -> bool:
    """Whether functions that ``torch.compile`` cuts into several graphs get right values under the library's modes."""
    return set_code_exec_strategy is not None
