"""The two forms of the state of many runs, and the batches of data that differ between the runs.

A *stacked* state is a ``TrainState`` whose leaves all have a leading axis over the members. The loop needs one step,
one data position and one set of pending requests, so it advances a *batch* state: its counters are those of the batch,
its parameters, buffers, optimizer state and callback slots are stacked, and a slot has the counters of the members.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fxtrain.core._checks import describe
from fxtrain.core._pytrees import NAMESPACE, ops, register_node
from fxtrain.core._slots import EPOCH, EPOCH_METRICS, EVALUATED, LOOP, MEMBERS, MEMBERS_EVALUATED, Epoch
from fxtrain.core._state import Due, TrainState
from fxtrain.core._types import Tree


class Members(NamedTuple):
    """The counters of the members in a batch state. Every leaf has a leading axis of members."""

    step: Tensor  # int64 [members]
    position: Tensor  # int64 [members]
    seed: Tensor  # int64 [members]
    due: Due  # of [members]
    epoch: dict[str, Tensor]  # int64 [members]: the fields of `Epoch`, as of the last step of the member
    evaluating: Tensor  # bool [members]: takes part in the current or the last evaluation
    ended: Tensor  # bool [members]: stopped at a step that the batch reaches later, or again after a rewind

    def at(self, step: Tensor) -> Tensor:
        """Returns which members have taken this step last, and take part in its events: bool [members]."""
        return (self.step == step) & ~self.ended

    def as_slot(self) -> dict[str, Any]:
        """Returns the content of the slot: dicts, which a checkpoint restores without a target."""
        return {**self._asdict(), "due": {name: getattr(self.due, name) for name in Due._fields}}


class PerMember:
    """A batch whose tensors have a leading axis of members, so each member trains on data of its own.

    Args:
        values: A pytree of tensors [members, ...].
    """

    def __init__(self, values: Tree) -> None:
        self.values = values

    def __repr__(self) -> str:
        return f"PerMember({self.values!r})"


register_node(PerMember, lambda batch: ([batch.values], None), lambda _, children: PerMember(children[0]))


def is_stacked(state: TrainState) -> bool:
    """Whether a state is that of several runs, stacked along a leading axis."""
    return state.step.ndim == 1


def members_of(state: TrainState) -> Members | None:
    """Returns the counters of the members of a batch state, or None for the state of one run."""
    slot = cast("dict[str, Any] | None", state.slots.get(MEMBERS))
    return None if slot is None else Members(**slot)._replace(due=Due(**slot["due"]))


def check_stacked(state: TrainState) -> int:
    """Returns the number of members of a stacked state.

    Raises:
        ValueError: If a leaf has no leading axis of that size, or there are no members.
    """
    if state.step.ndim != 1:
        raise ValueError(
            "expected the states of runs stacked along one axis, got state.step of shape "
            f"{list(state.step.shape)}. Stack the states of single runs: fxtrain.ensemble.stack(states)."
        )
    count = state.step.shape[0]
    if count == 0:
        raise ValueError("expected the states of one or more runs, got state.step of shape [0]. Stack at least one.")
    leaves: list[Any] = ops.tree_leaves(state, namespace=NAMESPACE)
    for index, leaf in enumerate(leaves):
        if leaf.ndim == 0 or leaf.shape[0] != count:
            path = ops.tree_accessors(state, namespace=NAMESPACE)[index].codify("state")
            raise ValueError(
                f"expected all leaves of a batch of {count} runs to have a leading axis of {count}, got "
                f"{describe(leaf)} at {path}. Stack the states of single runs: fxtrain.ensemble.stack(states)."
            )
    return count


def batch_state(state: TrainState) -> TrainState:
    """Converts a stacked state to a batch state.

    Raises:
        ValueError: If members that have not stopped are at different steps, data positions or epochs, because they
            cannot share batches.
    """
    count = check_stacked(state)
    step, position, stop = (_numbers(leaf) for leaf in (state.step, state.position, state.due.stop))
    slots = dict(state.slots)
    epoch = slots.get(EPOCH) or {name: torch.zeros_like(state.step) for name in Epoch._fields}
    epochs = list(zip(*(_numbers(epoch[name]) for name in Epoch._fields), strict=True))
    places = list(zip(step, position, epochs, strict=True))
    live = [places[index] for index in range(count) if not stop[index]] or [max(places)]
    if len(set(live)) > 1:
        raise ValueError(
            "expected the members of a batch of runs at one step and data position, because they share batches, got "
            f"steps {step} at data positions {position}. Give fit the members of one step, or take single ones out: "
            "fxtrain.ensemble.member(state, index)."
        )
    first = places.index(live[0])
    own = {name: slot for name, slot in slots.items() if not name.startswith(LOOP)}
    kept = {name: _at(slot, first) for name, slot in slots.items() if name.startswith(LOOP) and name not in _OF_MEMBERS}
    if EVALUATED in slots:
        own[MEMBERS_EVALUATED] = slots[EVALUATED]
        kept[EVALUATED] = _flat_evaluation(slots[EVALUATED], first)
    if EPOCH in slots:
        kept[EPOCH] = _at(epoch, first)
    if EPOCH_METRICS in slots:
        kept[EPOCH_METRICS] = _batch_metrics(slots[EPOCH_METRICS])
    members = Members(
        step=state.step,
        position=state.position,
        seed=state.seed,
        due=state.due._replace(begin_epoch=state.due.begin_epoch.clone()),
        epoch={name: value.clone() for name, value in epoch.items()},
        evaluating=torch.ones_like(state.due.stop),
        ended=state.due.stop.clone(),
    )
    due = state.due
    return state.replace(
        step=state.step[first].clone(),
        position=state.position[first].clone(),
        seed=state.seed[0].clone(),
        due=Due(
            begin_epoch=due.begin_epoch[first].clone(),
            rewind=due.rewind[first].clone(),
            evaluate=due.evaluate.any(),
            end_epoch=due.end_epoch[first].clone(),
            save=due.save.any(),
            stop=due.stop.all(),
            skip_final_save=due.skip_final_save.all(),
        ),
        slots={**own, MEMBERS: members.as_slot(), **kept},
    )


def stacked_state(state: TrainState) -> TrainState:
    """Converts a batch state to a stacked state. Any other state is returned as it is.

    Requests that are pending for the batch are pending for each member that is at its step.
    """
    members = members_of(state)
    if members is None:
        return state
    count, current = members.step.shape[0], members.at(state.step)
    slots: dict[str, Tree] = {}
    for name, slot in state.slots.items():
        if name in (MEMBERS, MEMBERS_EVALUATED, EVALUATED, EPOCH, EPOCH_METRICS):
            continue
        slots[name] = _repeated(slot, count) if name.startswith(LOOP) else slot
    if EPOCH in state.slots:
        slots[EPOCH] = {
            name: torch.where(current, state.slots[EPOCH][name], value) for name, value in members.epoch.items()
        }
    if MEMBERS_EVALUATED in state.slots:
        slots[EVALUATED] = state.slots[MEMBERS_EVALUATED]
    if EPOCH_METRICS in state.slots:
        slots[EPOCH_METRICS] = _member_metrics(state.slots[EPOCH_METRICS], count)
    due = members.due
    pending = {
        name: torch.where(current, getattr(state.due, name), getattr(due, name))
        for name in ("begin_epoch", "rewind", "end_epoch", "save")
    }
    return state.replace(
        step=members.step,
        position=members.position,
        seed=members.seed,
        due=due._replace(**pending),
        slots=slots,
    )


_OF_MEMBERS = (EVALUATED, EPOCH, EPOCH_METRICS)


def member_name(name: str, index: int) -> str:
    """Returns the published name of a member's value, such as ``loss/member_3``."""
    return f"{name}/member_{index}"


