"""An observer that writes readings of the machine at regular steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fxtrain.core import (
    Control,
    FitBegin,
    FitEnd,
    Interrupted,
    LoopEvent,
    Rewound,
    StepEnd,
    TrainState,
)
from fxtrain.fold import When, as_trigger
from fxtrain.values import outlet_of, settle, try_all

Seen = FitBegin | StepEnd | Rewound | Interrupted | FitEnd
Read = Callable[[TrainState | None], Mapping[str, float]]


class Gauge:
    """Writes readings at the steps of ``every`` and at the end of each session.

    Args:
        what: The observer's name in errors.
        writers: Writers from ``fxtrain.writers`` or clu.
        every: When to read: a number of steps, or a trigger, evaluated at ``StepEnd``.
        read: Returns the readings by name. Uses only the device of the state that it is called with.

    Raises:
        TypeError: ``every`` is neither an int nor a trigger.
        ValueError: There is no writer, or ``every`` is smaller than 1.
    """

    def __init__(self, what: str, writers: tuple[Any, ...], every: When, read: Read) -> None:
        if not writers:
            raise ValueError(
                f"expected at least one writer for {what}(), got none. Pass one, such as "
                "fxtrain.writers.tensorboard(folder)."
            )
        self._writers = writers
        self._outlets = [outlet_of(writer) for writer in writers]
        self._due = as_trigger(every)
        self._read_values = read
        self._step = 0  # of the last reading or the beginning of the session

    def __call__(self, state: TrainState | None, event: Seen, control: Control) -> None:
        match event:
            case FitBegin():
                self._drop_after(event.step)
            case Rewound():
                self._drop_after(event.to_step)
            case StepEnd() if self._due(event):
                self._read(state, event)
            case Interrupted() | FitEnd() if event.step > self._step:
                self._read(state, event)

    def close(self) -> None:
        """Closes every writer, then raises the first error."""
        try_all(*(outlet.close for outlet in self._outlets))

    def take_failure(self) -> Exception | None:
        """Returns the first error of a writer since the last call."""
        failures = [outlet.take_failure() for outlet in self._outlets]
        return next((failure for failure in failures if failure is not None), None)

    def _drop_after(self, step: int) -> None:
        self._step = step
        for outlet in self._outlets:
            outlet.take_back(step)

    def _read(self, state: TrainState | None, event: LoopEvent) -> None:
        self._step = event.step
        readings = self._read_values(state)
        for writer, outlet in zip(self._writers, self._outlets, strict=True):
            settle(writer)
            outlet.hand_over(event.step, readings, event)
