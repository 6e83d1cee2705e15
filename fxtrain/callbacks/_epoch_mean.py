"""Means of training metrics over each epoch, kept in the state across interruptions."""

from __future__ import annotations

from torch import Tensor

from fxtrain import metrics
from fxtrain.core import Control, EpochEnd, Logged, TrainState, Updated, did_you_mean
from fxtrain.fold import Handler, slotted


def epoch_mean(*names: str, name: str = "epoch_mean") -> Handler:
    """Logs the means of training metrics over each epoch, at ``EpochEnd``, as ``epoch/<metric>``.

    Each step has weight 1 regardless of its batch size, or the weight that ``fxtrain.weighted`` gives its loss. A
    metric that is a ``fxtrain.metrics.Average`` has its own weight. An epoch without steps logs nothing.

    Sums accumulate inside the compiled step, so nothing is read from the device until the epoch ends.

    Args:
        names: Names of step metrics, 0-d tensors; ``"loss"`` by default.
        name: The slot.

    Raises:
        KeyError: At run time, if the step has no metric of that name.

    Example:
        >>> epoch_mean("loss", "accuracy")
        <callback epoch_mean on Updated, EpochEnd, slot 'epoch_mean'>
    """
    watched = names or ("loss",)

    def init(state: TrainState) -> dict[str, metrics.Average]:
        return {metric: metrics.Average.empty(device=state.step.device) for metric in watched}

    def update(state: TrainState, event: Updated | EpochEnd) -> tuple[TrainState, Control]:
        slot: dict[str, metrics.Average] = state.slots[name]
        if isinstance(event, EpochEnd):
            # If all batches of an epoch were skipped there is no mean, and the epoch before ended at the same step.
            log = {
                f"epoch/{metric}": Logged(average.total / average.count, when=average.count > 0)
                for metric, average in slot.items()
            }
            return state.with_slot(name, init(state)), Control(log=log)
        for metric in watched:
            if metric not in event.metrics:
                there = ", ".join(map(repr, event.metrics))
                raise KeyError(
                    f"expected the step metric {metric!r} for epoch_mean, got {there}."
                    f"{did_you_mean(metric, event.metrics)}"
                )
        seen = {metric: _average(event.metrics[metric], event.weight) for metric in watched}
        return state.with_slot(name, metrics.merge(slot, seen)), Control()

    return slotted(name, init, update)


def _average(value: metrics.Metric | Tensor, weight: Tensor | None) -> metrics.Metric:
    if isinstance(value, metrics.Metric):
        return value
    seen = metrics.Average.from_model_output(value)
    return seen if weight is None else metrics.Average(seen.total * weight, seen.count * weight)
