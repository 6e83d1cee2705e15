"""Averages: what the training metrics were over an epoch, whatever interrupted it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxtrain import metrics
from fxtrain.core import Control, EpochEnd, Logged, TrainState, Updated
from fxtrain.fold import Handler, slotted


def epoch_mean(*names: str, name: str = "epoch_mean") -> Handler:
    """Averages training metrics over each epoch, and logs them at ``EpochEnd`` as ``epoch/<metric>``.

    Every step counts once, whatever the size of its batch, or by the weight that ``fxtrain.weighted`` gives its loss. A
    metric of the step that is a ``fxtrain.metrics.Average`` counts with its own weight.

    The sums are kept inside the compiled step, so nothing is read from the device until the epoch ends: give it to
    ``train_step(..., callbacks=)`` as well as to ``fit``. An epoch without a step logs nothing.

    Args:
        names: Metrics of the step, 0-d tensors; ``"loss"`` by default.
        name: The slot.

    Example:
        >>> epoch_mean("loss", "accuracy")
        <callback epoch_mean on Updated, EpochEnd, slot 'epoch_mean'>
    """
    watched = names or ("loss",)

    def init(state: TrainState) -> dict[str, Any]:
        return {metric: metrics.Average.empty(device=state.step.device) for metric in watched}

    def update(state: TrainState, event: Updated | EpochEnd) -> tuple[TrainState, Control]:
        memory: dict[str, Any] = state.slots[name]
        if isinstance(event, EpochEnd):
            # An epoch whose batches were all skipped has no mean, and ends at a step that has a point already.
            log = {
                f"epoch/{metric}": Logged(average.total / average.count, when=average.count > 0)
                for metric, average in memory.items()
            }
            return state.with_slot(name, init(state)), Control(log=log)
        for metric in watched:
            if metric not in event.metrics:
                there = ", ".join(map(repr, event.metrics))
                raise KeyError(f"epoch_mean averages {metric!r}, and the step measures {there}.")
        seen = {metric: _average(event.metrics[metric], event.weight) for metric in watched}
        return state.with_slot(name, metrics.merge(memory, seen)), Control()

    return slotted(name, init, update)


def _average(value: Any, weight: Tensor | None) -> Any:
    if isinstance(value, metrics.Metric):
        return value
    seen = metrics.Average.from_model_output(value)
    return seen if weight is None else metrics.Average(seen.total * weight, seen.count * weight)
