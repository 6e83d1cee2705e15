"""A progress display for terminals, notebooks and logs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

import torch

from fxtrain.core import (
    Control,
    EpochEnd,
    EvalBegin,
    EvalEnd,
    EvalStep,
    FitBegin,
    FitEnd,
    Interrupted,
    Logged,
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
from fxtrain.core._patterns import is_of_member
from fxtrain.core._rank import rank
from fxtrain.observers._compile_notice import CompileNotice
from fxtrain.observers._display import Column, EpochFrame, EvaluationFrame, Frame, Lines, Panel, display
from fxtrain.observers._machine import check_memory_is_known
from fxtrain.observers._progress_texts import describe_restored, evaluation_frame, memory_text
from fxtrain.observers._running_averages import RunningAverages, ends_epoch
from fxtrain.observers._spacing import Spacing
from fxtrain.values import Text
from fxtrain.values._kinds import kinds_logged

_AVERAGING_SECONDS = 10.0  # for throughput and metrics
_MAX_DEFAULT_METRICS = 4
_LINES_OF_A_RUN = 20  # of epochs, evenly spaced over the run, besides those every few seconds
_TEXTS_SECONDS = 1.0  # by the loop's clock, until texts of steps on a device are shown

Derived = Callable[[Mapping[str, float]], float]
Seen = (
    FitBegin | Restored | StepEnd | EvalBegin | EvalStep | EvalEnd | EpochEnd | Saved | Rewound | Interrupted | FitEnd
)


def progress(
    metrics: Sequence[str] | None = None,
    *,
    rate: tuple[str, float] = ("steps", 1),
    extra: Mapping[str, Derived] | None = None,
    best: str = "loss",
    mode: str = "min",
    smoothing: float | None = None,
    memory: bool = False,
    seconds: float = 10.0,
    every_rank: bool = False,
    file: TextIO | None = None,
) -> Progress:
    """Shows the position, metrics, throughput, elapsed and remaining time of a run.

    Each epoch leaves a line with the means of its metrics, the metrics of the evaluation at its end, and its duration.
    So does each evaluation within an epoch. In a run of many short epochs, about twenty lines are spread over the run,
    besides one every ``seconds``. Texts of one line that callbacks log, such as those of ``callbacks.track_best``, are
    shown too. So are compilations of more than two seconds, with the time that they took the last time.

    On a terminal and in a notebook, a few lines below these are redrawn in place, with a bar each for the run, the
    current epoch and the current evaluation. In other outputs, such as a log file, there is a line about the steps
    every ``seconds`` instead. With several processes, only rank 0 shows progress, and the others copy no metrics to the
    host.

    ``fit`` shows progress in a notebook by itself, unless its observers already do.

    Throughput is averaged over about the last ten seconds. Metrics are averaged over the same time, or over the last 20
    steps if those took less. Evaluations and saves do not lower the throughput, but the remaining time includes them.

    Args:
        metrics: Names of the metrics to show, of steps and of evaluations. By default the loss or, if the step returns
            none, its first four metrics.
        rate: Unit of throughput and number of units per step. ``("tokens", 8192)`` shows tokens per second.
        extra: Additional columns by name, as functions of the metrics:
            ``{"bpb": lambda m: m["loss"] / math.log(2)}``.
        best: Name of the evaluation metric whose best value is shown, if it exists.
        mode: ``"min"`` if lower values of ``best`` are better, ``"max"`` if higher ones are.
        smoothing: Weight of the newest step in the average speed, as in tqdm: from 0, the average of all steps of the
            session, to 1, the speed of the newest step. It replaces the ten seconds.
        memory: Whether to show the memory of tensors on the state's accelerator and its peak or, for a state on the
            CPU, the resident memory of the process and its peak.
        seconds: Time between two lines, if they are not redrawn. In a run of less than ten epochs, there is also a line
            at each tenth of the run.
        every_rank: Whether every process shows progress. Give each its own file then.
        file: The output. Defaults to standard output.

    Raises:
        TypeError: ``metrics`` is a single string.
        ValueError: An argument is out of range.
        OSError: The platform does not report the memory that ``memory=True`` shows. Windows does not.
        KeyError: At run time, if the step does not return one of ``metrics``.

    Example:
        >>> import io
        >>> shown = progress(rate=("tokens", 512), file=io.StringIO())
        >>> shown(None, StepEnd(step=1, total_steps=2, time=1.0, metrics={"loss": 2.0}), Control())
        >>> shown(None, StepEnd(step=2, total_steps=2, time=1.5, metrics={"loss": 1.0}), Control())
        >>> print(shown.file.getvalue(), end="")
        step 1/2 | loss 2.0000 | 1.0 s elapsed
        step 2/2 | loss 1.4872 | 1.02k tokens/s | data wait 0% | 1.5 s elapsed
    """
    if isinstance(metrics, str):
        shown = describe(metrics)
        raise TypeError(f"expected metrics to be a sequence of names, got the string {shown}. Pass ({shown},).")
    check_choice("mode", mode, ("min", "max"))
    check_positive(seconds=seconds)
    if not rate[1] > 0:
        raise ValueError(f"expected rate to be a unit and a positive number of it per step, got {describe(rate)}.")
    if smoothing is not None and not 0 <= smoothing <= 1:
        raise ValueError(f"expected smoothing to be in [0, 1], got {describe(smoothing)}. Pass a weight such as 0.3.")
    if memory:
        check_memory_is_known("memory=True")
    sign = 1 if mode == "min" else -1
    names = None if metrics is None else tuple(metrics)
    return Progress(names, rate, dict(extra or {}), best, sign, smoothing, memory, seconds, every_rank, file)


@dataclasses.dataclass(repr=False, eq=False)
class Progress:
    """Shows the progress of a run. Created by ``progress``."""

    _given: tuple[str, ...] | None  # names of the metrics to show
    _rate: tuple[str, float]
    _extra: Mapping[str, Derived]
    _best_of: str
    _sign: int  # -1 if higher values are better
    _smoothing: float | None
    _shows_memory: bool
    _seconds: float
    _every_rank: bool
    file: TextIO | None

    def __post_init__(self) -> None:
        self._display: Lines | Panel | None = None
        self._notice: CompileNotice | None = None
        self._reset()

    def _reset(self) -> None:
        # Read when a session begins, because torch.distributed may be initialized after this observer is created.
        self._silent = not self._every_rank and rank() != 0
        self._metrics = self._given or ()
        self._averages = RunningAverages(_AVERAGING_SECONDS, self._smoothing)
        self._checked = False
        self._previous_time = 0.0
        self._evaluating: float | None = None  # when the current evaluation began
        self._batches_done = 0  # in the current evaluation
        self._batch_count: int | None = None  # of the current evaluation; until it is known, of the last one
        self._counted_from = (0, 0.0)  # batches done and time, from which the speed of the evaluation is measured
        self._device = torch.device("cpu")
        self._last: tuple[int, Mapping[str, float]] | None = None  # step and metrics of the last evaluation
        self._best: tuple[float, int] | None = None  # best value and its step
        self._spacing = Spacing(self._seconds, _LINES_OF_A_RUN, first=True)
        self._held: tuple[LoopEvent, str, list[Column]] | None = None  # the latest line, if it was not due
        self._logs: list[tuple[LoopEvent, Mapping[str, Logged]]] = []  # with texts that are not shown yet

    def __call__(self, state: TrainState | None, event: Seen, control: Control) -> None:
        if isinstance(event, FitBegin) and state is not None:
            self._device = state.step.device
        try:
            self._show(event, control)
        except BaseException:
            self.close()  # the loop drops a failing observer, which must restore the terminal
            raise

    def close(self) -> None:
        """Restores the terminal."""
        if self._display is not None:
            self._display.close()
            self._display = None

    def _show(self, event: Seen, control: Control) -> None:
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
                if event.resumed:
                    shown.note(event, f"resuming from step {event.step}")
                shown.phase(event, self._frame(event), "running the first step")
            case Restored():
                if said := describe_restored(event):
                    shown.note(event, said)
                shown.phase(event, self._frame(event), "running the first step")
            case StepEnd():
                if not self._checked:
                    self._check(event)
                self._averages.step(event)
                shown.step(event, lambda: self._frame(event))
                self._note_texts(shown, event, control)
            case EvalBegin():
                is_first = self._batch_count is None
                self._evaluating, self._batches_done = event.time, 0
                self._counted_from = (1 if is_first else 0), event.time
                self._batch_count = event.num_batches or self._batch_count
                shown.phase(event, self._frame(event), "evaluating")
            case EvalStep():
                self._batches_done = event.index + 1
                if self._batches_done == self._counted_from[0]:
                    self._counted_from = self._batches_done, event.time  # after the compilation
                shown.evaluating(event, lambda: self._frame(event))
            case EvalEnd():
                self._evaluated(event)
                shown.evaluated(event, self._frame(event))
                if not ends_epoch(event):
                    columns = self._metric_columns(self._averages.metrics)
                    took = f"evaluated in {format_duration(event.duration)}"
                    self._leave(shown, event, f"step {event.step}", columns, took)
                self._note_texts(shown, event, control)
            case EpochEnd():
                total = "" if event.total_epochs is None else f"/{event.total_epochs}"
                label = f"epoch {str(event.epochs_done).rjust(len(total) - 1)}{total}"
                self._leave(shown, event, label, self._metric_columns(event.metrics), format_duration(event.duration))
            case Saved():
                self._averages.pause(event.time - self._previous_time)
            case Rewound():
                self._averages.pause(event.time - self._previous_time)
                if self._best is not None and self._best[1] > event.to_step:
                    self._best = None
                shown.note(event, f"rewound from step {event.from_step} to step {event.to_step}")
            case Interrupted():
                shown.interrupted(event, f"interrupted at step {event.step}: {event.cause}")
            case FitEnd():
                if self._held is not None:
                    shown.leave(*self._held)
                self._note_texts(shown, event, control)
                best = self._best and f"; best {self._best_of} {format_number(self._best[0])} at step {self._best[1]}"
                ended = f"{event.reason}, in {format_duration(event.time)}{best or ''}"
                shown.end(event, self._frame(event), ended)
                self.close()
        self._previous_time = event.time

    # Called by the loop while a step compiles, during which no events fire

    def compile_began(self, name: str, last_seconds: float | None) -> None:
        shown = self._display
        if shown is not None:
            before = "" if last_seconds is None else f" (last time: {format_duration(last_seconds)})"

            def show(seconds: float, is_first: bool) -> None:
                shown.compiling(f"compiling {name}", f": {format_duration(seconds)}", before, is_first)

            self._notice = CompileNotice(show)

    def compile_ended(self, name: str, seconds: float | None) -> None:
        notice, self._notice = self._notice, None
        if notice is not None:
            notice.end()
            if notice.is_shown and self._display is not None and seconds is not None:
                self._display.compiled(f"compiled {name} in {format_duration(seconds)}")

    def _note_texts(self, shown: Lines | Panel, event: StepEnd | EvalEnd | FitEnd, control: Control) -> None:
        """Shows logged texts of one line. Those of steps on a device wait, because a read would synchronize with it."""
        if Text in kinds_logged(control.log):
            self._logs.append((event, control.log))
        waits = isinstance(event, StepEnd) and type(control.log) is not dict
        if not self._logs or (waits and event.time - self._logs[0][0].time < _TEXTS_SECONDS):
            return
        logs, self._logs = self._logs, []
        for logged_at, log in logs:
            for entry in log.values():
                if type(entry.value) is Text and "\n" not in entry.value.markdown.strip():
                    at = f"step {logged_at.step}: " if isinstance(logged_at, StepEnd) else ""
                    shown.note(event, at + entry.value.markdown.strip())

    def _leave(
        self, shown: Lines | Panel, event: EvalEnd | EpochEnd, label: str, columns: list[Column], took: str
    ) -> None:
        """Leaves a line with metrics, those of the evaluation at this step if there was one, and a duration."""
        if self._last is not None and self._last[0] == event.step:
            values = self._last[1]
            own = self._metric_columns(values)
            columns = columns + [(f"eval {name}", value) for name, value in own + self._other_columns(values)]
        columns = [*columns, ("", took)]
        if self._best is not None and self._best[1] == event.step:
            columns.append(("", f"best {self._best_of}"))
        self._held = event, label, columns
        if self._spacing.is_due(event):
            shown.leave(*self._held)
            self._held = None

    def _evaluated(self, event: EvalEnd) -> None:
        if self._evaluating is not None:
            self._averages.pause(event.time - self._evaluating)
            self._evaluating = None
        self._batch_count = self._batches_done
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
        left = self._averages.remaining(event)
        return Frame(
            step=step.rjust(2 * len(f"{event.total_steps or 0}") + 1 if event.total_steps else 0),
            epoch=self._epoch(event),
            columns=[
                *self._metric_columns(self._averages.metrics),
                *self._throughput_columns(),
                *([("memory", memory_text(self._device))] if self._shows_memory else ()),
            ],
            elapsed=f"{format_duration(event.time)} elapsed",
            remaining=f"{format_duration(left)} left" if left else None,
            evaluating=self._evaluating_frame(event) if isinstance(event, EvalStep) else None,
            evaluation=self._evaluation_columns(),
        )

    def _epoch(self, event: LoopEvent) -> EpochFrame | None:
        epoch, length = event.epoch, event.epoch_length
        if epoch is None or not length:
            return None
        of_all = "" if event.total_epochs is None else f"/{event.total_epochs}"
        batches = min(event.position - event.epoch_start, length)
        if batches == 0 and event.epochs_done:
            batches = length  # the epoch that ended, until the next one takes a step
        whole, left = (self._averages.duration(count, event) for count in (length, length - batches))
        return EpochFrame(
            share=batches / length,
            done=f"{epoch:.2f}{of_all}",
            count=f"{math.floor(epoch + 1e-9)}{of_all}",
            seconds=None if whole is None else f"{format_duration(whole)} per epoch",
            remaining=f"{format_duration(left)} left" if left else None,
        )

    def _evaluating_frame(self, event: EvalStep) -> EvaluationFrame:
        return evaluation_frame(self._batches_done, self._batch_count, self._counted_from, event.time)

    def _metric_columns(self, metrics: Mapping[str, float]) -> list[Column]:
        shown = [(name, format_number(metrics[name])) for name in self._metrics if name in metrics]
        for name, derive in self._extra.items() if metrics else ():
            with contextlib.suppress(KeyError):  # an evaluation may have fewer metrics than a step
                shown.append((name, format_number(derive(metrics))))
        return shown

    def _other_columns(self, metrics: Mapping[str, float]) -> list[Column]:
        """Returns the metrics of an evaluation without those of steps, and without those of each member of a batch."""
        names = [name for name in metrics if name not in self._metrics and not is_of_member(name)]
        return [(name, format_number(metrics[name])) for name in names]

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
        columns = [("at step", str(step)), *self._metric_columns(metrics), *self._other_columns(metrics)]
        if self._best:
            columns.append((f"best {self._best_of}", f"{format_number(self._best[0])} at step {self._best[1]}"))
        return columns

    def _check(self, event: StepEnd) -> None:
        self._checked = True  # only once, because reading metrics synchronizes with the device
        if self._given is None:
            self._metrics = ("loss",) if "loss" in event.metrics else tuple(event.metrics)[:_MAX_DEFAULT_METRICS]
        for name in self._metrics:
            if name not in event.metrics:
                raise KeyError(
                    f"expected the metrics of the step to include {name!r}, got "
                    f"{describe(dict.fromkeys(event.metrics))}.{did_you_mean(name, event.metrics)} Set "
                    "progress(metrics=...) to names that the step returns."
                )
        for derive in self._extra.values():
            derive(event.metrics)
