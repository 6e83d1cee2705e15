"""Stops that wait for an evaluation metric: early stopping, and a growing gap to the training metric."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain.callbacks._per_model import per_model
from fxtrain.callbacks._watched_metric import (
    Best,
    Better,
    Metric,
    called,
    direction,
    improve,
    measured,
    needing,
    no_best,
    sign_of,
)
from fxtrain.core import (
    Control,
    EvalEnd,
    Logged,
    TrainState,
    Updated,
    check_choice,
    check_int,
    check_non_negative,
    check_positive_int,
    fractional_epoch,
    wide_dtype,
)
from fxtrain.equivalents import with_known_arguments
from fxtrain.fold import Handler, stateful
from fxtrain.fold._settings import accepts_settings_per_member


class EarlyStoppingState(NamedTuple):
    """State of ``early_stopping``."""

    best: Tensor  # float64 []: the best value so far; before the first, the worst value (baseline or nan if callable)
    best_step: Tensor  # int64 []: its step; -1 before the first
    evaluations: Tensor  # int64 []: evaluations so far
    since: Tensor  # []: start of the wait: int64 in evaluations or steps, float64 in epochs


@with_known_arguments
@accepts_settings_per_member
def early_stopping(
    metric: Metric,
    *,
    patience: int | Tensor,
    unit: str = "evaluations",
    mode: str | Better = "min",
    min_delta: float = 0.0,
    relative: bool = False,
    baseline: float | None = None,
    start_from: int = 0,
    name: str = "early_stopping",
) -> Handler:
    """Stops the run when an evaluation metric has not improved for ``patience`` evaluations, steps or epochs.

        improved = value < best - min_delta        (mode "min"; "max" mirrors it)
        waited   = 0 if improved and better than the baseline, else now - the last time it was
        stop     = waited >= patience

    Neither a NaN nor a tie is an improvement. Compose it with ``restore_best``, ``stop_at``, ``stop_on_divergence`` and
    ``stop_on_overfitting``.

    Args:
        metric: Metric name at ``EvalEnd``, or a function of all metrics there.
        patience: How long to wait, in ``unit``, 1 or more. For a batch of runs, each number here can be a tensor
            [members] with a value for each member, as in ``patience=torch.tensor([2, 5])``.
        unit: ``"evaluations"``, ``"steps"`` or ``"epochs"``. In any unit, decisions are made at evaluations.
        mode: ``"min"`` if lower is better, or ``"max"``. Or a function ``(value, best) -> improved`` of tensors of
            shape []. Before the first evaluation, its ``best`` is the baseline, or nan.
        min_delta: Margin of an improvement, in the metric's units, 0 or more.
        relative: Whether ``min_delta`` is a fraction of the best value instead.
        baseline: A value to beat. Improvements that do not beat it do not end the wait.
        start_from: Ignore evaluations before this many evaluations, steps or epochs, in ``unit``.
        name: The slot, and the prefix of the logged names: ``<name>/best``, ``<name>/waited``, and at an improvement
            ``<name>/improved_by``.

    Raises:
        ValueError: If an argument is out of range, or, at run time, if ``unit`` is ``"epochs"`` and the epoch length is
            unknown.
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
    check_choice("unit", unit, ("evaluations", "steps", "epochs"))
    better, worst = direction(mode, min_delta=min_delta, relative=relative)
    first = baseline if callable(mode) and baseline is not None else worst
    slack = 1e-9 if unit == "epochs" else 0  # rounding error of a difference of fractional epochs
    no_improvement = (
        f"{called(metric)} has not improved for {patience} {unit.removesuffix('s') if patience == 1 else unit}"
    )

    def init(state: TrainState) -> EarlyStoppingState:
        best = no_best(state, first)
        return EarlyStoppingState(
            best=best.best,
            best_step=best.step,
            evaluations=torch.zeros_like(state.step),
            since=_start_of_wait(state, unit),
        )

    def update(state: TrainState, event: EvalEnd, slot: EarlyStoppingState) -> tuple[EarlyStoppingState, Control]:
        before, value = slot.best, measured(event, metric, name, slot.best.device)
        now, passed = _time_in(event, slot, unit)
        watching = passed >= start_from - slack

        def improves(value: Tensor, best: Tensor) -> Tensor:
            # With a function and a baseline, the first value is the best so far, even if it does not beat the baseline.
            first = slot.best_step < 0 if callable(mode) and baseline is not None else False
            return better(value, best) | first

        best, improved = improve(Best(before, slot.best_step), value, state.step, improves, unless=~watching)
        beats = improved if baseline is None else improved & better(value, torch.full_like(before, baseline))
        slot = EarlyStoppingState(
            best=best.best,
            best_step=best.step,
            evaluations=slot.evaluations + 1,
            since=torch.where(beats | ~watching, now, slot.since),
        )
        waited = now - slot.since
        log = {
            f"{name}/best": slot.best,
            f"{name}/waited": waited,
            f"{name}/improved_by": Logged((value - before).abs(), when=improved & before.isfinite()),
        }
        control = Control(stop=watching & (waited >= patience - slack), reason=no_improvement)
        return slot, control | Control(log=log)

    return needing(stateful(name, init, update), metric)


