"""An observer that writes readings of the machine at regular steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

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
from fxtrain.writers import Writer
from fxtrain.writers._log import Log

Seen = FitBegin | StepEnd | Rewound | Interrupted | FitEnd
Read = Callable[[TrainState | None], Mapping[str, float]]


class PeriodicReadings:
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

    def __init__(self, what: str, writers: tuple[Writer, ...], every: When, read: Read) -> None:
        if not writers:
            raise ValueError(
                f"expected at least one writer for {what}(), got none. Pass one, such as "
                "fxtrain.writers.tensorboard(folder)."
            )
        self._log = Log(writers)
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
        self._log.close()

    def take_failure(self) -> Exception | None:
        """Returns the first error of a writer since the last call."""
        return self._log.take_failure()

    def _drop_after(self, step: int) -> None:
        self._step = step
        self._log.truncate_after(step)

    def _read(self, state: TrainState | None, event: LoopEvent) -> None:
        self._step = event.step
        self._log.flush_deferred()
        self._log.submit(event.step, self._read_values(state), event)
