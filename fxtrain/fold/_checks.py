"""Checks of what a callback returns: the requests and writes that its event allows, and the structure of the state."""

from __future__ import annotations

import typing
from collections.abc import Mapping

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import (
    SESSION,
    TRACED,
    Control,
    EpochBegin,
    EpochEnd,
    EvalBegin,
    EvalEnd,
    EvalStep,
    EvalStepBegin,
    Event,
    FitBegin,
    FitEnd,
    Gradients,
    Microbatch,
    Published,
    Restored,
    Rewound,
    Saved,
    StepBegin,
    StepEnd,
    TrainState,
    Tree,
    Updated,
    describe,
)
from fxtrain.core._state import FIELDS

_LOOP = frozenset({"stop", "skip_final_save", "end_epoch", "evaluate", "save", "rewind"})
_INSIDE_EVALUATION = _LOOP - {"evaluate"}  # nested evaluations would never end

_ALLOWED_REQUESTS: Mapping[type[Event], frozenset[str]] = {
    Microbatch: frozenset({"stop", "skip_final_save", "skip_update"}),
    Gradients: frozenset({"stop", "skip_final_save", "skip_update"}),
    Updated: frozenset({"stop", "skip_final_save"}),  # too late for skip_update
    EpochBegin: _LOOP,
    StepBegin: _LOOP | {"skip_batch"},
    StepEnd: _LOOP,
    EvalBegin: _INSIDE_EVALUATION,
    EvalStepBegin: _INSIDE_EVALUATION,
    EvalStep: _INSIDE_EVALUATION,
    EvalEnd: _INSIDE_EVALUATION,
    EpochEnd: _LOOP - {"end_epoch"},
    Rewound: frozenset({"stop", "skip_final_save"}),
    # No evaluation at session events: an interrupted run would evaluate more often, which callbacks would count.
    FitBegin: frozenset({"stop", "skip_final_save", "save"}),
    Restored: frozenset({"stop", "skip_final_save"}),
    Saved: frozenset({"stop", "skip_final_save"}),
}
"""The requests that are allowed at each event. At events that are not listed, callbacks can only log."""

_MODEL = (
    "Callbacks cannot change the model. Change it between two calls of fit, or train parameters in phases with "
    "fxtrain.optim.unfreeze."
)
_KEEP = "A run can only be resumed into the structure that it started with: "


def cause_of(event: Event) -> type[Event]:
    """Returns the type of the event whose rules hold: that of ``event``, or of the one that ``Published`` follows."""
    return typing.cast("type[Event]", type(event.event)) if type(event) is Published else type(event)


def refuse_impossible_requests(name: str, kind: type[Event], control: Control) -> None:
    """Raises if a callback requested something that is not possible at an event.

    Args:
        name: The callback's name.
        kind: The type of the event.
        control: Its requests.

    Raises:
        ValueError: The message names the events at which the request is possible.
    """
    for request in control.kinds:
        if request not in _ALLOWED_REQUESTS.get(kind, ()):
            where = [event.__name__ for event, possible in _ALLOWED_REQUESTS.items() if request in possible]
            raise ValueError(
                f"{name}: expected requests that are possible at {kind.__name__}, got {request}. Request it at "
                f"{', '.join(where)}."
            )


def refuse_overreach(name: str, kind: type[Event], before: TrainState, after: TrainState) -> None:
    """Raises if a callback wrote to a part of the state that it may only read at an event.

    Args:
        name: The callback's name.
        kind: The type of the event.
        before: The state that the callback received.
        after: The state that it returned.

    Raises:
        ValueError: The message names the field.
    """
    if kind is FitEnd or kind not in (*TRACED, *SESSION):
        return
    for field in (*FIELDS, "model"):
        is_writable = field == "slots" and kind in TRACED
        if not is_writable and not same_leaves(getattr(before, field), getattr(after, field)):
            allowed, remedy = (
                ("writes to slots only", "Request skip_update, or change it at StepEnd.")
                if kind in TRACED
                else ("no changes", "How often this event fires depends on interruptions, so use a trajectory event.")
            )
            raise ValueError(
                f"{name} changed state.{field} at {kind.__name__}: expected {allowed}, got another value. {remedy}"
            )


