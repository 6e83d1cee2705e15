"""Publish: what happened, brought to the host and shown to the observers."""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fxtrain import metrics
from fxtrain.core import EVENTS, SESSION, TRAJECTORY, Control, Logged, Saved, TrainState
from fxtrain.fold.subscription import name_of, subscription


class Publisher:
    """The observers of a run. They see events after the fold, with scalars on the host, and influence nothing.

    An observer that fails is reported and dropped, unless it has ``required = True``: then its error ends the run.

    Args:
        observers: Functions ``(state, event, control) -> None``. The second parameter's annotation subscribes;
            without one an observer sees every event of the loop.
    """

    def __init__(self, observers: Iterable[Callable[..., None]]) -> None:
        self._observers = [(observer, _events(observer)) for observer in observers]

    def __call__(self, state: TrainState, event: Any, control: Control) -> None:
        kind = type(event)
        seeing = [pair for pair in self._observers if kind in pair[1]]
        if not seeing:
            return
        on_host, published = host(event, control)
        for pair in seeing:
            observer = pair[0]
            try:
                observer(state, on_host, published)
            except Exception as error:
                if getattr(observer, "required", False):
                    raise
                self._observers.remove(pair)
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
        errors: list[Exception] = []
        for observer, _ in self._observers:
            try:
                _close(observer)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


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

    def __repr__(self) -> str:
        return repr(self._all())


def host(event: Any, control: Control) -> tuple[Any, Control]:
    """The event with its metrics as floats, and the log with floats and without what its flag holds back.

    Both are read when they are looked at: where nobody does, the loop does not wait for the device.
    """
    if hasattr(event, "metrics") and not isinstance(event, Saved):  # those are on the host already
        event = dataclasses.replace(event, metrics=_Late(lambda measured=event.metrics: _floats(measured)))
    if control.log:
        control = control.with_log(_Late(lambda log=control.log: _raised(log)))
    return event, control


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
    if any(value.device.type != "cpu" for value in scalars):
        numbers = iter(torch.stack([value.double() for value in scalars]).tolist())
    else:
        numbers = iter([value.item() for value in scalars])
    return [next(numbers) if isinstance(value, Tensor) and value.ndim == 0 else value for value in values]


def _close(observer: Callable[..., None]) -> None:
    close = getattr(observer, "close", None)
    if close is not None:
        close()


def _events(observer: Callable[..., None]) -> frozenset[type[Any]]:
    seen = frozenset(subscription(observer))
    # Unannotated, a callback sees the trajectory; an observer watches sessions too.
    return frozenset((*TRAJECTORY, *SESSION)) if seen == frozenset(TRAJECTORY) else seen & frozenset(EVENTS)
