"""Evaluate: a measurement of one state over a whole data set, which changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fxtrain import metrics, tree
from fxtrain.core import StepOutput, TrainState
from fxtrain.data import Exhausted, adapt


class Measured(NamedTuple):
    """One batch of an evaluation."""

    index: int
    batch: Any
    output: StepOutput
    total: dict[str, Any]  # the metrics so far, mergeable


def evaluate(state: TrainState, eval_step: Callable[..., StepOutput], data: Any) -> dict[str, float]:
    """The metrics of ``state`` over one epoch of ``data``.

    Args:
        state: Any state. It is left as it is.
        eval_step: From ``fxtrain.eval_step``, compiled or not.
        data: As ``fit`` takes it.

    Returns:
        Averages by name, weighted by the size of each batch.

    Raises:
        ValueError: If the data is empty or endless.

    Example:
        >>> import torch, fxtrain as fx
        >>> step = fx.eval_step(lambda model, batch: {"mean": batch.mean()})
        >>> fx.evaluate(fx.init(torch.nn.ReLU()), step, [torch.zeros(3), torch.ones(1)])
        {'mean': 0.25}
    """
    total: dict[str, Any] = {}
    for measured in measure(state, eval_step, adapt(data)):
        total = measured.total
    return {name: float(value) for name, value in metrics.compute(total).items()}


def measure(state: TrainState, eval_step: Callable[..., StepOutput], data: Any) -> Iterator[Measured]:
    """The batches of one evaluation, one at a time."""
    total: dict[str, Any] = {}
    index = 0
    while data.epoch_length is None or index < data.epoch_length:
        try:
            batch = to_device(data[index], state.step.device)
        except Exhausted:
            break
        # The position tells the evaluation step which batch it is at, and so which random numbers are its own.
        at = state.replace(position=torch.tensor(index, device=state.step.device))
        output = eval_step(at, batch)
        lifted = metrics.lift(output.metrics, _size(batch, state))
        total = metrics.merge(total, lifted) if total else lifted
        yield Measured(index, batch, output, total)
        index += 1
    if index == 0:
        raise ValueError("The evaluation data is empty: there is nothing to measure.")


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch, on this device."""
    if device.type == "cpu":
        return batch
    return tree.map(lambda leaf: leaf.to(device, non_blocking=True), batch)


def _size(batch: Any, state: TrainState) -> Tensor:
    """How many examples a batch has; rows that only fill it up do not count."""
    first = next((leaf for leaf in tree.leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), None)
    mask = batch.get("mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 1:
        return mask.sum()
    return torch.tensor(1 if first is None else first.shape[0], device=state.step.device)