def _numbers(values: Tensor) -> list[int]:
    return cast("list[int]", values.tolist())  # pyright: ignore[reportUnknownMemberType]


def _at(slot: Tree, index: int) -> Tree:
    def row(leaf: Tensor) -> Tensor:
        return leaf[index].clone()

    return ops.tree_map(row, slot, namespace=NAMESPACE)


def _repeated(slot: Tree, count: int) -> Tree:
    def repeated(leaf: Tensor) -> Tensor:
        return leaf.expand(count, *leaf.shape).clone()

    return ops.tree_map(repeated, slot, namespace=NAMESPACE)


def _flat_evaluation(slot: dict[str, Any], first: int) -> dict[str, Any]:
    """Returns the last evaluation of a batch by published names, from that of the members."""
    flat: dict[str, Tensor] = {}
    for name, values in slot["metrics"].items():
        flat |= summarized(name, values.clone())
    return {"step": slot["step"][first].clone(), "metrics": flat}


def summarized(name: str, values: Tensor) -> dict[str, Tensor]:
    """Returns mean, minimum, maximum and the values of the members by published name, tensors of shape [].

    The summary is that of finite values, and nan if there are none.

    Args:
        name: The metric.
        values: float [members]. NaN for members without a value.
    """
    parts = summary_of(values)
    return {f"{name}/{key}" if key else name: value for key, value in parts.items()}


