"""Dynamo, the tracer of ``torch.compile``."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch.overrides import TorchFunctionMode

from fxtrain._torch_internals.interface import Interface

LOOKUP = Interface("torch._dynamo.lookup_backend", "backends given by name")
LIMIT = Interface("torch._dynamo.exc.FailOnRecompileLimitHit", "steps whose sizes change more often than Dynamo allows")
CONFIG = Interface("torch._dynamo.config.error_on_nested_fx_trace", "compilation in the background")
LOCK = Interface("torch._dynamo.convert_frame.compile_lock", "compilation in the background")
EXPLAIN = Interface("torch._dynamo.backends.debugging.ExplainWithBackend", "fx.explain of steps of several graphs")
OVERRIDABLE = Interface(
    "torch._dynamo.variables.torch.get_overridable_functions", "random samples from keys below torch.compile"
)
STRATEGY = Interface(
    "torch._C._dynamo.eval_frame.set_code_exec_strategy", "function modes around functions that torch.compile splits"
)
SKIP = Interface("torch._C._dynamo.eval_frame._FrameAction.SKIP", STRATEGY.purpose)
STRATEGIES = Interface("torch._C._dynamo.eval_frame._FrameExecStrategy", STRATEGY.purpose)
HOOKS_ERROR = Interface(
    "torch._C._autograd._saved_tensors_hooks_get_disabled_error_message", "calls after an error in a compiled step"
)
HOOKS_ENABLED = Interface("torch._C._autograd._saved_tensors_hooks_enable", HOOKS_ERROR.purpose)

COMPILING_MODULE = "torch._dynamo.convert_frame"
"""The module whose frames are on the stack while Dynamo compiles."""

LOGGER = "torch._dynamo"
"""A logger whose records do not reach torch's."""

_Mode = TypeVar("_Mode", bound=type[TorchFunctionMode])
_F = TypeVar("_F", bound=Callable[..., Any])


def is_dynamo_loaded() -> bool:
    """Whether Dynamo has been imported, which takes as long as importing torch."""
    return "torch._dynamo" in sys.modules


def backend_named(name: str) -> Callable[..., Any]:
    """Returns a backend of ``torch.compile``: a function of a graph and its example inputs."""
    return LOOKUP.get()(name)


def recompile_limit_error() -> type[Exception] | tuple[()]:
    """Returns the exception of a call for which Dynamo would make more graphs than it allows, for ``except``."""
    return LIMIT.get() if LIMIT.exists else ()


def nested_calls_inlined() -> Callable[[], None]:
    """Runs compiled functions uncompiled while ``torch.fx`` traces. Returns a function that restores the setting.

    torch.fx sets a flag of the whole process, and Dynamo by default refuses calls in any thread then.
    """
    if not CONFIG.exists:
        return lambda: None
    from torch._dynamo import config

    before, config.error_on_nested_fx_trace = config.error_on_nested_fx_trace, False
    return functools.partial(setattr, config, "error_on_nested_fx_trace", before)


def compile_lock() -> AbstractContextManager[object]:
    """Returns the lock that Dynamo holds while it compiles."""
    return LOCK.get() if LOCK.exists else contextlib.nullcontext()


def explaining_backend() -> Any:
    """Returns a backend of ``torch.compile`` that records the graphs and the breaks between them."""
    return EXPLAIN.get()("eager")


def can_show_to_modes() -> bool:
    """Whether ``show_to_modes`` has an effect. Imports Dynamo."""
    return OVERRIDABLE.exists


def show_to_modes(functions: Iterable[Callable[..., object]]) -> None:
    """Makes Dynamo call function modes for these functions of torch, as eager code does. Imports Dynamo."""
    if OVERRIDABLE.exists:
        OVERRIDABLE.get()().update(functions)


def constant_in_dynamo(function: _F) -> _F:
    """Makes Dynamo call a function while tracing, and take its result as a constant.

    Equivalent to ``torch.compiler.assume_constant_result``, which would import Dynamo.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def modes_work_below_compile() -> bool:
    """Whether function modes give right values in functions that ``torch.compile`` splits into several graphs."""
    return STRATEGY.exists and SKIP.exists and STRATEGIES.exists


def inlined_only(mode: _Mode) -> _Mode:
    """Keeps Dynamo from compiling a mode's ``__torch_function__`` when no traced function calls it.

    Uncompiled code below ``torch.compile`` makes such calls, for example after a graph break. Their graphs have no
    guard on the called function, so the graph of ``x.mean()`` would be reused for ``x.sum()``. Tracing still inlines
    the method. Has no effect where ``modes_work_below_compile`` returns False.

    Example:
        >>> @inlined_only
        ... class Doubled(TorchFunctionMode):
        ...     def __torch_function__(self, func, types, args=(), kwargs=None):
        ...         return 2 * func(*args, **(kwargs or {}))
    """
    if modes_work_below_compile():
        skip = SKIP.get()
        # The first action applies to the frame, the second to frames of its callees.
        STRATEGY.get()(mode.__torch_function__.__code__, STRATEGIES.get()(skip, skip))
    return mode


def restoring_saved_tensor_hooks(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``function``, enabling the hooks of saved tensors again if an error in it has left them disabled."""
    if not (HOOKS_ERROR.exists and HOOKS_ENABLED.exists):
        return function
    disabled_reason, enable = HOOKS_ERROR.get(), HOOKS_ENABLED.get()

    def run(*args: object, **kwargs: object) -> Any:
        before = disabled_reason()
        try:
            return function(*args, **kwargs)
        except BaseException:
            if before is None:
                enable()
            raise

    return run