def same_leaves(first: Tree, second: Tree) -> bool:
    """Whether two trees hold the same leaf objects. Dynamo tracks the identity of tensors, but not of containers."""
    leaves, others = tree.leaves(first), tree.leaves(second)
    return len(leaves) == len(others) and all(leaf is other for leaf, other in zip(leaves, others, strict=True))


def refuse_other_structure(name: str, event: type[Event], before: TrainState, after: TrainState) -> None:
    """Raises if a saved run could not be resumed into the state that a callback returned.

    Only containers that were replaced are compared, so the cost is proportional to what the callback wrote.

    Args:
        name: The callback's name.
        event: The type of the event.
        before: The state that the callback received.
        after: The state that it returned.

    Raises:
        ValueError: If a container, a shape, a dtype or a device changed. The message names the callback, the event
            and the path of the leaf.
    """
    if torch.compiler.is_dynamo_compiling():  # Dynamo cannot format paths; `Step` compares its result with its input
        return
    old_fields, new_fields = before.__dict__, after.__dict__
    for field, old in old_fields.items():
        new = new_fields[field]
        if new is old:
            continue
        if field == "model":
            if new != old:
                raise ValueError(f"{name} changed state.model at {event.__name__}: expected {old}, got {new}. {_MODEL}")
        elif field == "slots":
            if old.keys() != new.keys():
                raise ValueError(_other_slots(name, event, old, new))
            for slot, content in old.items():
                if new[slot] is not content and not _is_alike(content, new[slot]):
                    raise ValueError(_other(name, event, f"state.slots[{slot!r}]", content, new[slot]))
        elif not _is_alike(old, new):
            raise ValueError(_other(name, event, f"state.{field}", old, new))


def _is_alike(old: Tree, new: Tree) -> bool:
    if isinstance(old, Tensor):
        return isinstance(new, Tensor) and _is_alike_leaf(old, new)
    if type(new) is not type(old):
        return False
    if isinstance(old, tuple):  # most slots are named tuples of tensors, for which this is faster than flattening
        parts = typing.cast("tuple[Tree, ...]", old)
        return len(parts) == len(new) and all(map(_is_alike, parts, new))
    old_leaves, old_structure = tree.flatten(old)
    new_leaves, new_structure = tree.flatten(new)
    return old_structure == new_structure and all(map(_is_alike_leaf, old_leaves, new_leaves))


def _is_alike_leaf(old: Tensor, new: Tensor) -> bool:
    return new is old or (new.dtype is old.dtype and new.device == old.device and new.shape == old.shape)


def _other_slots(name: str, event: type[Event], old: dict[str, Tree], new: dict[str, Tree]) -> str:
    added = [slot for slot in new if slot not in old]
    what, slot = ("added", added[0]) if added else ("removed", next(slot for slot in old if slot not in new))
    slots = ", ".join(map(repr, old)) or "none"
    remedy = (
        "reserve a slot with fxtrain.stateful or fxtrain.slotted, which initialize it before the first step."
        if added
        else "reset the slot to its initial content instead."
    )
    return (
        f"{name} {what} state.slots[{slot!r}] at {event.__name__}: expected the slots {slots}, got "
        f"{', '.join(map(repr, new)) or 'none'}. {_KEEP}{remedy}"
    )


def _other(name: str, event: type[Event], path: str, old: Tree, new: Tree) -> str:
    where = f"{name} changed {path} at {event.__name__}"
    if isinstance(new, TrainState) and not isinstance(old, TrainState):
        return (
            f"{where}: expected {_described(old)}, got a TrainState. The update of fxtrain.stateful must return "
            "(content of the slot, control), not (state, control)."
        )
    was, now = (dict(zip(tree.paths(side, path), tree.leaves(side), strict=True)) for side in (old, new))
    for place in (*was, *now):
        if place not in now or place not in was:
            expected, got = (_described(side[place]) if place in side else "no leaf" for side in (was, now))
        elif _is_alike_leaf(was[place], now[place]):
            continue
        else:
            expected, got = _described(was[place]), _described(now[place])
        where = f"{name} changed {place} at {event.__name__}"
        return f"{where}: expected {expected}, got {got}. {_KEEP}keep it, or start the run with the new one."
    return (
        f"{where}: expected {tree.structure(old)}, got {tree.structure(new)}. {_KEEP}keep the types of all containers."
    )


def _described(value: object) -> str:
    return f"{describe(value)} on {value.device}" if isinstance(value, Tensor) else describe(value)
