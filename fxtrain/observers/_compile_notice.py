"""A notice of a long compilation, during which no events fire."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable

_SILENT_SECONDS = 2.0
_SECONDS_PER_UPDATE = 1.0


class CompileNotice:
    """Calls a function from a thread each second, from two seconds after its creation until ``end``.

    Args:
        show: A function of the seconds since the creation, and of whether it is called for the first time.
    """

    def __init__(self, show: Callable[[float, bool], None]) -> None:
        self.is_shown = False
        self._show = show
        self._began = time.perf_counter()
        self._over = threading.Event()
        self._error: Exception | None = None
        # In a copy of the context, by which a kernel assigns output to its cell.
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._update,), name="fxtrain-compile-notice", daemon=True)
        self._thread.start()

    def _update(self) -> None:
        while not self._over.wait(_SECONDS_PER_UPDATE if self.is_shown else _SILENT_SECONDS):
            is_first, self.is_shown = not self.is_shown, True
            try:
                self._show(time.perf_counter() - self._began, is_first)
            except Exception as error:
                self._error = error
                return

    def end(self) -> None:
        """Ends the thread. Raises the error of the function, if it failed."""
        self._over.set()
        self._thread.join()
        try:
            if self._error is not None:
                raise self._error
        finally:
            self._error = None  # its traceback references this object
