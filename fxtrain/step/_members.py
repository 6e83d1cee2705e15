"""The step and the evaluation step of many runs: those of one run, vmapped over the members of a batch state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fxtrain import metrics, tree
from fxtrain.core import Batch, Callback, Due, StepOutput, TrainState, describe
from fxtrain.core._members import MEMBERS, Members, PerMember, members_of
from fxtrain.data import for_step
from fxtrain.fold import Composed
from fxtrain.metrics._members import MemberMetrics, MemberValues
from fxtrain.step._eval_step import EvalFunction
from fxtrain.step._step import Step


class MembersStep(Step):
    """The step of a batch of runs, made from the step of one.

    Args:
        single: The step of one run.
        callbacks: Its callbacks, as those of a batch state.
        lift: Maps callbacks of one run to those of a batch.
    """

    def __init__(self, single: Step, lift: Callable[[Composed], Composed]) -> None:
        super().__init__(
            functools.partial(_step_members, single),
            callbacks=lift(single.callbacks),
            fires=single.fires,
            settings=single.settings,
            description=single.description,
            check_state=None if single.check_state is None else functools.partial(_check_members, single.check_state),
        )
        self.single, self._lift = single, lift
        self._name = single._name
        self.enters = frozenset({*self.enters, MEMBERS})

    def with_callbacks(self, callbacks: Callback | Iterable[Callback]) -> Step:
        return self

    def _take(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepOutput]:
        state = self.attached(state)
        new, output = self.function(state, for_step(batch))
        members = _members(new)
        # Each member is a fixed point once it has stopped, and the batch once all have.
        running, due = ~state.due.stop, state.due
        stop = due.stop | members.due.stop.all()
        skip_final_save = due.skip_final_save | members.due.skip_final_save.all()
        # Not `_replace`, which returns an empty tuple inside torch.compile of torch 2.11.
        due = Due(due.begin_epoch, due.rewind, due.evaluate, due.end_epoch, due.save, stop, skip_final_save)
        return new.replace(step=state.step + running, position=state.position + running, due=due), output


class MembersEval(EvalFunction):
    """The evaluation step of a batch of runs, made from that of one."""

    enters = frozenset({MEMBERS})

    def __init__(self, single: EvalFunction) -> None:
        super().__init__(functools.partial(_evaluate_members, single))


def of_member(state: TrainState, members: Members, slots: Any) -> TrainState:
    """Returns the stacked state that a step of one run sees, without the loop's slots."""
    return state.replace(step=members.step, position=members.position, seed=members.seed, due=members.due, slots=slots)


def _step_members(single: Step, state: TrainState, batch: Batch) -> tuple[TrainState, StepOutput]:
    members = _members(state)
    live = ~members.due.stop
    slots = {name: slot for name, slot in state.slots.items() if name in single.enters}
    data, axis = _shared_or_own(batch, members)
    new, output = _over_members(single, of_member(state, members, slots), data, axis)
    weight = 1.0 if output.weight is None else output.weight
    measured = {
        name: MemberMetrics(value) if isinstance(value, metrics.Metric) else MemberValues.of(value, live, weight)
        for name, value in output.metrics.items()
    }
    due = {name: getattr(new.due, name) for name in Due._fields}
    slot = {**members.as_slot(), "step": new.step, "position": new.position, "due": due}
    counters = {"step": state.step, "position": state.position, "seed": state.seed, "due": state.due}
    return new.replace(**counters, slots={**state.slots, **new.slots, MEMBERS: slot}), StepOutput(
        measured, output.control, output.outputs
    )


def _evaluate_members(single: EvalFunction, state: TrainState, batch: Batch) -> StepOutput:
    members = _members(state)
    data, axis = _shared_or_own(batch, members)
    # The evaluation sets the position of the batch state to the index of the batch.
    position = torch.zeros_like(members.position) + state.position
    seen = of_member(state, members._replace(position=position), {})
    output = _over_members(single, seen, data, axis)
    return StepOutput(dict(output.metrics), output.control, output.outputs, output.weight)


def _over_members(single: Callable[..., Any], runs: TrainState, data: Any, axis: int | None) -> Any:
    """Calls a step of one run for all runs at once."""
    try:
        return torch.func.vmap(single, in_dims=(0, axis))(runs, data)
    except RuntimeError as error:
        if str(error).startswith(("vmap: ", "Cannot access data pointer")):
            error.add_note(
                f"The {len(runs.step)} runs of a batch take a step in one call of torch.func.vmap, where values cannot "
                "be read on the host, nor decide branches or shapes. torch.where selects without. BatchNorm with "
                "momentum=None reads a count. If the step must read values, train the runs one by one: "
                "fxtrain.ensemble.member(state, index)."
            )
        raise


def _members(state: TrainState) -> Members:
    members = members_of(state)
    if members is None:
        raise ValueError(
            "expected the state of a batch of runs, got that of one run. Stack states: fxtrain.ensemble.stack(states)."
        )
    return members


def _shared_or_own(batch: Batch, members: Members) -> tuple[Any, int | None]:
    """Returns the batch of the members, and its axis of members or None."""
    if not isinstance(batch, PerMember):
        return batch, None
    count = members.step.shape[0]
    for leaf in tree.leaves(batch.values):
        if isinstance(leaf, Tensor) and (leaf.ndim == 0 or leaf.shape[0] != count):
            raise ValueError(
                f"expected per-member batches with a leading axis of {count} members, got {describe(leaf)}. Give one "
                "batch for each member, or a batch for all without fxtrain.ensemble.per_member."
            )
    return batch.values, 0


def _check_members(check: Callable[[TrainState], None], state: TrainState) -> None:
    members = _members(state)
    slots = {name: slot for name, slot in state.slots.items() if not name.startswith("loop/")}
    check(tree.map(lambda leaf: leaf[0], of_member(state, members, slots)))
