"""Interrupts: a signal becomes a flag, which the loop reads where the state is whole."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While it is entered, the first SIGINT or SIGTERM is noted, and the second acts at once.

    Signals belong to the main thread; elsewhere nothing is noted and nothing changed.
    """

    def __init__(self) -> None:
        self.cause: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {kind: signal.signal(kind, self._note) for kind in _SIGNALS}
        return self

    def __exit__(self, *exc: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        kind = signal.Signals(number)
        if self.cause is None:
            self.cause = kind.name
            return
        # Asked twice: whoever handled it before us handles it now. Checkpoints are committed atomically, so
        # even in the middle of a save nothing is lost but that save.
        self.__exit__()
        os.kill(os.getpid(), kind)
