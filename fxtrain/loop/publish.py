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
from fxtrain.loop.late import Late, Together, log_at_once, metrics_at_once
from fxtrain.values import named_after, published, try_all

_TOGETHER = 64  # events between two readings of the device; more of them would fill the caches with scalars
_MEASURED = (StepEnd, EvalEnd)
_RECORDED = (EvalEnd, Rewound)  # also where nobody sees them
_NOTHING = Control()

_Published = tuple[type[Any], int, Mapping[str, Any], Control]  # an event's type, its step, what it measured, its log


class Publisher:
    """The observers of a run. They see events after the fold, with scalars on the host, and influence nothing.

    An observer that fails is reported and dropped, unless it has ``required = True``: then its error ends the run.

    Args:
        observers: Functions ``(state, event, control) -> None``. The second parameter's annotation subscribes;
            without one an observer sees every event of the loop. One with ``sees_logged = True`` sees any other
            event too, where something was logged at it. ``flush()`` is called before each save, and ``close()`` in
            the end, where an observer has them.
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
        # For the history.
        self._unread: list[_Published] = []
        self._sent: list[_Published] = []  # what is on its way to the host
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
            self._record(state, event, control, logged=bool(control.log))
            return
        on_host, shown = event, control
        measured = None if kind is Saved else getattr(event, "metrics", None)  # what was saved is on the host already
        if measured is not None or control.log:
            numbers, shown = self._on_host(measured or {}, control)
            if measured is not None:
                on_host = event_of(kind, vars(event))
                vars(on_host)["metrics"] = numbers
        none_waits = not self._unread and not self._sent
        if kind is StepEnd and none_waits and type(on_host.metrics) is dict and type(shown.log) is dict:
            self._history.add(event.step, published(on_host, shown))  # as the numbers are there
        else:
            self._record(state, on_host, shown, logged=bool(control.log))
        if control.log and self._wanting_logs:
            seeing = [observer for observer in self._observers if observer in (*seeing, *self._wanting_logs)]
        for observer in tuple(seeing):
            try:
                observer(state, on_host, shown)
            except Exception as error:
                self._failed(observer, f"{kind.__name__} of step {event.step}", error)

    def flush(self, step: int) -> None:
        """Has observers put down what they keep back of steps until this one, as those that can do have ``flush()``.

        Before each save, so that what a checkpoint leaves behind is written, whenever the run is killed.
        """
        for observer in tuple(self._observers):
            flush = getattr(observer, "flush", None)
            if flush is None:
                continue
            try:
                flush()
            except Exception as error:
                self._failed(observer, f"the save of step {step}", error)

    def close(self) -> None:
        """Closes the observers that can be closed. Every one is tried, then the first error is raised."""
        try_all(self._read, *(functools.partial(_close, observer) for observer in self._observers))

    def _record(self, state: TrainState, event: Any, control: Control, *, logged: bool) -> None:
        kind, step = type(event), event.step
        if kind is Rewound:
            self._read()
            step = event.to_step
            self._history.forget_after(step)
        if kind in _MEASURED or logged:
            self._unread.append((kind, step, event.metrics if kind in _MEASURED else {}, control))
            # At once where that does not wait for a device, so that what cannot be published is refused at its event.
            if logged and state.step.device.type == "cpu":
                self._read()
            elif len(self._unread) >= _TOGETHER:
                self._read(wait=False)

    def _read(self, *, wait: bool = True) -> None:
        """Brings to the history what was published since this was last done.

        Args:
            wait: Whether for what is on a device, which without it comes the next time, and is sent now.
        """
        unread, self._unread = self._unread, []
        shown = [(kind, step, *self._on_host(measured, control)) for kind, step, measured, control in unread]
        come = self._sent + shown if wait else self._sent
        self._sent = [] if wait else shown
        self._together.send()
        for kind, step, values, control in come:
            if control.log:
                self._history.add(step, published(event_of(kind, {"metrics": values}), control))
            else:
                self._history.add(step, named_after(kind, values))

    def _on_host(self, measured: Mapping[str, Any], control: Control) -> tuple[Mapping[str, Any], Control]:
        """Metrics and log as numbers. Where somebody would have to wait for them, they come when he looks at them."""
        if type(measured) is not Late:
            numbers = metrics_at_once(measured)
            measured = self._together.metrics(measured) if numbers is None else numbers
        if type(control.log) is not Late and control.log:
            log = log_at_once(control.log)
            control = control.with_log(self._together.log(control.log) if log is None else log)
        return measured, control

    def _failed(self, observer: Callable[..., None], at: str, error: Exception) -> None:
        if getattr(observer, "required", False):
            raise error
        for observers in (self._observers, self._wanting_logs, *self._seeing.values()):
            observers[:] = [other for other in observers if other is not observer]
        with contextlib.suppress(Exception):
            _close(observer)
        warnings.warn(
            f"The observer {name_of(observer)} failed at {at} and is dropped; training goes on.\n"
            f"{''.join(traceback.format_exception(error))}",
            RuntimeWarning,
            stacklevel=3,
        )


def _close(observer: Callable[..., None]) -> None:
    close = getattr(observer, "close", None)
    if close is not None:
        close()


def _events(observer: Callable[..., None]) -> frozenset[type[Any]]:
    seen = frozenset(subscription(observer))
    # Unannotated, a callback sees the trajectory; an observer watches sessions too.
    return frozenset((*TRAJECTORY, *SESSION)) if seen == frozenset(TRAJECTORY) else seen & frozenset(EVENTS)
