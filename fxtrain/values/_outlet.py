"""Outlet: one writer of a run, which fails alone, keeps what it could not write, and is tried again."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

from fxtrain.core._text import printable, printable_lines
from fxtrain.values._backlog import MOST_BYTES, MOST_POINTS, Backlog, Lost, Waiting, waiting
from fxtrain.values._log import hand_over, take_back

_RETRY_SECONDS = 1.0


class Outlet:
    """Hands values to one writer, and contains its failures.

    After an ``OSError`` the points that the writer missed wait, up to ``MOST_POINTS`` and ``MOST_BYTES``, and are
    written in their order once it works again: it is tried each second, at each flush and at the end. After any other
    error the points of that call are lost, and the next are written. Each failure, recovery and loss is a warning.

    Args:
        writer: From ``fxtrain.writers``, or clu's.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._name = type(writer).__name__
        self._backlog = Backlog()
        self._fails = False  # since the last success
        self._has_refused = False
        self._retry_at = 0.0
        self._failure: Exception | None = None
        # A writer whose errors surface late would be given the wrong points again.
        getattr(writer, "contain_failures", lambda: None)()

    def hand_over(self, step: int, values: Mapping[str, Any], event: Any = None) -> None:
        """Has the writer write values, or keeps them for it."""
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
        """Has the writer drop what lies beyond a step, or keeps that for it."""
        self._backlog.forget_after(step)
        self._backlog.add(Waiting(step, None))
        self._deliver()

    def flush(self) -> None:
        """Tries what waits, and flushes the writer."""
        delivered = self._delivered()
        try:
            self._writer.flush()
        except Exception as error:
            self._failed(None, error)
        else:
            if delivered:
                self._recovered()

    def close(self) -> None:
        """Tries what waits, counts what is lost, and closes the writer, whose own error is raised."""
        self._deliver()
        try:
            self._writer.close()
        finally:
            self._backlog.lose_all()
            if self._backlog.lost:
                _warn(f"{self._name}: {self._backlog.lost} could not be written and are lost.")
            self._backlog, self._fails, self._has_refused = Backlog(), False, False

    def take_failure(self) -> Exception | None:
        """Returns the first error that was contained since this was last asked, for those that must not go on."""
        inner = getattr(self._writer, "take_failure", lambda: None)()
        failure, self._failure = self._failure or inner, None
        return failure

    def _deliver(self) -> None:
        if self._delivered():
            self._recovered()

    def _delivered(self) -> bool:
        """Gives the writer what waits for it, until it fails; returns whether nothing waits any more."""
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
            lost = f", but {self._backlog.lost} are lost" if self._backlog.lost else ""
            self._fails, self._backlog.lost = False, Lost()
            _warn(f"{self._name} works again: the points that waited are written{lost}.")

    def _failed(self, step: int | None, error: Exception) -> None:
        self._retry_at = time.monotonic() + _RETRY_SECONDS
        if not self._fails:
            # Once an outage, so that a run which it ends can still save its last state.
            self._fails, self._failure = True, self._failure or error
            at = "a flush" if step is None else f"step {step}"
            _warn(
                f"{self._name} failed at {at} and is tried again; up to {MOST_POINTS} points and "
                f"{MOST_BYTES // 2**20} MiB wait for it. Training and other writers go on. "
                f"{type(error).__name__}: {printable(str(error))}"
            )

    def _refused(self, call: Waiting, error: Exception) -> None:
        self._failure = self._failure or error
        self._backlog.lost.add(call.step, call.points)
        if not self._has_refused:
            self._has_refused = True
            lines = printable_lines("".join(traceback.format_exception(error)))
            _warn(
                f"{self._name} failed at step {call.step}, whose points are lost; more such errors are counted, and "
                "reported at the end. Training and other writers go on.\n" + "\n".join(lines)
            )


def outlet_of(writer: Any) -> Outlet:
    """The outlet of a writer: one, whichever observers share the writer, so that points keep their order."""
    return getattr(writer, "__dict__", {}).setdefault("_outlet", None) or _new_outlet(writer)


def _new_outlet(writer: Any) -> Outlet:
    outlet = Outlet(writer)
    getattr(writer, "__dict__", {})["_outlet"] = outlet
    return outlet


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
