"""Evaluation: of a state by ``evaluate``, and within a run, at the end of each epoch or as a callback requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fxtrain import metrics
from fxtrain.core import (
    EVALUATED,
    Batch,
    Control,
    Epoch,
    EvalBegin,
    EvalEnd,
    EvalStep,
    EvalStepBegin,
    StepEnd,
    StepOutput,
    TrainState,
)
from fxtrain.core._device_tensors import tensor_on
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.core._slots import MEMBERS
from fxtrain.data import Exhausted, Source, SourceLike, as_source, to_device
from fxtrain.data._batch_weight import batch_weight
from fxtrain.fold import Handler, as_trigger, on
from fxtrain.loop._checks import check_eval_step, check_state
from fxtrain.loop._emitter import Emitter
from fxtrain.loop._epochs import announce
from fxtrain.loop._interrupts import Abandoned, Interrupts, Waits, leaving_compilation
from fxtrain.loop._plan import Plan
from fxtrain.loop._types import EvalFn, Events

if TYPE_CHECKING:
    from fxtrain.distributed import Mesh

_Total = dict[str, metrics.Metric]
"""The mergeable metrics of all batches so far."""


@with_short_traceback
def evaluate(state: TrainState, eval_step: EvalFn, data: SourceLike, *, mesh: Mesh | None = None) -> dict[str, float]:
    """Returns the metrics of ``state`` over one epoch of ``data``.

    Args:
        state: Any state. It is not modified.
        eval_step: From ``fxtrain.eval_step``, compiled or not.
        data: A source of batches, as for ``fit``.
        mesh: The ranks among which each batch is split, as for ``fit``. All ranks must call this function, and all
            return the same metrics.

    Returns:
        Averages by name. Values of ``fxtrain.metrics`` merge with their own weights. The weight of a batch for 0-d
        tensors is the first of these that exists: the weight that ``fxtrain.weighted`` gives the loss, the sum of the
        batch's 1-d ``mask`` (an entry, or an attribute of a named tuple or dataclass), and the batch size.

    Raises:
        TypeError: If ``state`` is not a TrainState, or ``eval_step`` is not an evaluation step.
        ValueError: If the data is empty or endless, or if a batch without a mask has tensors of different first
            dimensions. Tensors of shape [] are ignored.

    Example:
        >>> import torch, fxtrain as fx
        >>> step = fx.eval_step(lambda model, batch: {"mean": batch.mean()})
        >>> fx.evaluate(fx.init(torch.nn.ReLU()), step, [torch.zeros(3), torch.ones(1)])
        {'mean': 0.25}
    """
    check_state(state, "evaluate(state, eval_step, data)")
    check_eval_step(eval_step)
    if state.step.ndim:
        from fxtrain.loop._members import lifted_evaluation  # keeps the import of fxtrain fast

        state, eval_step = lifted_evaluation(state, eval_step)
    total: _Total = {}
    source = as_source(data)
    if mesh is not None:
        from fxtrain.distributed._rank_rows import split  # keeps the import of fxtrain fast

        source = split(source, mesh)
    declare_shapes(eval_step, source)
    for index, batch in _batches(source, state.step.device):
        _, total = _measured(state, eval_step, index, batch, total)
    return {name: float(value) for name, value in metrics.compute(total).items()}


def evaluation_requests(plan: Plan) -> list[Handler]:
    """Returns the callback that requests the evaluations of a run, if it has any."""
    if plan.eval_step is None:
        return []
    is_due = _is_last_step if plan.eval_when is None else as_trigger(plan.eval_when, "eval_when")

    def evaluation(state: TrainState, event: StepEnd) -> tuple[TrainState, Control]:
        return state, Control(evaluate=is_due(event), reason="evaluation is due")

    return [on(StepEnd, evaluation)]


def _is_last_step(event: StepEnd) -> bool:
    """Whether this is the last step of an epoch or of the run."""
    ends_epoch = event.epoch_length is not None and event.position == event.epoch_start + event.epoch_length
    return ends_epoch or event.step == event.total_steps


class Evaluations:
    """The evaluations of a run.

    Args:
        emitter: Emits ``EvalBegin``, ``EvalStepBegin``, ``EvalStep`` and ``EvalEnd``.
        data: From ``fxtrain.data.as_source``, or None.
        interrupts: Signals, which abort an evaluation.
    """

    def __init__(self, emitter: Emitter, data: Source | None, interrupts: Interrupts) -> None:
        self._plan, self._now, self._emit, self._time = emitter.plan, emitter.now, emitter.emit, emitter.time
        self._data, self._interrupts, self._ranks = data, interrupts, emitter.ranks
        # Read once, because data of unknown length has one after an evaluation, which a resumed run would not know.
        self._num_batches = None if data is None else data.epoch_length

    def handle(self) -> Events[None]:
        """Evaluates the current state, as a callback requested."""
        now, eval_step, data = self._now, self._plan.eval_step, self._data
        if eval_step is None or data is None:
            raise ValueError(
                "expected eval_step and eval_data for an evaluation requested by a callback, got neither. Give both to "
                "fit, or remove the callback."
            )
        if self._ranks is not None:
            self._ranks.meet("an evaluation", now.step)  # agrees on the time at which it begins
            if self._interrupts.cause is not None:
                return
        # An interrupted evaluation is rolled back and stays due.
        mark, began = now.mark(), self._time()
        now.set(evaluate=False)
        if now.is_batch:
            from fxtrain.loop._members import begin_evaluation

            now.state = begin_evaluation(now.state)
        yield from self._emit(EvalBegin, num_batches=self._num_batches)
        total: _Total = {}
        seen = now.state if self._plan.eval_view is None else self._viewed(self._plan.eval_view, now.state)
        eval_step = leaving_compilation(eval_step)
        try:
            for index, batch in _batches(Waits(data, self._interrupts), now.state.step.device):
                yield from self._emit(EvalStepBegin, index=index, batch=batch)
                if self._ranks is None:
                    output, total = _measured(seen, eval_step, index, batch, total)
                else:
                    self._ranks.meet("a batch of an evaluation", now.step, index)
                    if self._interrupts.cause is not None:
                        raise Abandoned
                    with self._ranks.dispatch("collectives of the evaluation step", now.step):
                        output, total = _measured(seen, eval_step, index, batch, total)
                if self._interrupts.cause is not None:
                    raise Abandoned
                yield from self._emit(
                    EvalStep, index=index, batch=batch, metrics=output.metrics, outputs=output.outputs
                )
            if self._ranks is not None:
                self._ranks.meet("the end of an evaluation", now.step)
        except Abandoned:
            if self._interrupts.cause is None and self._ranks is not None:
                self._ranks.meet(None)  # agrees on the signal that ended this rank's wait for data
            now.roll_back(mark)
            return
        measured = metrics.compute(total)
        slot = {"step": now.state.step.clone(), "metrics": {k: v.detach().clone() for k, v in measured.items()}}
        now.state = now.state.with_slot(EVALUATED, slot)
        if now.is_batch:
            from fxtrain.loop._members import end_evaluation

            now.state = end_evaluation(now.state, measured)
        yield from self._emit(EvalEnd, metrics=measured, duration=self._time() - began)

    def _viewed(self, view: Callable[[TrainState], TrainState], state: TrainState) -> TrainState:
        if self._ranks is None:
            return view(state)
        from fxtrain.distributed._opened import on_opened

        return on_opened(state, view)

    def is_missing(self) -> bool:
        """Whether the epoch must end with an evaluation that no step has requested.

        The last step cannot request it in data of unknown length, or if all batches after it were skipped.
        """
        evaluates_epochs = self._plan.eval_step is not None and self._plan.eval_when is None
        return evaluates_epochs and self._of_this_step() is None

    def metrics_of_this_step(self) -> dict[str, float]:
        """Returns the metrics of the current step's evaluation, or none if it has not been evaluated."""
        return {name: float(value) for name, value in (self._of_this_step() or {}).items()}

    def _of_this_step(self) -> dict[str, Tensor] | None:
        last = self._now.state.slots.get(EVALUATED)
        return last["metrics"] if last is not None and int(last["step"]) == self._now.step else None


