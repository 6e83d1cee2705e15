"""Steps: reads a batch, takes one step or several per dispatch, and folds the events, until a request is due.

No local variable may reference a state across a step, because a step copies a state with other references before it
donates the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

from fxtrain import tree
from fxtrain.core import Batch, Control, EpochBegin, StepBegin, StepEnd, StepOutput, TrainState, Tree
from fxtrain.data import Source
from fxtrain.fold import as_composed
from fxtrain.loop._emitter import Emitter
from fxtrain.loop._interrupts import Abandoned, Interrupts, leaving_compilation
from fxtrain.loop._saving import Checkpoints
from fxtrain.loop._types import EventRecord, Events, LoopStep
from fxtrain.step import take_steps

if TYPE_CHECKING:
    from fxtrain.loop._ranks import Ranks

_Many = Callable[[TrainState, Sequence[Batch]], tuple[TrainState, Sequence[StepOutput]]]

_NOTHING = Control()


class Steps:
    """Takes the steps of a run.

    Args:
        emitter: Emits ``EpochBegin``, ``StepBegin`` and ``StepEnd``.
        step: The step.
        data: The data source.
        interrupts: Signals, which end a sequence of steps.
        checkpoints: The saves under way, whose end is reported between two steps.
    """

    def __init__(
        self, emitter: Emitter, step: LoopStep, data: Source, interrupts: Interrupts, checkpoints: Checkpoints
    ) -> None:
        self._plan, self._now, self._publish, self._reader = emitter.plan, emitter.now, emitter.publish, emitter.reader
        self._emitter, self._data, self._interrupts, self._checkpoints = emitter, data, interrupts, checkpoints
        self._steps_per_call: int = getattr(step, "steps_per_call", 1)
        self._one = leaving_compilation(step)
        many: _Many | None = getattr(step, "multi_step", None)
        self._many = None if many is None else leaving_compilation(many)
        self._may_differ: bool = data.num_shapes != 1 or data.dynamic_dims > 0
        self._in_step = as_composed(step).traced_slots
        self._epochs_differ = data.has_variable_epochs
        self._end: int | None = None  # data position at which the current epoch ends
        self._outside: dict[str, Tree] = {}  # slots that do not enter the step, from before the current StepBegin
        self._ranks, self._has_stepped = emitter.ranks, False
        self._waited = 0.0  # seconds that this rank waited for its latest batches

    def take(self) -> Events[None]:
        """Takes steps until a request is due."""
        now = self._now
        if now.due["begin_epoch"]:
            yield from self._begin_epoch()
            if now.anything_due:
                return
        due, last, self._end, self._outside = now.due, self._last_in_a_row(), now.epoch.end, {}
        # The epoch length was found after this snapshot was taken, and the run has rewound to it.
        if now.position == self._end:
            now.set(end_epoch=True)
            return
        begins, ends = self._emitter.is_seen(StepBegin), self._emitter.is_seen(StepEnd)
        while True:
            batches = self._fetch()
            if not batches or (begins and not (yield from self._begin(batches))):
                return
            began = self._emitter.time() if ends else 0.0
            outputs = self._step(batches)
            time = self._emitter.time()
            duration = (time - began) / (len(outputs) or 1) if ends else 0.0
            if self._ranks is not None:
                duration = self._ranks.duration
            for output in outputs:
                now.step += 1
                now.position += 1
                if now.position == self._end:
                    now.set(end_epoch=True)
                if ends or output.control:
                    fields = {"metrics": output.metrics, "duration": duration, "outputs": output.outputs}
                    yield from self._emitter.fold(StepEnd, fields, output.control)[0]
                else:
                    self._publish.step(now.step, output.metrics, (time, now.position, now.epoch))
            # After the folds, because an error in one of them rolls all steps of the dispatch back.
            now.metrics.add(outputs)
            if now.due is not due or now.step >= last or self._interrupts.cause is not None:
                return
            now.set_mark()

    def _begin_epoch(self) -> Events[None]:
        now = self._now
        if now.unread and now.read_flags():
            return
        now.set(begin_epoch=False)
        if now.is_batch:
            from fxtrain.loop._members import begin_epoch

            now.state = begin_epoch(now.state)
        self._emitter.epoch_began = self._emitter.time()
        yield from self._emitter.emit(EpochBegin)
        now.set_mark()

    def _fetch(self) -> Sequence[Batch]:
        """Returns the batches of the next dispatch: none at the end of the epoch, or if a signal has arrived."""
        now, epoch = self._now, self._now.epoch
        agreed_wait = self._reader.wait
        try:
            batches = self._reader.next(now.position, epoch, self._dispatch_length())
        except Abandoned:
            self._meet(None)  # agrees on the signal that ended this rank's wait
            return ()
        if self._ranks is not None:
            # Until the ranks meet, events have rank 0's wait for the batches before.
            self._waited, self._reader.wait = self._reader.wait, agreed_wait
        if not batches:  # end of data of unknown length, which is known from here on
            if not (now.unread and now.read_flags()):
                now.count(epoch._replace(length=now.position - epoch.start))
                now.set(end_epoch=True)
            self._meet("the end of the data")
        elif self._epochs_differ and epoch.length and self._data.epoch_length is None:
            # The epoch is longer than expected, so its length is unknown again.
            now.count(epoch._replace(length=0))
            self._end = None
        return batches

    def _begin(self, batches: Sequence[Batch]) -> Generator[EventRecord, None, bool]:
        """Emits StepBegin. Returns whether to take the step."""
        now, asked = self._now, _NOTHING
        self._outside = {name: kept for name, kept in now.state.slots.items() if name not in self._in_step}
        for index, batch in enumerate(batches):  # several only if no callback subscribes
            step, position = now.step + 1 + index, now.position + index
            asked = yield from self._emitter.emit(StepBegin, step=step, position=position, batch=batch)
        if asked.any("skip_batch"):
            now.move_to(now.position + 1)
            if now.position == now.epoch.end:
                now.set(end_epoch=True)
        elif not (now.due["stop"] or now.due["rewind"] or now.due["end_epoch"]):
            return True
        self._meet("a step that a callback prevents")
        # If the step is not taken and the run continues, the same batch is fetched again.
        if now.read_flags(len(now.marked.unread)) and now.marked.unread:
            # The run had stopped one step before, so this event is rolled back.
            now.roll_back(now.marked)
            now.read_flags()
        return False

    def _step(self, batches: Sequence[Batch]) -> Sequence[StepOutput]:
        """Takes the steps. Returns no outputs if a signal arrived while compiling, or if the run had stopped before."""
        now = self._now
        now.mark_as_delta()
        try:
            if self._ranks is None:
                now.state, outputs = self._dispatch(now.state, batches)
            else:
                self._meet("a step")
                if self._interrupts.cause is not None:
                    raise Abandoned
                with self._ranks.dispatch("collectives of the training step", now.step + 1, len(batches)):
                    now.state, outputs = self._dispatch(now.state, batches)
        except Abandoned:
            now.roll_back(now.marked)
            return ()
        if self._ranks is not None and not self._has_stepped:
            self._check_first_step(self._ranks)
        if now.unread and self._has_stopped_before():
            return ()
        if len(outputs) > 1:
            outputs = outputs[: int(now.state.step) - now.step]  # steps after a stop were not taken
        return outputs

    def _meet(self, purpose: str | None) -> None:
        """Waits for all ranks, if there are several."""
        if self._ranks is not None:
            self._ranks.meet(purpose, self._now.step + 1, self._now.position, data_wait=self._waited)
            self._reader.wait = self._ranks.data_wait

    def _check_first_step(self, ranks: Ranks) -> None:
        """Compares the states of all ranks. Their meeting also assigns the time of a compilation to its step."""
        self._has_stepped = True
        ranks.check_equal(
            self._now.state,
            "after the first step",
            "Give the mesh to the step: fxtrain.train_step(loss_fn, tx, mesh=mesh). A hand-written step averages its "
            "gradients with fxtrain.distributed.averaged. Let no callback depend on its process.",
        )

    def _has_stopped_before(self) -> bool:
        """Reads the flags left on the device; returns whether one was set, so that the step returned its input."""
        now, mark = self._now, self._now.marked
        if mark.unread and now.read_flags(len(mark.unread)):
            # The run had stopped one step before, so this StepBegin is rolled back.
            now.unread = ()
            pending = mark.due.items()
            now.set(**{name: value for name, value in pending if name not in ("stop", "skip_final_save")})
            now.state = now.state.replace(slots={**now.state.slots, **self._outside})
            return True
        return bool(now.unread) and now.read_flags()

    def _last_in_a_row(self) -> float:
        """Returns the next step after which the run must check saves, snapshots or its limit."""
        now, every = self._now, self._plan.snapshot_every
        if self._checkpoints.under_way:
            return now.step + 1
        limit = math.inf if self._plan.steps is None else self._plan.steps
        return min(limit, now.step - now.step % every + every) if every else limit

    def _dispatch_length(self) -> int:
        """Returns how many steps to take in the next dispatch."""
        count = self._steps_per_call
        if count == 1:
            return 1
        now, epoch, steps, every = self._now, self._now.epoch, self._plan.steps, self._plan.snapshot_every
        if not epoch.length and self._data.has_snapshots:
            # The epoch may end at any batch, and the iterator state of the data would be ahead of the steps.
            return 1
        fits = (
            (steps is None or now.step + count <= steps)
            and (not epoch.length or now.position - epoch.start + count <= epoch.length)
            and (not every or now.step // every == (now.step + count - 1) // every)
        )
        return count if fits else 1

    def _dispatch(self, state: TrainState, batches: Sequence[Batch]) -> tuple[TrainState, Sequence[StepOutput]]:
        """Takes one step per batch. In a multi-step dispatch, outputs after a stop are invalid."""
        if (
            self._many is not None
            and 1 < len(batches) == self._steps_per_call
            and (not self._may_differ or _are_alike(batches))
        ):
            return self._many(state, batches)
        # A single batch, the last batches of the data, or batches of several shapes.
        return take_steps(self._one, state, batches)


def _are_alike(batches: Sequence[Batch]) -> bool:
    return len({tuple(getattr(leaf, "shape", None) for leaf in tree.leaves(batch)) for batch in batches}) == 1
