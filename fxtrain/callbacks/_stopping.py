"""Stopping: end a run when it has stopped getting better, is good enough, or has taken its time."""

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
    epochs_taken,
    wide_dtype,
)
from fxtrain.fold import Handler, on, slotted, stateful

_UNITS = ("evaluations", "steps", "epochs")
_ROUNDING = 1e-9  # of a difference of fractional epochs


class Overfitting(NamedTuple):
    """The memory of how training and evaluation drift apart."""

    total: Tensor  # float64 []: the training metric, summed since the last evaluation
    count: Tensor  # int64 []: over so many steps
    gap: Tensor  # float64 []: evaluation minus training at the last evaluation, the worse the larger
    grown: Tensor  # int64 []: evaluations in a row at which it grew


class EarlyStoppingState(NamedTuple):
    """The memory of ``early_stopping``."""

    best: Tensor  # float64 []: the best value so far; nan before the first, where a function says what is better
    best_step: Tensor  # int64 []: where it was; -1 before the first
    evaluations: Tensor  # int64 []: how many there were
    since: Tensor  # []: where waiting began: int64 in evaluations or steps, float64 in epochs
    kept: Any  # the best parameters and buffers, or nothing: ()
    overfitting: Any  # Overfitting, or nothing: ()


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
    """Stops when an evaluation metric has not improved for ``patience`` evaluations, steps or epochs.

        improved = value < best - min_delta        (mode "min"; "max" mirrors it)
        waited   = 0 if improved, and better than the baseline, else now - when it last was
        stop     = waited >= patience

    A NaN is no improvement, and neither is a tie.

    Args:
        metric: Its name at ``EvalEnd``, or a function of all metrics there.
        patience: How long to wait, 1 or more of ``unit``.
        unit: ``"evaluations"``, ``"steps"`` or ``"epochs"``. It is decided at evaluations in any case.
        mode: ``"min"`` or ``"max"``: which way is better. Or a function ``(value, best) -> improved`` of tensors of
            shape []; before the first value ``best`` is the baseline, or nan.
        min_delta: What counts as an improvement, in the metric's units, 0 or more.
        relative: Whether ``min_delta`` is a part of the best value instead.
        baseline: A value to beat; waiting begins with the first evaluation that does not. The best weights are those of
            the best value seen, whether or not it beat the baseline.
        start_from: Nothing is watched before so many evaluations, steps or epochs.
        good_enough: Stop at once where the value is at this one or better.
        diverged: Stop at once where it is at this one or worse.
        check_finite: Stop at once where it is not finite.
        overfit_patience: Stop where the gap between the metric and ``train_metric`` has grown at so many evaluations
            in a row. The training metric is averaged inside the step: give the callback to
            ``train_step(..., callbacks=)`` as well then.
        overfit_min_delta: What counts as growth, in the metric's units.
        train_metric: The step's metric that is compared.
        restore_best: True keeps a copy of the best parameters and buffers in the slot, and puts them into
            ``result.state`` at the end of the session. A checkpointer is asked for a save at each improvement, and
            read at the end instead: no memory, one file read. Live parameters are never touched.
        name: The slot, and the prefix of what is logged: ``<name>/best``, ``<name>/waited``, and at an improvement
            ``<name>/improved_by``.

    Raises:
        ValueError: If an argument is out of its range, or, when it runs, if ``unit`` is epochs and nobody knows how
            long they are.
        KeyError: When it runs, if the evaluation has no such metric.

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
        raise ValueError(f"overfit_min_delta={overfit_min_delta!r}: 0 or more is wanted.")
    better, worst, sign = direction(mode, min_delta=min_delta, relative=relative)
    if callable(mode) and (good_enough is not None or diverged is not None or overfit_patience is not None):
        raise ValueError(
            "mode is a function, and good_enough, diverged and overfit_patience need to know which way is worse: "
            "choose 'min' or 'max', or leave them out."
        )
    in_memory, checkpointer = restore_best is True, None if isinstance(restore_best, bool) else restore_best
    if checkpointer is not None and not hasattr(checkpointer, "restore"):
        raise ValueError(f"restore_best={restore_best!r}: True, False or a checkpointer is wanted.")
    first = baseline if callable(mode) and baseline is not None else worst
    what = called(metric)
    singular = unit.removesuffix("s") if patience == 1 else unit
    slack = _ROUNDING if unit == "epochs" else 0
    late = f"{what} has not improved for {patience} {singular}"
    drifted = f"the gap between {what} and the training {train_metric} grew {overfit_patience} evaluations in a row"

    def init(state: TrainState) -> EarlyStoppingState:
        wide = wide_dtype(state.step.device)

        def of(value: float, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(value, dtype=dtype, device=state.step.device)

        return EarlyStoppingState(
            best=of(first, wide),
            best_step=of(-1),
            evaluations=of(0),
            since=_begin(state, unit),
            kept=(state.params, state.buffers) if in_memory else (),
            overfitting=()
            if overfit_patience is None
            else Overfitting(of(0.0, wide), of(0), of(math.inf, wide), of(0)),
        )

    def update(state: TrainState, event: EvalEnd | FitEnd | Updated) -> tuple[TrainState, Control]:
        memory: EarlyStoppingState = state.slots[name]
        if isinstance(event, FitEnd):
            return _harvest(state, memory, checkpointer, what) if restore_best else state, Control()
        if isinstance(event, Updated):
            trained = _trained(memory.overfitting, event, train_metric, name)
            return state.with_slot(name, memory._replace(overfitting=trained)), Control()
        memory, control = evaluated(state, event, memory)
        return state.with_slot(name, memory), control

    def evaluated(state: TrainState, event: EvalEnd, memory: EarlyStoppingState) -> tuple[EarlyStoppingState, Control]:
        before, value = memory.best, measured(event, metric, name, memory.best.device)
        now, passed = _place(event, memory, unit)
        watching = passed >= start_from - slack
        improved = better(value, before)
        if callable(mode) and baseline is not None:
            improved = improved | (memory.best_step < 0)  # nothing was seen before, so this is the best
        improved = watching & improved & ~value.isnan()
        beats = improved if baseline is None else improved & better(value, torch.full_like(before, baseline))
        memory = EarlyStoppingState(
            best=torch.where(improved, value.to(before.dtype), before),
            best_step=torch.where(improved, state.step, memory.best_step),
            evaluations=memory.evaluations + 1,
            since=torch.where(beats | ~watching, now, memory.since),
            kept=tree.where(improved, (state.params, state.buffers), memory.kept) if in_memory else (),
            overfitting=_drifted(memory.overfitting, value, sign, overfit_min_delta) if overfit_patience else (),
        )
        waited = now - memory.since
        stops = {late: watching & (waited >= patience - slack)}
        if good_enough is not None:
            stops[f"{what} reached {good_enough:g}"] = watching & (sign * value <= sign * good_enough)
        if diverged is not None:
            stops[f"{what} diverged: it reached {diverged:g}"] = watching & (sign * value >= sign * diverged)
        if check_finite:
            stops[f"{what} is not finite"] = watching & ~value.isfinite()
        if overfit_patience is not None:
            stops[drifted] = watching & (memory.overfitting.grown >= overfit_patience)
        log = {
            f"{name}/best": memory.best,
            f"{name}/waited": waited,
            f"{name}/improved_by": Logged((value - before).abs(), when=improved & before.isfinite()),
        }
        asked = Control(stop=stops, log=log)
        if checkpointer is not None:
            asked = asked | Control(save=improved, reason=f"{what} improved")
        return memory, asked

    events = EvalEnd | FitEnd | Updated if overfit_patience is not None else EvalEnd | FitEnd
    return needing(slotted(name, init, on(events, update)), metric)


def _begin(state: TrainState, unit: str) -> Tensor:
    """Where waiting begins for a state that has not been evaluated."""
    if unit == "epochs":
        return epochs_taken(state).to(wide_dtype(state.step.device))
    return state.step.clone() if unit == "steps" else torch.zeros_like(state.step)


def _place(event: EvalEnd, memory: EarlyStoppingState, unit: str) -> tuple[Any, Tensor]:
    """Returns where the run is, in the unit, and how much of it has passed before this evaluation."""
    if unit == "evaluations":
        return memory.evaluations + 1, memory.evaluations
    now = event.step if unit == "steps" else event.epoch
    if now is None:
        raise ValueError(
            "expected data with a known epoch length for early_stopping(unit='epochs'), got data without one. Use "
            "unit='steps' or 'evaluations'."
        )
    return now, torch.full_like(memory.since, now)


def _trained(memory: Overfitting, event: Updated, metric: str, who: str) -> Overfitting:
    value = measured(event, metric, who, memory.total.device).to(memory.total.dtype)
    finite = value.isfinite()  # what a guard skips says nothing of the fit
    return memory._replace(
        total=memory.total + torch.where(finite, value, torch.zeros_like(value)), count=memory.count + finite
    )


def _drifted(memory: Overfitting, value: Tensor, sign: float, min_delta: float) -> Overfitting:
    """The memory after an evaluation. Where there was no training in between, nothing has drifted."""
    gap = sign * (value - memory.total / memory.count.clamp(min=1))
    seen = memory.count > 0
    grew = seen & (gap > memory.gap + min_delta)
    return Overfitting(
        total=torch.zeros_like(memory.total),
        count=torch.zeros_like(memory.count),
        gap=torch.where(seen, gap, memory.gap),
        grown=torch.where(seen, torch.where(grew, memory.grown + 1, 0), memory.grown),
    )


def _harvest(state: TrainState, memory: EarlyStoppingState, checkpointer: Any, what: str) -> TrainState:
    found = memory.best_step >= 0
    if checkpointer is None:
        params, buffers = tree.where(found, memory.kept, (state.params, state.buffers))
        return state.replace(params=params, buffers=buffers)
    if not bool(found):
        return state
    step = int(memory.best_step)
    if step not in checkpointer.steps():
        raise ValueError(
            f"The best {what} was at step {step}, and {checkpointer!r} has deleted its checkpoint: keep it with "
            "fxtrain.checkpointer(..., best=...), or use restore_best=True."
        )
    best = checkpointer.restore(state, step=step)
    return state.replace(params=best.params, buffers=best.buffers)


class TimeLimitState(NamedTuple):
    """The memory of ``time_limit``."""

    seconds: Tensor  # float64 []: of all sessions so far


def time_limit(*, seconds: float = 0.0, minutes: float = 0.0, hours: float = 0.0, name: str = "time_limit") -> Handler:
    """Stops after so much time, that of earlier sessions included.

    It is looked at after each step, so a run is longer by a step, an evaluation and a save at most.

    Args:
        seconds: And ``minutes``, and ``hours``: they are added.
        name: The slot.

    Raises:
        ValueError: If they are not more than 0 together.

    Example:
        >>> import torch, fxtrain as fx
        >>> limit = fx.compose(time_limit(minutes=1))
        >>> state = fx.attach(fx.init(torch.nn.Linear(1, 1)), limit)
        >>> for step, time in enumerate([0.0, 30.0, 61.0], start=1):
        ...     event = fx.StepEnd(step=step, metrics={}, time=time, previous_time=max(0.0, time - 31))
        ...     state, control = limit(state, event)
        >>> control.reasons("stop")
        ['the time limit of 60 s is over']
    """
    limit = seconds + 60 * minutes + 3600 * hours
    if not (0 < limit < math.inf):
        raise ValueError(f"time_limit of {limit!r} seconds: more than 0, and less than for ever, is wanted.")

    def update(state: TrainState, event: StepEnd, memory: TimeLimitState) -> tuple[TimeLimitState, Control]:
        memory = TimeLimitState(memory.seconds + (event.time - event.previous_time))
        return memory, Control(stop=memory.seconds >= limit, reason=f"the time limit of {limit:g} s is over")

    def init(state: TrainState) -> TimeLimitState:
        return TimeLimitState(torch.zeros((), dtype=torch.float64, device=state.step.device))

    return stateful(name, init, update)


def target(metric: Metric, value: float, *, mode: str = "min", at: Any = EvalEnd) -> Handler:
    """Stops when a metric reaches a value.

    Args:
        metric: Its name, or a function of all metrics of the event.
        value: What is wanted.
        mode: ``"min"`` if less is better, or ``"max"``.
        at: ``EvalEnd``, or ``StepEnd`` for a metric of the step.

    Raises:
        ValueError: If an argument is out of its range.
        KeyError: When it runs, if there is no such metric.

    Example:
        >>> import torch, fxtrain as fx
        >>> callback = fx.compose(target("accuracy", 0.9, mode="max"))
        >>> event = fx.EvalEnd(step=1, metrics={"accuracy": torch.tensor(0.95)})
        >>> callback(fx.init(torch.nn.Linear(1, 1)), event)[1].reasons("stop")
        ['accuracy reached 0.9']
    """
    if mode not in ("min", "max"):
        raise ValueError(f"mode={mode!r}: 'min' or 'max' is wanted.")
    if not math.isfinite(value):
        raise ValueError(f"value={value!r}: a finite number is wanted.")
    if at not in (EvalEnd, StepEnd):
        raise ValueError(f"at={at!r}: EvalEnd or StepEnd is wanted.")
    sign = 1.0 if mode == "min" else -1.0
    what = called(metric)

    def reached(state: TrainState, event: EvalEnd | StepEnd) -> tuple[TrainState, Control]:
        now = measured(event, metric, "target", state.step.device)
        return state, Control(stop=sign * now <= sign * value, reason=f"{what} reached {value:g}")

    handler = Handler(f"target {what}", reached, frozenset({at}))
    return needing(handler, metric) if at is EvalEnd else handler
