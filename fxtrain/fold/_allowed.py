"""The requests and the writes that are allowed at each event."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from fxtrain import tree
from fxtrain.core import (
    EVENTS,
    SESSION,
    TRACED,
    Control,
    EpochBegin,
    EpochEnd,
    EvalBegin,
    EvalEnd,
    EvalStep,
    Event,
    FitBegin,
    FitEnd,
    Gradients,
    Microbatch,
    Restored,
    Rewound,
    Saved,
    StepBegin,
    StepEnd,
    TrainState,
    Tree,
    Updated,
)

_LOOP = frozenset({"stop", "skip_final_save", "end_epoch", "evaluate", "save", "rewind"})
_INSIDE_EVALUATION = _LOOP - {"evaluate"}  # nested evaluations would never end
_ONLY_LOG: frozenset[str] = frozenset()

ALLOWED_REQUESTS: Mapping[type[Event], frozenset[str]] = {
    Microbatch: frozenset({"stop", "skip_final_save", "skip_update"}),
    Gradients: frozenset({"stop", "skip_final_save", "skip_update"}),
    Updated: frozenset({"stop", "skip_final_save"}),  # too late for skip_update
    EpochBegin: _LOOP,
    StepBegin: _LOOP | {"skip_batch"},
    StepEnd: _LOOP,
    EvalBegin: _INSIDE_EVALUATION,
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

_WRITABLE = {**dict.fromkeys(TRACED, ("slots",)), **dict.fromkeys(SESSION, ())}
_FIELDS = tuple(field.name for field in dataclasses.fields(TrainState))


def refuse_impossible_requests(name: str, kind: type[Event], control: Control) -> None:
    """Raises if a callback requested something that is not possible at an event.

    Args:
        name: The callback's name.
        kind: The type of the event.
        control: Its requests.

    Raises:
        ValueError: The message names the events at which the request is possible.
    """
    possible = ALLOWED_REQUESTS.get(kind, _ONLY_LOG)
    for request in control.kinds:
        if request not in possible:
            where = [event.__name__ for event in EVENTS if request in ALLOWED_REQUESTS.get(event, _ONLY_LOG)]
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
    if kind not in _WRITABLE or kind is FitEnd:
        return
    for field in _FIELDS:
        if field not in _WRITABLE[kind] and not _same(getattr(before, field), getattr(after, field)):
            allowed, remedy = (
                ("writes to slots only", "Request skip_update, or change it at StepEnd.")
                if kind in TRACED
                else ("no changes", "How often this event fires depends on interruptions, so use a trajectory event.")
            )
            raise ValueError(
                f"{name} changed state.{field} at {kind.__name__}: expected {allowed}, got another value. {remedy}"
            )


def _same(first: Tree, second: Tree) -> bool:
    """Whether two trees hold the same leaf objects. Dynamo tracks the identity of tensors, but not of containers."""
    leaves, others = tree.leaves(first), tree.leaves(second)
    return len(leaves) == len(others) and all(leaf is other for leaf, other in zip(leaves, others, strict=True))
