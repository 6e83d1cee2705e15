"""Callbacks that stop a run: early stopping, a target value and a time limit."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.callbacks._metric import Better, Metric, called, direction, measured, needing
from fxtrain.core import (
    Control,
    EvalEnd,
    FitEnd,
    Logged,
    StepEnd,
    TrainState,
    Updated,
    check_choice,
    check_int,
    check_positive_int,
    describe,
    epochs_taken,
    wide_dtype,
)
from fxtrain.fold import Handler, on, slotted, stateful

_UNITS = ("evaluations", "steps", "epochs")
# Rounding error of a difference of fractional epochs.
_ROUNDING = 1e-9


class Overfitting(NamedTuple):
    """State of the gap between the evaluation metric and the training metric."""

    total: Tensor  # float64 []: sum of the training metric since the last evaluation
    count: Tensor  # int64 []: number of steps in the sum
    gap: Tensor  # float64 []: evaluation minus training at the last evaluation, signed so that larger is worse
    grown: Tensor  # int64 []: consecutive evaluations at which the gap grew


class EarlyStoppingState(NamedTuple):
    """State of ``early_stopping``."""

    best: Tensor  # float64 []: the best value so far; before the first, the worst value (baseline or nan if callable)
    best_step: Tensor  # int64 []: its step; -1 before the first
    evaluations: Tensor  # int64 []: evaluations so far
    since: Tensor  # []: start of the wait: int64 in evaluations or steps, float64 in epochs
    kept: Any  # the best (params, buffers), or () without restore_best=True
    overfitting: Any  # Overfitting, or () without overfit_patience


def early_stopping(
    metric: Metric,
    *,
    patience: int,
    unit: str = "evaluations",
    mode: str | Better = "min",
    min_delta: float = 0.0,
    relative: bool = False,
    baseline: float | None = None,
    start_from: int = 0,
    good_enough: float | None = None,
    diverged: float | None = None,
    check_finite: bool = True,
    overfit_patience: int | None = None,
    overfit_min_delta: float = 0.0,
    train_metric: str = "loss",
    restore_best: Any = False,
    name: str = "early_stopping",
) -> Handler:
    """Stops the run when an evaluation metric has not improved for ``patience`` evaluations, steps or epochs.

        improved = value < best - min_delta        (mode "min"; "max" mirrors it)
        waited   = 0 if improved and better than the baseline, else now - the last time it was
        stop     = waited >= patience

    Neither a NaN nor a tie is an improvement.

    Args:
        metric: Metric name at ``EvalEnd``, or a function of all metrics there.
        patience: How long to wait, in ``unit``, 1 or more.
        unit: ``"evaluations"``, ``"steps"`` or ``"epochs"``. In any unit, decisions are made at evaluations.
        mode: ``"min"`` if lower is better, or ``"max"``. Or a function ``(value, best) -> improved`` of tensors of
            shape []. Before the first evaluation, its ``best`` is the baseline, or nan.
        min_delta: Margin of an improvement, in the metric's units, 0 or more.
        relative: Whether ``min_delta`` is a fraction of the best value instead.
        baseline: A value to beat. Improvements that do not beat it do not end the wait, but the best weights are those
            of the best value seen in any case.
        start_from: Ignore evaluations before this many evaluations, steps or epochs, in ``unit``.
        good_enough: Stop immediately if the value is this or better.
        diverged: Stop immediately if the value is this or worse.
        check_finite: Stop immediately if the value is not finite.
        overfit_patience: Stop when the gap between the metric and ``train_metric`` has grown at this many evaluations
            in a row. The training metric is averaged inside the step.
        overfit_min_delta: Margin of a growth of the gap, in the metric's units, 0 or more.
        train_metric: The step metric to compare with.
        restore_best: True keeps a copy of the best parameters and buffers in the slot, and puts them into
            ``result.state`` at the end of the session. With a checkpointer, each improvement requests a save, and the
            best checkpoint is read at the end, so no copy is kept. Live parameters never change during the run.
        name: The slot, and the prefix of the logged names: ``<name>/best``, ``<name>/waited``, and at an improvement
            ``<name>/improved_by``.

    Raises:
        ValueError: If an argument is out of range, or, at run time, if ``unit`` is ``"epochs"`` and the epoch length is
            unknown, or the best checkpoint was deleted.
        KeyError: At run time, if the evaluation has no such metric.

    Example:
        >>> import torch, fxtrain as fx
        >>> callback = fx.compose(early_stopping("loss", patience=2))
        >>> state = fx.attach(fx.init(torch.nn.Linear(1, 1)), callback)
        >>> for step, loss in enumerate([3.0, 2.0, 2.5, 2.0]):
        ...     event = fx.EvalEnd(step=step, metrics={"loss": torch.tensor(loss)})
        ...     state, control = callback(state, event)
        >>> control.reasons("stop")
        ['loss has not improved for 2 evaluations']
    """
    check_positive_int("patience", patience)
    check_int("start_from", start_from, minimum=0)
    check_choice("unit", unit, _UNITS)
    if overfit_patience is not None:
        check_positive_int("overfit_patience", overfit_patience)
    if not overfit_min_delta >= 0:
        raise ValueError(f"expected overfit_min_delta to be at least 0, got {describe(overfit_min_delta)}.")
    better, worst, sign = direction(mode, min_delta=min_delta, relative=relative)
    if callable(mode) and (good_enough is not None or diverged is not None or overfit_patience is not None):
        raise ValueError(
            "expected mode to be 'min' or 'max' with good_enough, diverged or overfit_patience, got a function. Choose "
            "a direction, or leave these arguments out."
        )
    in_memory, checkpointer = restore_best is True, None if isinstance(restore_best, bool) else restore_best
    if checkpointer is not None and not hasattr(checkpointer, "restore"):
        raise ValueError(f"expected restore_best to be True, False or a checkpointer, got {describe(restore_best)}.")
    first = baseline if callable(mode) and baseline is not None else worst
    what = called(metric)
    singular = unit.removesuffix("s") if patience == 1 else unit
    slack = _ROUNDING if unit == "epochs" else 0
    no_improvement = f"{what} has not improved for {patience} {singular}"
    gap_grew = f"the gap between {what} and the training {train_metric} grew {overfit_patience} evaluations in a row"

    def init(state: TrainState) -> EarlyStoppingState:
        wide = wide_dtype(state.step.device)

        def of(value: float, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(value, dtype=dtype, device=state.step.device)

        return EarlyStoppingState(
            best=of(first, wide),
            best_step=of(-1),
            evaluations=of(0),
            since=_start_of_wait(state, unit),
            kept=(state.params, state.buffers) if in_memory else (),
            overfitting=()
            if overfit_patience is None
            else Overfitting(of(0.0, wide), of(0), of(math.inf, wide), of(0)),
        )

    def update(state: TrainState, event: EvalEnd | FitEnd | Updated) -> tuple[TrainState, Control]:
        slot: EarlyStoppingState = state.slots[name]
        if isinstance(event, FitEnd):
            return _with_best(state, slot, checkpointer, what) if restore_best else state, Control()
        if isinstance(event, Updated):
            overfitting = _after_step(slot.overfitting, event, train_metric, name)
            return state.with_slot(name, slot._replace(overfitting=overfitting)), Control()
        slot, control = evaluated(state, event, slot)
        return state.with_slot(name, slot), control

    def evaluated(state: TrainState, event: EvalEnd, slot: EarlyStoppingState) -> tuple[EarlyStoppingState, Control]:
        before, value = slot.best, measured(event, metric, name, slot.best.device)
        now, passed = _time_in(event, slot, unit)
        watching = passed >= start_from - slack
        improved = better(value, before)
        if callable(mode) and baseline is not None:
            # The first value is the best so far, even if it does not beat the baseline.
            improved = improved | (slot.best_step < 0)
        improved = watching & improved & ~value.isnan()
        beats = improved if baseline is None else improved & better(value, torch.full_like(before, baseline))
        slot = EarlyStoppingState(
            best=torch.where(improved, value.to(before.dtype), before),
            best_step=torch.where(improved, state.step, slot.best_step),
            evaluations=slot.evaluations + 1,
            since=torch.where(beats | ~watching, now, slot.since),
            kept=tree.where(improved, (state.params, state.buffers), slot.kept) if in_memory else (),
            overfitting=_after_evaluation(slot.overfitting, value, sign, overfit_min_delta) if overfit_patience else (),
        )
        waited = now - slot.since
        stops = {no_improvement: watching & (waited >= patience - slack)}
        if good_enough is not None:
            stops[f"{what} reached {good_enough:g}"] = watching & (sign * value <= sign * good_enough)
        if diverged is not None:
            stops[f"{what} diverged: it reached {diverged:g}"] = watching & (sign * value >= sign * diverged)
        if check_finite:
            stops[f"{what} is not finite"] = watching & ~value.isfinite()
        if overfit_patience is not None:
            stops[gap_grew] = watching & (slot.overfitting.grown >= overfit_patience)
        log = {
            f"{name}/best": slot.best,
            f"{name}/waited": waited,
            f"{name}/improved_by": Logged((value - before).abs(), when=improved & before.isfinite()),
        }
        control = Control(stop=stops, log=log)
        if checkpointer is not None:
            control = control | Control(save=improved, reason=f"{what} improved")
        return slot, control

    events = EvalEnd | FitEnd | Updated if overfit_patience is not None else EvalEnd | FitEnd
    return needing(slotted(name, init, on(events, update)), metric)


def _start_of_wait(state: TrainState, unit: str) -> Tensor:
    """Returns the start of the wait for a state that has not been evaluated."""
    if unit == "epochs":
        return epochs_taken(state).to(wide_dtype(state.step.device))
    return state.step.clone() if unit == "steps" else torch.zeros_like(state.step)


def _time_in(event: EvalEnd, slot: EarlyStoppingState, unit: str) -> tuple[Any, Tensor]:
    """Returns the current time in ``unit``, and how much has passed before this evaluation."""
    if unit == "evaluations":
        return slot.evaluations + 1, slot.evaluations
    now = event.step if unit == "steps" else event.epoch
    if now is None:
        raise ValueError(
            "expected data with a known epoch length for early_stopping(unit='epochs'), got data without one. Use "
            "unit='steps' or 'evaluations'."
        )
    return now, torch.full_like(slot.since, now)


def _after_step(slot: Overfitting, event: Updated, metric: str, who: str) -> Overfitting:
    value = measured(event, metric, who, slot.total.device).to(slot.total.dtype)
    # Steps with a non-finite metric are excluded, because guards skip their updates.
    finite = value.isfinite()
    return slot._replace(
        total=slot.total + torch.where(finite, value, torch.zeros_like(value)), count=slot.count + finite
    )


def _after_evaluation(slot: Overfitting, value: Tensor, sign: float, min_delta: float) -> Overfitting:
    """Returns the state after an evaluation. Without training steps since the last one, the gap is unchanged."""
    gap = sign * (value - slot.total / slot.count.clamp(min=1))
    seen = slot.count > 0
    grew = seen & (gap > slot.gap + min_delta)
    return Overfitting(
        total=torch.zeros_like(slot.total),
        count=torch.zeros_like(slot.count),
        gap=torch.where(seen, gap, slot.gap),
        grown=torch.where(seen, torch.where(grew, slot.grown + 1, 0), slot.grown),
    )


def _with_best(state: TrainState, slot: EarlyStoppingState, checkpointer: Any, what: str) -> TrainState:
    found = slot.best_step >= 0
    if checkpointer is None:
        params, buffers = tree.where(found, slot.kept, (state.params, state.buffers))
        return state.replace(params=params, buffers=buffers)
    if not bool(found):
        return state
    step = int(slot.best_step)
    if step not in checkpointer.steps():
        raise ValueError(
            f"expected a checkpoint of step {step}, where {what} was best, got steps {checkpointer.steps()} in "
            f"{checkpointer!r}. Keep the best one with fxtrain.checkpointer(..., best=...), or use restore_best=True."
        )
    best = checkpointer.restore(state, step=step)
    return state.replace(params=best.params, buffers=best.buffers)


class TimeLimitState(NamedTuple):
    """State of ``time_limit``."""

    seconds: Tensor  # float64 []: elapsed time of all sessions so far


def time_limit(*, seconds: float = 0.0, minutes: float = 0.0, hours: float = 0.0, name: str = "time_limit") -> Handler:
    """Stops the run after a total time, earlier sessions included.

    The limit is checked after each step, so a run can exceed it by a step, an evaluation and a save. The limit is the
    sum of all three units.

    Args:
        seconds: Seconds.
        minutes: Minutes.
        hours: Hours.
        name: The slot.

    Raises:
        ValueError: If the sum is not positive and finite.

    Example:
        >>> import torch, fxtrain as fx
        >>> limit = fx.compose(time_limit(minutes=1))
        >>> state = fx.attach(fx.init(torch.nn.Linear(1, 1)), limit)
        >>> for step, time in enumerate([0.0, 30.0, 61.0], start=1):
        ...     event = fx.StepEnd(step=step, metrics={}, time=time, previous_time=max(0.0, time - 31))
        ...     state, control = limit(state, event)
        >>> control.reasons("stop")
        ['reached the time limit of 60 s']
    """
    limit = seconds + 60 * minutes + 3600 * hours
    if not (0 < limit < math.inf):
        raise ValueError(f"expected the time limit to be positive and finite, got {limit:g} s.")

    def update(state: TrainState, event: StepEnd, slot: TimeLimitState) -> tuple[TimeLimitState, Control]:
        slot = TimeLimitState(slot.seconds + (event.time - event.previous_time))
        return slot, Control(stop=slot.seconds >= limit, reason=f"reached the time limit of {limit:g} s")

    def init(state: TrainState) -> TimeLimitState:
        return TimeLimitState(torch.zeros((), dtype=torch.float64, device=state.step.device))

    return stateful(name, init, update)


def target(metric: Metric, value: float, *, mode: str = "min", at: Any = EvalEnd) -> Handler:
    """Stops the run when a metric reaches a value.

    Args:
        metric: Metric name, or a function of all metrics of the event.
        value: The value to reach.
        mode: ``"min"`` if lower is better, or ``"max"``.
        at: ``EvalEnd``, or ``StepEnd`` for a metric of the step.

    Raises:
        ValueError: If an argument is out of range.
        KeyError: At run time, if the event has no such metric.

    Example:
        >>> import torch, fxtrain as fx
        >>> callback = fx.compose(target("accuracy", 0.9, mode="max"))
        >>> event = fx.EvalEnd(step=1, metrics={"accuracy": torch.tensor(0.95)})
        >>> callback(fx.init(torch.nn.Linear(1, 1)), event)[1].reasons("stop")
        ['accuracy reached 0.9']
    """
    check_choice("mode", mode, ("min", "max"))
    if not math.isfinite(value):
        raise ValueError(f"expected value to be finite, got {describe(value)}.")
    if at not in (EvalEnd, StepEnd):
        raise ValueError(f"expected at to be EvalEnd or StepEnd, got {describe(at)}.")
    sign = 1.0 if mode == "min" else -1.0
    what = called(metric)

    def reached(state: TrainState, event: EvalEnd | StepEnd) -> tuple[TrainState, Control]:
        now = measured(event, metric, "target", state.step.device)
        return state, Control(stop=sign * now <= sign * value, reason=f"{what} reached {value:g}")

    handler = Handler(f"target {what}", reached, frozenset({at}))
    return needing(handler, metric) if at is EvalEnd else handler
