"""Interrupts a session with a signal or an exception, at a chosen occurrence of an event or call."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import fxtrain as fx
from benchmarks.fuzz.build import NAMES
from benchmarks.fuzz.program import Cut
from fxtrain.core import TRAJECTORY

_TICK = 0.0002  # seconds


class InjectedError(Exception):
    """The exception raised by a cut with ``how="error"``."""


class Cutter:
    """Counts occurrences at the place of a cut, and interrupts the session once.

    Args:
        cut: The cut to make; None makes none.
    """

    def __init__(self, cut: Cut | None) -> None:
        self._cut = None if cut is None or cut.how in ("limit", "epochs", "leave") else cut
        self._count = 0
        self._lock = threading.Lock()
        # Armed at FitBegin, because a signal before the loop installs its handlers would end the process.
        self._is_armed = False

    def at(self, where: str) -> Callable[[], None]:
        """Returns a function to call at each occurrence of ``where``."""

        def called() -> None:
            if self._cut is not None and self._cut.where == where:
                self._passed()

        return called

    @property
    def observers(self) -> list[Any]:
        """Observers that disarm the cut at ``FitEnd``, and make it if its place is an observer."""

        def disarm(state: Any, event: fx.FitEnd, control: Any) -> None:
            self.disarm()

        disarm.__annotations__ = {"event": fx.FitEnd}
        if self._cut is None or self._cut.where != "observer":
            return [disarm]

        def cut(state: Any, event: Any, control: Any) -> None:
            self._passed()

        kind = _annotation(self._cut)
        cut.__annotations__ = {"event": kind}
        return [fx.observers.required(cut), disarm]

    @property
    def callbacks(self) -> list[Any]:
        """Callbacks that arm the cut at ``FitBegin``, and make it if its place is a callback."""

        def arm(state: Any, event: fx.FitBegin) -> Any:
            self._is_armed = True
            if self._cut is not None and self._cut.where == "time":
                threading.Timer(self._cut.at * _TICK, self._at_time).start()
            return state, fx.Control()

        armed = fx.on(fx.FitBegin, arm)
        if self._cut is None or self._cut.where != "callback":
            return [armed]

        def cut(state: Any, event: Any) -> Any:
            self._passed()
            return state, fx.Control()

        return [armed, fx.on(_annotation(self._cut), cut)]

    def disarm(self) -> None:
        """Prevents any later cut."""
        with self._lock:
            self._is_armed = False

    def _at_time(self) -> None:
        with self._lock:
            if self._is_armed:
                self._passed_last()

    def _passed(self) -> None:
        assert self._cut is not None
        self._count += self._is_armed
        if not self._is_armed or self._count != self._cut.at:
            return
        self._passed_last()

    def _passed_last(self) -> None:
        assert self._cut is not None
        if self._cut.how == "error":
            raise InjectedError(f"{self._cut}")
        if self._cut.how == "exit":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGKILL if self._cut.how == "kill" else signal.Signals[self._cut.how])


def _annotation(cut: Cut) -> Any:
    """Returns the event types counted by a cut, by default all trajectory events except ``StepBegin``.

    ``StepBegin`` is excluded because callbacks of a multi-step call cannot subscribe to it.
    """
    if cut.event:
        return NAMES[cut.event]
    kinds = [kind for kind in TRAJECTORY if kind is not fx.StepBegin]
    union = kinds[0]
    for kind in kinds[1:]:
        union = union | kind
    return union
