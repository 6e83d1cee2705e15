"""Which of many updates are shown."""

from __future__ import annotations

from fxtrain.core import LoopEvent
from fxtrain.observers._running_averages import fraction


class Spacing:
    """Selects updates: the first one, one every ``seconds``, and one in each of ``parts`` equal parts of the run.

    Args:
        seconds: Time after which an update is due, by the loop's clock.
        parts: Number of parts of the run. In a run without a known end, this many of the first updates can be due.
        first: Whether the first ``parts`` updates of a run without a known end are due.
    """

    def __init__(self, seconds: float, parts: int, *, first: bool = False) -> None:
        self._seconds, self._parts = seconds, parts
        self._remaining = parts if first else 0  # of the first updates
        self._time: float | None = None  # of the last update that was due
        self._part = 0  # of the run, at that update

    def is_due(self, event: LoopEvent, *, by_time: bool = False) -> bool:
        """Whether to show this update.

        Args:
            event: The event of the update.
            by_time: Whether to ignore the parts of the run.
        """
        share = fraction(event)
        part = 0 if by_time or share is None else int(self._parts * share + 1e-9)
        self._part = min(self._part, part)  # a rewind lowers it
        is_first = share is None and self._remaining > 0
        if self._time is None or event.time - self._time >= self._seconds or part > self._part or is_first:
            self._time, self._part, self._remaining = event.time, part, self._remaining - is_first
            return True
        return False
