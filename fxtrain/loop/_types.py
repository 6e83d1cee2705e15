"""The functions that the loop calls and the items that it yields."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol, TypeVar

from fxtrain.core import Batch, Control, Event, StepOutput, TrainState
from fxtrain.fold import Composed

R = TypeVar("R")

EventRecord = tuple[TrainState, Event, Control]
"""Item yielded by the loop: the state after an event's fold, the event, and the requests made at it."""

Events = Generator[EventRecord, None, R]


class LoopStep(Protocol):
    """A step that declares its callbacks and events: from ``train_step``, compiled or not, or a ``Step``.

    Compiled steps have more attributes, such as ``route`` and ``steps_per_call``. The loop reads each with a default.
    """

    @property
    def callbacks(self) -> Composed | tuple[()]: ...

    @property
    def fires(self) -> frozenset[type[Event]]: ...

    def __call__(self, state: TrainState, batch: Batch, /) -> tuple[TrainState, StepOutput]: ...


class EvalFn(Protocol):
    """An evaluation step: from ``eval_step``, compiled or not."""

    def __call__(self, state: TrainState, batch: Batch, /) -> StepOutput: ...
