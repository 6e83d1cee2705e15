"""The observer that passes metrics and logged values to writers."""

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
    check_non_negative,
    try_all,
)
from fxtrain.fold import When, as_trigger
from fxtrain.values import KINDS, HParams, kind_of, published
from fxtrain.writers import Writer
from fxtrain.writers._multi import MultiWriter


def write(
    *writers: Writer,
    every: When | Mapping[str, When] = 1,
    reduce: str = "mean",
    hparams: Mapping[str, object] | None = None,
    flush_seconds: float = 30.0,
) -> Write:
    """Passes metrics and logged values to writers.

    Step metrics are named ``train/<name>``, and evaluation metrics ``eval/<name>``. Logged values keep their names, and
    are written at the event that logged them. When a run resumes or rewinds, writers first mark all later points as
    abandoned, so readers find one point for each step.

    Points of steps are held back and written in batches of 64, or each second, and before any other event or save.
    Until then, metrics stay on their device. They are copied to the host in a single asynchronous transfer.

    A failing writer does not affect the others. After an ``OSError``, such as a full disk, up to 10,000 points and 64
    MiB are queued for it. It is retried each second, at each flush and at the end. Lost points are counted in a
    warning. Under ``observers.required``, a failure ends the run.

    Args:
        writers: Writers from ``fxtrain.writers`` or clu.
        every: When a point of the step metrics ends: at multiples of a number of steps, or when a trigger holds. An
            interval also ends before each save and at the end, so an interruption loses no step. A mapping sets it per
            kind, with the names of ``fxtrain.values.KINDS``:
            ``{"metrics": 10, "images": 500}``. Of values that steps log of such a kind, only the latest of each name is
            kept, and written at the kind's next such step or at the end.
        reduce: How the step metrics of an interval are reduced to a point: ``"mean"``, ``"last"``, ``"min"`` or
            ``"max"``. NaN propagates.
        hparams: Hyperparameters, as a nested mapping of strings, numbers and bools. They are written when a session
            begins.
        flush_seconds: Time between flushes. Writers are also flushed at each evaluation, before each save, and at the
            end.

    Raises:
        TypeError: ``every`` is neither an int, a trigger nor a mapping of these.
        ValueError: There is no writer, or an argument is out of range.

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
    periods = dict(every) if isinstance(every, Mapping) else {_METRICS: every}
    for kind, period in periods.items():
        check_choice("a key of every", kind, (_METRICS, *KINDS.values()))
        as_trigger(period, "every" if kind == _METRICS else f"every[{kind!r}]")
    check_choice("reduce", reduce, tuple(_REDUCTIONS))
    check_non_negative(flush_seconds=flush_seconds)
    return Write(writers, periods, reduce, None if hparams is None else HParams(hparams), flush_seconds)


_METRICS = "metrics"
_REDUCTIONS: Mapping[str, Callable[[list[float]], float]] = {
    "mean": lambda values: sum(values) / len(values),
    "last": lambda values: values[-1],
    "min": lambda values: float(np.min(values)),  # propagates NaN, unlike min()
    "max": lambda values: float(np.max(values)),
}

_MAX_HELD_POINTS = 64
_MAX_HELD_SECONDS = 1.0  # by the loop's clock

_Steps = list[tuple[int, Mapping[str, Any]]]  # steps and their metrics
_Point = tuple[StepEnd, _Steps, Control]  # event to write at, steps to reduce, logged values

Seen = FitBegin | StepEnd | EvalBegin | EvalEnd | Rewound | Interrupted | FitEnd


class Write:
    """Passes metrics and logged values to writers. Created by ``write``.

    Points of steps are written in batches, because a single write between two steps would run with cold caches and wait
    for the device.
    """

    sees_logged = True

    def __init__(
        self,
        writers: tuple[Writer, ...],
        periods: Mapping[str, When],
        reduce: str,
        hparams: HParams | None,
        flush_seconds: float,
    ) -> None:
        self._log = MultiWriter("write", writers)
        self._log.defer(self._write_points)
        self._due = as_trigger(periods.get(_METRICS, 1))
        self._due_by_kind = {kind: as_trigger(periods[n]) for kind, n in KINDS.items() if periods.get(n, 1) != 1}
        self._reduce = _REDUCTIONS[reduce]
        self._hparams = hparams
        self._flush_seconds = flush_seconds
        self._interval: _Steps = []  # steps since the last point
        self._last: StepEnd | None = None  # the interval's last event; keeping all would take megabytes
        self._points: list[_Point] = []
        self._sent: list[_Point] = []  # with an asynchronous copy to the host in progress
        self._latest: dict[str, tuple[StepEnd, Logged]] = {}  # by name, for kinds with their own period
        self._batch_time = self._flush_time = 0.0

    def __call__(self, state: TrainState | None, event: Seen, control: Control) -> None:
        match event:
            case StepEnd():
                self._step(event, control)
                return
            case FitBegin():
                self._batch_time = self._flush_time = event.time
                self._truncate_after(event.step)
                if self._hparams is not None:
                    control = control | Control(log={"hparams": self._hparams})
            case Rewound():
                self._truncate_after(event.to_step)
                event = dataclasses.replace(event, step=event.to_step)  # where the curves continue
            case Interrupted() | FitEnd():
                self._end_interval()
                self._write_points()
                self._write_latest()
        self._write_points()  # held points come first in step order; an evaluation may take long
        self._submit(event, control)
        if isinstance(event, EvalEnd | Interrupted | FitEnd):
            self._flush(event.time)

    def flush(self) -> None:
        """Writes a point for every step so far, and flushes the writers."""
        self._end_interval()
        self._write_points()
        self._flush(self._flush_time)  # without an event, the current time is unknown

    def close(self) -> None:
        """Writes all held values and closes every writer, then raises the first error."""
        self._end_interval()
        try_all(self._write_points, self._write_latest, self._log.close)

    def take_failure(self) -> Exception | None:
        """Returns the first error of a writer since the last call."""
        return self._log.take_failure()

    def _step(self, event: StepEnd, control: Control) -> None:
        self._interval.append((event.step, event.metrics))
        self._last = event
        log = control.log
        silent = type(log) is dict and not log  # other logs are lazy, and reading them would wait
        if self._due(event):
            self._points.append((event, self._interval, control))
            self._interval = []
        elif not silent:
            self._points.append((event, [], control))
        if not silent and not _only_scalars(log):
            self._write_points()  # media may be large
        elif self._points and (
            len(self._points) >= _MAX_HELD_POINTS or event.time - self._batch_time >= _MAX_HELD_SECONDS
        ):
            self._write_points(wait=False)
            self._batch_time = event.time
        if self._latest:
            self._write_latest(event)
        if event.time - self._flush_time >= self._flush_seconds:
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
        """Writes the points held back.

        Args:
            wait: Whether to wait for metrics on a device. If False, their copy to the host starts now, and they are
                written by the next call.
        """
        points, self._points = self._points, []
        sent, self._sent = self._sent, []
        if not wait and points and (send := getattr(points[-1][0].metrics, "send", None)) is not None:
            send()
            self._sent, points = points, []
        for event, measured, control in (*sent, *points):
            if len(measured) != 1:
                event = dataclasses.replace(event, metrics=self._reduced([metrics for _, metrics in measured]))
            self._submit(event, self._without_latest(event, control))

    def _reduced(self, measured: list[Mapping[str, float]]) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for metrics in measured:
            for name, value in metrics.items():
                found.setdefault(name, []).append(value)
        return {name: self._reduce(values) for name, values in found.items()}

    def _without_latest(self, event: StepEnd, control: Control) -> Control:
        """Returns the control without logged values of kinds with their own period, which are kept for later."""
        if not self._due_by_kind:
            return control
        log = dict(control.log)
        for name, entry in control.log.items():
            if kind_of(entry.value) in self._due_by_kind:
                # Copied, because its buffers may be donated before it is written.
                del log[name]
                own = tree.map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, entry.value)
                self._latest[name] = event, dataclasses.replace(entry, value=own)
        return control.with_log(log)

    def _write_latest(self, now: StepEnd | None = None) -> None:
        """Writes the kept values of kinds that are due now, or all if ``now`` is None."""
        latest = self._latest
        due = [n for n, (_, e) in latest.items() if now is None or self._due_by_kind[kind_of(e.value)](now)]
        if due:
            self._write_points()
        for name in due:
            event, entry = latest.pop(name)
            self._submit(dataclasses.replace(event, metrics={}), Control(log={name: entry}))

    def _submit(self, event: LoopEvent, control: Control) -> None:
        self._log.put(event.step, published(event, control), event)

    def _truncate_after(self, step: int) -> None:
        self._interval = [entry for entry in self._interval if entry[0] <= step]
        self._points = [point for point in (*self._sent, *self._points) if point[0].step <= step]
        self._sent = []
        self._latest = {name: entry for name, entry in self._latest.items() if entry[0].step <= step}
        self._log.purge(step)

    def _flush(self, time: float) -> None:
        self._flush_time = time
        self._log.flush()


def _only_scalars(log: Mapping[str, Logged]) -> bool:
    if type(log) is dict:
        return all(kind_of(entry.value) is float for entry in log.values())
    return getattr(log, "only_numbers", False)
