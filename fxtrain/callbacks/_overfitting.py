"""Stops a run whose evaluation metric falls behind its training metric."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fxtrain.callbacks._watched_metric import Metric, called, measured, needing, sign_of
from fxtrain.core import Control, EvalEnd, TrainState, Updated, check_non_negative, check_positive_int, wide_dtype
from fxtrain.fold import Handler, slotted


class OverfittingState(NamedTuple):
    """State of ``stop_on_overfitting``."""

    total: Tensor  # float64 []: sum of the training metric since the last evaluation
    count: Tensor  # int64 []: number of steps in the sum
    gap: Tensor  # float64 []: evaluation minus training at the last evaluation, signed so that larger is worse
    grown: Tensor  # int64 []: consecutive evaluations at which the gap grew


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

    def update(state: TrainState, event: EvalEnd | Updated) -> tuple[TrainState, Control]:
        slot: OverfittingState = state.slots[name]
        if isinstance(event, Updated):
            return state.with_slot(name, _after_step(slot, event, train_metric, name)), Control()
        slot = _after_evaluation(slot, measured(event, metric, name, slot.gap.device), sign, min_delta)
        return state.with_slot(name, slot), Control(stop=slot.grown >= patience, reason=reason)

    return needing(slotted(name, init, update), metric)


def _after_step(slot: OverfittingState, event: Updated, metric: str, who: str) -> OverfittingState:
    value = measured(event, metric, who, slot.total.device).to(slot.total.dtype)
    # Steps with a non-finite metric are excluded, because guards skip their updates.
    finite = value.isfinite()
    return slot._replace(
        total=slot.total + torch.where(finite, value, torch.zeros_like(value)), count=slot.count + finite
    )


def _after_evaluation(slot: OverfittingState, value: Tensor, sign: float, min_delta: float) -> OverfittingState:
    """Returns the state after an evaluation. Without training steps since the last one, the gap is unchanged."""
    gap = sign * (value - slot.total / slot.count.clamp(min=1))
    seen = slot.count > 0
    grew = seen & (gap > slot.gap + min_delta)
    return OverfittingState(
        total=torch.zeros_like(slot.total),
        count=torch.zeros_like(slot.count),
        gap=torch.where(seen, gap, slot.gap),
        grown=torch.where(seen, torch.where(grew, slot.grown + 1, 0), slot.grown),
    )
