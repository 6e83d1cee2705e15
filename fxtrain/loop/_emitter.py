"""Emits the events of a run: folds each over the state and passes it to the observers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxtrain import tree
from fxtrain.core import CHANGED_AT_END, Control, FitEnd, LoopEvent, TrainState, event_of
from fxtrain.fold import Composed
from fxtrain.loop._batches import BatchReader
from fxtrain.loop._cursor import Cursor
from fxtrain.loop._plan import Plan
from fxtrain.loop._publisher import Publisher
from fxtrain.loop._types import EventRecord, Events

_NOTHING = Control()


class Emitter:
    """Creates events with the loop's clock and counters.

    Args:
        plan: The options of the run.
        callbacks: All callbacks of the run.
        now: The current state.
        publish: The observers.
        reader: The data, which measures the wait for batches.
        every_event: Whether to yield each event, even if nothing subscribes to it.
    """

    def __init__(
        self,
        plan: Plan,
        callbacks: Composed,
        now: Cursor,
        publish: Publisher,
        reader: BatchReader,
        *,
        every_event: bool,
    ) -> None:
        self._now, self._publish, self._reader, self._every_event = now, publish, reader, every_event
        self._callbacks, self._steps, self._epochs, self._clock = callbacks, plan.steps, plan.epochs, plan.clock
        self._start = plan.clock()
        self._times: dict[type[LoopEvent], float] = {}

    def is_seen(self, kind: type[LoopEvent]) -> bool:
        """Whether a callback, an observer or the caller subscribes to events of this type."""
        return self._every_event or kind in self._callbacks.table or self._publish.is_seen(kind)

    def emit(self, kind: type[LoopEvent], **fields: object) -> Events[Control]:
        """Folds and yields an event, unless nothing subscribes to it. Returns the requests made at it."""
        if not self.is_seen(kind):
            return _NOTHING
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
        now = self._now
        time = self._clock() - self._start
        event = event_of(
            kind,
            {
                "step": now.step,
                "position": now.position,
                "epochs_done": now.epoch.done,
                "epoch_start": now.epoch.start,
                "epoch_length": now.epoch.length or None,
                "total_steps": self._steps,
                "total_epochs": self._epochs,
                "time": time,
                "previous_time": self._times.get(kind, 0.0),
                "data_wait": self._reader.wait,
                **fields,
            },
        )
        self._times[kind] = time
        if kind is FitEnd:
            now.state, control = _mark_changes(self._callbacks, now.state, event)
        else:
            now.state, control = self._callbacks(now.state, event)
        if also:
            control = also | control
        if control:
            now.ask(control)
        self._publish(now.state, event, control)
        return ((now.state, event, control),) if self._every_event else (), control


def _mark_changes(callbacks: Composed, state: TrainState, event: FitEnd) -> tuple[TrainState, Control]:
    """Folds ``FitEnd``, and marks the new state if it differs, so that no run continues from it."""
    changed, control = callbacks(state, event)
    before, after = tree.leaves(state), tree.leaves(changed)
    if len(before) != len(after) or any(old is not new for old, new in zip(before, after, strict=True)):
        changed = changed.with_slot(CHANGED_AT_END, torch.tensor(True, device=state.step.device))
    return changed, control
