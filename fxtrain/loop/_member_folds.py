"""Callbacks of many runs: those of one run, folded for each member of a batch state.

A callback is vmapped over the members. One that needs the value of a tensor, as in ``if loss < best`` or ``.item()``,
is called for one member after another instead, with the same result. Members that have stopped keep their state, and
their requests do not count.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import (
    EVALUATED,
    LOOP,
    SESSION,
    Control,
    EpochBegin,
    EvalBegin,
    EvalEnd,
    EvalStep,
    EvalStepBegin,
    Event,
    FitEnd,
    Logged,
    Published,
    StepBegin,
    TrainState,
    Tree,
    event_of,
    wide_dtype,
)
from fxtrain.core._control import _control_of
from fxtrain.core._members import (
    MEMBERS,
    MEMBERS_EVALUATED,
    Members,
    PerMember,
    gathered,
    member_name,
    members_of,
    summary_of,
)
from fxtrain.fold import Composed, Handler
from fxtrain.fold._checks import refuse_other_structure, same_leaves
from fxtrain.fold._handler import Init, checked_result
from fxtrain.fold._per_member import Across, Each
from fxtrain.metrics import Metric
from fxtrain.metrics._members import MemberMetrics, MemberValues

_HIDDEN = (MEMBERS, MEMBERS_EVALUATED, EVALUATED)  # slots of the loop that callbacks of a member do not see
_BATCHED = ("metrics", "evaluation", "outputs", "batch")  # fields of events that may differ between members


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MembersHandler(Handler):
    """A callback of a batch of runs."""

    @property
    def inits(self) -> dict[str, Init | None]:
        return {name: None if init is None else _init_members(init) for name, init in super().inits.items()}


def lift(callbacks: Composed) -> Composed:
    """Returns callbacks of one run as callbacks of a batch of runs."""
    return Composed(tuple(map(_lifted, callbacks.handlers)))


def _lifted(handler: Handler) -> MembersHandler:
    if isinstance(handler, MembersHandler):
        return handler
    if handler.needs.one_run:
        raise ValueError(
            f"expected callbacks for a batch of runs, got {handler.name}, which is for one run. {handler.needs.one_run}"
        )
    fields = {field.name: getattr(handler, field.name) for field in dataclasses.fields(handler)}
    needs = dataclasses.replace(handler.needs, checks=(functools.partial(_check_members, handler),))
    return MembersHandler(**{**fields, "needs": needs, "function": _Fold(handler)})


def _check_members(handler: Handler, state: TrainState) -> None:
    view, function = _View.of(state), handler.function
    if isinstance(function, Each):
        function.check_count(view.count)
    for index, each in enumerate(function.handlers if isinstance(function, Each) else (handler,)):
        for check in each.needs.checks:
            check(view.member(index))


def _init_members(init: Init) -> Init:
    def init_each(state: TrainState) -> Tree:
        view = _View.of(state)
        inits = getattr(init, "each", None) or [init] * view.count
        contents = [one(view.member(index)) for index, one in enumerate(inits)]
        return tree.map(lambda *leaves: torch.stack(leaves), *contents)

    return init_each


class _View(NamedTuple):
    """A batch state as the members see it."""

    state: TrainState  # stacked, without slots of the loop
    shared: dict[str, Tree]  # slots of the loop that all members see
    members: Members

    @classmethod
    def of(cls, state: TrainState) -> _View:
        members = members_of(state)
        assert members is not None
        own = {name: slot for name, slot in state.slots.items() if not name.startswith(LOOP)}
        shared = {n: slot for n, slot in state.slots.items() if n.startswith(LOOP) and n not in _HIDDEN}
        counters = {"step": members.step, "position": members.position, "seed": members.seed, "due": members.due}
        return cls(state.replace(**counters, slots=own), shared, members)

    @property
    def count(self) -> int:
        return self.members.step.shape[0]

    def shown(self, state: TrainState) -> TrainState:
        """Returns the state of one member, with the slots of the loop."""
        return state.replace(slots={**state.slots, **self.shared})

    def member(self, index: int) -> TrainState:
        return self.shown(tree.map(lambda leaf: leaf[index], self.state))

    def hidden(self, state: TrainState) -> TrainState:
        """Returns a state that a callback returned, without the slots of the loop."""
        return state.replace(slots={n: slot for n, slot in state.slots.items() if n not in self.shared})

    def written(self, before: TrainState, state: TrainState) -> TrainState:
        """Returns the batch state ``before`` with the stacked state of a fold."""
        # Unchanged containers stay the same objects: the loop keeps old values of others until the next step.
        fields = {
            name: content
            for name in ("params", "buffers", "opt_state")
            if not same_leaves(getattr(before, name), content := getattr(state, name))
        }
        slots = dict(before.slots)
        slots |= {
            name: slot for name, slot in state.slots.items() if name not in slots or not same_leaves(slots[name], slot)
        }
        members = self.members._replace(step=state.step, position=state.position, seed=state.seed, due=state.due)
        if not same_leaves(members, self.members):
            slots[MEMBERS] = members.as_slot()
        return before.replace(**fields, slots=slots)


class _Fold:
    """Folds a callback of one run over the members of a batch state."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self._by_vmap = handler.errors is None and not isinstance(handler.function, Each)

    def __call__(self, state: TrainState, event: Event) -> tuple[TrainState, Control]:
        view, live = _View.of(state), live_members(state, event)
        if isinstance(self.handler.function, Across):
            return self._across(state, event, view, live)
        if self._by_vmap and type(event) not in (*SESSION, Published):
            try:
                return self._vmapped(state, event, view, live)
            except Exception:  # the callback needs values of tensors, or it fails for single members too
                self._by_vmap = False
        return self._one_by_one(state, event, view, live)

    def _across(self, state: TrainState, event: Event, view: _View, live: Tensor) -> tuple[TrainState, Control]:
        handler = self.handler
        batched, static = _split(event, view.count)
        given = view.shown(view.state)
        new, control = checked_result(
            handler, event, handler.function(given, event_of(static[0], {**static[1], **batched}))
        )
        refuse_other_structure(handler.name, type(event), given, new)
        new = view.hidden(new)
        before, structure = tree.flatten(view.state)
        after = tree.leaves(new)
        leaves = [old if new is old else _where(live, new, old) for old, new in zip(before, after, strict=True)]
        requests = {
            kind: {reason: live * torch.as_tensor(flag, device=live.device) for reason, flag in reasons.items()}
            for kind, reasons in control.requests.items()
        }
        log: dict[str, Logged] = {}
        for name, entry in control.log.items():
            each = isinstance(entry.value, Tensor) and entry.value.shape == live.shape
            log |= _expanded(name, entry, view.count, live) if each else {name: entry}
        return view.written(state, tree.unflatten(structure, leaves)), _control_of(requests, log)

    def _vmapped(self, state: TrainState, event: Event, view: _View, live: Tensor) -> tuple[TrainState, Control]:
        handler = self.handler
        leaves, structure = tree.flatten(view.state)
        batched, (kind, fields) = _split(event, view.count)
        changed: list[int] = []
        statics: list[Any] = []
        made: list[Any] = []

        def one(leaves_of_one: list[Tensor], batched: dict[str, Tree]) -> tuple[list[Tensor], list[Tensor]]:
            given = view.shown(tree.unflatten(structure, leaves_of_one))
            result = handler.function(given, event_of(kind, {**fields, **batched}))
            new, control = checked_result(handler, event, result)
            refuse_other_structure(handler.name, type(event), given, new)
            after = tree.leaves(view.hidden(new))
            changed[:] = [i for i, (old, new) in enumerate(zip(leaves_of_one, after, strict=True)) if new is not old]
            requests, control_structure = tree.flatten(control)
            made[:] = [control_structure]
            statics[:] = [None if isinstance(leaf, Tensor | bool | int | float) else leaf for leaf in requests]
            device = view.members.step.device
            tensors = [
                torch.as_tensor(leaf, device=device)
                if not isinstance(leaf, float)
                else torch.tensor(leaf, dtype=wide_dtype(device), device=device)
                for leaf in requests
                if isinstance(leaf, Tensor | bool | int | float)
            ]
            return [after[index] for index in changed], tensors

        new, tensors = torch.func.vmap(one)(leaves, batched)
        for index, leaf in zip(changed, new, strict=True):
            leaves[index] = _where(live, leaf, leaves[index])
        filled = iter(tensors)
        control: Control = tree.unflatten(made[0], [next(filled) if s is None else s for s in statics])
        after = view.written(state, tree.unflatten(structure, leaves)) if changed else state
        return after, of_members(control, view.count, live)

    def _one_by_one(self, state: TrainState, event: Event, view: _View, live: Tensor) -> tuple[TrainState, Control]:
        handler = self.handler
        function = handler.function
        functions = (
            [each.function for each in function.handlers] if isinstance(function, Each) else [function] * view.count
        )
        leaves, structure = tree.flatten(view.state)
        batched, (kind, fields) = _split(event, view.count)
        rows: dict[int, dict[int, Tensor]] = {}
        requests: dict[str, dict[str, Any]] = {}
        log: dict[str, dict[int, Logged]] = {}
        for index, is_live in enumerate(live.tolist()):
            if not is_live:
                continue
            mine = [leaf[index] for leaf in leaves]
            given = view.shown(tree.unflatten(structure, mine))
            own = {name: _of_member(value, index) for name, value in batched.items()}
            seen = event_of(kind, {**fields, **own, **_counters(event, view, index)})
            new, control = checked_result(handler, event, functions[index](given, seen))
            refuse_other_structure(handler.name, type(event), given, new)
            for place, (old, leaf) in enumerate(zip(mine, tree.leaves(view.hidden(new)), strict=True)):
                if leaf is not old:
                    rows.setdefault(place, {})[index] = leaf
            for request, reasons in control.requests.items():
                for reason, flag in reasons.items():
                    into = requests.setdefault(request, {}).setdefault(reason, [0 * flag] * view.count)
                    into[index] = flag
            for name, entry in control.log.items():
                log.setdefault(name, {})[index] = entry
        for place, new in rows.items():
            old_rows = dict(enumerate(leaves[place].unbind()))
            leaves[place] = torch.stack(list({**old_rows, **new}.values()))
        stacked = {
            request: {
                reason: torch.stack([torch.as_tensor(flag, device=live.device) for flag in flags])
                for reason, flags in reasons.items()
            }
            for request, reasons in requests.items()
        }
        published: dict[str, Logged] = {}
        for name, entries in log.items():
            published |= _joined(name, entries, view.count)
        after = view.written(state, tree.unflatten(structure, leaves)) if rows else state
        return after, _control_of(stacked, published)


