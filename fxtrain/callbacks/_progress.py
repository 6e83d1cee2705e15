"""Logs of a run's progress: throughput, durations, and means of training metrics over each epoch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain.core import (
    Control,
    EpochEnd,
    EvalBegin,
    EvalEnd,
    Event,
    StepEnd,
    TrainState,
    Updated,
    describe,
    did_you_mean,
)
from fxtrain.fold import Handler, When, as_trigger, stateful

Seen = StepEnd | EvalBegin | EvalEnd


class ThroughputState(NamedTuple):
    """State of ``throughput`` since it last published."""

    steps: Tensor  # int64 []
    seconds: Tensor  # float64 []
    waited: Tensor  # float64 []: seconds spent waiting for data
    evaluating: Tensor  # float64 []: seconds of evaluations since the last step; negative during an evaluation


def throughput(
    *,
    samples: int | None = None,
    tokens: int | None = None,
    flops: float | None = None,
    peak: float | None = None,
    every: When = 50,
    name: str = "throughput",
) -> Handler:
    """Logs steps, samples, tokens and floating-point operations per second, and hardware utilization.

        utilization = flops per step * steps / (seconds * peak)

    Time is measured on the loop's clock, from the end of one step to the end of the next, without the evaluations in
    between. Each published value covers the time since the last one. The first step of a session is excluded, because
    it compiles.

    Args:
        samples: Samples per batch.
        tokens: Tokens per batch.
        flops: Floating-point operations per step, as counted by ``fx.explain(step, state, batch).flops``.
        peak: Peak floating-point operations per second of the hardware.
        every: When to log: a number of steps, or a trigger, evaluated at ``StepEnd``.
        name: The slot, and the prefix of the logged names: ``<name>/steps_per_second``, ``/samples_per_second``,
            ``/tokens_per_second``, ``/flops_per_second``, ``/utilization``, ``/data_wait`` (a fraction of the time).

    Raises:
        ValueError: If an argument is not positive and finite, or ``peak`` is given without ``flops``.

    Example:
        >>> import fxtrain as fx
        >>> callback = fx.compose(throughput(samples=32, every=3))
        >>> state = fx.attach(fx.init(torch.nn.Linear(1, 1)), callback)
        >>> for step in (1, 2, 3):
        ...     event = fx.StepEnd(step=step, metrics={}, time=0.5 * step, previous_time=0.5 * (step - 1))
        ...     state, control = callback(state, event)
        >>> float(control.log["throughput/samples_per_second"].value)
        64.0
    """
    given = {"samples": samples, "tokens": tokens, "flops": flops, "peak": peak}
    for argument, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"expected {argument} to be positive and finite, got {describe(value)}.")
    if peak is not None and flops is None:
        raise ValueError("expected flops together with peak, got peak alone. Give the operations of a step as flops=.")
    due = as_trigger(every)

    def update(state: TrainState, event: Seen, slot: ThroughputState) -> tuple[ThroughputState, Control]:
        if isinstance(event, EvalBegin | EvalEnd):
            since = event.time if isinstance(event, EvalEnd) else -event.time
            return slot._replace(evaluating=slot.evaluating + since), Control()
        if event.previous_time > 0:
            took = event.time - event.previous_time - slot.evaluating
            slot = slot._replace(
                steps=slot.steps + 1, seconds=slot.seconds + took, waited=slot.waited + event.data_wait
            )
        slot = slot._replace(evaluating=torch.zeros_like(slot.evaluating))
        if not due(event):
            return slot, Control()
        steps_per_second = slot.steps / slot.seconds
        log = {"steps_per_second": steps_per_second, "data_wait": slot.waited / slot.seconds}
        log |= {
            f"{unit}_per_second": steps_per_second * value for unit, value in given.items() if value and unit != "peak"
        }
        if flops is not None and peak is not None:
            log["utilization"] = steps_per_second * flops / peak
        known = slot.steps > 0
        shown = {f"{name}/{key}": torch.where(known, value, math.nan) for key, value in log.items()}
        return start(state), Control(log=shown)

    def start(state: TrainState) -> ThroughputState:
        seconds = torch.zeros((), dtype=torch.float64, device=state.step.device)
        return ThroughputState(torch.zeros_like(state.step), seconds, seconds.clone(), seconds.clone())

    return stateful(name, start, update)


def durations(*, steps: When | None = None, name: str = "duration") -> Handler:
    """Logs the seconds that epochs, evaluations and steps take, each at its end.

    Equal runs take different times. Without this callback and ``throughput``, they log the same values.

    Args:
        steps: When to log the duration of a step: a number of steps, or a trigger, evaluated at ``StepEnd``. By default
            durations of steps are not logged.
        name: Prefix of the logged names: ``<name>/epoch``, ``<name>/evaluation``, ``<name>/step``.

    Example:
        >>> import fxtrain as fx
        >>> state, event = fx.init({"w": torch.zeros(())}), fx.EpochEnd(step=9, epochs_done=1, duration=1.5)
        >>> fx.compose(durations())(state, event)[1].log["duration/epoch"].value
        1.5
    """
    parts: dict[type[Event], str] = {EpochEnd: "epoch", EvalEnd: "evaluation"}
    due = None if steps is None else as_trigger(steps, "steps")
    if due is not None:
        parts[StepEnd] = "step"

    def log(state: TrainState, event: EpochEnd | EvalEnd | StepEnd) -> tuple[TrainState, Control]:
        if due is not None and isinstance(event, StepEnd) and not due(event):
            return state, Control()
        return state, Control(log={f"{name}/{parts[type(event)]}": event.duration})

    return Handler("durations", log, frozenset(parts))


def epoch_mean(*names: str) -> Handler:
    """Logs the means of training metrics over each epoch, at ``EpochEnd``, as ``epoch/<metric>``.

    The means are those of ``EpochEnd.metrics``. An epoch without steps logs nothing.

    Args:
        names: Names of step metrics; ``"loss"`` by default.

    Raises:
        KeyError: At the first step, if it has no metric of that name.

    Example:
        >>> import fxtrain as fx
        >>> state = fx.init({"w": torch.zeros(())})
        >>> event = fx.EpochEnd(step=9, metrics={"loss": torch.tensor(0.5), "accuracy": torch.tensor(0.75)})
        >>> fx.compose(epoch_mean("accuracy"))(state, event)[1].log["epoch/accuracy"].value
        tensor(0.7500)
    """
    watched = names or ("loss",)

    def log(state: TrainState, event: Updated | EpochEnd) -> tuple[TrainState, Control]:
        found = {metric: event.metrics[metric] for metric in watched if metric in event.metrics}
        if isinstance(event, EpochEnd):
            return state, Control(log={f"epoch/{metric}": value for metric, value in found.items()})
        # While the step is traced, names are checked, which adds nothing to its graph. The metrics of one of several
        # models are only some of the step's.
        for metric in watched:
            if metric not in found and event.model is None:
                there = ", ".join(map(repr, event.metrics))
                raise KeyError(
                    f"expected the step metric {metric!r} for epoch_mean, got {there}."
                    f"{did_you_mean(metric, event.metrics)} Return it from the loss function, or name one of these."
                )
        return state, Control()

    return Handler("epoch_mean", log, frozenset({Updated, EpochEnd}))
