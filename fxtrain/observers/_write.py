"""The observer that passes metrics and logged values to writers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fxtrain import tree
from fxtrain.core import (
    Control,
    EvalBegin,
    EvalEnd,
    EvalStep,
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
from fxtrain.core._rank import rank
from fxtrain.fold import Trigger, When, as_trigger
from fxtrain.model._size import model_sizes
from fxtrain.observers._write_options import Options, checked_prefixes, checked_reductions, reduced, renamed
from fxtrain.values import KINDS, HParams, Kind, Text, Value, kind_of, published
from fxtrain.values._kinds import kinds_logged
from fxtrain.writers import Writer
from fxtrain.writers._multi import MultiWriter


def write(
    *writers: Writer,
    every: When | Mapping[str, When] = 1,
    eval_every: When | None = None,
    reduce: str | Sequence[str] = "mean",
    prefixes: Mapping[str, str] | None = None,
    hparams: Mapping[str, object] | None = None,
    flush_seconds: float = 30.0,
    every_rank: bool = False,
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

    With several processes, only rank 0 writes, and the others copy no metrics to the host.

    Args:
        writers: Writers from ``fxtrain.writers`` or clu.
        every: When a point of the step metrics ends: at multiples of a number of steps, or when a trigger holds. An
            interval also ends before each save and at the end, so an interruption loses no step. A trigger may read the
            metrics to end it at this step: ``fx.every(100) | (lambda event: event.metrics["loss"] > 10)``. What a
            callback logs is written at its step whatever ``every`` is, so a callback asks for a point by logging it. A
            mapping sets it per kind, with the names of ``fxtrain.values.KINDS``: ``{"metrics": 10, "images": 500}``. Of
            values that steps log of such a kind, only the latest of each name is kept, and written at the kind's next
            such step or at the end.
        eval_every: Which batches of an evaluation are written, besides its averages: every n-th batch, or those at
            whose ``EvalStep`` a trigger holds. ``eval_batch/loss/5`` is the loss of the fifth batch. Each batch has its
            own curve over the steps of training, so no two points share a name and a step.
        reduce: How the step metrics of an interval are reduced to a point: ``"mean"``, ``"last"``, ``"min"``, ``"max"``
            or ``"std"``, the standard deviation of the interval's steps. Of several, such as ``("mean", "std")``, all
            but the first are named ``train/<name>_<reduction>``. NaN propagates.
        prefixes: Other prefixes for the names in these writers, by the default one: ``{"train": "training", "eval":
            "val"}``. An empty string removes the prefix. Those of ``train``, ``eval`` and ``eval_batch`` can be chosen,
            and logged values with these prefixes follow. ``Result.history``, checkpoints and callbacks keep the
            defaults. Reports recognize metrics by the defaults too.
        hparams: The configuration, as in ``RunInfo``, written when a session begins, with the sizes of
            ``callbacks.model_size``. Defaults to that of ``fit(run=...)``.
        flush_seconds: Time between flushes. Writers are also flushed at each evaluation, before each save, and at the
            end.
        every_rank: Whether every process writes. Give each its own writers then.

    Raises:
        TypeError: ``every`` is neither an int, a trigger nor a mapping of these, or a prefix is not a string.
        ValueError: There is no writer, or an argument is out of range. At run time, if two values have the same name.

    Example:
        >>> import pathlib, tempfile
        >>> from fxtrain import writers
        >>> path = pathlib.Path(tempfile.mkdtemp(), "metrics.jsonl")
        >>> observer = write(writers.jsonl(path, clock=None), every=2)
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
    check_non_negative(flush_seconds=flush_seconds)
    options = Options(
        periods,
        checked_reductions(reduce),
        checked_prefixes(prefixes or {}),
        None if hparams is None else HParams(hparams),
        flush_seconds,
        every_rank,
    )
    return Write(writers, options) if eval_every is None else WriteBatches(writers, options, eval_every)


_METRICS = "metrics"

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

    def __init__(self, writers: tuple[Writer, ...], options: Options) -> None:
        self._log = MultiWriter("write", writers)
        self._log.defer(self._write_points)
        self._options = options
        periods = options.periods
        due = as_trigger(periods.get(_METRICS, 1))
        self._due = due.predicate if isinstance(due, Trigger) else due  # called at each step, so without the trigger
        self._due_by_kind = {kind: as_trigger(periods[n]) for kind, n in KINDS.items() if periods.get(n, 1) != 1}
        # Otherwise a point of one step has its metrics unchanged, still unread.
        self._reduces_single = len(options.reductions) > 1 or "std" in options.reductions
        self._is_silent = self._on_other_rank()
        self._interval: _Steps = []  # steps since the last point
        self._last: StepEnd | None = None  # the interval's last event; keeping all would take megabytes
        self._points: list[_Point] = []
        self._sent: list[_Point] = []  # with an asynchronous copy to the host in progress
        self._latest: dict[str, tuple[StepEnd, Logged]] = {}  # by name, for kinds with their own period
        self._batch_time = self._flush_time = 0.0

    def _on_other_rank(self) -> bool:
        return not self._options.every_rank and rank() != 0

    def __call__(self, state: TrainState | None, event: Seen, control: Control) -> None:
        if isinstance(event, FitBegin):
            # Read again, because torch.distributed may be initialized after this observer is created.
            self._is_silent = self._on_other_rank()
        if self._is_silent:
            return
        match event:
            case StepEnd():
                self._step(event, control)
                return
            case FitBegin():
                self._batch_time = self._flush_time = event.time
                self._truncate_after(event.step)
                control = control | Control(log=self._run_values(state, event))
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

    @property
    def keeps(self) -> frozenset[Kind]:
        """The kinds of logged values that at least one of the writers keeps."""
        return self._log.keeps

    def take_failure(self) -> Exception | None:
        """Returns the first error of a writer since the last call."""
        return self._log.take_failure()

    def _step(self, event: StepEnd, control: Control) -> None:
        time, log = event.time, control.log
        self._interval.append((event.step, event.metrics))
        self._last = event
        silent = type(log) is dict and not log  # other logs are lazy, and reading them would wait
        if self._due(event):
            self._points.append((event, self._interval, control))
            self._interval = []
        elif not silent:
            self._points.append((event, [], control))
        if not silent and not _is_small(log):
            self._write_points()  # media may be large
        elif self._points and (len(self._points) >= _MAX_HELD_POINTS or time - self._batch_time >= _MAX_HELD_SECONDS):
            self._write_points(wait=False)
            self._batch_time = time
        if self._latest:
            self._write_latest(event)
        if time - self._flush_time >= self._options.flush_seconds:
            self._write_points()
            self._flush(time)

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
            if len(measured) != 1 or (measured and self._reduces_single):
                event = dataclasses.replace(
                    event, metrics=reduced([metrics for _, metrics in measured], self._options.reductions)
                )
            self._submit(event, self._without_latest(event, control))

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

    def _run_values(self, state: TrainState | None, event: FitBegin) -> dict[str, Value]:
        """Returns the facts and the configuration of the run, with the sizes of its model."""
        run, hparams = event.run, self._options.hparams
        found: dict[str, Value] = {"run": run} if run is not None and run.given() else {}
        if hparams is None and run is not None and run.config:
            hparams = HParams(run.config)
        if hparams is None:
            return found
        given, sizes = hparams.flat(), {} if state is None else model_sizes(state)
        others = {name: size for name, size in sizes.items() if name not in given}
        return found | {"hparams": HParams({**hparams.values, **others})}

    def _submit(self, event: LoopEvent, control: Control) -> None:
        values = renamed(self._values(event, control), self._options.prefixes)
        self._log.put(event.step, values, event)

    def _values(self, event: LoopEvent, control: Control) -> dict[str, Value]:
        return published(event, control)

    def _truncate_after(self, step: int) -> None:
        self._interval = [entry for entry in self._interval if entry[0] <= step]
        self._points = [point for point in (*self._sent, *self._points) if point[0].step <= step]
        self._sent = []
        self._latest = {name: entry for name, entry in self._latest.items() if entry[0].step <= step}
        self._log.purge(step)

    def _flush(self, time: float) -> None:
        self._flush_time = time
        self._log.flush()


class WriteBatches(Write):
    """Also writes the metrics of evaluation batches. Created by ``write(eval_every=...)``.

    They are written at the end of the evaluation, because an aborted one is repeated.
    """

    def __init__(self, writers: tuple[Writer, ...], options: Options, eval_every: When) -> None:
        super().__init__(writers, options)
        is_due = as_trigger(eval_every, "eval_every")
        # The interval counts batches of the evaluation, not steps.
        self._batch_is_due = is_due if callable(eval_every) else lambda event: (event.index + 1) % eval_every == 0
        self._batches: dict[int, Mapping[str, Any]] = {}  # metrics by number of the batch

    def __call__(self, state: TrainState | None, event: Seen | EvalStep, control: Control) -> None:
        if isinstance(event, EvalBegin):
            self._batches = {}
        if not isinstance(event, EvalStep):
            super().__call__(state, event, control)
        elif not self._is_silent:
            if self._batch_is_due(event):
                self._batches[event.index + 1] = event.metrics
            if control.log:
                self._write_points()
                self._submit(event, control)

    def _values(self, event: LoopEvent, control: Control) -> dict[str, Value]:
        values = super()._values(event, control)
        if isinstance(event, EvalEnd):
            batches, self._batches = self._batches, {}
            for number, metrics in batches.items():
                values |= {f"eval_batch/{name}/{number}": value for name, value in metrics.items()}
        return values


def _is_small(log: Mapping[str, Logged]) -> bool:
    return kinds_logged(log) <= {float, Text}
