"""Batches of runs in the loop: requests of members as those of the batch, and the bookkeeping of each member."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from fxtrain import metrics, tree
from fxtrain.core import EPOCH, Batch, Control, Epoch, Event, StepOutput, TrainState
from fxtrain.core._control import _control_of
from fxtrain.core._members import (
    MEMBERS,
    MEMBERS_EVALUATED,
    Members,
    PerMember,
    batch_state,
    gathered,
    members_of,
    stacked_state,
)
from fxtrain.fold import Composed, as_composed, compose
from fxtrain.loop._evaluation import evaluation_requests
from fxtrain.loop._member_folds import lift, live_members, of_members
from fxtrain.loop._plan import Plan
from fxtrain.metrics._members import lift_members
from fxtrain.step import EvalFunction, Step
from fxtrain.step._callbacks import shared

_FOR_ALL = ("rewind", "end_epoch", "skip_batch")
"""Requests that move the data position, which the members share."""


def lifted_run(state: TrainState, step: Any, plan: Plan) -> tuple[TrainState, Any, Composed, Plan]:
    """Returns the parts of a run of a batch of runs, from those of single runs.

    Args:
        state: A stacked state.
        step: The step of one run.
        plan: The options of the run, with callbacks of one run.

    Returns:
        The batch state, its step, its callbacks, and the plan with the evaluation step of the batch.
    """
    state = batch_state(state)
    given, callbacks = shared(step, compose(as_composed(plan.callbacks)))
    if getattr(given, "steps_per_call", 1) > 1:
        raise ValueError(
            f"expected steps_per_call=1 for a batch of runs, got {given.steps_per_call}. A member stops after any step."
        )
    eval_step: Any = plan.eval_step
    if eval_step is not None:
        plan = dataclasses.replace(plan, eval_step=lifted_eval(eval_step))
    return state, _over_members(given), compose(lift(callbacks), *evaluation_requests(plan)), plan


def stacked_results(state: TrainState, continue_from: TrainState) -> tuple[TrainState, TrainState]:
    """Returns the stacked states of a result. They are one object if no callback changed the state at ``FitEnd``."""
    last = stacked_state(continue_from)
    return last if state is continue_from else stacked_state(state), last


def lifted_evaluation(state: TrainState, eval_step: Any) -> tuple[TrainState, Any]:
    """Returns the batch state and the evaluation step of a batch of runs."""
    return batch_state(state), lifted_eval(eval_step)


def lifted_metrics(
    output: StepOutput, batch: Batch, weight_of: Callable[[Batch], Tensor | int]
) -> dict[str, metrics.Metric]:
    """Returns the mergeable metrics of the members for a batch of an evaluation.

    Args:
        output: The output of the evaluation step of a batch of runs.
        batch: The batch.
        weight_of: Returns the weight of a batch of one run.
    """
    weight: Tensor | int = 1
    if output.weight is not None:
        weight = output.weight
    elif not all(isinstance(value, metrics.Metric) for value in output.metrics.values()):
        if isinstance(batch, PerMember):
            count = tree.leaves(output.metrics)[0].shape[0]
            own = [tree.map(lambda leaf, index=index: leaf[index], batch.values) for index in range(count)]
            weight = torch.stack([torch.as_tensor(weight_of(each)) for each in own])
        else:
            weight = weight_of(batch)
    return lift_members(output.metrics, weight)


def lifted_eval(eval_step: Any) -> Any:
    """Returns the evaluation step of a batch of runs."""
    if not hasattr(eval_step, "over_members"):
        eval_step = EvalFunction(eval_step)
    return eval_step.over_members()


def _over_members(step: Any) -> Any:
    if not hasattr(step, "over_members"):
        step = Step(step, callbacks=getattr(step, "callbacks", ()), fires=getattr(step, "fires", ()))
    return step.over_members(lift)


def settled(state: TrainState, event: Event, control: Control) -> tuple[TrainState, Control]:
    """Writes the requests of members to their state, and returns them as those of the batch.

    A stop ends the batch when all members have stopped. An evaluation or a save of one member is one of the batch, but
    only members that requested an evaluation see its events. The requests that move the data position must be made by
    all members that take part.

    Raises:
        ValueError: If only some members request a rewind, the end of the epoch or to skip the batch.
    """
    if not control.requests:
        return state, control
    members = cast(Members, members_of(state))
    due, live = members.due, live_members(state, event)
    requests: dict[str, dict[str, Any]] = {}
    for kind, reasons in control.requests.items():
        # A product gates flags and the number of steps of a rewind alike.
        flags = {reason: live * flag for reason, flag in reasons.items()}
        united = torch.stack(list(flags.values())).amax(0) if kind == "rewind" else _any(flags)
        if kind in _FOR_ALL:
            requests[kind] = {reason: _of_all(kind, reason, flag, live) for reason, flag in flags.items()}
        elif kind in ("stop", "skip_final_save"):
            due = due._replace(**{kind: getattr(due, kind) | united})
            requests[kind] = flags
        else:
            if kind == "evaluate":
                due = due._replace(evaluate=due.evaluate | united)
            requests[kind] = {reason: flag.any() for reason, flag in flags.items()}
    if "stop" in requests:
        ends, count = due.stop.all(), due.stop.shape[0]
        prefix = f"all {count} members have stopped, the last: " if count > 1 else ""
        requests["stop"] = {f"{prefix}{reason}": ends & flag.any() for reason, flag in requests["stop"].items()}
        if "skip_final_save" in requests:
            requests["skip_final_save"] = {"": ends & due.skip_final_save.all()}
    if due is not members.due:
        state = _with(state, members._replace(due=due))
    return state, _control_of(requests, control.log)


def _any(flags: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(flags.values())).any(0)


def _of_all(kind: str, reason: str, flag: Tensor, live: Tensor) -> Any:
    """Returns the request of the batch, after checking that all members that take part make it."""
    values = flag[live]
    if values.numel() == 0:
        return 0 if kind == "rewind" else False
    if not bool((values == values[0]).all()):
        who = (live * flag).nonzero().flatten().tolist()
        raise ValueError(
            f"expected {kind} of all members of a batch of runs or of none, because they share the data position, got "
            f"it of the members {who} ({reason}). Stop these members, or train them alone: "
            "fxtrain.ensemble.member(state, index)."
        )
    return int(values[0]) if kind == "rewind" else bool(values[0])


def from_step(state: TrainState, control: Control) -> Control:
    """Returns the requests that the step of a batch made, with logged values by published names."""
    members = cast(Members, members_of(state))
    live = ~members.due.stop | members.at(state.step)
    return of_members(control, live.shape[0], live)


def begin_evaluation(state: TrainState) -> TrainState:
    """Chooses the members that take part in an evaluation: those that requested it, or all if the loop did."""
    members = cast(Members, members_of(state))
    asked, current = members.due.evaluate, members.at(state.step)
    evaluating = torch.where(asked.any(), asked, current)
    due = members.due._replace(evaluate=torch.zeros_like(asked))
    return _with(state, members._replace(due=due, evaluating=evaluating))


def end_evaluation(state: TrainState, measured: dict[str, Tensor]) -> TrainState:
    """Records the metrics of the members that took part in an evaluation, before ``EvalEnd``."""
    members = cast(Members, members_of(state))
    mask = members.evaluating
    values = gathered(measured, mask.shape[0])
    before = state.slots.get(MEMBERS_EVALUATED)
    old = {} if before is None else before["metrics"]
    step = torch.full_like(members.step, -1) if before is None else before["step"]
    metrics = {
        name: torch.where(mask, value, old[name] if name in old else torch.full_like(value, float("nan")))
        if value.is_floating_point()
        else torch.where(mask, value, old.get(name, value))
        for name, value in values.items()
    }
    return state.with_slot(MEMBERS_EVALUATED, {"step": torch.where(mask, members.step, step), "metrics": metrics})


def begin_epoch(state: TrainState) -> TrainState:
    """Clears the pending begin of an epoch, except that of members that have stopped, before ``EpochBegin``."""
    members = cast(Members, members_of(state))
    due = members.due
    return _with(state, members._replace(due=due._replace(begin_epoch=due.begin_epoch & due.stop)))


def record_epoch(state: TrainState, *, ends: bool) -> TrainState:
    """Records the epoch of the batch as that of the members that are at its step.

    Args:
        state: A batch state with the new epoch.
        ends: Whether the epoch before has just ended.
    """
    members = cast(Members, members_of(state))
    current = members.at(state.step)
    if ends:
        members = members._replace(due=members.due._replace(begin_epoch=members.due.begin_epoch | current))
    epoch = {name: torch.where(current, state.slots[EPOCH][name], members.epoch[name]) for name in Epoch._fields}
    return _with(state, members._replace(epoch=epoch))


def moved(state: TrainState) -> TrainState:
    """Moves the members that have not stopped to the data position of the batch."""
    members = cast(Members, members_of(state))
    takes_part = members.at(state.step) if bool(state.due.end_epoch) else ~members.due.stop
    return _with(state, members._replace(position=torch.where(takes_part, state.position, members.position)))


def with_stopped(target: TrainState, state: TrainState) -> TrainState:
    """Returns the state to rewind to, with the members that have stopped since as they are."""
    members = cast(Members, members_of(state))
    stopped = members.due.stop

    def keep(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(stopped.reshape(-1, *[1] * (new.ndim - 1)), old, new)

    names = [name for name in target.slots if name == MEMBERS or not name.startswith("loop/")]
    slots = {name: tree.map(keep, target.slots[name], state.slots[name]) for name in names}
    fields = {name: tree.map(keep, getattr(target, name), getattr(state, name)) for name in _STACKED}
    slots[MEMBERS] = {**slots[MEMBERS], "ended": stopped.clone()}
    return target.replace(**fields, slots={**target.slots, **slots})


_STACKED = ("params", "buffers", "opt_state")


def _with(state: TrainState, members: Members) -> TrainState:
    return state.with_slot(MEMBERS, members.as_slot())
