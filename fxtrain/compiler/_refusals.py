"""Refusals: where in the source of users a step cannot be traced, and why, in plain words."""

from __future__ import annotations

import dataclasses
import linecache
import traceback
from collections.abc import Iterable

from fxtrain.core._frames import places

_LONGEST = 300  # characters of a line or a reason that are shown

VALUE = (
    "Python reads the value of a tensor here, by if, while, assert, .item(), float() or the like, and a graph is made "
    "once for all values: use torch.where, or keep the value a tensor."
)
SHAPE = (
    "the shape of the result depends on values here, as with a mask as an index, nonzero or unique, and a graph has "
    "one shape: use torch.where, or multiply by the mask."
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
}


@dataclasses.dataclass(frozen=True)
class Break:
    """A place where a step cannot be in one graph.

    Args:
        reason: The cause, and what to do.
        where: ``file:line in function``, the innermost line of users, else of a library; "" if unknown.
        code: The source of that line.
        within: ``file:line: code`` of the innermost line of a library that the user's line leads to, or "".
    """

    reason: str
    where: str = ""
    code: str = ""
    within: str = ""

    def __str__(self) -> str:
        return " | ".join(part for part in (self.where, self.code, self.within, self.reason) if part)


def refusal(error: BaseException) -> Break:
    """The reason and the place of an error of a tracer or a compiler."""
    text = str(error)
    reason = _BY_EXCEPTION.get(type(error).__name__)
    reason = reason or next((said for part, said in _BY_MESSAGE.items() if part in text), None)
    # Dynamo reads the step without running it, and keeps the lines that it read beside the error.
    frames = getattr(error, "real_stack", None) or traceback.extract_tb(error.__traceback__)
    return break_at(frames, reason or f"{type(error).__name__}: {first_line(text)}")


def break_at(frames: Iterable[traceback.FrameSummary], reason: str) -> Break:
    """The break at the innermost of these frames that is not torch's, Python's or fxtrain's."""
    own, library = places(frames)
    frame = own or library
    if frame is None:
        return Break(reason)
    within = f"{_place(library)}: {_code(library)}" if own and library else ""
    return Break(reason, f"{_place(frame)} in {frame.name}", _code(frame), within)


def first_line(text: str) -> str:
    """The first line of a message that is not empty, shortened."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "torch gives no reason.")
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def _place(frame: traceback.FrameSummary) -> str:
    return f"{frame.filename}:{frame.lineno}"


def _code(frame: traceback.FrameSummary) -> str:
    return first_line(linecache.getline(frame.filename, frame.lineno or 0) or "?")