def summary_of(values: Tensor) -> dict[str, Tensor]:
    """As ``summarized``, by ``""``, ``min``, ``max`` and ``member_<index>``."""
    wide = values if values.is_floating_point() else values.to(torch.get_default_dtype())
    finite = wide.isfinite()
    some, nan = finite.any(), torch.full((), float("nan"), dtype=wide.dtype, device=wide.device)
    mean = torch.where(finite, wide, 0).sum() / finite.sum()
    low = torch.where(some, torch.where(finite, wide, float("inf")).amin(), nan)
    high = torch.where(some, torch.where(finite, wide, float("-inf")).amax(), nan)
    # Cloned, because the values of a slot must not share storage.
    each = {f"member_{index}": value for index, value in enumerate(values.clone().unbind())}
    return {"": mean, "min": low, "max": high, **each}


def gathered(flat: dict[str, Any] | Any, count: int) -> dict[str, Tensor]:
    """Returns the metrics of the members, [members] by name, from those of a batch by published names."""
    last = f"/member_{count - 1}"
    names = [name.removesuffix(last) for name in flat if name.endswith(last)]
    return {name: torch.stack([flat[member_name(name, index)] for index in range(count)]) for name in names}


# The metrics of an epoch so far. In a stacked state, `sums` and `merged` are those of single runs, with a leading axis
# of members. In a batch state, a mean has the leaves of a `fxtrain.metrics.MemberValues`: the last values, the totals
# and the weights. `values` are those that a metric publishes.


def _member_metrics(slot: dict[str, Any], count: int) -> dict[str, Any]:
    found: dict[str, Any] = {"sums": {}, "merged": {}}
    for name, stored in slot.get("means", {}).items():
        _, total, weight = stored["leaves"]
        found["sums"][name] = torch.stack([total, weight], -1)
    for name, stored in slot.get("merged", {}).items():
        found["merged"][name] = {"leaves": stored["leaves"], "values": gathered(stored["values"], count)}
    return {key: stored for key, stored in found.items() if stored}


def _batch_metrics(slot: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"means": {}, "merged": {}}
    for name, sums in slot.get("sums", {}).items():
        total, weight = (part.clone() for part in sums.unbind(-1))
        found["means"][name] = {"leaves": [total / weight, total, weight], "values": summarized(name, total / weight)}
    for name, stored in slot.get("merged", {}).items():
        values: dict[str, Tensor] = {}
        for key, each in stored["values"].items():
            values |= summarized(key, each)
        found["merged"][name] = {"leaves": stored["leaves"], "values": values}
    return {key: stored for key, stored in found.items() if stored}
