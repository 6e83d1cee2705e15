"""Publish: what happened, brought to the host and shown to the observers."""

from __future__ import annotations

import contextlib
import functools
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fxtrain.core import (
    EVENTS,
    SESSION,
    TRAJECTORY,
    Control,
    EvalEnd,
    Rewound,
    Saved,
    StepEnd,
    TrainState,
    event_of,
)
from fxtrain.fold.subscription import name_of, subscription
from fxtrain.loop.history import History
from fxtrain.loop.late import Together, at_once
from fxtrain.values import named_after, published, try_all

_TOGETHER = 64  # events between two readings of the device; more of them would fill the caches with scalars
_MEASURED = (StepEnd, EvalEnd)
_RECORDED = (EvalEnd, Rewound)  # also where nobody sees them
_NOTHING = Control()


class Publisher:
    """The observers of a run. They see events after the fold, with scalars on the host, and influence nothing.

    An observer that fails is reported and dropped, unless it has ``required = True``: then its error ends the run.

    Args:
        observers: Functions ``(state, event, control) -> None``. The second parameter's annotation subscribes;
            without one an observer sees every event of the loop. One with ``sees_logged = True`` sees any other
            event too, where something was logged at it.
        history: What records all that is published.
    """

    def __init__(self, observers: Iterable[Callable[..., None]], history: History) -> None:
        self._observers = list(observers)
        self._history = history
        self._seeing: dict[type[Any], list[Callable[..., None]]] = {}
        for observer in self._observers:
            for kind in _events(observer):
                self._seeing.setdefault(kind, []).append(observer)
        self._wanting_logs = [observer for observer in self._observers if getattr(observer, "sees_logged", False)]
        # For the history: a type of event, a step, what was measured, and what was logged.
        self._unread: list[tuple[type[Any], int, Mapping[str, Any], Control]] = []
        self._together = Together()

    def is_seen(self, kind: type[Any]) -> bool:
        """Whether somebody sees events of this type, also where no callback does."""
        return kind in _RECORDED or bool(self._seeing.get(kind))

    def step(self, number: int, measured: Mapping[str, Any]) -> None:
        """Records what a step measured that nobody sees, without an event."""
        self._unread.append((StepEnd, number, measured, _NOTHING))
        if len(self._unread) >= _TOGETHER:
            self._read()

    def __call__(self, state: TrainState, event: Any, control: Control) -> None:
        kind = type(event)
        seeing = self._seeing.get(kind, ())
        if not seeing and not (control.log and self._wanting_logs):
            self._record(state, kind, event, control)
            return
        on_host, shown = event, control
        measured = None if kind is Saved else getattr(event, "metrics", None)  # what was saved is on the host already
        if measured is not None or control.log:
            numbers, shown = self._on_host(measured or {}, control)
            if measured is not None:
                on_host = event_of(kind, vars(event))
                vars(on_host)["metrics"] = numbers
        if kind is StepEnd and not control.log and not self._unread and type(on_host.metrics) is dict:
            self._history.add(event.step, named_after(kind, on_host.metrics))  # as the numbers are there
        else:
            self._record(state, kind, event, control)
        if control.log and self._wanting_logs:
            seeing = [observer for observer in self._observers if observer in (*seeing, *self._wanting_logs)]
        for observer in tuple(seeing):
            try:
                observer(state, on_host, shown)
            except Exception as error:
                if getattr(observer, "required", False):
                    raise
                self._drop(observer)
                with contextlib.suppress(Exception):
                    _close(observer)
                warnings.warn(
                    f"The observer {name_of(observer)} failed at {kind.__name__} of step {event.step} and is dropped; "
                    f"training goes on.\n{''.join(traceback.format_exception(error))}",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def close(self) -> None:
        """Closes the observers that can be closed. Every one is tried, then the first error is raised."""
        try_all(self._read, *(functools.partial(_close, observer) for observer in self._observers))

    def _record(self, state: TrainState, kind: type[Any], event: Any, control: Control) -> None:
        step = event.step
        if kind is Rewound:
            self._read()
            step = event.to_step
            self._history.forget_after(step)
        if kind in _MEASURED or control.log:
            self._unread.append((kind, step, event.metrics if kind in _MEASURED else {}, control))
            # At once where that does not wait for a device, so that what cannot be published is refused at its event.
            if (control.log and state.step.device.type == "cpu") or len(self._unread) >= _TOGETHER:
                self._read()

    def _read(self) -> None:
        """Brings to the host what was published since this was last done."""
        unread, self._unread = self._unread, []
        shown = [(kind, step, *self._on_host(measured, control)) for kind, step, measured, control in unread]
        for kind, step, values, control in shown:
            if control.log:
                self._history.add(step, published(event_of(kind, {"metrics": values}), control))
            else:
                self._history.add(step, named_after(kind, values))

    def _on_host(self, measured: Mapping[str, Any], control: Control) -> tuple[Mapping[str, Any], Control]:
        """Metrics and log as numbers. Where somebody would have to wait for them, they come when he looks at them."""
        numbers = at_once(measured)
        if control.log:
            control = control.with_log(self._together.log(control.log))
        return self._together.metrics(measured) if numbers is None else numbers, control

    def _drop(self, observer: Callable[..., None]) -> None:
        for observers in (self._observers, self._wanting_logs, *self._seeing.values()):
            observers[:] = [other for other in observers if other is not observer]


def _close(observer: Callable[..., None]) -> None:
    close = getattr(observer, "close", None)
    if close is not None:
        close()


def _events(observer: Callable[..., None]) -> frozenset[type[Any]]:
    seen = frozenset(subscription(observer))
    # Unannotated, a callback sees the trajectory; an observer watches sessions too.
    return frozenset((*TRAJECTORY, *SESSION)) if seen == frozenset(TRAJECTORY) else seen & frozenset(EVENTS)