def _start_of_wait(state: TrainState, unit: str) -> Tensor:
    """Returns the start of the wait for a state that has not been evaluated."""
    if unit == "epochs":
        return fractional_epoch(state)
    return state.step.clone() if unit == "steps" else torch.zeros_like(state.step)


def _time_in(event: EvalEnd, slot: EarlyStoppingState, unit: str) -> tuple[int | float | Tensor, Tensor]:
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


class OverfittingState(NamedTuple):
    """State of ``stop_on_overfitting``."""

    total: Tensor  # float64 []: sum of the training metric since the last evaluation
    count: Tensor  # int64 []: number of steps in the sum
    gap: Tensor  # float64 []: evaluation minus training at the last evaluation, signed so that larger is worse
    grown: Tensor  # int64 []: consecutive evaluations at which the gap grew


@accepts_settings_per_member
def stop_on_overfitting(
    metric: Metric,
    *,
    patience: int,
    min_delta: float = 0.0,
    mode: str = "min",
    train_metric: str = "loss",
    name: str = "overfitting",
) -> Handler:
    """Stops the run when the gap between evaluation and training has grown ``patience`` evaluations in a row.

        gap  = value - mean of the training metric since the last evaluation        (mode "min"; "max" mirrors it)
        grew = gap > previous gap + min_delta

    The training metric is averaged inside the compiled step. Steps with a non-finite value are left out.

    Args:
        metric: Metric name at ``EvalEnd``, or a function of all metrics there.
        patience: Consecutive evaluations at which the gap grew, 1 or more.
        min_delta: Margin of a growth of the gap, in the metric's units, 0 or more.
        mode: ``"min"`` if lower is better, or ``"max"``.
        train_metric: The step metric to compare with.
        name: The slot.

    Raises:
        ValueError: If an argument is out of range.
        KeyError: At run time, if the evaluation or the step has no such metric.

    Example:
        >>> stop_on_overfitting("loss", patience=3)
        <callback overfitting on Updated, EvalEnd, slot 'overfitting'>
    """
    check_positive_int("patience", patience)
    check_non_negative(min_delta=min_delta)
    sign = sign_of(mode)
    times = "1 evaluation" if patience == 1 else f"{patience} evaluations"
    reason = f"the gap between {called(metric)} and the training {train_metric} grew {times} in a row"

    def init(state: TrainState) -> OverfittingState:
        zero = torch.zeros_like(state.step)
        total = torch.zeros((), dtype=wide_dtype(zero.device), device=zero.device)
        return OverfittingState(total, zero, torch.full_like(total, math.inf), zero.clone())

    def update(state: TrainState, event: EvalEnd | Updated, slot: OverfittingState) -> tuple[OverfittingState, Control]:
        if isinstance(event, Updated):
            value = measured(event, train_metric, name, slot.total.device).to(slot.total.dtype)
            # Steps with a non-finite metric are excluded, because guards skip their updates.
            finite = value.isfinite()
            total = slot.total + torch.where(finite, value, 0.0)
            return slot._replace(total=total, count=slot.count + finite), Control()
        gap = sign * (measured(event, metric, name, slot.gap.device) - slot.total / slot.count.clamp(min=1))
        # Without training steps since the last evaluation, the gap is unchanged.
        seen = slot.count > 0
        grew = seen & (gap > slot.gap + min_delta)
        slot = OverfittingState(
            total=torch.zeros_like(slot.total),
            count=torch.zeros_like(slot.count),
            gap=torch.where(seen, gap, slot.gap),
            grown=torch.where(seen, torch.where(grew, slot.grown + 1, 0), slot.grown),
        )
        return slot, Control(stop=slot.grown >= patience, reason=reason)

    return needing(per_model(stateful(name, init, update)), metric)
