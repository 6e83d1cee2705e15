"""Handles pending requests in this order: rewind, evaluation, epoch end, save. The run itself handles a stop."""

from __future__ import annotations

from typing import Any

import torch

from fxtrain import metrics
from fxtrain.checkpoint import Role
from fxtrain.core import EVALUATED, REWINDS, Epoch, EpochEnd, EvalBegin, EvalEnd, EvalStep, Rewound, Saved
from fxtrain.loop._batches import BatchReader, LastBatch
from fxtrain.loop._cursor import Cursor
from fxtrain.loop._emitter import Emitter
from fxtrain.loop._epochs import announce
from fxtrain.loop._evaluation import measure
from fxtrain.loop._interrupts import Abandoned, Interrupts, leaving_compilation
from fxtrain.loop._plan import Plan
from fxtrain.loop._publisher import Publisher
from fxtrain.loop._rewind import Snapshots
from fxtrain.loop._saving import SavedSlots, Saving
from fxtrain.loop._types import Events

_MAX_EMPTY_EPOCHS = 100  # consecutive epochs without a step, after which the run is stuck


class Requests:
    """Handles the requests pending in the state, after the fold that made them.

    Args:
        plan: The options of the run.
        now: The current state.
        emitter: Emits events.
        reader: The batches.
        data: From ``fxtrain.data.as_source``.
        eval_data: From ``fxtrain.data.as_source``, or None.
        publish: The observers, flushed before a save.
        saving: The checkpoints.
        snapshots: The states to rewind to.
        interrupts: Signals, which abort an evaluation.
    """

    def __init__(
        self,
        plan: Plan,
        now: Cursor,
        emitter: Emitter,
        *,
        reader: BatchReader,
        data: Any,
        eval_data: Any,
        publish: Publisher,
        saving: Saving,
        snapshots: Snapshots,
        interrupts: Interrupts,
    ) -> None:
        self._plan, self._now, self._emit = plan, now, emitter.emit
        self._evaluates_epochs = plan.eval_step is not None and plan.eval_when is None
        self._reader, self._data, self._eval_data = reader, data, eval_data
        self._publish, self._saving, self._snapshots, self._interrupts = publish, saving, snapshots, interrupts
        self._empty_epochs = 0  # consecutive epochs without a step
        self._step_of_last_epoch = -1

    def handle(self) -> Events[None]:
        """Handles requests, including those made meanwhile, until only a stop is left or a signal arrives."""
        now = self._now
        while self._interrupts.cause is None:
            if now.anything_due and now.unread:
                now.read_flags()
            if now.due["rewind"]:
                yield from self._rewind()
            elif now.due["evaluate"] or (now.due["end_epoch"] and self._epoch_lacks_evaluation()):
                yield from self._evaluate()
            elif now.due["end_epoch"]:
                yield from self._end_epoch()
            elif now.due["save"]:
                now.set(save=False)
                self.save()
                yield from self.report_saves()
            else:
                return

    def _evaluate(self) -> Events[None]:
        now, eval_step = self._now, self._plan.eval_step
        if eval_step is None:
            raise ValueError(
                "expected eval_step and eval_data for an evaluation requested by a callback, got neither. Give both to "
                "fit, or remove the callback."
            )
        # An interrupted evaluation is rolled back and stays due.
        mark = now.mark()
        now.set(evaluate=False)
        yield from self._emit(EvalBegin)
        total: dict[str, Any] = {}
        seen = now.state if self._plan.eval_view is None else self._plan.eval_view(now.state)
        batches = measure(seen, leaving_compilation(eval_step), self._interrupts.leaving_waits(self._eval_data))
        try:
            for index, batch, output, total in batches:  # noqa: B007
                if self._interrupts.cause is not None:
                    raise Abandoned
                yield from self._emit(
                    EvalStep, index=index, batch=batch, metrics=output.metrics, outputs=output.outputs
                )
        except Abandoned:
            now.roll_back(mark)
            return
        measured = metrics.compute(total)
        slot = {"step": now.state.step.clone(), "metrics": {k: v.detach().clone() for k, v in measured.items()}}
        now.state = now.state.with_slot(EVALUATED, slot)
        yield from self._emit(EvalEnd, metrics=measured)

    def _epoch_lacks_evaluation(self) -> bool:
        """Whether the epoch must end with an evaluation that no step has requested.

        The last step cannot request it in data of unknown length, or if all batches after it were skipped.
        """
        last = self._now.state.slots.get(EVALUATED)
        return self._evaluates_epochs and (last is None or int(last["step"]) != self._now.step)

    def _end_epoch(self) -> Events[None]:
        now, epoch = self._now, self._now.epoch
        if not epoch.length:
            raise ValueError(
                "expected data with a known epoch length for the request end_epoch, got data of unknown length in its "
                "first epoch. Give data that has a length."
            )
        if now.position < epoch.start + epoch.length:
            now.move_to(epoch.start + epoch.length)
        self._empty_epochs = 0 if now.step > self._step_of_last_epoch else self._empty_epochs + 1
        if self._empty_epochs >= _MAX_EMPTY_EPOCHS:
            raise ValueError(
                f"expected a step within {_MAX_EMPTY_EPOCHS} epochs, got none. A callback skips every batch or ends "
                "every epoch before its first step. Request a stop there instead."
            )
        self._step_of_last_epoch = now.step
        following = Epoch(epoch.done + 1, start=now.position, length=self._data.epoch_length or epoch.length)
        announce(self._data, following)
        now.count(following._replace(length=self._data.epoch_length or following.length))
        now.set(end_epoch=False, begin_epoch=True)
        yield from self._emit(EpochEnd)

    def save(self, role: Role = "trajectory") -> None:
        """Saves the current state, after flushing the observers and saving the snapshots that it lists."""
        now = self._now
        self._publish.flush(now.step)
        self._snapshots.save(now.snapshots)
        slots = SavedSlots() if self._plan.checkpointer is None else self._saved_slots()
        self._saving.save(now.state, self._metrics_of_this_step(), role, now.snapshots, slots)

    def _saved_slots(self) -> SavedSlots:
        now, last = self._now, self._reader.last
        return SavedSlots(
            batch=None if last is None else LastBatch.of(last),
            data=self._data.snapshot(now.epoch.data_index(now.position)),
            stop_reasons=now.why if now.due["stop"] else (),
        )

    def save_last(self) -> Events[None]:
        """Waits for the saves under way, and saves the final state of the session unless it is on disk."""
        yield from self.report_saves(wait=True)
        if self._saving.is_due_at_the_end(self._now.state) and not self._now.due["skip_final_save"]:
            # A pending save request, such as one that waits for an evaluation, stays due.
            self.save("session")
            yield from self.report_saves(wait=True)

    def report_saves(self, *, wait: bool = False) -> Events[None]:
        """Emits ``Saved`` for each checkpoint committed since the last call."""
        for step, path, measured in self._saving.news(wait=wait):
            yield from self._emit(Saved, step=step, path=str(path), metrics=measured)

    def _metrics_of_this_step(self) -> dict[str, float]:
        last = self._now.state.slots.get(EVALUATED)
        if last is None or int(last["step"]) != self._now.step:
            return {}
        return {name: float(value) for name, value in last["metrics"].items()}

    def _rewind(self) -> Events[None]:
        now, old, steps = self._now, self._now.state, self._now.due["rewind"]
        target = self._snapshots.newest_until(now.step - steps, now)
        now.set(rewind=0, evaluate=False, end_epoch=False, save=False)
        if target is None:
            now.stop(f"a rewind of {steps} steps was requested at step {now.step}, but no retained state is that old")
            return
        to_step = int(target.step)
        times: dict[int, int] = dict(old.slots[REWINDS].tolist()) if REWINDS in old.slots else {}
        times[to_step] = times.get(to_step, 0) + 1
        yield from self._emit(
            Rewound,
            from_step=now.step,
            to_step=to_step,
            abandoned=range(int(target.position), now.position),
            times=times[to_step],
        )
        now.read_flags()
        # Only slots written at this event, and a request to stop, survive the rewind.
        surviving = {name: slot for name, slot in now.state.slots.items() if slot is not old.slots.get(name)}
        surviving[REWINDS] = torch.tensor(sorted(times.items()), device=old.step.device)
        due, retained, length = now.due, now.snapshots, now.epoch.length
        now.take(target.replace(slots={**target.slots, **surviving}))
        # Keep the epoch length if it was found after the snapshot.
        if not now.epoch.length:
            now.count(now.epoch._replace(length=length))
        announce(self._data, now.epoch)
        now.snapshots = retained
        self._snapshots.roll_back(now)
        # Save again, so the folder marks the abandoned steps and a resume starts from the new timeline.
        now.set(stop=due["stop"], skip_final_save=due["skip_final_save"], save=self._plan.checkpointer is not None)
        if times[to_step] > (limit := self._plan.rewind_limit):
            now.stop(f"rewound to step {to_step} {times[to_step]} times, more than rewind_limit={limit} allows")
