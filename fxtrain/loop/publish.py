"""Publish: what happened, brought to the host and shown to the observers."""

from __future__ import annotations

import contextlib
import functools
import traceback
import warnings
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fxtrain import metrics
from fxtrain.core import (
    EVENTS,
    SESSION,
    TRAJECTORY,
    Control,
    EvalEnd,
    Logged,
    Rewound,
    Saved,
    StepEnd,
    TrainState,
    event_of,
)
from fxtrain.fold.subscription import name_of, subscription
from fxtrain.loop.history import History
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
        on_host, shown = host(event, control)
        if kind is StepEnd and not control.log and not self._unread and type(on_host.metrics) is dict:
            self._history.add(event.step, named_after(kind, on_host.metrics))  # as the numbers are there
        else:
            self._record(state, kind, event, control)
        if shown.log and self._wanting_logs:
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
        """Brings to the host, in one transfer, what was published since this was last done."""
        unread, self._unread = self._unread, []
        computed = [metrics.compute(measured) for _, _, measured, _ in unread]
        logged = [control.log for _, _, _, control in unread]
        parts = [value for values in computed for value in values.values()]
        parts += [part for log in logged for entry in log.values() for part in (entry.value, entry.when)]
        numbers = iter(_numbers(parts))
        read = [{name: next(numbers) for name in values} for values in computed]
        for (kind, step, _, control), values in zip(unread, read, strict=True):
            if control.log:
                log = {name: Logged(next(numbers), next(numbers), entry.owner) for name, entry in control.log.items()}
                shown = control.with_log({name: entry for name, entry in log.items() if entry.when})
                self._history.add(step, published(event_of(kind, {"metrics": values}), shown))
            else:
                self._history.add(step, named_after(kind, values))

    def _drop(self, observer: Callable[..., None]) -> None:
        for observers in (self._observers, self._wanting_logs, *self._seeing.values()):
            observers[:] = [other for other in observers if other is not observer]


class _Late(Mapping[str, Any]):
    """A mapping that is read from the device, in one transfer, when somebody first looks into it."""

    def __init__(self, read: Callable[[], dict[str, Any]]) -> None:
        self._read: Callable[[], dict[str, Any]] | None = read
        self._values: dict[str, Any] = {}

    def _all(self) -> dict[str, Any]:
        if self._read is not None:
            self._values, self._read = self._read(), None
        return self._values

    def __getitem__(self, name: str) -> Any:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def items(self) -> ItemsView[str, Any]:
        return self._all().items()

    def __repr__(self) -> str:
        return repr(self._all())


def host(event: Any, control: Control) -> tuple[Any, Control]:
    """The event with its metrics as floats, and the log with floats and without what its flag holds back.

    What is on a device is read when it is looked at: where nobody does, the loop does not wait for it.
    """
    fields = vars(event)
    if "metrics" in fields and type(event) is not Saved:  # those are on the host already
        measured = fields["metrics"]
        numbers = _at_once(measured)
        if numbers is None:
            numbers = _Late(functools.partial(_floats, measured))
        event = event_of(type(event), fields)
        vars(event)["metrics"] = numbers
    if control.log:
        control = control.with_log(_Late(functools.partial(_raised, control.log)))
    return event, control


def _at_once(measured: Mapping[str, Any]) -> dict[str, Any] | None:
    """The numbers, where nobody has to wait for them."""
    numbers: dict[str, Any] = {}
    for name, value in measured.items():
        if not (isinstance(value, Tensor) and value.is_cpu and value.ndim == 0):
            return None
        numbers[name] = value.item()
    return numbers


def _floats(measured: Mapping[str, Any]) -> dict[str, Any]:
    computed = metrics.compute(measured)
    return dict(zip(computed, _numbers(list(computed.values())), strict=True))


def _raised(log: Mapping[str, Logged]) -> dict[str, Logged]:
    entries = list(log.values())
    numbers = _numbers([*(entry.value for entry in entries), *(entry.when for entry in entries)])
    values, flags = numbers[: len(entries)], numbers[len(entries) :]
    return {
        name: Logged(value, True, entry.owner)
        for (name, entry), value, flag in zip(log.items(), values, flags, strict=True)
        if flag
    }


def _numbers(values: list[Any]) -> list[Any]:
    """0-d tensors as Python numbers, in one transfer where they are on a device; anything else as it is."""
    scalars = [value for value in values if isinstance(value, Tensor) and value.ndim == 0]
    if all(value.is_cpu for value in scalars):
        return [value.item() if isinstance(value, Tensor) and value.ndim == 0 else value for value in values]
    numbers = iter(torch.stack([value.double() for value in scalars]).tolist())
    return [next(numbers) if isinstance(value, Tensor) and value.ndim == 0 else value for value in values]


def _close(observer: Callable[..., None]) -> None:
    close = getattr(observer, "close", None)
    if close is not None:
        close()


def _events(observer: Callable[..., None]) -> frozenset[type[Any]]:
    seen = frozenset(subscription(observer))
    # Unannotated, a callback sees the trajectory; an observer watches sessions too.
    return frozenset((*TRAJECTORY, *SESSION)) if seen == frozenset(TRAJECTORY) else seen & frozenset(EVENTS)
