"""Interrupts: a signal becomes a flag, which the loop reads where the state is whole."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

# What is on the stack while a graph is made, and not while it runs: a function of ours, or a module of torch's.
_OURS = ("fxtrain.compile.traced", "compile_traced")
_DYNAMO = "torch._dynamo.convert_frame"
_LEAVABLE = (__name__, "leavable")


class Abandoned(BaseException):
    """A signal came, and what is under way changes nothing: it is left."""


class Interrupts:
    """While it is entered, the first SIGINT, SIGTERM or SIGUSR1 is noted, and a SIGINT after it acts at once.

    SIGUSR1 is what Slurm and some spot instances send ahead of the end; it is left alone where the program handles it
    itself. Signals belong to the main thread; elsewhere nothing is noted and nothing changed.
    """

    def __init__(self) -> None:
        self.cause: str | None = None
        self.exit_code = 0
        self._before: dict[signal.Signals, Any] = {}
        self._has_left = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # What whoever started this process had ignored, as a shell does of a job in the background, stays ignored.
            kinds = [kind for kind in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(kind) != signal.SIG_IGN]
            ahead = getattr(signal, "SIGUSR1", None)
            if ahead is not None and signal.getsignal(ahead) == signal.SIG_DFL:
                kinds.append(ahead)
            self._before = {kind: signal.signal(kind, self._note) for kind in kinds}
        return self

    def __exit__(self, *exc: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        kind = signal.Signals(number)
        if self.cause is None:
            self.cause, self.exit_code = kind.name, 128 + number
        elif kind == signal.SIGINT:
            # Asked twice: whoever handled it before us handles it now. Checkpoints are committed atomically, so
            # even in the middle of a save nothing is lost but that save.
            self.__exit__()
            os.kill(os.getpid(), kind)
            return
        if not self._has_left and _can_be_left(frame):
            self._has_left = True
            raise Abandoned


def leaving_compilation(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which is left by ``Abandoned`` if a signal comes while torch compiles in it.

    That can take minutes and has changed nothing yet. A graph that runs is never left: it may be in the middle of
    writing over memory that was donated to it.
    """

    def leavable(*args: Any) -> Any:  # known by its name on the stack
        return function(*args)

    return leavable


def _can_be_left(frame: FrameType | None) -> bool:
    compiles = False
    while frame is not None:
        where = frame.f_globals.get("__name__"), frame.f_code.co_name
        compiles = compiles or where[0] == _DYNAMO or where == _OURS
        if where == _LEAVABLE:
            return compiles
        frame = frame.f_back
    return False
