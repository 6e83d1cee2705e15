"""The observer that prints each event with the callbacks that ran, and what each changed, requested and logged."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TextIO

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import (
    SESSION,
    TRAJECTORY,
    Control,
    Event,
    Logged,
    LoopEvent,
    Published,
    TrainState,
    describe,
    dtype_name,
    encodable,
    first_names,
    matching,
    printable,
)
from fxtrain.fold import When, as_trigger
from fxtrain.fold._watched import Outcome

_EVENTS = (*TRAJECTORY, Published, *SESSION)
_MAX_LEAVES = 6  # shown changes of one callback


def debug(
    events: str | Sequence[str] = "*",
    callbacks: str | Sequence[str] = "*",
    *,
    every: When = 1,
    file: TextIO | None = None,
) -> Debug:
    """Prints each event of the loop with the callbacks that ran, and what each changed, requested and logged.

    A line is printed as soon as its callback returns or raises. Traced callbacks run inside the compiled step: their
    requests and logged values are listed at ``StepEnd``, and their slots are not. Values are read from the device after
    each callback. Without this observer, callbacks are not watched and nothing of this costs time.

    Args:
        events: One or several shell patterns of event types, such as ``"Eval*"``.
        callbacks: One or several shell patterns of callback names, such as ``"early_*"``. Names are those in the repr
            of ``fxtrain.compose(...)``. Events at which no such callback runs are left out.
        every: At which events to print: multiples of a number of steps, or a trigger.
        file: The output stream. Defaults to standard output.

    Raises:
        ValueError: If a pattern matches no event.

    Example:
        >>> import tempfile, torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: (model(batch) - 1).square().mean(), tx)
        >>> def count(state, event: fx.StepEnd, steps):
        ...     return steps + 1, fx.Control(stop=event.step == 2, reason="enough", log={"steps": steps + 1})
        >>> callbacks = [fx.stateful("count", lambda state: torch.tensor(0), count), fx.callbacks.save(every=2)]
        >>> checkpointer = fx.checkpointer(tempfile.mkdtemp())
        >>> watch = debug(events=["Step*", "Rewound"])
        >>> state, data = fx.init(torch.nn.Linear(1, 1), tx), [torch.ones(4, 1)]
        >>> _ = fx.fit(state, step, data, steps=9, callbacks=callbacks, checkpointer=checkpointer, observers=watch)
        StepBegin of step 1, epoch 0.00
        StepEnd of step 1, epoch 1.00
          count: changes slots['count'] 0 -> 1, logs steps=1
          save when every(2): nothing
        StepBegin of step 2, epoch 1.00
        StepEnd of step 2, epoch 2.00
          count: changes slots['count'] 1 -> 2, requests stop (enough), logs steps=2
          save when every(2): requests save (a save is due)
    """
    names = [kind.__name__ for kind in _EVENTS]
    chosen = frozenset(names[index] for index in matching(names, events, "loop event"))
    patterns = (callbacks,) if isinstance(callbacks, str) else tuple(callbacks)
    return Debug(chosen, patterns, every, file)


class Debug:
    """Prints events and what callbacks did at them. Created by ``debug``."""

    def __init__(self, events: frozenset[str], callbacks: tuple[str, ...], every: When, file: TextIO | None) -> None:
        self._events, self._callbacks, self._due, self._file = events, callbacks, as_trigger(every), file
        self._printed: Event | LoopEvent | None = None  # the event printed last, until its observers are called
        self._known: set[tuple[str, str]] = set()  # requests and logged names of the callbacks watched at this event
        self._ran: dict[str, None] = {}  # names of all callbacks that ran, in order

    def callback_ran(self, name: str, event: Event, before: TrainState, outcome: Outcome) -> None:
        """Prints what a callback did at an event.

        Args:
            name: The callback's name.
            event: The event.
            before: The state that the callback received.
            outcome: The state and the requests that it returned, or the error that it raised.
        """
        self._ran[name] = None
        if isinstance(outcome, tuple):
            self._known |= _keys(outcome[1])
        if self._shows(event) and self._matches(name):
            if isinstance(outcome, tuple):
                parts = [*_changes(before, outcome[0]), *_requests(outcome[1], name), *_logs(outcome[1].log)]
            else:
                parts = [f"raises {type(outcome).__name__}: {outcome}"]
            self._print_head(event)
            self._print(f"  {name}: {', '.join(parts) or 'nothing'}")

    def __call__(self, state: TrainState, event: LoopEvent, control: Control) -> None:
        if self._shows(event):
            if "*" in self._callbacks and self._printed is None:
                self._print_head(event)
            self._print_inside_step(event, control)
        self._printed = None
        self._known = set()

    def close(self) -> None:
        """Names the patterns that no callback matched."""
        for pattern in self._callbacks:
            if pattern != "*" and not fnmatch.filter(self._ran, pattern):
                ran = first_names(list(self._ran), 8) if self._ran else "none"
                self._print(f"debug: expected {pattern!r} to match a callback that ran, got no match among {ran}.")

    def _shows(self, event: Event | LoopEvent) -> bool:
        return type(event).__name__ in self._events and bool(self._due(event))

    def _matches(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self._callbacks)

    def _print_head(self, event: Event | LoopEvent) -> None:
        if event is self._printed:
            return
        self._printed = event
        epoch = getattr(event, "epoch", None)
        after = f", after {type(event.event).__name__}" if isinstance(event, Published) else ""
        where = "" if epoch is None else f", epoch {epoch:.2f}"
        self._print(f"{type(event).__name__} of step {int(event.step)}{where}{after}")

    def _print_inside_step(self, event: LoopEvent, control: Control) -> None:
        """Prints what the traced callbacks requested and logged inside the step."""
        if _keys(control) <= self._known:
            return
        logged: dict[str, dict[str, Logged]] = {}
        for name, entry in control.log.items():
            if ("log", name) not in self._known:
                logged.setdefault(entry.owner or "the step", {})[name] = entry
        lines = {owner: list(_logs(log)) for owner, log in logged.items()}
        asked = {
            kind: {reason: flag for reason, flag in reasons.items() if (kind, reason) not in self._known}
            for kind, reasons in control.requests.items()
        }
        if any(requests := [text for kind in asked for text in _request(kind, asked[kind], "")]):
            lines.setdefault("callbacks", []).extend(requests)
        for owner, parts in lines.items():
            if parts and self._matches(owner):
                if self._printed is None:
                    self._print_head(event)
                self._print(f"  {owner}, inside the step: {', '.join(parts)}")

    def _print(self, line: str) -> None:
        file = self._file or sys.stdout
        print(encodable(printable(line), getattr(file, "encoding", None)), file=file)


def _keys(control: Control) -> set[tuple[str, str]]:
    requests = {(kind, reason) for kind, reasons in control.requests.items() for reason in reasons}
    return requests | {("log", name) for name in control.log}


def _requests(control: Control, name: str) -> Iterable[str]:
    for kind, reasons in control.requests.items():
        yield from _request(kind, reasons, name)


def _request(kind: str, reasons: Mapping[str, object], name: str) -> Iterable[str]:
    held = {reason: flag for reason, flag in reasons.items() if bool(flag)}
    if held:
        amount = f" of {max(int(str(flag)) for flag in held.values())} steps" if kind == "rewind" else ""
        told = "; ".join(reason for reason in held if reason != f"requested by {name}")
        yield f"requests {kind}{amount}{f' ({told})' if told else ''}"


def _logs(log: Mapping[str, Logged]) -> Iterable[str]:
    for name, entry in log.items():
        if entry.when:
            yield f"logs {name}={_shown(entry.value)}"


def _changes(before: TrainState, after: TrainState) -> Iterable[str]:
    if before is after:
        return
    old, new = (dict(zip(tree.paths(s, "state"), tree.leaves(s), strict=True)) for s in (before, after))
    changed = [path for path in {**old, **new} if not _is_same(old.get(path), new.get(path))]
    for path in changed[:_MAX_LEAVES]:
        was, now = old.get(path), new.get(path)
        is_scalar = isinstance(now, Tensor) and now.ndim == 0
        what = f" {_shown(was)} -> {_shown(now)}" if is_scalar else f" ({_shown(now)})"
        yield f"changes {path.removeprefix('state.')}{what}"
    if len(changed) > _MAX_LEAVES:
        yield f"changes {len(changed) - _MAX_LEAVES} more leaves"


def _is_same(old: object, new: object) -> bool:
    return old is new or (
        isinstance(old, Tensor) and isinstance(new, Tensor) and old.dtype is new.dtype and torch.equal(old, new)
    )


def _shown(value: object) -> str:
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    elif isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {list(value.shape)}"
    return f"{value:.6g}" if isinstance(value, float) else str(value) if isinstance(value, int) else describe(value)
