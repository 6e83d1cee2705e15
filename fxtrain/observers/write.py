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
    EvalEnd,
    FitBegin,
    FitEnd,
    Interrupted,
    Logged,
    LoopEvent,
    Rewound,
    Saved,
    StepEnd,
    TrainState,
    refuse_unless_one_of,
    refuse_unless_whole,
)
from fxtrain.values import KINDS, HParams, hand_over, kind_of, published, share, take_back, try_all


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

    Metrics stay on their device until they are written, and then come in one transfer.

    Args:
        writers: From ``fxtrain.writers``, or clu's.
        every: Write the metrics of steps at the multiples of so many steps. Less than that is written at a save and
            at the end, so that no step is lost where a run is interrupted. A mapping says it for each kind:
            ``{"metrics": 10, "images": 500}``, with the names of ``fxtrain.values.KINDS``. What steps log of such a
            kind waits for a multiple, or the end, and only the latest of each name is written then.
        reduce: What is written of the metrics of the steps since the last ones written: their ``"mean"``, the
            ``"last"``, the ``"min"`` or the ``"max"``. NaN stays NaN.
        hparams: What the run is configured with, a nested mapping of strings, numbers and bools; written as the
            session begins.
        flush_seconds: Writers flush after so many seconds, and at each evaluation, save and end.

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
        refuse_unless_one_of("a kind in every", kind, (_METRICS, *KINDS.values()))
        refuse_unless_whole("every" if kind == _METRICS else f"every[{kind!r}]", period, "steps")
    refuse_unless_one_of("reduce", reduce, tuple(_REDUCED))
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

_Step = tuple[int, Mapping[str, Any], tuple[StepEnd, Control] | None]

Seen = FitBegin | StepEnd | EvalEnd | Rewound | Saved | Interrupted | FitEnd


class Write:
    """Hands what is published to writers; made by ``write``."""

    sees_logged = True

    def __init__(
        self,
        writers: tuple[Any, ...],
        periods: Mapping[str, int],
        reduce: str,
        hparams: HParams | None,
        flush_seconds: float,
    ) -> None:
        self._writers = writers
        share(writers)
        self._every = periods.get(_METRICS, 1)
        self._periods = {kind: periods[name] for kind, name in KINDS.items() if periods.get(name, 1) > 1}
        self._reduce = _REDUCED[reduce]
        self._hparams = hparams
        self._flush_seconds = flush_seconds
        # Steps that are not yet written, their metrics, and what they logged, if anything; of the other events, of
        # which each fills a kilobyte, the last.
        self._interval: list[_Step] = []
        self._last: StepEnd | None = None
        self._waiting: dict[str, tuple[StepEnd, Logged]] = {}  # the latest of what has a period of its own
        self._flushed = 0.0

    def __call__(self, state: TrainState | None, event: Seen, control: Control) -> None:
        match event:
            case StepEnd():
                self._step(event, control)
                if event.time - self._flushed >= self._flush_seconds:
                    self._flush(event)
                return
            case FitBegin():
                self._flushed = event.time
                self._take_back(event.step)
                if self._hparams is not None:
                    control = control | Control(log={"hparams": self._hparams})
            case Rewound():
                self._take_back(event.to_step)
                event = dataclasses.replace(event, step=event.to_step)  # where the curves go on
            case Saved() | Interrupted() | FitEnd():
                self._write_interval()
                if not isinstance(event, Saved):
                    self._write_waiting()
        if self._interval:  # what steps logged goes before this, so that all is written in the order of steps
            self._write_logged(self._interval)
            self._interval = [(step, metrics, None) for step, metrics, _ in self._interval]
        self._hand_over(event, control)
        if isinstance(event, EvalEnd | Saved | Interrupted | FitEnd):
            self._flush(event)

    def close(self) -> None:
        """Writes what is left, and closes every writer; then the first error is raised."""
        try_all(self._write_interval, self._write_waiting, *(writer.close for writer in self._writers))

    def _step(self, event: StepEnd, control: Control) -> None:
        # Whether something was logged under its flag only the device knows: it is asked when the interval is written.
        logged = None if type(control.log) is dict and not control.log else (event, control)
        self._interval.append((event.step, event.metrics, logged))
        self._last = event
        if event.step % self._every == 0:
            self._write_interval()
        if self._waiting:
            self._write_waiting(event.step)

    def _write_interval(self) -> None:
        if not self._interval:
            return
        self._write_logged(self._interval[:-1])
        last, _, logged = self._interval[-1]
        measured = [metrics for _, metrics, _ in self._interval]
        self._interval = []
        assert self._last is not None
        event = dataclasses.replace(self._last, step=last, metrics=self._reduced(measured))
        self._hand_over(event, Control() if logged is None else self._without_waiting(*logged))

    def _write_logged(self, steps: list[_Step]) -> None:
        for _, _, logged in steps:
            if logged is not None:
                event, control = logged
                self._hand_over(dataclasses.replace(event, metrics={}), self._without_waiting(event, control))

    def _reduced(self, measured: list[Mapping[str, float]]) -> dict[str, float]:
        if len(measured) == 1:
            return dict(measured[0])
        found: dict[str, list[float]] = {}
        for metrics in measured:
            for name, value in metrics.items():
                found.setdefault(name, []).append(value)
        return {name: self._reduce(values) for name, values in found.items()}

    def _without_waiting(self, event: StepEnd, control: Control) -> Control:
        """What was logged, but for what has a period of its own, which is kept."""
        if not self._periods:
            return control
        log = dict(control.log)
        for name, entry in control.log.items():
            if kind_of(entry.value) in self._periods:
                # Its tensors may be written over before it is written.
                del log[name]
                own = tree.map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, entry.value)
                self._waiting[name] = event, dataclasses.replace(entry, value=own)
        return control.with_log(log)

    def _write_waiting(self, step: int | None = None) -> None:
        """Writes what waited for this step, or all that waits."""
        for name, (event, entry) in list(self._waiting.items()):
            if step is None or step % self._periods[kind_of(entry.value)] == 0:
                del self._waiting[name]
                self._hand_over(dataclasses.replace(event, metrics={}), Control(log={name: entry}))

    def _hand_over(self, event: LoopEvent, control: Control) -> None:
        values = published(event, control)
        for writer in self._writers:
            hand_over(writer, event.step, values, event)

    def _take_back(self, step: int) -> None:
        self._interval = [entry for entry in self._interval if entry[0] <= step]
        self._waiting = {name: entry for name, entry in self._waiting.items() if entry[0].step <= step}
        for writer in self._writers:
            take_back(writer, step)

    def _flush(self, event: LoopEvent) -> None:
        self._flushed = event.time
        for writer in self._writers:
            writer.flush()
