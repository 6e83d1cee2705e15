"""One session of the loop.

    data[i] -> StepBegin -> step -> StepEnd -> pending requests: rewind, evaluation, epoch end, save, stop

Each event is folded over the state, the callbacks' requests are merged into the pending ones, observers see the result,
and it is yielded. Requests are handled after the fold, so a checkpoint includes everything the callbacks wrote.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar, cast

import torch

from fxtrain import tree
from fxtrain.checkpoint import Restoration
from fxtrain.core import (
    FitBegin,
    FitEnd,
    History,
    Interrupted,
    Restored,
    StepFn,
    TrainState,
    Tree,
    warn,
)
from fxtrain.core._shard import full_tensor, shards_in
from fxtrain.core._slots import MEMBERS
from fxtrain.data import SourceLike, as_source
from fxtrain.data._sizes import data_sizes
from fxtrain.fold import as_composed, attach, compose
from fxtrain.loop._batches import BatchReader
from fxtrain.loop._checkpoint_slots import CheckpointSlots
from fxtrain.loop._checks import check_needs, check_state, check_step, check_unchanged_at_end, check_written
from fxtrain.loop._cursor import Cursor
from fxtrain.loop._emitter import Emitter
from fxtrain.loop._epoch_metrics import EpochMetrics
from fxtrain.loop._epochs import Epochs, begin_epochs
from fxtrain.loop._evaluation import Evaluations, declare_shapes, evaluation_requests
from fxtrain.loop._interrupts import Interrupts, Waits
from fxtrain.loop._plan import Plan
from fxtrain.loop._publisher import Publisher
from fxtrain.loop._rewind import Snapshots, rewind
from fxtrain.loop._run_statistics import run_statistics
from fxtrain.loop._saving import Checkpoints, Saves
from fxtrain.loop._steps import Steps
from fxtrain.loop._types import Events, LoopStep
from fxtrain.step import Step
from fxtrain.step._callbacks import shared

if TYPE_CHECKING:
    from fxtrain.loop._ranks import Ranks

T = TypeVar("T")

_EQUAL_STATES = (
    "Take that of rank 0: fxtrain.shard(state, mesh). If it was restored, let all ranks read the same files."
)


class Run:
    """A session of the loop. Iterating over ``events`` runs it, and sets its result.

    Args:
        state: As for ``fit``. So are ``step`` and ``data``.
        step: The step.
        data: The data.
        plan: The options of the run.
        every_event: Whether to yield each event, even if nothing subscribes to it.
    """

    def __init__(
        self, state: TrainState, step: StepFn, data: SourceLike, plan: Plan, *, every_event: bool = False
    ) -> None:
        check_state(state, "fit(state, step, data)")
        check_step(step)
        declared = cast(LoopStep, step) if hasattr(step, "fires") else Step(step)
        if state.step.ndim:
            from fxtrain.loop._members import lifted_run  # keeps the import of fxtrain fast

            state, given, callbacks, plan = lifted_run(state, declared, plan)
        else:
            given, callbacks = shared(declared, compose(as_composed(plan.callbacks), *evaluation_requests(plan)))
        # The loop owns its state, so a compiled step may donate it.
        self._step: LoopStep = getattr(given, "with_donation", lambda: given)()
        self._plan, self._callbacks = plan, callbacks
        is_alone = plan.mesh is None or plan.mesh.world_size == 1
        self._interrupts = Interrupts(is_alone=is_alone)
        self._ranks: Ranks | None = None
        checkpointer, observers = plan.checkpointer, plan.observers
        if plan.mesh is not None and not is_alone:
            from fxtrain.loop._shared import share  # keeps the import of fxtrain fast

            self._ranks, checkpointer, observers = share(plan, plan.mesh, state, self._interrupts)
        self._publish = Publisher(observers, state.step.device)
        if shards := shards_in(state):
            from fxtrain.loop._shared import check_shards

            check_shards(shards, plan.mesh, self._step, plan.eval_step, self._publish)
        # Not the live history of events, which references the observers.
        recorder = self._publish.recorder
        self.history = History(recorder.points, clock=recorder.clock)

        size = 1 if self._ranks is None else self._ranks.mesh.world_size
        checkpoints = self._checkpoints = Checkpoints(checkpointer, self._step, size)
        # Does not reference the run: in a cycle, its state would stay until a garbage collection.
        self._interrupts.is_saving = lambda: checkpoints.under_way
        self._restored = self._checkpoints.restored(self._attached(state)) if plan.resume else None
        is_whole = self._restored is not None and not self._restored.missing
        if self._restored is not None:
            state = self._without_missing(self._restored)
        else:
            check_unchanged_at_end(state)
        state, saved = CheckpointSlots.split(state)
        self._from_disk = state if is_whole else None

        seed = int(state.seed)
        self._data = as_source(data, seed=seed)
        self._eval_data = None if plan.eval_data is None else as_source(plan.eval_data, seed=seed)
        if self._ranks is not None:
            self._data, self._eval_data = self._ranks.rows(self._data), self._ranks.rows(self._eval_data)
        self._callbacks = self._publish.watched(compose(callbacks, *run_statistics(self._step, self._data)))
        # Missing slots are initialized from the state that the session starts with, its epoch included.
        state = begin_epochs(state, self._data)
        if MEMBERS in state.slots:
            from fxtrain.loop._members import record_epoch

            state = record_epoch(state, ends=False)
        state = self._attached(state)
        best = getattr(plan.checkpointer, "best_metric", None)
        self._on_opened(
            state,
            lambda seen: check_needs(self._callbacks, seen, self._step, plan.eval_step, self._eval_data, best),
        )
        check_written(self._callbacks, self._publish.keeps())
        declare_shapes(self._step, self._data)
        declare_shapes(plan.eval_step, self._eval_data)

        # Copied once at entry, because the loop owns its state and a notebook cell can be run twice. A restored state
        # has no other owner.
        state = state if is_whole else state.copy()
        if self._ranks is not None:
            self._ranks.check_equal(state, "when a session begins", _EQUAL_STATES)
        now = self.now = Cursor(state, saved.epoch_metrics or EpochMetrics(), lag=plan.lag, why=saved.stop_reasons)
        waits = Waits(self._data, self._interrupts)
        reader = BatchReader(waits, state.step.device, plan.clock, plan.length, self._ranks)
        if saved.data is not None and self._data.has_snapshots:
            self._data.restore(now.epoch.data_index(now.position), saved.data)
        else:
            reader.expected = saved.batch
        emitter = Emitter(plan, self._callbacks, now, self._publish, reader, every_event, self._ranks)
        donates = self._step is not given or getattr(given, "donates", False)
        self._emitter, self._emit = emitter, emitter.emit
        self._snapshots = Snapshots(plan, checkpointer, copied=donates, notes=self._checkpoints.notes)
        self._evaluations = Evaluations(emitter, self._eval_data, self._interrupts)
        self._epochs = Epochs(emitter, self._data)
        self._saves = Saves(emitter, self._checkpoints, self._snapshots, self._evaluations, self._data)
        self._steps = Steps(emitter, self._step, self._data, self._interrupts, self._checkpoints)
        self.reason = ""

    def events(self) -> Events[None]:
        """Runs the session and yields its events in order."""
        with self._interrupts, contextlib.ExitStack() as closing:
            closing.callback(self._checkpoints.close)
            self._begin_saving()
            closing.callback(self._publish.close)
            closing.callback(self._data.close)
            for step in (self._step, self._plan.eval_step):
                watchers: list[Publisher] | None = getattr(step, "watchers", None)
                if watchers is not None:  # a compiled step
                    watchers.append(self._publish)
                    closing.callback(watchers.remove, self._publish)
            if self._eval_data is not None:
                closing.callback(self._eval_data.close)
            try:
                yield from self._train()
            except Exception as error:
                yield from self._after_error(error)
                _explain_stop_iteration(error)
                raise
            try:
                yield from self._end()
            except Exception as error:
                self._report(error)
                _explain_stop_iteration(error)
                raise
            self._interrupts.adopt_own()
            self.exit_code = self._interrupts.exit_code  # read last, because a signal can arrive after the last step

    def _train(self) -> Events[None]:
        """Takes steps, and handles requests between them, until the run is over."""
        now = self.now
        yield from self._begin()
        while True:
            now.set_mark()
            if now.anything_due or self._checkpoints.under_way:
                yield from self._saves.report()
                yield from self._handle_requests()
                now.set_mark()
            if self._interrupts.cause is not None:
                now.read_flags()
                self.reason = f"interrupted by {self._interrupts.cause}"
                yield from self._emit(Interrupted, cause=self._interrupts.cause, history=self._publish.history)
                return
            if self._is_over():
                return
            if self._snapshots.is_due(now):
                if now.unread and now.read_flags():
                    continue
                self._snapshots.retain(now)
            yield from self._steps.take()

    def _handle_requests(self) -> Events[None]:
        """Handles requests, including those made meanwhile, until only a stop is left or a signal arrives."""
        now = self.now
        while self._interrupts.cause is None:
            if now.anything_due and now.unread:
                now.read_flags()
            if now.due["rewind"]:
                yield from rewind(self._emitter, self._snapshots, self._data)
            elif now.due["evaluate"] or (now.due["end_epoch"] and self._evaluations.is_missing()):
                yield from self._evaluations.handle()
            elif now.due["end_epoch"]:
                yield from self._epochs.handle()
            elif now.due["save"]:
                yield from self._saves.handle()
            else:
                return

    def _is_over(self) -> bool:
        now, plan = self.now, self._plan
        out_of_steps = plan.steps is not None and now.step >= plan.steps
        out_of_epochs = plan.epochs is not None and now.epoch.done >= plan.epochs
        if (out_of_steps or out_of_epochs) and now.unread:
            now.read_flags()
        if now.due["stop"]:
            self.reason = "; ".join(dict.fromkeys(now.why)) or "stopped before this session began"
        elif out_of_steps:
            self.reason = f"reached {plan.steps} steps{self._divergence()}"
        elif out_of_epochs:
            self.reason = f"finished {plan.epochs} epoch{'s' if plan.epochs != 1 else ''}{self._divergence()}"
        return bool(self.reason)

    def _divergence(self) -> str:
        """Returns a clause for the reason if a parameter is not finite, or else an empty string.

        The parameters tell, and not the losses of the session, because an interrupted run ends with the same reason.
        """
        params = self.now.state.params
        if self._ranks is None or not self._emitter.is_sharded:
            return self._not_finite(params)
        from fxtrain.distributed._opened import Opened

        with self._ranks.mesh.collective("check for values that are not finite", step=self.now.step):
            return self._not_finite(Opened(params).tree)

    @staticmethod
    def _not_finite(params: Tree) -> str:
        for path, leaf in zip(tree.paths(params, "state.params"), tree.leaves(params), strict=True):
            has_elements = leaf.layout is torch.strided and not leaf.is_nested and not leaf.is_meta
            if has_elements and leaf.is_floating_point() and not bool(full_tensor(leaf.isfinite().all())):
                return f", but {path} is not finite"
        return ""

    # Begin and end of the session

    def _attached(self, state: TrainState) -> TrainState:
        def with_slots(seen: TrainState) -> TrainState:
            return attach(attach(seen, self._callbacks), as_composed(self._step))

        return self._on_opened(state, with_slots)

    def _on_opened(self, state: TrainState, function: Callable[[TrainState], T]) -> T:
        """Returns ``function(state)``, with DTensors in place of shards if the state has any."""
        if self._ranks is None:
            return function(state)
        from fxtrain.distributed._opened import on_opened

        return on_opened(state, function)

    def _without_missing(self, restored: Restoration) -> TrainState:
        """Returns the restored state without the callbacks' slots that were not in the checkpoint."""
        claimed = {*self._callbacks.slots, *as_composed(self._step).slots}.intersection(restored.missing)
        slots = {name: slot for name, slot in restored.state.slots.items() if name not in claimed}
        return restored.state.replace(slots=slots)

    def _begin_saving(self) -> None:
        self._checkpoints.begin(self.now.state)
        self._snapshots.begin(self.now)
        # Clear the attribute, because a step donates only states without other references.
        restored, self._from_disk = self._from_disk, None
        if restored is not None and restored is self.now.state:
            self._checkpoints.mark_on_disk(restored)

    def _begin(self) -> Events[None]:
        now, pending = self.now, self.now.due["save"]
        self._meet("the begin of the session")
        self._first_step = now.step
        yield from self._emit(
            FitBegin,
            fires=frozenset(self._step.fires),
            resumed=now.step > 0,
            num_shapes=self._data.num_shapes,
            **data_sizes(self._data)._asdict(),
            step_description=getattr(self._step, "description", {}),
            history=self._publish.history,
            run=self._plan.run,
        )
        # How often FitBegin fires depends on interruptions, so its save has a role that rewinds ignore.
        if now.due["save"] and not pending:
            now.set(save=False)
            yield from self._saves.save("session")
        report, self._restored = self._restored, None
        if report is not None:
            yield from self._emit(
                Restored,
                path=str(report.path),
                missing=tuple(report.missing),
                extra=tuple(report.extra),
                environment_changes=tuple(report.different),
            )

    def _end(self) -> Events[None]:
        now = self.now
        yield from self._saves.save_last()
        # The final checkpoint keeps the stop, so resuming a finished run does nothing. The state in memory does not, so
        # it can be trained further.
        now.read_flags()
        now.set(stop=False, skip_final_save=False)
        now.state = now.metrics.added_to(now.state)
        self.continue_from = now.state
        yield from self._emit(
            FitEnd,
            reason=self.reason,
            steps_taken=now.step - self._first_step,
            evaluation=now.last_evaluation(),
            history=self._publish.history,
        )
        self._meet("the end of the session")

    def _meet(self, purpose: str) -> None:
        """Waits for all ranks, if there are several."""
        if self._ranks is not None:
            self._ranks.meet(purpose, self.now.step, self.now.position)

    def _report(self, error: Exception) -> None:
        """Reports an error to the other ranks, if there are any."""
        if self._ranks is not None:
            self._ranks.fail(error, self.now.step)

    def _after_error(self, error: Exception) -> Events[None]:
        now = self.now
        self._report(error)
        if taken := now.marked.is_taken:
            error.add_note(
                "The state before the step was donated, and not all callbacks have seen the state after it, so neither "
                "is saved. Resume from the last checkpoint."
            )
        else:
            # Roll back, because some callbacks may not have seen the latest event.
            now.roll_back(now.marked)
        try:
            now.read_flags()
            cause = f"{type(error).__name__}: {error}"
            yield from self._emit(Interrupted, cause=cause, history=self._publish.history)
            if not taken:
                yield from self._saves.save_last()
        except Exception as error:  # the first error is the one to raise
            warn(f"Ending the run after an error raised another: {error!r}.", RuntimeWarning)


def _explain_stop_iteration(error: Exception) -> None:
    """Raises an error that explains another one, if that is of the user's code and Python has replaced it."""
    # Python replaces StopIteration wherever it would leave a generator, as the loop is one.
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, StopIteration):
        raise RuntimeError(
            "expected callbacks, steps and data that handle the ends of their own iterators, got StopIteration. Give "
            "next() a default, or iterate with a for loop."
        ) from error.__cause__