def declare_shapes(step: object, data: Source | None) -> None:
    """Declares to a compiled step how many shapes the batches of a data source have."""
    expect = getattr(step, "expect_shapes", None)
    if expect is not None and data is not None:
        expect(data.num_shapes)


def _batches(data: Source | Waits, device: torch.device) -> Iterator[tuple[int, Batch]]:
    """Yields the batches of one epoch of data with their indices."""
    index = 0
    announce(data, Epoch(0, 0, 0))
    while data.epoch_length is None or index < data.epoch_length:
        try:
            batch = to_device(data[index], device)
        except Exhausted as error:
            if index and data.epoch_length not in (None, index):  # of another source that a function of map reads
                raise ValueError(
                    f"expected {data.epoch_length} batches of evaluation data, got {index}, after which a source that "
                    "it reads ends. Give that source as many batches."
                ) from error
            break
        yield index, batch
        index += 1
    if index == 0:
        raise ValueError("expected evaluation data with at least one batch, got none. Check what the source yields.")


def _measured(
    state: TrainState, eval_step: EvalFn, index: int, batch: Batch, total: _Total
) -> tuple[StepOutput, _Total]:
    """Returns the output of a batch, and ``total`` merged with its metrics."""
    # The evaluation step derives its random samples from the position, so set it to the index of the batch.
    output = eval_step(state.replace(position=tensor_on(state.step.device, index)), batch)
    if MEMBERS in state.slots:
        from fxtrain.loop._members import lifted_metrics

        lifted = lifted_metrics(output, batch, lambda one: _weight(one, index))
        return output, metrics.merge(total, lifted) if total else lifted
    # Metrics that merge with their own weights need no batch size.
    averaged = not all(isinstance(value, metrics.Metric) for value in output.metrics.values())
    weight = _weight(batch, index) if averaged and output.weight is None else output.weight
    lifted = metrics.lift(output.metrics, 1 if weight is None else weight)
    return output, metrics.merge(total, lifted) if total else lifted


def _weight(batch: Batch, index: int) -> Tensor | int:
    """Returns the weight of a batch in averages.

    Raises:
        ValueError: If the tensors differ in their first dimension. The message names two of them.
    """
    try:
        return batch_weight(batch)
    except ValueError as error:
        raise ValueError(f"Evaluation batch {index}: {error}") from None
