"""A progress display for terminals, notebooks and logs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from fxtrain.core import (
    Control,
    EvalBegin,
    EvalEnd,
    EvalStep,
    FitBegin,
    FitEnd,
    Interrupted,
    LoopEvent,
    Restored,
    Rewound,
    Saved,
    StepEnd,
    TrainState,
    check_choice,
    check_positive,
    describe,
    did_you_mean,
    format_duration,
    format_number,
    format_scaled,
)
from fxtrain.observers._display import Column, Frame, Lines, Panel, display
from fxtrain.observers._running_averages import RunningAverages
from fxtrain.observers._wrapped import rank

_AVERAGING_SECONDS = 10.0  # for throughput and metrics

Derived = Callable[[Mapping[str, float]], float]
Seen = FitBegin | Restored | StepEnd | EvalBegin | EvalStep | EvalEnd | Saved | Rewound | Interrupted | FitEnd


def progress(
    metrics: Sequence[str] = ("loss",),
    *,
    rate: tuple[str, float] = ("steps", 1),
    extra: Mapping[str, Derived] | None = None,
    best: str = "loss",
    mode: str = "min",
    seconds: float = 10.0,
    every_rank: bool = False,
    file: TextIO | None = None,
) -> Progress:
    """Shows the position, metrics, throughput and remaining time of a run.

    On a terminal and in a notebook, a few lines are redrawn in place. Other outputs get a line every ``seconds``. With
    several processes, only rank 0 shows progress, and the others copy no metrics to the host.

    Throughput is averaged over about the last ten seconds. Metrics are averaged over the same time, or over the last 20
    steps if those took less. Evaluations and saves do not lower the throughput, but the remaining time includes them.

    Args:
        metrics: Names of the metrics to show, of steps and of evaluations.
        rate: Unit of throughput and number of units per step. ``("tokens", 8192)`` shows tokens per second.
        extra: Additional columns by name, as functions of the metrics:
            ``{"bpb": lambda m: m["loss"] / math.log(2)}``.
        best: Name of the evaluation metric whose best value is shown, if it exists.
        mode: ``"min"`` if lower values of ``best`` are better, ``"max"`` if higher ones are.
        seconds: Time between two lines, if they are not redrawn. There is also a line at each tenth of the run.
        every_rank: Whether every process shows progress. Give each its own file then.
        file: The output. Defaults to standard output.

    Raises:
        TypeError: ``metrics`` is a single string.
        ValueError: An argument is out of range.
        KeyError: At run time, if the step does not return one of ``metrics``.

    Example:
        >>> import io
        >>> shown = progress(rate=("tokens", 512), file=io.StringIO())
        >>> shown(None, StepEnd(step=1, total_steps=2, time=1.0, metrics={"loss": 2.0}), Control())
        >>> shown(None, StepEnd(step=2, total_steps=2, time=1.5, metrics={"loss": 1.0}), Control())
        >>> print(shown.file.getvalue(), end="")
        step 1/2 | loss 2.0000
        step 2/2 | loss 1.4872 | 1.02k tokens/s | data wait 0%
    """
    if isinstance(metrics, str):
        shown = describe(metrics)
        raise TypeError(f"expected metrics to be a sequence of names, got the string {shown}. Pass ({shown},).")
    check_choice("mode", mode, ("min", "max"))
    check_positive(seconds=seconds)
    if not rate[1] > 0:
        raise ValueError(f"expected rate to be a unit and a positive number of it per step, got {describe(rate)}.")
    sign = 1 if mode == "min" else -1
    return Progress(tuple(metrics), rate, dict(extra or {}), best, sign, seconds, every_rank, file)


@dataclasses.dataclass(repr=False, eq=False)
class Progress:
    """Shows the progress of a run. Created by ``progress``."""

    _metrics: tuple[str, ...]
    _rate: tuple[str, float]
    _extra: Mapping[str, Derived]
    _best_of: str
    _sign: int  # -1 if higher values are better
    _seconds: float
    _every_rank: bool
    file: TextIO | None

    def __post_init__(self) -> None:
        self._display: Lines | Panel | None = None
        self._reset()

    def _reset(self) -> None:
        # Read when a session begins, because torch.distributed may be initialized after this observer is created.
        self._silent = not self._every_rank and rank() != 0
        self._averages = RunningAverages(_AVERAGING_SECONDS)
        self._checked = False
        self._previous_time = 0.0
        self._evaluating: float | None = None  # when the current evaluation began
        self._batches_done = 0  # in the current evaluation
        self._last_batch_count: int | None = None  # number of batches of the last evaluation
        self._last: tuple[int, Mapping[str, float]] | None = None  # step and metrics of the last evaluation
        self._best: tuple[float, int] | None = None  # best value and its step

    def __call__(self, state: TrainState | None, event: Seen, control: Control) -> None:
        try:
            self._show(event)
        except BaseException:
            self.close()  # the loop drops a failing observer, which must restore the terminal
            raise

    def close(self) -> None:
        """Restores the terminal."""
        if self._display is not None:
            self._display.close()
            self._display = None

    def _show(self, event: Seen) -> None:
        if isinstance(event, FitBegin):
            self.close()
            self._reset()
        if self._silent:
            return
        if self._display is None:
            self._display = display(self.file, self._seconds)
        shown = self._display
        match event:
            case FitBegin():
                where = f"resuming from step {event.step}; " if event.resumed else ""
                shown.phase(event, self._frame(event), f"{where}compiling and running the first step")
            case Restored():
                if said := _describe_restored(event):
                    shown.phase(event, self._frame(event), f"{said}; compiling and running the first step")
            case StepEnd():
                if not self._checked:
                    self._check(event)
                self._averages.step(event)
                shown.step(event, lambda: self._frame(event))
            case EvalBegin():
                self._evaluating, self._batches_done = event.time, 0
                if self._last_batch_count is None:
                    shown.phase(event, self._frame(event), f"step {event.step}: compiling the evaluation")
            case EvalStep():
                self._batches_done = event.index + 1
                shown.evaluating(event, self._batches_done, self._last_batch_count)
            case EvalEnd():
                self._evaluated(event)
                shown.evaluated(event, self._frame(event))
            case Saved():
                self._averages.pause(event.time - self._previous_time)
            case Rewound():
                self._averages.pause(event.time - self._previous_time)
                if self._best is not None and self._best[1] > event.to_step:
                    self._best = None
                shown.note(event, f"rewound from step {event.from_step} to step {event.to_step}")
            case Interrupted():
                shown.note(event, f"interrupted at step {event.step}: {event.cause}")
            case FitEnd():
                shown.end(event, self._frame(event), f"{event.reason}, in {format_duration(event.time)}")
                self.close()
        self._previous_time = event.time

    def _evaluated(self, event: EvalEnd) -> None:
        if self._evaluating is not None:
            self._averages.pause(event.time - self._evaluating)
            self._evaluating = None
        self._last_batch_count = self._batches_done
        self._last = (event.step, dict(event.metrics))
        if self._best_of not in event.metrics and self._best_of.rpartition("/")[2] in event.metrics:
            raise KeyError(
                f"expected the metrics of the evaluation to include {self._best_of!r}, got "
                f"{describe(dict.fromkeys(event.metrics))}.{did_you_mean(self._best_of, event.metrics)}"
            )
        value = event.metrics.get(self._best_of)
        if value is not None and (self._best is None or self._sign * value < self._sign * self._best[0]):
            self._best = (value, event.step)

    # Texts

    def _frame(self, event: LoopEvent) -> Frame:
        step = f"{event.step}/{event.total_steps}" if event.total_steps is not None else f"{event.step}"
        return Frame(
            step=step.rjust(2 * len(f"{event.total_steps or 0}") + 1 if event.total_steps else 0),
            epoch=_epoch(event),
            columns=[*self._metric_columns(self._averages.metrics), *self._throughput_columns()],
            remaining=f"{format_duration(left)} left" if (left := self._averages.remaining(event)) else None,
            evaluation=self._evaluation_columns(),
        )

    def _metric_columns(self, metrics: Mapping[str, float]) -> list[Column]:
        shown = [(name, format_number(metrics[name])) for name in self._metrics if name in metrics]
        for name, derive in self._extra.items() if metrics else ():
            with contextlib.suppress(KeyError):  # an evaluation may have fewer metrics than a step
                shown.append((name, format_number(derive(metrics))))
        return shown

    def _throughput_columns(self) -> list[Column]:
        unit, in_a_step = self._rate
        rate, waiting = self._averages.rate, self._averages.waiting
        if rate is None or waiting is None:
            return []
        return [("", f"{format_scaled(rate * in_a_step)} {unit}/s"), ("data wait", f"{waiting:.0%}")]

    def _evaluation_columns(self) -> list[Column]:
        if self._last is None:
            return []
        step, metrics = self._last
        rest = [(name, format_number(value)) for name, value in metrics.items() if name not in self._metrics]
        columns = [("at step", str(step)), *self._metric_columns(metrics), *rest]
        if self._best:
            columns.append((f"best {self._best_of}", f"{format_number(self._best[0])} at step {self._best[1]}"))
        return columns

    def _check(self, event: StepEnd) -> None:
        self._checked = True  # only once, because reading metrics synchronizes with the device
        for name in self._metrics:
            if name not in event.metrics:
                raise KeyError(
                    f"expected the metrics of the step to include {name!r}, got "
                    f"{describe(dict.fromkeys(event.metrics))}.{did_you_mean(name, event.metrics)} Set "
                    "progress(metrics=...) to names that the step returns."
                )
        for derive in self._extra.values():
            derive(event.metrics)


def _describe_restored(event: Restored) -> str:
    """Returns the differences of the restored state from the expected one, in one line."""
    new = [f"slot {name!r} is initialized" for name in event.missing]
    kept = [f"slot {name!r} belongs to no callback" for name in event.extra]
    changed = [f"results may differ in the last bits: {line}" for line in event.environment_changes]
    return "; ".join([*new, *kept, *changed])


def _epoch(event: LoopEvent) -> str | None:
    if event.epoch is None:
        return None
    return f"epoch {event.epoch:.2f}" + (f"/{event.total_epochs}" if event.total_epochs is not None else "")
