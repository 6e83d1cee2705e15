"""One session of the loop.

    data[i] -> StepBegin -> step -> StepEnd -> pending requests: rewind, evaluation, epoch end, save, stop

Each event is folded over the state, the callbacks' requests are merged into the pending ones, observers see the result,
and it is yielded. Requests are handled after the fold, so a checkpoint includes everything the callbacks wrote.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from fxtrain.checkpoint import Restoration
from fxtrain.core import (
    Control,
    EpochBegin,
    FitBegin,
    FitEnd,
    Interrupted,
    Restored,
    StepBegin,
    StepEnd,
    TrainState,
)
from fxtrain.data import as_source
from fxtrain.fold import as_composed, attach, compose
from fxtrain.loop._batches import BatchReader
from fxtrain.loop._checks import check_needs, check_state, check_step, check_unchanged_at_end
from fxtrain.loop._cursor import Cursor
from fxtrain.loop._dispatch import Dispatch
from fxtrain.loop._emitter import Emitter
from fxtrain.loop._epochs import begin_epochs
from fxtrain.loop._evaluation import declare_shapes, evaluation_requests
from fxtrain.loop._history import History
from fxtrain.loop._interrupts import Abandoned, Interrupts
from fxtrain.loop._plan import Plan
from fxtrain.loop._publisher import Publisher
from fxtrain.loop._requests import Requests
from fxtrain.loop._rewind import Snapshots
from fxtrain.loop._run_statistics import run_statistics
from fxtrain.loop._saving import SavedSlots, Saving
from fxtrain.loop._types import EventRecord, Events
from fxtrain.step import Step
from fxtrain.step._callbacks import shared

_NOTHING = Control()


class Run:
    """A session of the loop. Iterating over ``events`` runs it, and sets its result."""

    def __init__(
        self,
        state: TrainState,
        step: Callable[..., Any],
        data: Any,
        plan: Plan,
        history: History,
        *,
        every_event: bool = False,
    ) -> None:
        check_state(state, "fit(state, step, data)")
        check_step(step)
        self.plan = plan
        given: Any
        folded = compose(as_composed(plan.callbacks), *evaluation_requests(plan))
        given, self.callbacks = shared(step if hasattr(step, "fires") else Step(step), folded)
        # The loop owns its state, so a compiled step may donate it.
        self.step: Any = given.donating() if hasattr(given, "donating") else given
        self._publish = Publisher(plan.observers, history, state.step.device)
        self._interrupts = Interrupts(lambda: self._saving.under_way)
        self._in_step = as_composed(self.step).traced_slots
        self._saving = Saving(plan.checkpointer, self.step)
        self._restored = self._saving.restored(self._attached(state)) if plan.resume else None
        whole = self._restored is not None and not self._restored.missing
        if self._restored is not None:
            state = self._without_missing(self._restored)
        else:
            check_unchanged_at_end(state)
        state, saved = SavedSlots.split(state)
        restored_state = state
        seed = int(state.seed)
        self.data = as_source(data, seed=seed)
        self.callbacks = compose(self.callbacks, *run_statistics(self.step, self.data))
        # Missing slots are initialized from the state that the session starts with, its epoch included.
        state = self._attached(begin_epochs(state, self.data))
        self._reader = BatchReader(
            self._interrupts.leaving_waits(self.data), state.step.device, plan.clock, plan.length
        )
        self._differs = self.data.has_variable_epochs
        self._dispatch = Dispatch(self.step, self.data, steps=plan.steps, snapshot_every=plan.snapshot_every)
        self.eval_data = None if plan.eval_data is None else as_source(plan.eval_data, seed=seed)
        best = getattr(plan.checkpointer, "best_metric", None)
        check_needs(self.callbacks, state, self.step, plan.eval_step, self.eval_data, best)
        declare_shapes(self.step, self.data)
        declare_shapes(plan.eval_step, self.eval_data)
        late = plan.lag if plan.lag is not None else state.step.device.type != "cpu"
        # Copied once at entry, because the loop owns its state and a notebook cell can be run twice. A restored state
        # has no other owner.
        self._now = Cursor(state if whole else state.copy(), late=bool(late), why=saved.stop_reasons)
        if saved.data is not None and self.data.has_snapshots:
            self.data.restore(self._now.epoch.data_index(self._now.position), saved.data)
        else:
            self._reader.expected = saved.batch
        donates = self.step is not given or getattr(given, "donates", False)
        self._snapshots = Snapshots(
            plan.snapshot_every, plan.snapshots, on_host=plan.snapshots_on_host, copied=donates, saving=self._saving
        )
        self._from_disk = restored_state if whole else None
        self._emitter = Emitter(plan, self.callbacks, self._now, self._publish, self._reader, every_event=every_event)
        self._requests = Requests(
            plan,
            self._now,
            self._emitter,
            reader=self._reader,
            data=self.data,
            eval_data=self.eval_data,
            publish=self._publish,
            saving=self._saving,
            snapshots=self._snapshots,
            interrupts=self._interrupts,
        )
        self._mark = self._now.mark()  # the point to roll back to after an error
        self.reason = ""
        self.exit_code = 0
        self.continue_from: Any = None

    def _attached(self, state: TrainState) -> TrainState:
        return attach(attach(state, self.callbacks), self.step)

    def _without_missing(self, restored: Restoration) -> TrainState:
        """Returns the restored state without the callbacks' slots that were not in the checkpoint."""
        claimed = {*self.callbacks.slots, *as_composed(self.step).slots}.intersection(restored.missing)
        slots = {name: slot for name, slot in restored.state.slots.items() if name not in claimed}
        return restored.state.replace(slots=slots)

    @property
    def state(self) -> TrainState:
        """The current state."""
        return self._now.state

    def events(self) -> Events[None]:
        """Runs the session and yields its events in order."""
        with self._interrupts, contextlib.ExitStack() as closing:
            closing.callback(self._saving.close)
            self._begin_saving()
            closing.callback(self._publish.close)
            closing.callback(self.data.close)
            if self.eval_data is not None:
                closing.callback(self.eval_data.close)
            yield from self._session()
            self.exit_code = self._interrupts.exit_code  # read last, because a signal can arrive after the last step

    def _begin_saving(self) -> None:
        self._saving.begin(self._now.state)
        self._snapshots.begin(self._now)
        # Clear the attribute, because a step donates only states without other references.
        restored, self._from_disk = self._from_disk, None
        if restored is not None and restored is self._now.state:
            self._saving.mark_on_disk(restored)

    def _session(self) -> Events[None]:
        now = self._now
        try:
            yield from self._begin()
            while True:
                self._mark = now.mark()
                if now.anything_due or self._saving.under_way:
                    yield from self._requests.report_saves()
                    yield from self._requests.handle()
                    self._mark = now.mark()
                if self._interrupts.cause is not None:
                    now.read_flags()
                    self.reason = f"interrupted by {self._interrupts.cause}"
                    yield from self._emitter.emit(Interrupted, cause=self._interrupts.cause)
                    break
                if self._finished():
                    break
                if self._snapshots.is_due(now):
                    if now.unread and now.read_flags():
                        continue
                    self._snapshots.retain(now)
                yield from self._advance()
        except Exception as error:
            yield from self._after_error(error)
            raise
        yield from self._requests.save_last()
        # The final checkpoint keeps the stop, so resuming a finished run does nothing. The state in memory does not, so
        # it can be trained further.
        now.read_flags()
        now.forget_stop()
        self.continue_from = now.state
        yield from self._emitter.emit(FitEnd, reason=self.reason)

    def _finished(self) -> bool:
        now, plan = self._now, self.plan
        out_of_steps = plan.steps is not None and now.step >= plan.steps
        out_of_epochs = plan.epochs is not None and now.epoch.done >= plan.epochs
        if (out_of_steps or out_of_epochs) and now.unread:
            now.read_flags()
        if now.due["stop"]:
            self.reason = "; ".join(dict.fromkeys(now.why)) or "stopped before this session began"
        elif out_of_steps:
            self.reason = f"reached {plan.steps} steps"
        elif out_of_epochs:
            self.reason = f"finished {plan.epochs} epoch{'s' if plan.epochs != 1 else ''}"
        return bool(self.reason)

    def _begin(self) -> Events[None]:
        now, pending = self._now, self._now.due["save"]
        yield from self._emitter.emit(
            FitBegin, fires=frozenset(self.step.fires), resumed=now.step > 0, num_shapes=self.data.num_shapes
        )
        # How often FitBegin fires depends on interruptions, so its save has a role that rewinds ignore.
        if now.due["save"] and not pending:
            now.set(save=False)
            self._requests.save("session")
        report, self._restored = self._restored, None
        if report is not None:
            yield from self._emitter.emit(
                Restored,
                path=str(report.path),
                missing=tuple(report.missing),
                extra=tuple(report.extra),
                environment_changes=tuple(report.different),
            )

    def _after_error(self, error: Exception) -> Events[None]:
        now = self._now
        if taken := self._mark.is_taken:
            error.add_note(
                "The state before the step was donated, and not all callbacks have seen the state after it, so neither "
                "is saved. Resume from the last checkpoint."
            )
        else:
            # Roll back, because some callbacks may not have seen the latest event.
            now.roll_back(self._mark)
        try:
            now.read_flags()
            yield from self._emitter.emit(Interrupted, cause=f"{type(error).__name__}: {error}")
            if not taken:
                yield from self._requests.save_last()
        except Exception as error:  # the first error is the one to raise
            warnings.warn(f"Ending the run after an error raised another: {error!r}.", RuntimeWarning, stacklevel=2)

    # Steps

    def _advance(self) -> Events[None]:
        """Takes steps until a request is due."""
        now = self._now
        if now.due["begin_epoch"]:
            if now.unread and now.read_flags():
                return
            now.set(begin_epoch=False)
            yield from self._emitter.emit(EpochBegin)
            if now.anything_due:
                return
            self._mark = now.mark()
        # No local variable may reference a state, because a step copies states with other references before donating.
        due, last, end = now.due, self._last_in_a_row(), now.epoch.end
        # The epoch length was found after this snapshot was taken, and the run has rewound to it.
        if now.position == end:
            now.set(end_epoch=True)
            return
        begins, ends = self._emitter.is_seen(StepBegin), self._emitter.is_seen(StepEnd)
        while True:
            count = self._dispatch.length(now.step, now.position, now.epoch)
            try:
                batches = self._reader.next(now.position, now.epoch, count)
            except Abandoned:
                return
            if not batches:  # end of data of unknown length, which is known from here on
                if now.unread and now.read_flags():
                    return
                now.count(now.epoch._replace(length=now.position - now.epoch.start))
                now.set(end_epoch=True)
                return
            # The epoch is longer than expected, so its length is unknown again.
            if now.epoch.length and self._differs and self.data.epoch_length is None:
                now.count(now.epoch._replace(length=0))
                end = None
            outside: dict[str, Any] = {}
            if begins:
                outside = {name: kept for name, kept in now.state.slots.items() if name not in self._in_step}
                if not (yield from self._begin_step(batches)):
                    if now.read_flags(len(self._mark.unread)) and self._mark.unread:
                        # The run had stopped one step before, so this event is rolled back.
                        now.roll_back(self._mark)
                        now.read_flags()
                    return
            self._mark = now.as_delta(self._mark)
            try:
                now.state, outputs = self._dispatch.take(now.state, batches)
            except Abandoned:
                now.roll_back(self._mark)
                return
            if now.unread and self._stopped_before_step(outside):
                return
            if len(outputs) > 1:
                outputs = outputs[: int(now.state.step) - now.step]  # steps after a stop were not taken
            for output in outputs:
                now.step += 1
                now.position += 1
                if now.position == end:
                    now.set(end_epoch=True)
                if ends or output.control:
                    yield from self._emitter.fold(StepEnd, {"metrics": output.metrics}, output.control)[0]
                else:
                    self._publish.step(now.step, output.metrics)
            if now.due is not due or now.step >= last or self._interrupts.cause is not None:
                return
            self._mark = now.mark()

    def _stopped_before_step(self, outside: Mapping[str, Any]) -> bool:
        """Reads the flags left on the device; returns whether one was set, so that the step returned its input.

        Args:
            outside: Slots that do not enter the step, from before this StepBegin.
        """
        now = self._now
        if self._mark.unread and now.read_flags(len(self._mark.unread)):
            # The run had stopped one step before, so this StepBegin is rolled back.
            now.unread = ()
            pending = self._mark.due.items()
            now.set(**{name: value for name, value in pending if name not in ("stop", "skip_final_save")})
            now.state = now.state.replace(slots={**now.state.slots, **outside})
            return True
        return bool(now.unread) and now.read_flags()

    def _begin_step(self, batches: Sequence[Any]) -> Generator[EventRecord, None, bool]:
        """Emits StepBegin. Returns whether to take the step."""
        now, asked = self._now, _NOTHING
        for index, batch in enumerate(batches):  # several only if no callback subscribes
            at: dict[str, Any] = {"step": now.step + 1 + index, "position": now.position + index}
            asked = yield from self._emitter.emit(StepBegin, **at, batch=batch)
        if asked.any("skip_batch"):
            now.move_to(now.position + 1)
            if now.position == now.epoch.end:
                now.set(end_epoch=True)
            return False
        # If the step is not taken and the run continues, the same batch is fetched again.
        return not (now.due["stop"] or now.due["rewind"] or now.due["end_epoch"])

    def _last_in_a_row(self) -> float:
        """Returns the next step after which the run must check saves, snapshots or its limit."""
        now, every = self._now, self.plan.snapshot_every
        if self._saving.under_way:
            return now.step + 1
        limit = math.inf if self.plan.steps is None else self.plan.steps
        return min(limit, now.step - now.step % every + every) if every else limit
