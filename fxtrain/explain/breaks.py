"""Breaks: where in the user's own source a step cannot be traced, and why."""

from __future__ import annotations

import functools
import linecache
import os
import traceback
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fxtrain
from fxtrain.explain.explanation import Break

_OURS = os.path.dirname(os.path.abspath(fxtrain.__file__))

_VALUE = (
    "Python reads the value of a tensor here, by if, while, assert, .item(), float() or the like, and a graph is made "
    "once for all values: use torch.where, or keep the value a tensor."
)
_SHAPE = (
    "the shape of the result depends on values here, as with a mask as an index, nonzero or unique, and a graph has "
    "one shape: use torch.where, or multiply by the mask."
)
_BY_EXCEPTION = {"DataDependentOutputException": _VALUE, "DynamicOutputShapeException": _SHAPE}
_BY_TAG = {torch.Tag.data_dependent_output: _VALUE, torch.Tag.dynamic_output_shape: _SHAPE}


def refusal(error: Exception) -> Break:
    """What our tracer refused, and where."""
    reason = _BY_EXCEPTION.get(type(error).__name__) or f"{type(error).__name__}: {_first_line(str(error))}"
    return _at(traceback.extract_tb(error.__traceback__), reason)


def found_by_running(step: Callable[..., Any], state: Any, batch: Any) -> list[Break]:
    """Every place of the user's own where a step, run uncompiled, depends on the values of tensors.

    The tracer ends at the first one.
    """
    with _Watch() as watch:
        step(state, batch)
    return [each for each in watch.breaks if each.where]


class _Watch(TorchDispatchMode):
    """Notes each operation that no graph can have."""

    def __init__(self) -> None:
        super().__init__()
        self.breaks: list[Break] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reason = next((said for tag, said in _BY_TAG.items() if tag in func.tags), None)
        if reason is not None:
            self.breaks.append(_at(traceback.extract_stack(), reason))
        return func(*args, **(kwargs or {}))


def found_by_dynamo(step: Callable[..., Any], state: Any, batch: Any) -> tuple[int, list[Break]]:
    """How many graphs Dynamo makes of a step when it may make several, and where it cuts.

    The step is run. Within ``torch.func.grad`` Dynamo gives up at the first break.
    """
    from torch._dynamo.backends.debugging import ExplainWithBackend

    # Not torch._dynamo.explain, which throws away all that this process has compiled.
    explain = ExplainWithBackend("eager")

    def run(state: Any, batch: Any) -> Any:
        return step(state, batch)

    # With code of its own, because graphs are kept by code object.
    own = types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
    try:
        torch.compile(own, backend=explain)(state, batch)
    except Exception as error:
        return 0, [refusal(error)]
    output = explain.output()
    return output.graph_count, [_at(each.user_stack, _first_line(each.reason)) for each in output.break_reasons]


def joined(breaks: Iterable[Break]) -> tuple[Break, ...]:
    """One for each place: the first said there."""
    places: dict[str, Break] = {}
    for each in breaks:
        places.setdefault(each.where or each.reason, each)
    return tuple(places.values())


def _at(frames: Iterable[traceback.FrameSummary], reason: str) -> Break:
    own = [frame for frame in frames if _is_own(frame.filename)]
    if not own:
        return Break(reason)
    frame = own[-1]
    code = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return Break(reason, f"{frame.filename}:{frame.lineno} in {frame.name}", code)


def _is_own(filename: str) -> bool:
    if filename.startswith("<"):
        return filename.startswith(("<doctest", "<ipython"))
    path = os.path.abspath(filename)
    return not any(path.startswith(f"{folder}{os.sep}") for folder in (_OURS, *_installed()))


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "torch does not say why.")


@functools.cache
def _installed() -> frozenset[str]:
    import sysconfig

    return frozenset(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
