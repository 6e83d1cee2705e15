"""Write: hands what a run publishes to writers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fxtrain.core import (
    Control,
    EvalEnd,
    FitBegin,
    FitEnd,
    Interrupted,
    LoopEvent,
    Rewound,
    Saved,
    StepEnd,
    TrainState,
    refuse_unless_whole,
)
from fxtrain.values import HParams, hand_over, published, take_back, try_all


def write(
    *writers: Any,
    every: int = 1,
    reduce: str = "mean",
    hparams: Mapping[str, Any] | None = None,
    flush_seconds: float = 30.0,
) -> Write:
    """Hands what is published to writers.

    The metrics of steps are called ``train/<name>``, those of evaluations ``eval/<name>``. What was logged keeps its
    name, and is written at its own event. Where a run resumes or goes back, writers first drop what lies beyond that
    step, so that there is one point for each step in the end.

    Metrics stay on their device until they are written.

    Args:
        writers: From ``fxtrain.writers``, or clu's.
        every: Write the metrics of steps at the multiples of so many steps. Less than that is written at a save and
            at the end, so that no step is lost where a run is interrupted.
        reduce: ``"mean"`` over the steps since the last ones written, or ``"last"`` of them.
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
    refuse_unless_whole("every", every, "steps")
    if reduce not in ("mean", "last"):
        raise ValueError(f"reduce={reduce!r}: 'mean' or 'last' is wanted.")
    if not flush_seconds >= 0:
        raise ValueError(f"flush_seconds={flush_seconds!r}: 0 or more is wanted.")
    return Write(writers, every, reduce, None if hparams is None else HParams(hparams), flush_seconds)


Seen = FitBegin | StepEnd | EvalEnd | Rewound | Saved | Interrupted | FitEnd


class Write:
    """Hands what is published to writers; made by ``write``."""

    sees_logged = True

    def __init__(
        self, writers: tuple[Any, ...], every: int, reduce: str, hparams: HParams | None, flush_seconds: float
    ) -> None:
        self._writers = writers
        self._every = every
        self._reduce = _mean if reduce == "mean" else _last
        self._hparams = hparams
        self._flush_seconds = flush_seconds
        # Steps that are not yet written, and their metrics; of their events, of which each fills a kilobyte, the last.
        self._interval: list[tuple[int, Mapping[str, Any]]] = []
        self._last: StepEnd | None = None
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
        self._hand_over(event, control)
        if isinstance(event, EvalEnd | Saved | Interrupted | FitEnd):
            self._flush(event)

    def close(self) -> None:
        """Writes what is left, and closes every writer; then the first error is raised."""
        try_all(self._write_interval, *(writer.close for writer in self._writers))

    def _step(self, event: StepEnd, control: Control) -> None:
        self._interval.append((event.step, event.metrics))
        self._last = event
        if event.step % self._every == 0:
            self._write_interval(control)
        elif control.log:
            self._hand_over(dataclasses.replace(event, metrics={}), control)

    def _write_interval(self, control: Control | None = None) -> None:
        if self._interval:
            (last, _), measured = self._interval[-1], [metrics for _, metrics in self._interval]
            self._interval = []
            assert self._last is not None
            event = dataclasses.replace(self._last, step=last, metrics=self._reduce(measured))
            self._hand_over(event, control or Control())

    def _hand_over(self, event: LoopEvent, control: Control) -> None:
        values = published(event, control)
        for writer in self._writers:
            hand_over(writer, event, values)

    def _take_back(self, step: int) -> None:
        self._interval = [entry for entry in self._interval if entry[0] <= step]
        for writer in self._writers:
            take_back(writer, step)

    def _flush(self, event: LoopEvent) -> None:
        self._flushed = event.time
        for writer in self._writers:
            writer.flush()


def _mean(measured: list[Mapping[str, float]]) -> dict[str, float]:
    if len(measured) == 1:
        return dict(measured[0])
    found: dict[str, list[float]] = {}
    for metrics in measured:
        for name, value in metrics.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _last(measured: list[Mapping[str, float]]) -> dict[str, float]:
    return dict(measured[-1])
