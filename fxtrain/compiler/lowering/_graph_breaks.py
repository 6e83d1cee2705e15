"""Finds the line of user code that keeps a step from being traced, and explains why."""

from __future__ import annotations

import dataclasses
import linecache
import traceback
from collections.abc import Iterable

from fxtrain.core import Record, truncate
from fxtrain.core._tracebacks import place, places

_MAX_CHARACTERS = 300  # of a line or a reason

VALUE = (
    "Python reads the value of a tensor here (if, while, assert, .item(), float() or similar), but one graph serves "
    "all values. Use torch.where, or keep the value in a tensor."
)
SHAPE = (
    "The shape of the result depends on values here (a mask as an index, nonzero, unique or similar), but shapes in a "
    "graph are fixed. Use torch.where, or multiply by the mask."
)
NO_COMPILER = (
    "Inductor finds no working C++ compiler. Install g++ or clang++, or name one in the environment variable CXX."
)
_BY_EXCEPTION = {
    "DataDependentOutputException": VALUE,
    "GuardOnDataDependentSymNode": VALUE,
    "DynamicOutputShapeException": SHAPE,
}
_BY_MESSAGE = {
    "tensor with unallocated storage": VALUE,  # tolist() and numpy() of a tensor without values
    "Cannot access data pointer of Tensor that doesn't have storage": VALUE,
    "The tensor has a non-zero number of elements, but its data is not allocated yet": VALUE,
    "not 'SymBool'": VALUE,  # float() or int() of a comparison
    "Data-dependent branching": VALUE,  # Dynamo's
    "Data dependent operator": VALUE,
    "Unsupported Tensor.item() call": VALUE,
    "Dynamic shape operator": SHAPE,
    "InvalidCxxCompiler": NO_COMPILER,
}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Break(Record):
    """A place that keeps a step from being one graph.

    Args:
        reason: The cause, and what to do.
        where: ``file:line in function`` of the innermost user code, else of a library. Empty if unknown.
        code: The source of that line.
        within: ``file:line: code`` of the innermost library code that the user's line leads to, or empty.

    Example:
        >>> print(Break("Python reads the value of a tensor here.", "train.py:7 in loss_fn", "if loss > 1:"))
        train.py:7 in loss_fn | if loss > 1: | Python reads the value of a tensor here.
    """

    reason: str
    where: str = ""
    code: str = ""
    within: str = ""

    def __str__(self) -> str:
        return " | ".join(part for part in (self.where, self.code, self.within, self.reason) if part)


def break_from_error(error: BaseException) -> Break:
    """Returns the place and the explanation of an error from a tracer or a compiler."""
    text = str(error)
    reason = _BY_EXCEPTION.get(type(error).__name__)
    reason = reason or next((known for part, known in _BY_MESSAGE.items() if part in text), None)
    # Dynamo analyzes the step without running it, and attaches the stack of that code to the error.
    frames = getattr(error, "real_stack", None) or traceback.extract_tb(error.__traceback__)
    return break_at(frames, reason or f"{type(error).__name__}: {first_line(text)}")


def break_at(frames: Iterable[traceback.FrameSummary], reason: str) -> Break:
    """Returns a break at the innermost of these frames that is not torch's, Python's or fxtrain's."""
    own, library = places(frames)
    frame = own or library
    if frame is None:
        return Break(reason)
    within = f"{_place(library)}: {_code(library)}" if own and library else ""
    return Break(reason, f"{_place(frame)} in {frame.name}", _code(frame), within)


def first_line(text: str) -> str:
    """Returns the first non-empty line of a message, shortened."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "torch gives no reason.")
    return truncate(line, _MAX_CHARACTERS)


def _place(frame: traceback.FrameSummary) -> str:
    return place(frame.filename, frame.lineno)


def _code(frame: traceback.FrameSummary) -> str:
    return first_line(linecache.getline(frame.filename, frame.lineno or 0) or "?")
