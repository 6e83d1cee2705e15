"""The delivery of values to one writer, with its failures contained and retried."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

from fxtrain.core import printable, printable_lines
from fxtrain.values._backlog import MOST_BYTES, MOST_POINTS, Backlog, Lost, Waiting, waiting
from fxtrain.values._log import hand_over, take_back

_RETRY_SECONDS = 1.0


class Outlet:
    """Passes values to one writer, and contains its failures.

    After an ``OSError``, points that the writer missed are queued, up to ``MOST_POINTS`` and ``MOST_BYTES``. They are
    written in order once it works again. It is retried at the next write after a second, at each flush, and on close.
    After any other error, the points of that call are lost, and later ones are written. Each outage, recovery and loss
    causes a warning.

    Args:
        writer: A writer of ``fxtrain.writers``, or clu's.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._name = type(writer).__name__
        self._backlog = Backlog()
        self._fails = False  # since the last success
        self._has_refused = False
        self._retry_at = 0.0
        self._failure: Exception | None = None
        # A writer that raises errors at a later call must contain them itself, or the wrong points would be retried.
        getattr(writer, "contain_failures", lambda: None)()

    def hand_over(self, step: int, values: Mapping[str, Any], event: Any = None) -> None:
        """Writes values, or queues them while the writer fails."""
        if not values:
            return
        if self._backlog and time.monotonic() >= self._retry_at:
            self._deliver()
        if self._backlog:
            self._backlog.add(waiting(step, values, event))
            return
        try:
            hand_over(self._writer, step, values, event)
        except OSError as error:
            self._backlog.add(waiting(step, values, event))
            self._failed(step, error)
        except Exception as error:
            self._refused(Waiting(step, values), error)

    def take_back(self, step: int) -> None:
        """Makes the writer drop everything after a step, or queues that while it fails."""
        self._backlog.forget_after(step)
        self._backlog.add(Waiting(step, None))
        self._deliver()

    def flush(self) -> None:
        """Retries pending calls, and flushes the writer."""
        delivered = self._delivered()
        try:
            self._writer.flush()
        except Exception as error:
            self._failed(None, error)
        else:
            if delivered:
                self._recovered()

    def close(self) -> None:
        """Retries pending calls, warns about lost points, and closes the writer, whose error is raised."""
        self._deliver()
        try:
            self._writer.close()
        finally:
            self._backlog.lose_all()
            if self._backlog.lost:
                _warn(f"{self._name}: {self._backlog.lost} could not be written and were lost.")
            self._backlog, self._fails, self._has_refused = Backlog(), False, False

    def take_failure(self) -> Exception | None:
        """Returns the first error contained since the last call, for runs that require the writer."""
        inner = getattr(self._writer, "take_failure", lambda: None)()
        failure, self._failure = self._failure or inner, None
        return failure

    def _deliver(self) -> None:
        if self._delivered():
            self._recovered()

    def _delivered(self) -> bool:
        """Writes pending calls until the writer fails. Returns whether none is left."""
        while self._backlog:
            call = self._backlog.first
            try:
                if call.values is None:
                    take_back(self._writer, call.step)
                else:
                    hand_over(self._writer, call.step, call.values, call.event)
            except OSError as error:
                self._failed(call.step, error)
                return False
            except Exception as error:
                self._refused(call, error)
            self._backlog.pop()
        return True

    def _recovered(self) -> None:
        if self._fails:
            lost = f", but {self._backlog.lost} were lost" if self._backlog.lost else ""
            self._fails, self._backlog.lost = False, Lost()
            _warn(f"{self._name} works again. Queued points were written{lost}.")

    def _failed(self, step: int | None, error: Exception) -> None:
        self._retry_at = time.monotonic() + _RETRY_SECONDS
        if not self._fails:
            # Recorded once per outage, so that a run stopped by it can still save its last state.
            self._fails, self._failure = True, self._failure or error
            at = "a flush" if step is None else f"step {step}"
            _warn(
                f"{self._name} failed at {at} and will be retried. Up to {MOST_POINTS} points and "
                f"{MOST_BYTES // 2**20} MiB are queued for it. Training and other writers continue. "
                f"{type(error).__name__}: {printable(str(error))}"
            )

    def _refused(self, call: Waiting, error: Exception) -> None:
        self._failure = self._failure or error
        self._backlog.lost.add(call.step, call.points)
        if not self._has_refused:
            self._has_refused = True
            lines = printable_lines("".join(traceback.format_exception(error)))
            _warn(
                f"{self._name} failed at step {call.step}, whose points are lost. Further losses are counted and "
                "reported at the end. Training and other writers continue.\n" + "\n".join(lines)
            )


def outlet_of(writer: Any) -> Outlet:
    """Returns the outlet of a writer. Observers that share a writer share its outlet, so points keep their order."""
    return getattr(writer, "__dict__", {}).setdefault("_outlet", None) or _new_outlet(writer)


def _new_outlet(writer: Any) -> Outlet:
    outlet = Outlet(writer)
    getattr(writer, "__dict__", {})["_outlet"] = outlet
    return outlet


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