def live_members(state: TrainState, event: Event) -> Tensor:
    """Returns which members take part in an event: bool [members].

    A run ends after the events of the step at which it stopped, so a member is frozen from the next step on.
    """
    members = cast("Members", members_of(state))
    kind = type(event)
    if kind in SESSION:
        return torch.ones_like(members.due.stop)
    cause: object = event.event if isinstance(event, Published) else event
    if isinstance(cause, StepBegin | EpochBegin):
        live = ~members.due.stop
        return live | _has_published(event, live) if isinstance(event, Published) else live
    live = ~members.due.stop | members.at(state.step)
    if isinstance(cause, EvalBegin | EvalStepBegin | EvalStep | EvalEnd):
        live = live & members.evaluating
    return live


def _has_published(event: Published, like: Tensor) -> Tensor:
    """Returns which members have published a value, as those that stopped at this very event may have."""
    names = [member_name("", index) for index in range(len(like))]
    return torch.tensor([any(key.endswith(name) for key in event.log) for name in names], device=like.device)


def of_members(control: Control, count: int, live: Tensor) -> Control:
    """Returns requests with flags [members] as those of a batch, with logged values by published names.

    Args:
        control: Requests whose flags and values have a leading axis of members.
        count: The number of members.
        live: bool [members]. The requests of the others do not count.
    """
    if not control:
        return control
    requests = {
        kind: {reason: live * flag for reason, flag in reasons.items()} for kind, reasons in control.requests.items()
    }
    log: dict[str, Logged] = {}
    for name, entry in control.log.items():
        log |= _expanded(name, entry, count, live)
    return _control_of(requests, log)


