"""Write: hands what a run publishes to writers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fxtrain import tree
from fxtrain.core import (
    Control,
    EvalBegin,
    EvalEnd,
    FitBegin,
    FitEnd,
    Interrupted,
    Logged,
    LoopEvent,
    Rewound,
    StepEnd,
    TrainState,
    check_choice,
    check_positive_int,
)
from fxtrain.values import KINDS, HParams, hold_back, kind_of, outlet_of, published, share, try_all


def write(
    *writers: Any,
    every: int | Mapping[str, int] = 1,
    reduce: str = "mean",
    hparams: Mapping[str, Any] | None = None,
    flush_seconds: float = 30.0,
) -> Write:
    """Hands what is published to writers.

    The metrics of steps are called ``train/<name>``, those of evaluations ``eval/<name>``. What was logged keeps its
    name, and is written at its own event. Where a run resumes or goes back, writers first drop what lies beyond that
    step, so that there is one point for each step in the end.

    Points of steps are handed over several at once: 64 of them, or those of a second; before anything else is, and
    before each save. Until then metrics stay on their device, and come from there in one transfer, which is under way
    while the next points are taken.

    Each writer fails alone. After an ``OSError``, as of a full disk, the points that it misses wait, at most 10,000 of
    them and 64 MiB, and are written when it works again; it is tried each second, at each flush and at the end. What is
    lost is counted in a warning. Within ``observers.required`` a failure ends the run.

    Args:
        writers: From ``fxtrain.writers``, or clu's.
        every: Write the metrics of steps at the multiples of so many steps. Less than that is written before a save
            and at the end, so that no step is lost where a run is interrupted. A mapping says it for each kind:
            ``{"metrics": 10, "images": 500}``, with the names of ``fxtrain.values.KINDS``. What steps log of such a
            kind waits for a multiple, or the end, and only the latest of each name is written then.
        reduce: What is written of the metrics of the steps since the last ones written: their ``"mean"``, the
            ``"last"``, the ``"min"`` or the ``"max"``. NaN stays NaN.
        hparams: What the run is configured with, a nested mapping of strings, numbers and bools; written as the
            session begins.
        flush_seconds: Writers flush after so many seconds, at each evaluation, before each save, and in the end.

    Raises:
        ValueError: If there is no writer, or an argument is out of its range.

    Example:
        >>> import pathlib, tempfile
        >>> from fxtrain import writers
        >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.jsonl")
        >>> observer = write(writers.jsonl(path), every=2)
        >>> for step, loss in enumerate([4.0, 2.0, 1.0], start=1):
        ...     observer(None, StepEnd(step=step, metrics={"loss": loss}), Control())
        >>> observer.close()
        >>> print(path.read_text(), end="")
        {"event": "StepEnd", "step": 2, "epoch": null, "time": 0.0, "metrics": {"train/loss": 3.0}}
        {"event": "StepEnd", "step": 3, "epoch": null, "time": 0.0, "metrics": {"train/loss": 1.0}}
    """
    if not writers:
        raise ValueError("write() has nothing to write to: give it a writer, fxtrain.writers.tensorboard(folder) say.")
    periods = dict(every) if isinstance(every, Mapping) else {_METRICS: every}
    for kind, period in periods.items():
        check_choice("a kind in every", kind, (_METRICS, *KINDS.values()))
        check_positive_int("every" if kind == _METRICS else f"every[{kind!r}]", period)
    check_choice("reduce", reduce, tuple(_REDUCED))
    if not flush_seconds >= 0:
        raise ValueError(f"flush_seconds={flush_seconds!r}: 0 or more is wanted.")
    return Write(writers, periods, reduce, None if hparams is None else HParams(hparams), flush_seconds)


_METRICS = "metrics"
_REDUCED: Mapping[str, Callable[[list[float]], float]] = {
    "mean": lambda values: sum(values) / len(values),
    "last": lambda values: values[-1],
    "min": lambda values: float(np.min(values)),  # which NaN does not escape
    "max": lambda values: float(np.max(values)),
}

_AT_MOST = 64  # points that wait to be written together, and
_SECONDS = 1.0  # for how long at most, by the run's clock

_Steps = list[tuple[int, Mapping[str, Any]]]  # which, and what each measured
_Point = tuple[StepEnd, _Steps, Control]  # where it is written, of which steps, and what was logged there

Seen = FitBegin | StepEnd | EvalBegin | EvalEnd | Rewound | Interrupted | FitEnd


class Write:
    """Hands what is published to writers; made by ``write``.

    The points of steps wait for each other, and are written together: beside a step, which takes the caches for
    itself, one alone takes five times as long as one among many, and for each alone one would wait for the device.
    """

    sees_logged = True

    def __init__(
        self,
        writers: tuple[Any, ...],
        periods: Mapping[str, int],
        reduce: str,
        hparams: HParams | None,
        flush_seconds: float,
    ) -> None:
        share(writers)
        self._outlets = [outlet_of(writer) for writer in writers]
        for writer in writers:
            hold_back(writer, self._write_points)
        self._every = periods.get(_METRICS, 1)
        self._periods = {kind: periods[name] for kind, name in KINDS.items() if periods.get(name, 1) > 1}
        self._reduce = _REDUCED[reduce]
        self._hparams = hparams
        self._flush_seconds = flush_seconds
        self._interval: _Steps = []  # since the last point
        self._last: StepEnd | None = None  # of the interval; all the other events of a long one would fill megabytes
        self._points: list[_Point] = []
        self._sent: list[_Point] = []  # whose numbers are on their way to the host
        self._latest: dict[str, tuple[StepEnd, Logged]] = {}  # of each name of a kind that has a period of its own
        self._written = 0.0
        self._flushed = 0.0

    def __call__(self, state: TrainState | None, event: Seen, control: Control) -> None:
        match event:
            case StepEnd():
                self._step(event, control)
                return
            case FitBegin():
                self._written = self._flushed = event.time
                self._take_back(event.step)
                if self._hparams is not None:
                    control = control | Control(log={"hparams": self._hparams})
            case Rewound():
                self._take_back(event.to_step)
                event = dataclasses.replace(event, step=event.to_step)  # where the curves go on
            case Interrupted() | FitEnd():
                self._end_interval()
                self._write_points()
                self._write_latest()
        self._write_points()  # before this, so that all is in the order of steps; before an evaluation, which may last
        self._hand_over(event, control)
        if isinstance(event, EvalEnd | Interrupted | FitEnd):
            self._flush(event.time)

    def flush(self) -> None:
        """Writes what waits, so that each step until now is in a point, and has the writers put it on the disk."""
        self._end_interval()
        self._write_points()
        self._flush(self._flushed)  # no event says the time

    def close(self) -> None:
        """Writes what is left, and closes every writer; then the first error is raised."""
        self._end_interval()
        try_all(self._write_points, self._write_latest, *(outlet.close for outlet in self._outlets))

    def take_failure(self) -> Exception | None:
        """Returns the first error of a writer since this was last asked."""
        failures = [outlet.take_failure() for outlet in self._outlets]
        return next((failure for failure in failures if failure is not None), None)

    def _step(self, event: StepEnd, control: Control) -> None:
        self._interval.append((event.step, event.metrics))
        self._last = event
        log = control.log
        silent = type(log) is dict and not log  # whether a device has something to log only the device knows
        if event.step % self._every == 0:
            self._points.append((event, self._interval, control))
            self._interval = []
        elif not silent:
            self._points.append((event, [], control))
        if not silent and not _only_numbers(log):
            self._write_points()  # it may be large
        elif self._points and (len(self._points) >= _AT_MOST or event.time - self._written >= _SECONDS):
            self._write_points(wait=False)
            self._written = event.time
        if self._latest:
            self._write_latest(event.step)
        if event.time - self._flushed >= self._flush_seconds:
            self._write_points()
            self._flush(event.time)

    def _end_interval(self) -> None:
        if not self._interval:
            return
        assert self._last is not None
        control = Control()
        if self._points and self._points[-1][0] is self._last:
            _, _, control = self._points.pop()
        self._points.append((self._last, self._interval, control))
        self._interval = []

    def _write_points(self, *, wait: bool = True) -> None:
        """Writes the points that wait.

        Args:
            wait: Whether for what is on a device, which without it is sent now, and written the next time.
        """
        points, self._points = self._points, []
        sent, self._sent = self._sent, []
        if not wait and points and (send := getattr(points[-1][0].metrics, "send", None)) is not None:
            send()
            self._sent, points = points, []
        for event, measured, control in (*sent, *points):
            if len(measured) != 1:
                event = dataclasses.replace(event, metrics=self._reduced([metrics for _, metrics in measured]))
            self._hand_over(event, self._without_latest(event, control))

    def _reduced(self, measured: list[Mapping[str, float]]) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for metrics in measured:
            for name, value in metrics.items():
                found.setdefault(name, []).append(value)
        return {name: self._reduce(values) for name, values in found.items()}

    def _without_latest(self, event: StepEnd, control: Control) -> Control:
        """What was logged, but for what has a period of its own, of which the latest is kept."""
        if not self._periods:
            return control
        log = dict(control.log)
        for name, entry in control.log.items():
            if kind_of(entry.value) in self._periods:
                # Its tensors may be written over before it is written.
                del log[name]
                own = tree.map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, entry.value)
                self._latest[name] = event, dataclasses.replace(entry, value=own)
        return control.with_log(log)

    def _write_latest(self, step: int | None = None) -> None:
        """Writes what is kept and has its period end at this step, or all that is kept."""
        latest = self._latest
        due = [n for n, (_, e) in latest.items() if step is None or step % self._periods[kind_of(e.value)] == 0]
        if due:
            self._write_points()
        for name in due:
            event, entry = latest.pop(name)
            self._hand_over(dataclasses.replace(event, metrics={}), Control(log={name: entry}))

    def _hand_over(self, event: LoopEvent, control: Control) -> None:
        values = published(event, control)
        for outlet in self._outlets:
            outlet.hand_over(event.step, values, event)

    def _take_back(self, step: int) -> None:
        self._interval = [entry for entry in self._interval if entry[0] <= step]
        self._points = [point for point in (*self._sent, *self._points) if point[0].step <= step]
        self._sent = []
        self._latest = {name: entry for name, entry in self._latest.items() if entry[0].step <= step}
        for outlet in self._outlets:
            outlet.take_back(step)

    def _flush(self, time: float) -> None:
        self._flushed = time
        for outlet in self._outlets:
            outlet.flush()


def _only_numbers(log: Mapping[str, Logged]) -> bool:
    if type(log) is dict:
        return all(kind_of(entry.value) is float for entry in log.values())
    return getattr(log, "only_numbers", False)
