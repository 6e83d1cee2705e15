"""Running averages of a run's speed and metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fxtrain.core import LoopEvent, StepEnd

_MAX_METRIC_STEPS = 20
_MAX_UNREAD_STEPS = 256  # steps whose metrics may stay unread on the device


class RunningAverages:
    """Exponentially weighted averages over about the last ``span`` seconds.

        mean = sum(w_i * x_i) / sum(w_i),  w_i = exp(-(seconds since step i) / span)

    Each step also multiplies the metric weights of earlier steps by at most 19/20, so averages of metrics cover about
    20 steps at most, even in a fast run.

    Time spent on evaluations and saves is excluded. The first step of a session, which includes compilation,
    contributes only its metrics.

    Args:
        span: Time constant of the averages, in seconds.
        smoothing: Weight of the newest step in the averages of the speed, in [0, 1], instead of ``span``. 0 averages
            all steps alike.
    """

    def __init__(self, span: float, smoothing: float | None = None) -> None:
        self._span = span
        self._retained = None if smoothing is None else 1 - smoothing  # of the speed, after a step
        self._last: float | None = None  # end of the last step
        self._first = 0.0  # end of the first step
        self._paused = 0.0  # seconds since the last step spent on other work
        self._steps = self._seconds = self._waited = 0.0  # decayed sums of steps, their seconds and data waits
        self._busy = 0.0  # total seconds of steps
        self._sums: dict[str, tuple[float, float]] = {}  # by metric: decayed sums of values and weights
        self._latest: dict[str, float] = {}
        self._unread: list[tuple[float, Mapping[str, float]]] = []  # decay of earlier weights, metrics

    def step(self, event: StepEnd) -> None:
        """Adds a step."""
        retained = 0.0
        if self._last is None:
            self._first = event.time
        else:
            seconds = max(event.time - self._last - self._paused, 0.0)
            decay = math.exp(-seconds / self._span)
            kept = decay if self._retained is None else self._retained
            self._steps = self._steps * kept + 1
            self._seconds = self._seconds * kept + seconds
            self._waited = self._waited * kept + event.data_wait
            self._busy += seconds
            retained = min(decay, 1 - 1 / _MAX_METRIC_STEPS)
        self._last, self._paused = event.time, 0.0
        # Reading metrics synchronizes with the device, so they are read only when shown.
        self._unread.append((retained, event.metrics))
        if len(self._unread) > _MAX_UNREAD_STEPS:
            self._read()

    def pause(self, seconds: float) -> None:
        """Excludes seconds spent on work other than steps."""
        self._paused += seconds

    @property
    def rate(self) -> float | None:
        """Steps per second, or None before the second step."""
        return self._steps / self._seconds if self._seconds > 0 else None

    @property
    def waiting(self) -> float | None:
        """Fraction of the time spent waiting for data, in [0, 1], or None before the second step."""
        return min(self._waited / self._seconds, 1.0) if self._seconds > 0 else None

    @property
    def metrics(self) -> dict[str, float]:
        """Mean of each metric by name. If its latest value is not finite, that value instead."""
        self._read()
        return {
            name: total / weight if weight and math.isfinite(self._latest[name]) else self._latest[name]
            for name, (total, weight) in self._sums.items()
        }

    def remaining(self, event: LoopEvent) -> float | None:
        """Returns the estimated seconds until the end, evaluations and saves included, or None if unknown."""
        left = [total - done for done, total in _counts(event)]
        return self.duration(max(min(left), 0), event) if left else None

    def duration(self, steps: float, event: LoopEvent) -> float | None:
        """Returns the estimated seconds of steps, with their share of evaluations and saves, or None if unknown."""
        if self.rate is None or self._busy <= 0:
            return None
        return steps / self.rate * max((event.time - self._first) / self._busy, 1.0)

    def _read(self) -> None:
        for retained, metrics in self._unread:
            for name, value in metrics.items():
                total, weight = self._sums.get(name, (0.0, 0.0))
                # A non-finite value would stay in the sum forever.
                finite = math.isfinite(value)
                self._sums[name] = (total * retained + value, weight * retained + 1) if finite else (total, weight)
                self._latest[name] = value
        self._unread = []


def fraction(event: LoopEvent) -> float | None:
    """Returns the completed fraction of the run, in [0, 1], or None if it has no known end."""
    shares = [done / total for done, total in _counts(event) if total > 0]
    return min(max(shares), 1.0) if shares else None


def ends_epoch(event: LoopEvent) -> bool:
    """Whether the current step is the last of its epoch."""
    return event.epoch_length is not None and 0 < event.epoch_length <= event.position - event.epoch_start


def _counts(event: LoopEvent) -> list[tuple[int, int]]:
    """Returns (done, total) for each limit of the run: in steps, and in batches for a limit on epochs."""
    counts: list[tuple[int, int]] = []
    if event.total_steps is not None:
        counts.append((event.step, event.total_steps))
    if event.total_epochs is not None and event.epoch_length is not None:
        batches = event.epochs_done * event.epoch_length + event.position - event.epoch_start
        counts.append((batches, event.total_epochs * event.epoch_length))
    return counts
