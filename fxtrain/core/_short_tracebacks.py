"""Hides the frames of fxtrain and torch in tracebacks, so that a traceback shows the user's lines.

``FXTRAIN_TRACEBACK=full`` in the environment shows all frames.
"""

from __future__ import annotations

import dis
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, ParamSpec, TypeVar

from fxtrain.core._tracebacks import FXTRAIN_FOLDER, ipython_shell, is_internal, is_standard_library, locals_of

Options = ParamSpec("Options")
R = TypeVar("R")

_log = logging.getLogger(__name__)

_NOTE = "Frames of fxtrain and torch are hidden. Set the environment variable FXTRAIN_TRACEBACK=full to show them."
_RAISE = dis.opmap["RAISE_VARARGS"]
_RAISES_ERRORS_OF_WORKERS = "reraise"  # a function of torch


def shorten_traceback(error: BaseException) -> None:
    """Hides the frames of fxtrain and torch in the traceback of an error that is about to leave fxtrain.

    Only the outermost call of fxtrain does so: nothing happens if the function that handles the error was called by
    fxtrain or torch. Errors that may be defects of fxtrain keep all frames: those that pass through no code of the user
    and were not raised by a ``raise`` statement of fxtrain.

    In a script, hidden frames are removed. In IPython, pytest and a debugger, they are marked by ``__tracebackhide__``.
    Those at the end are removed in IPython, which would show the last frame even if it is marked. The logger
    ``fxtrain.core`` has the whole traceback at level DEBUG.

    Args:
        error: The exception that is being handled. Its causes are treated alike.
    """
    trace = error.__traceback__
    caller = trace and trace.tb_frame.f_back
    is_full = os.environ.get("FXTRAIN_TRACEBACK") == "full"
    if caller is None or is_full or is_internal(caller.f_code.co_filename) or _may_be_defect(error):
        return
    _log.debug("The traceback of %s, before frames are hidden.", type(error).__name__, exc_info=error)
    keeps_all, is_ipython = "_pytest" in sys.modules or _is_debugged(), ipython_shell() is not None
    for each in _printed_with(error):
        hidden = _hidden(each.__traceback__)
        if keeps_all or is_ipython:
            for frame in hidden:
                locals_of(frame)["__tracebackhide__"] = True
        if not keeps_all:
            each.__traceback__ = _without(each.__traceback__, hidden, tail_only=is_ipython)
    if _NOTE not in getattr(error, "__notes__", ()):
        error.add_note(_NOTE)


def with_short_traceback(function: Callable[Options, R]) -> Callable[Options, R]:
    """Returns ``function``, whose errors have short tracebacks. For functions that users call."""

    @functools.wraps(function)
    def shortening(*args: Options.args, **kwargs: Options.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            shorten_traceback(error)
            raise

    return shortening


def _printed_with(error: BaseException) -> Iterator[BaseException]:
    """Yields an error and those printed before it: its causes and contexts."""
    seen = set[int]()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _entries(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _hidden(trace: TracebackType | None) -> set[FrameType]:
    """Returns the frames of fxtrain and torch, and those of the standard library that they call."""
    hidden, is_hidden = set[FrameType](), False
    for entry in _entries(trace):
        frame = entry.tb_frame
        name = frame.f_code.co_filename
        if not is_standard_library(name):
            # Generated functions, such as __init__ of dataclasses, have the name of a prompt.
            module = str(frame.f_globals.get("__name__")).partition(".")[0]
            is_hidden = is_internal(name) or (name.startswith("<") and module in ("fxtrain", "torch"))
        if is_hidden:
            hidden.add(frame)
    return hidden


def _may_be_defect(error: BaseException) -> bool:
    """Whether an error passes through no visible frame, and was not raised on purpose."""
    entries = list(_entries(error.__traceback__))
    if len(_hidden(error.__traceback__)) < len({entry.tb_frame for entry in entries}):
        return False
    code = entries[-1].tb_frame.f_code
    is_raised_here = code.co_filename.startswith(FXTRAIN_FOLDER) or code.co_name == _RAISES_ERRORS_OF_WORKERS
    is_statement = code.co_code[entries[-1].tb_lasti] == _RAISE and not isinstance(error, AssertionError)
    return not (is_raised_here and is_statement)


def _without(trace: TracebackType | None, hidden: set[FrameType], *, tail_only: bool) -> TracebackType | None:
    """Returns the traceback without frames, or without those of them at its end."""
    result = None
    for entry in reversed(list(_entries(trace))):
        if entry.tb_frame not in hidden or (tail_only and result is not None):
            result = TracebackType(result, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return result


def _is_debugged() -> bool:
    """Whether a debugger is attached, or may start at the place of an error."""
    monitoring: Any = getattr(sys, "monitoring", None)  # from Python 3.12 on
    return bool(
        sys.gettrace() is not None
        or sys.flags.interactive
        or (monitoring is not None and monitoring.get_tool(monitoring.DEBUGGER_ID))
        or getattr(ipython_shell(), "call_pdb", False)
    )
