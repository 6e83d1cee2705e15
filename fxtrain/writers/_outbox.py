"""A queue of calls that a thread sends to a service, so that a slow or unreachable service never stops a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from fxtrain.core import printable
from fxtrain.writers._backlog import Backlog, PendingCall

FLUSH_SECONDS = 5.0
"""The longest wait of a flush, and of all flushes together while the service does not answer."""

CLOSE_SECONDS = 20.0
"""The longest wait on close if the service answers."""

CLOSE_FAILING_SECONDS = 5.0
"""The longest wait on close if the service does not answer."""

_MAX_BATCH_CALLS = 1000
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0  # seconds between attempts


class Session(Protocol):
    """The calls to a service, made by one thread. Each may block and raise."""

    def begin(self) -> None:
        """Creates or continues the run."""
        ...

    def send(self, calls: list[PendingCall]) -> None:
        """Sends values, in the order of the calls."""
        ...

    def end(self) -> None:
        """Ends the session. Everything sent must be stored when this returns."""
        ...

    def is_refusal(self, error: Exception) -> bool:
        """Returns whether the service rejects these values, so that retrying is useless."""
        ...


class Outbox:
    """Sends calls in a thread, in order, and retries after a failure.

    At most ``MOST_POINTS`` points and ``MOST_BYTES`` are queued. Beyond that, the oldest are dropped and counted.

    Args:
        service: The name of the service, for warnings.
        session: The calls that the thread makes.
    """

    def __init__(self, service: str, session: Session) -> None:
        self._service, self._session = service, session
        self._backlog = Backlog()
        self._sending: list[PendingCall] = []
        self._changed = threading.Condition()
        self._closing = self._abandoned = self._ended = False
        self._error: Exception | None = None  # of the last attempt
        self._failure: Exception | None = None  # the first of an outage, until it is taken
        self._is_late = False  # from a flush that timed out until everything is sent
        self._first_lost = True
        self._notes: list[str] = []
        # A daemon, so that a request that hangs does not keep the program from exiting.
        self._thread = threading.Thread(target=self._run, name=f"{service} writer", daemon=True)
        self._thread.start()

    def add(self, call: PendingCall) -> None:
        """Queues a call. Never blocks."""
        with self._changed:
            self._backlog.add(call)
            if self._backlog.lost and self._first_lost:
                self._first_lost = False
                self._notes.append(
                    f"{self._service} does not keep up. From step {call.step} on, new points replace the oldest queued "
                    "ones. Lost points are counted and reported at the end."
                )
            self._changed.notify_all()

    def truncate_after(self, step: int) -> int:
        """Drops queued points after a step, and returns the last step that is being sent."""
        with self._changed:
            self._backlog.truncate_after(step)
            return max((call.step for call in self._sending), default=0)

    def flush(self) -> None:
        """Waits until everything is sent, for at most ``FLUSH_SECONDS``, and not while the service does not answer."""
        with self._changed:
            if self._error is None and not self._is_late:
                self._is_late = not self._changed.wait_for(
                    lambda: self._is_sent or self._error is not None, FLUSH_SECONDS
                )

    def close(self) -> None:
        """Waits until everything is sent and the session has ended, for at most ``CLOSE_SECONDS``.

        Unsent points are lost, and counted in a warning.
        """
        began = time.monotonic()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while not self._ended and self._thread.is_alive():
                failing = self._error is not None or self._is_late
                left = began + (CLOSE_FAILING_SECONDS if failing else CLOSE_SECONDS) - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            self._abandoned = True
            lost = self._backlog.lost
            for call in self._sending:
                lost.add(call.step, call.points)
            self._sending = []
            self._backlog.lose_all()
            if lost:
                why = f" ({_short(self._error)})" if self._error is not None else ""
                self._notes.append(f"{self._service}: {lost} were not sent and are lost{why}.")
            elif not self._ended:
                self._notes.append(f"{self._service} did not confirm the end of the run in time.")

    def tell(self, note: str) -> None:
        """Adds a message for the user."""
        with self._changed:
            self._notes.append(note)

    def take_failure(self) -> Exception | None:
        """Returns the first error of an outage or a refusal, once."""
        with self._changed:
            failure, self._failure = self._failure, None
            return failure

    def notes(self) -> list[str]:
        """Returns the messages for the user, once."""
        with self._changed:
            notes, self._notes = self._notes, []
            return notes

    @property
    def _is_sent(self) -> bool:
        return not self._backlog and not self._sending

    # Run by the thread.

    def _run(self) -> None:
        if not self._tried(self._session.begin):
            return
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._backlog or self._closing)
                if self._abandoned:
                    return
                if not self._backlog:
                    break
                self._sending = [self._backlog.pop() for _ in range(min(len(self._backlog), _MAX_BATCH_CALLS))]
            if not self._sent():
                return
        if self._tried(self._session.end):
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _sent(self) -> bool:
        """Sends the batch, or its calls one by one if the service rejects it. Returns False if abandoned."""
        calls = self._sending
        parts = [calls]
        while parts:
            part = parts.pop(0)
            refused: list[Exception] = []
            if not self._tried(lambda part=part: self._session.send(part), refused):
                return False
            if refused and len(part) > 1:
                parts = [[call] for call in part] + parts
                continue
            with self._changed:
                if refused:
                    self._refused(part[0], refused[0])
                self._sending = self._sending[len(part) :]
        with self._changed:
            self._is_late = self._is_late and bool(self._backlog)
            self._changed.notify_all()
        return True

    def _tried(self, act: Callable[[], None], refused: list[Exception] | None = None) -> bool:
        """Retries until the call succeeds or is refused. Returns False if abandoned."""
        pause = _FIRST_PAUSE
        while True:
            error: Exception | None = None
            try:
                act()
            except Exception as raised:
                error = raised
            with self._changed:
                if self._abandoned:
                    return False
                if error is None or (refused is not None and self._session.is_refusal(error)):
                    if error is not None and refused is not None:
                        refused.append(error)
                    if self._error is not None:
                        self._error = None
                        self._notes.append(f"{self._service} answers again. Queued points are being sent.")
                    return True
                if self._error is None:
                    self._failure = self._failure or error
                    self._notes.append(
                        f"{self._service} does not answer. Points are queued and sent when it does. "
                        f"Training continues. {_short(error)}"
                    )
                self._error = error
                self._changed.notify_all()
                self._changed.wait(min(pause, 0.2) if self._closing else pause)
                if self._abandoned:
                    return False
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _refused(self, call: PendingCall, error: Exception) -> None:
        self._failure = self._failure or error
        if not self._backlog.lost:
            self._notes.append(
                f"{self._service} rejected the points of step {call.step}, which are lost: {_short(error)}. Further "
                "losses are counted and reported at the end."
            )
        self._backlog.lost.add(call.step, call.points)


def _short(error: BaseException) -> str:
    text = printable(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:300]}"
