"""Emits the events of a run: folds each over the state and passes it to the observers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fxtrain import tree
from fxtrain.core import CHANGED_AT_END, Control, Event, FitEnd, LoopEvent, Published, TrainState, event_of
from fxtrain.core._shard import full_tensor, shards_in
from fxtrain.fold import Composed
from fxtrain.fold._checks import same_leaves
from fxtrain.loop._batches import BatchReader
from fxtrain.loop._cursor import Cursor
from fxtrain.loop._plan import Plan
from fxtrain.loop._published import published_after
from fxtrain.loop._publisher import Publisher
from fxtrain.loop._types import EventRecord, Events
from fxtrain.values import METRIC_PREFIXES

if TYPE_CHECKING:
    from fxtrain.loop._ranks import Ranks

_NOTHING = Control()


@dataclasses.dataclass(eq=False, repr=False)
class Emitter:
    """Creates events with the loop's clock and counters. The parts of a run share its attributes.

    Args:
        plan: The options of the run.
        callbacks: All callbacks of the run.
        now: The current state.
        publish: The observers.
        reader: The data, which measures the wait for batches.
        every_event: Whether to yield each event, even if nothing subscribes to it.
        ranks: The ranks of the run, whose agreed clock is used; None if there is one.
    """

    plan: Plan
    callbacks: Composed
    now: Cursor
    publish: Publisher
    reader: BatchReader
    every_event: bool
    ranks: Ranks | None = None

    def __post_init__(self) -> None:
        self._steps, self._epochs = self.plan.steps, self.plan.epochs
        self._clock = self.plan.clock if self.ranks is None else self.ranks.time
        self._start = self._clock()
        self._times: dict[type[LoopEvent], float] = {}
        self.epoch_began = 0.0  # time of the latest EpochBegin of this session
        self._shows_published = Published in self.callbacks.table
        self.is_sharded = bool(shards_in(self.now.state))
        self._call = self._call_opened if self.is_sharded else self.callbacks

    def time(self) -> float:
        """Returns the seconds since the session began."""
        return self._clock() - self._start

    def is_seen(self, kind: type[LoopEvent]) -> bool:
        """Whether a callback, an observer or the caller subscribes to events of this type."""
        return (
            self.every_event
            or kind in self.callbacks.table
            or self.publish.is_seen(kind)
            or (self._shows_published and kind in METRIC_PREFIXES)
        )

    def emit(self, kind: type[LoopEvent], **fields: object) -> Events[Control]:
        """Folds and yields an event, unless nothing subscribes to it. Returns the requests made at it."""
        if not self.is_seen(kind):
            return Control()
        moments, asked = self.fold(kind, fields)
        yield from moments
        return asked

    def fold(
        self, kind: type[LoopEvent], fields: dict[str, object], also: Control | None = None
    ) -> tuple[Sequence[EventRecord], Control]:
        """Folds an event, merges its requests into the pending ones, and publishes it.

        Args:
            kind: Type of the event.
            fields: Fields specific to this event type, plus overrides of the loop's own counters.
            also: Requests made before the event, inside the step.

        Returns:
            The items to yield, and the requests.
        """
        now, time = self.now, self.time()
        epoch = now.epoch
        epochs_done, epoch_start, epoch_length = epoch
        event = event_of(
            kind,
            {
                "step": now.step,
                "position": now.position,
                "epochs_done": epochs_done,
                "epoch_start": epoch_start,
                "epoch_length": epoch_length or None,
                "total_steps": self._steps,
                "total_epochs": self._epochs,
                "time": time,
                "previous_time": self._times.get(kind, 0.0),
                "data_wait": self.reader.wait,
                **fields,
            },
        )
        self._times[kind] = time
        before = now.state
        try:
            now.state, control = self._call(before, event)
        except KeyError as error:
            from fxtrain.loop._missing_key import note_existing_keys  # keeps the import of fxtrain fast

            note_existing_keys(error, before, event)
            raise
        if now.is_batch:
            from fxtrain.loop._members import from_step, settled

            control = from_step(now.state, also) | control if also else control
            now.state, control = settled(now.state, event, control)
        elif also is not None and also is not _NOTHING:
            control = also | control
        if self._shows_published:
            control |= self._fold_published(event, control)
        if kind is FitEnd and not same_leaves(before, now.state):
            # Marked, so that no run continues from this state.
            now.state = now.state.with_slot(CHANGED_AT_END, torch.tensor(True, device=now.state.step.device))
        if control is not _NOTHING:
            now.ask(control)
        self.publish(self._for_observers(now.state), event, control, epoch)
        return ((now.state, event, control),) if self.every_event else (), control

    def _call_opened(self, state: TrainState, event: Event) -> tuple[TrainState, Control]:
        """Folds an event over a sharded state. Callbacks see DTensors in place of its shards."""
        from fxtrain.distributed._opened import Opened, seeing_dtensors

        assert self.ranks is not None
        opened = Opened(state)
        with seeing_dtensors(), self.ranks.mesh.collective("collectives of callbacks", step=self.now.step):
            state, control = self.callbacks(opened.tree, event)
            return opened.close(state), tree.map(full_tensor, control)

    def _for_observers(self, state: TrainState) -> TrainState:
        if not self.is_sharded:
            return state
        from fxtrain.distributed._opened import abstract

        return abstract(state)

    def _fold_published(self, event: LoopEvent, control: Control) -> Control:
        """Folds what an event published over the state. Returns the requests made then."""
        seen = published_after(event, control.log, previous_time=self._times.get(Published, 0.0))
        if seen is None:
            return Control()
        self._times[Published] = event.time
        self.now.state, control = self._call(self.now.state, seen)
        if self.now.is_batch:
            from fxtrain.loop._members import settled

            self.now.state, control = settled(self.now.state, seen, control)
        return control
