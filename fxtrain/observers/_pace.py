"""Pace: how fast a run goes, and around what its metrics move, in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fxtrain.core import LoopEvent, StepEnd

_STEPS = 20
_UNREAD = 256  # steps whose metrics may wait on their device


class Pace:
    """Averages over about the last ``span`` seconds, in which a step counts the less the longer ago it was.

        mean = sum(w_i * x_i) / sum(w_i),  w_i = exp(-(seconds since step i) / span)

    Those of metrics go back about 20 steps at most, so that a fast run does not show values of long ago: each step
    takes at least a 20th off the weights of those before.

    Seconds are those of the steps: what the loop spent on evaluations and saves is left out. The first step of a
    session, in which it is compiled, counts for nothing but its metrics.

    Args:
        span: Seconds.
    """

    def __init__(self, span: float) -> None:
        self._span = span
        self._last: float | None = None  # when the last step ended
        self._first = 0.0  # when the first one did
        self._paused = 0.0  # seconds since the last step that were not spent on the next
        self._steps = self._seconds = self._waited = 0.0  # decayed sums
        self._busy = 0.0  # seconds of all steps
        self._sums: dict[str, tuple[float, float]] = {}  # by metric, the decayed sums of values and of weights
        self._latest: dict[str, float] = {}
        self._unread: list[tuple[float, Mapping[str, float]]] = []  # with what is left of the weights before each

    def step(self, event: StepEnd) -> None:
        """A step was taken."""
        forget = 0.0
        if self._last is None:
            self._first = event.time
        else:
            seconds = max(event.time - self._last - self._paused, 0.0)
            decay = math.exp(-seconds / self._span)
            self._steps = self._steps * decay + 1
            self._seconds = self._seconds * decay + seconds
            self._waited = self._waited * decay + event.data_wait
            self._busy += seconds
            forget = min(decay, 1 - 1 / _STEPS)
        self._last, self._paused = event.time, 0.0
        # Metrics are read when they are shown: reading them at each step would wait for the device each time.
        self._unread.append((forget, event.metrics))
        if len(self._unread) > _UNREAD:
            self._read()

    def pause(self, seconds: float) -> None:
        """So many seconds went to something else."""
        self._paused += seconds

    @property
    def rate(self) -> float | None:
        """Steps a second, or None as long as nothing is known."""
        return self._steps / self._seconds if self._seconds > 0 else None

    @property
    def waiting(self) -> float | None:
        """The share of the time in which the loop waited for data, between 0 and 1."""
        return min(self._waited / self._seconds, 1.0) if self._seconds > 0 else None

    @property
    def metrics(self) -> dict[str, float]:
        """The mean of each metric; where the last value is not finite, that value."""
        self._read()
        return {
            name: total / weight if weight and math.isfinite(self._latest[name]) else self._latest[name]
            for name, (total, weight) in self._sums.items()
        }

    def remaining(self, event: LoopEvent) -> float | None:
        """Seconds until the end, if evaluations and saves go on taking the share they took; None if unknown."""
        left = [total - done for done, total in _counts(event)]
        if not left or self.rate is None or self._busy <= 0:
            return None
        return max(min(left), 0) / self.rate * max((event.time - self._first) / self._busy, 1.0)

    def _read(self) -> None:
        for forget, metrics in self._unread:
            for name, value in metrics.items():
                total, weight = self._sums.get(name, (0.0, 0.0))
                # A value that is not finite would stay in the sum for ever.
                finite = math.isfinite(value)
                self._sums[name] = (total * forget + value, weight * forget + 1) if finite else (total, weight)
                self._latest[name] = value
        self._unread = []


def fraction(event: LoopEvent) -> float | None:
    """How much of the run is done, between 0 and 1; None where it has no known end."""
    shares = [done / total for done, total in _counts(event) if total > 0]
    return min(max(shares), 1.0) if shares else None


def _counts(event: LoopEvent) -> list[tuple[int, int]]:
    """What is done, of how much, by each measure that ends the run."""
    counts: list[tuple[int, int]] = []
    if event.total_steps is not None:
        counts.append((event.step, event.total_steps))
    if event.total_epochs is not None and event.epoch_length is not None:
        batches = event.epochs_done * event.epoch_length + event.position - event.epoch_start
        counts.append((batches, event.total_epochs * event.epoch_length))
    return counts