def _expanded(name: str, entry: Logged, count: int, live: Tensor) -> dict[str, Logged]:
    when = (live & entry.when).unbind()
    values = [_of_member(entry.value, index) for index in range(count)]
    return _joined(name, {i: Logged(values[i], when[i], entry.owner) for i in range(count)}, count)


def _joined(name: str, entries: Mapping[int, Logged], count: int) -> dict[str, Logged]:
    """Returns the logged values of members by published names, with a summary of scalars."""
    published = {member_name(name, index): entry for index, entry in entries.items()}
    values = [entry.value for entry in entries.values()]
    if all((isinstance(value, Tensor) and value.ndim == 0) or type(value) in (bool, int, float) for value in values):
        device = next((value.device for value in values if isinstance(value, Tensor)), torch.device("cpu"))
        wide = torch.stack([torch.as_tensor(value, device=device).to(wide_dtype(device)) for value in values])
        when = torch.stack([torch.as_tensor(entry.when, device=device) for entry in entries.values()])
        summary = summary_of(torch.where(when, wide, float("nan")))
        owner, some = next(iter(entries.values())).owner, when.any()
        for key in ("", "min", "max"):
            published[f"{name}/{key}" if key else name] = Logged(summary[key], some, owner)
    return published


def _where(live: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Returns ``new`` for live members and ``old`` for the others, in memory of its own."""
    return torch.where(live.reshape(-1, *[1] * (old.ndim - 1)), new, old).contiguous()


def _of_member(value: Tree, index: int) -> Tree:
    return tree.map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, value)


def _split(event: Event, count: int) -> tuple[dict[str, Tree], tuple[type[Any], dict[str, Any]]]:
    """Splits an event into the fields that differ between members, with a leading axis, and its type and the others."""
    fields = dict(event.__dict__)
    batched: dict[str, Tree] = {}
    for name in _BATCHED:
        value = fields.get(name)
        if value is None or (name == "batch" and not isinstance(value, PerMember)):
            continue
        batched[name] = (
            value.values if isinstance(value, PerMember) else _metrics(value, count) if name != "outputs" else value
        )
    return batched, (type(event), fields)


def _metrics(measured: Mapping[str, Any], count: int) -> dict[str, Tree]:
    """Returns the metrics of the members: of a step, or those of an evaluation or epoch by published names."""
    each = {name: _values(value) for name, value in measured.items() if isinstance(value, Metric)}
    flat = {name: value for name, value in measured.items() if not isinstance(value, Metric)}
    stacked = {n: v for n, v in flat.items() if isinstance(v, Tensor) and v.ndim == 1 and v.shape[0] == count}
    return {**each, **stacked, **gathered(flat, count)}


def _values(value: Metric) -> Tree:
    if isinstance(value, MemberValues):
        return value.values
    return value.each if isinstance(value, MemberMetrics) else value


def _counters(event: Event, view: _View, index: int) -> dict[str, Any]:
    """Returns fields of an event that a member sees with values of its own when it is folded alone."""
    if isinstance(event, FitEnd):
        epoch = {name: int(value[index]) for name, value in view.members.epoch.items()}
        ended = int(view.members.step[index]) < event.step
        own = {"epochs_done": epoch["done"], "epoch_start": epoch["start"], "epoch_length": epoch["length"] or None}
        counters = {"step": int(view.members.step[index]), "position": int(view.members.position[index])}
        return {**counters, **own} if ended else counters
    if isinstance(event, Published):
        tail = member_name("", index)
        log = {name.removesuffix(tail): value for name, value in event.log.items() if name.endswith(tail)}
        cause = cast("Event", event.event)
        batched, (kind, fields) = _split(cause, view.count)
        own = {name: _of_member(value, index) for name, value in batched.items()}
        return {"log": log, "event": event_of(kind, {**fields, **own})}
    return {}
