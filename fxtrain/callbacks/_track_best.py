"""A callback that tracks the best values of metrics, without a request."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from torch import Tensor

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
)
from fxtrain.core import Control, EvalEnd, FitEnd, Logged, Record, TrainState, format_number
from fxtrain.fold import Handler, on, slotted
from fxtrain.values import Text


class TrackBestState(NamedTuple):
    """State of ``track_best`` for one metric."""

    best: Tensor  # float64 []: the best value so far; before the first, the worst value (nan if mode is a function)
    step: Tensor  # int64 []: its step; -1 before the first
    since: Tensor  # int64 []: evaluations since then, or all before the first


def track_best(*metrics: Metric, mode: str | Better = "min", min_delta: float = 0.0, name: str = "best") -> Handler:
    """Tracks the best values of evaluation metrics, and logs a line about each evaluation.

        new best loss: 0.412 at step 500 (was 0.437)
        no improvement of loss for 3 evaluations (best 0.412 at step 500)

    It requests nothing. ``early_stopping`` stops a run, and ``restore_best`` restores its weights. Neither a NaN nor a
    tie is an improvement.

    Args:
        metrics: Metric names at ``EvalEnd``, or functions of all metrics there.
        mode: ``"min"`` if lower is better, or ``"max"``, for all of ``metrics``. Or a function
            ``(value, best) -> improved`` of tensors of shape []. Its ``best`` is nan before the first evaluation.
        min_delta: Margin of an improvement, in the metrics' units, 0 or more.
        name: The slot, and the prefix of the logged names: ``<name>/<metric>``, the number of evaluations since,
            ``<name>/<metric>/since``, and the line, ``<name>/<metric>/line``. At the end of a run, the line has the
            best value.

    Raises:
        ValueError: If no metric or one twice is given, or an argument is out of range.
        KeyError: At run time, if the evaluation has no such metric.

    Example:
        >>> import torch, fxtrain as fx
        >>> callback = fx.compose(track_best("loss"))
        >>> state = fx.attach(fx.init(torch.nn.Linear(1, 1)), callback)
        >>> for step, loss in enumerate([0.5, 0.25, 0.75], start=1):
        ...     event = fx.EvalEnd(step=step, metrics={"loss": torch.tensor(loss)})
        ...     state, control = callback(state.replace(step=torch.tensor(step)), event)
        ...     print(control.log["best/loss/line"].value.markdown)
        new best loss: 0.5000 at step 1
        new best loss: 0.2500 at step 2 (was 0.5000)
        no improvement of loss for 1 evaluation (best 0.2500 at step 2)
    """
    better, worst = direction(mode, min_delta=min_delta)
    by_name = {called(metric): metric for metric in metrics}
    if not metrics or len(by_name) < len(metrics):
        raise ValueError(
            f"expected metrics with distinct names, got {', '.join(map(called, metrics)) or 'none'}. Pass "
            "track_best('loss'), and name functions of metrics by def."
        )

    def init(state: TrainState) -> dict[str, TrackBestState]:
        return {metric: TrackBestState(*no_best(state, worst), since=state.step.new_zeros(())) for metric in by_name}

    def update(state: TrainState, event: EvalEnd | FitEnd) -> tuple[TrainState, Control]:
        slots: dict[str, TrackBestState] = dict(state.slots[name])
        log: dict[str, object] = {}
        for metric, slot in slots.items():
            if isinstance(event, FitEnd):
                line = Text.written(_Summary(metric), slot.best, slot.step)
                log[f"{name}/{metric}/line"] = Logged(line, when=slot.step >= 0)
                continue
            value, before = measured(event, by_name[metric], name, slot.best.device), Best(slot.best, slot.step)
            best, improved = improve(before, value, state.step, better)
            since = (slot.since + 1).masked_fill(improved, 0)
            slots[metric] = TrackBestState(*best, since=since)
            line = Text.written(_Line(metric), *best, since, before.best)
            log |= {f"{name}/{metric}": Logged(best.best, when=best.step >= 0), f"{name}/{metric}/since": since}
            log[f"{name}/{metric}/line"] = line
        return state.with_slot(name, slots), Control(log=log)

    handler = slotted(name, init, on(EvalEnd | FitEnd, update))
    for metric in metrics:
        handler = needing(handler, metric)
    return handler


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Line(Record):
    """Writes the line about an evaluation. Equal for equal metrics, as parts of a pytree's structure are."""

    metric: str

    def __call__(self, best: float, step: int, since: int, before: float) -> str:
        if not since:
            was = f" (was {format_number(before)})" if math.isfinite(before) else ""
            return f"new best {self.metric}: {format_number(best)} at step {step}{was}"
        times = "1 evaluation" if since == 1 else f"{since} evaluations"
        known = f" (best {format_number(best)} at step {step})" if step >= 0 else ""
        return f"no improvement of {self.metric} for {times}{known}"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Summary(Record):
    """Writes the line at the end of a run."""

    metric: str

    def __call__(self, best: float, step: int) -> str:
        return f"best {self.metric}: {format_number(best)} at step {step}"
