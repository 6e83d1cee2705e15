"""The base class of all events outside the step: the loop's clock and counters."""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

from fxtrain.core._checks import did_you_mean
from fxtrain.core._field_access import missing_field
from fxtrain.core._record import Record


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LoopEvent(Record):
    """Base class of all events outside the step. Callbacks take the time from here and never read a clock.

    Args:
        step: Number of the step being taken or, between steps, of the last step taken.
        position: Data position: number of batches consumed, including this step's batch at its end.
        epochs_done: Number of completed epochs.
        epoch_start: Data position at which the current epoch began.
        epoch_length: Number of batches in an epoch; None while it is unknown, and for endless data.
        total_steps: Number of steps in the run, or None.
        total_epochs: Number of epochs in the run, or None.
        time: Seconds since this session of the loop began.
        previous_time: ``time`` of the previous event of this type, or 0.
        data_wait: Seconds that the loop waited for the latest batch.
    """

    step: int
    position: int = 0
    epochs_done: int = 0
    epoch_start: int = 0
    epoch_length: int | None = None
    total_steps: int | None = None
    total_epochs: int | None = None
    time: float = 0.0
    previous_time: float = 0.0
    data_wait: float = 0.0

    def __getattr__(self, name: str) -> NoReturn:
        fields = [field.name for field in dataclasses.fields(self)]

        def remedy() -> str:
            if name == "metrics":
                return "Subscribe to an event that has metrics: StepEnd, EvalStep, EvalEnd or EpochEnd."
            if name in self.__dict__.get("metrics", ()):
                return f"Read event.metrics[{name!r}]."
            return did_you_mean(name, fields).strip() or f"help(fxtrain.{type(self).__name__}) describes the fields."

        raise missing_field(self, name, fields, remedy)

    @property
    def epoch(self) -> float | None:
        """Epochs done, as a fraction; None while the length of an epoch is unknown."""
        if self.epoch_length is None:
            return None
        return self.epochs_done + (self.position - self.epoch_start) / self.epoch_length

    @property
    def epoch_index(self) -> int:
        """Index of the epoch, from 0: at ``EpochEnd`` of the one that has ended, between two epochs of the next."""
        return self.epochs_done


def event_of(kind: type[LoopEvent], fields: dict[str, object]) -> Any:
    """Creates an event without ``__init__``, which is slow in frozen dataclasses because it sets each field by a call.

    Args:
        kind: The event's type.
        fields: Values by field name, in a dict that the event keeps. A field that is left out takes the default of its
            class, if it has one.
    """
    event = object.__new__(kind)
    _set_fields(event, fields)
    return event


_set_fields = vars(Record)["__dict__"].__set__  # faster than object.__setattr__
