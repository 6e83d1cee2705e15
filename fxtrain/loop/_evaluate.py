"""Evaluate: a measurement of one state over a whole data set, which changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fxtrain import metrics, tree
from fxtrain.core import Epoch, StepOutput, TrainState
from fxtrain.data import Exhausted, adapt, map_tensors
from fxtrain.data._containers import count_examples
from fxtrain.loop._arguments import refuse_unless_evaluates, refuse_unless_state
from fxtrain.loop._epochs import announce


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
        Averages by name. ``fxtrain.metrics`` merge with weights of their own. A tensor is weighted by what
        ``fxtrain.weighted`` gave the loss; else by the batch's 1-d ``mask``, its sum, if the batch is a mapping, named
        tuple or dataclass that has one; else by the first dimension of the batch's tensors.

    Raises:
        TypeError: If ``state`` is no state, or ``eval_step`` no evaluation step.
        ValueError: If the data is empty or endless, or if a batch that has no mask has tensors of different first
            dimensions. Tensors of shape [] are left out.

    Example:
        >>> import torch, fxtrain as fx
        >>> step = fx.eval_step(lambda model, batch: {"mean": batch.mean()})
        >>> fx.evaluate(fx.init(torch.nn.ReLU()), step, [torch.zeros(3), torch.ones(1)])
        {'mean': 0.25}
    """
    refuse_unless_state(state, "evaluate(state, eval_step, data)")
    refuse_unless_evaluates(eval_step)
    total: dict[str, Any] = {}
    source = adapt(data)
    declare_shapes(eval_step, source)
    for measured in measure(state, eval_step, source):
        total = measured.total
    return {name: float(value) for name, value in metrics.compute(total).items()}


def declare_shapes(step: Any, data: Any) -> None:
    """Declares to a compiled step how many shapes the batches of a data source have."""
    expect = getattr(step, "expect", None)
    if expect is not None and data is not None:
        expect(data.kinds)


def measure(state: TrainState, eval_step: Callable[..., StepOutput], data: Any) -> Iterator[Measured]:
    """The batches of one evaluation, one at a time."""
    total: dict[str, Any] = {}
    index = 0
    announce(data, Epoch(0, 0, 0))
    while data.epoch_length is None or index < data.epoch_length:
        try:
            batch = to_device(data[index], state.step.device)
        except Exhausted:
            break
        # The position tells the evaluation step which batch it is at, and so which random numbers are its own.
        at = state.replace(position=torch.tensor(index, device=state.step.device))
        output = eval_step(at, batch)
        # What merges by weights of its own needs no batch size.
        averaged = not all(isinstance(value, metrics.Metric) for value in output.metrics.values())
        weight = output.weight
        if weight is None:
            weight = _weight(batch, index) if averaged else 1
        lifted = metrics.lift(output.metrics, weight)
        total = metrics.merge(total, lifted) if total else lifted
        yield Measured(index, batch, output, total)
        index += 1
    if index == 0:
        raise ValueError("The evaluation data is empty: there is nothing to measure.")


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch, on this device."""
    if device.type == "cpu":
        return batch
    return map_tensors(lambda leaf: leaf.to(device, non_blocking=True), batch)


def _weight(batch: Any, index: int) -> Tensor | int:
    """How much a batch counts in averages: its mask's sum, the first dimension that all of its tensors share, or the
    number of its graphs or of the elements of its lists.

    Raises:
        ValueError: If the tensors do not agree. The message names two of them.
    """
    mask = _mask(batch)
    sizes = {leaf.shape[0] for leaf in _tensors(batch) if leaf is not mask and leaf.ndim}
    if mask is not None and (not sizes or len(mask) in sizes):
        return mask.sum()
    examples = count_examples(batch) if mask is None else None
    if examples is not None:
        return examples
    if len(sizes) > 1 or mask is not None:
        raise ValueError(
            f"Evaluation batch {index}: expected one first dimension, the batch size that weights the averages, got "
            f'{_two_sizes(batch)}. Give the batch a 1-d "mask" of its examples, keep tensors without a batch dimension '
            "out of it, or return metrics with weights of their own from eval_step, as "
            "fxtrain.metrics.Average.from_model_output(losses)."
        )
    return sizes.pop() if sizes else 1


def _mask(batch: Any) -> Tensor | None:
    """Which examples count, or how much each does: a batch's own 1-d mask, if it has one."""
    if isinstance(batch, Tensor | list):
        return None
    mask = cast(Mapping[Any, Any], batch).get("mask") if isinstance(batch, Mapping) else getattr(batch, "mask", None)
    return mask if isinstance(mask, Tensor) and mask.ndim == 1 and not mask.is_complex() else None


def _two_sizes(batch: Any) -> str:
    pairs = zip(tree.paths(batch, "batch"), tree.leaves(batch), strict=True)
    shapes = {
        leaf.shape[0]: f"{path} of shape {list(leaf.shape)}"
        for path, leaf in pairs
        if isinstance(leaf, Tensor) and leaf.ndim
    }
    return " and ".join(list(shapes.values())[:2])


def _tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in tree.leaves(batch) if isinstance(leaf, Tensor)]
