"""The run: one way of the data, once through and never back.

    data[i] -> StepBegin -> step -> StepEnd -> what is due: rewind, evaluation, epoch end, save, stop

Each event is folded over the state, what the callbacks asked is joined into what is due, observers see the outcome,
and it is yielded. A request is honoured only after the fold, so what is saved is what the callbacks left.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import torch

from fxtrain import metrics
from fxtrain.checkpoint import Restoration, Role
from fxtrain.core import (
    DATA,
    EVALUATED,
    REWINDS,
    Control,
    Epoch,
    EpochBegin,
    EpochEnd,
    EvalBegin,
    EvalEnd,
    EvalStep,
    Event,
    FitBegin,
    FitEnd,
    Interrupted,
    Restored,
    Rewound,
    Saved,
    StepBegin,
    StepEnd,
    TrainState,
    event_of,
)
from fxtrain.data import adapt
from fxtrain.fold import Composed, as_composed, attach
from fxtrain.loop.current import Current
from fxtrain.loop.epochs import begin_epochs
from fxtrain.loop.evaluate import measure
from fxtrain.loop.feeding import Feeding
from fxtrain.loop.history import History
from fxtrain.loop.interrupts import Abandoned, Interrupts, leaving_compilation
from fxtrain.loop.provided import refuse_unprovided
from fxtrain.loop.publish import Publisher
from fxtrain.loop.repeats import LastBatch, without_last_batch
from fxtrain.loop.rewind import Snapshots
from fxtrain.loop.saving import Saving
from fxtrain.loop.served import refuse_unserved
from fxtrain.loop.strides import Strides
from fxtrain.step import Step

Moment = tuple[TrainState, Event, Control]
"""What the loop yields: the state after an event's fold, the event, and what was asked at it."""

Moments = Generator[Moment, None, Any]

_NOTHING = Control()
_MAX_EMPTY_EPOCHS = 100  # in a row; a run that takes no step in so many never will


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run is to do. ``fit`` documents each."""

    callbacks: Composed
    eval_step: Callable[..., Any] | None
    eval_data: Any
    eval_view: Callable[[TrainState], TrainState] | None
    evaluate_epochs: bool  # whether each epoch ends with an evaluation
    epochs: int | None
    steps: int | None
    observers: Iterable[Callable[..., None]]
    checkpointer: Any
    resume: bool
    keep_every: int | None
    keep: int
    keep_on_host: bool
    rewind_limit: int
    lag: int | None
    clock: Callable[[], float]
    every_event: bool  # whether each event is yielded, and made where nobody else sees it


class Run:
    """One session of the loop: ``moments`` drives it, and ``state``, ``last`` and ``reason`` say how it ended."""

    def __init__(self, state: TrainState, step: Callable[..., Any], data: Any, plan: Plan, history: History) -> None:
        self.plan = plan
        given: Any = step if hasattr(step, "fires") else Step(step)
        refuse_unserved(plan.callbacks, given)
        # The loop owns its state, so a compiled step may write the next one over it.
        self.step: Any = given.donating() if hasattr(given, "donating") else given
        self._publish = Publisher(plan.observers, history, state.step.device)
        self._interrupts = Interrupts(lambda: self._saving.under_way)
        self._in_step = as_composed(self.step).traced_slots
        state = attach(attach(state, plan.callbacks), self.step)
        self._saving = Saving(plan.checkpointer, _settings(self.step))
        self._restored = self._saving.restored(state) if plan.resume else None
        whole = self._restored is not None and not self._restored.missing
        if self._restored is not None:
            # A slot that the checkpoint lacks begins at the state that the run goes on from, not at a fresh one.
            state = self._attached_late(self._restored)
        state, last_batch = without_last_batch(state)
        seed = int(state.seed)
        self.data: Any = adapt(data, seed=seed)
        wanted = f"{plan.steps} steps" if plan.steps is not None else f"{plan.epochs} epochs"
        self._feeding = Feeding(self._interrupts.leaving_waits(self.data), state.step.device, plan.clock, wanted)
        self._strides = Strides(self.step, self.data, steps=plan.steps, keep_every=plan.keep_every)
        self.eval_data: Any = None if plan.eval_data is None else adapt(plan.eval_data, seed=seed)
        refuse_unprovided(plan.callbacks, state, self.step, plan.eval_step, self.eval_data)
        late = plan.lag if plan.lag is not None else state.step.device.type != "cpu"
        # The one copy at entry: the loop owns its state, so a notebook cell can be run twice. What was read from the
        # disk is its own already.
        self._now = Current(state if whole else state.copy(), late=bool(late))
        self._now.count(begin_epochs(state, self.data))
        if DATA in state.slots and hasattr(self.data, "restore"):
            self.data.restore(self._now.epoch.data_index(self._now.position), state.slots[DATA])
        else:
            self._feeding.expected = last_batch
        self._saving.begin(self._now.state)
        donates = self.step is not given or getattr(given, "donates", False)
        self._snapshots = Snapshots(
            plan.keep_every, plan.keep, on_host=plan.keep_on_host, copied=donates, saving=self._saving
        )
        self._snapshots.begin(self._now)
        if whole and self._now.state is state:
            self._saving.mark_on_disk(state)
        self._start = plan.clock()
        self._times: dict[type[Any], float] = {}
        self._root = self._now.branch()  # what to come back to when something goes wrong
        self._empty_epochs = 0  # in a row, without a step
        self._step_of_last_epoch = -1
        self.reason = ""
        self.exit_code = 0
        self.last: Any = None

    def _attached_late(self, restored: Restoration) -> TrainState:
        claimed = {*self.plan.callbacks.slots, *as_composed(self.step).slots}.intersection(restored.missing)
        slots = {name: slot for name, slot in restored.state.slots.items() if name not in claimed}
        return attach(attach(restored.state.replace(slots=slots), self.plan.callbacks), self.step)

    @property
    def state(self) -> TrainState:
        """Where the run is."""
        return self._now.state

    def moments(self) -> Moments:
        """Every event of the session, in order."""
        with self._interrupts, contextlib.ExitStack() as closing:
            closing.callback(self._saving.close)
            closing.callback(self._publish.close)
            closing.callback(self.data.close)
            if self.eval_data is not None:
                closing.callback(self.eval_data.close)
            yield from self._session()

    def _session(self) -> Moments:
        now = self._now
        try:
            yield from self._begin()
            while True:
                self._root = now.branch()
                if now.anything_due or self._saving.under_way:
                    yield from self._tell_saved()
                    yield from self._settle()
                    self._root = now.branch()
                if self._interrupts.cause is not None:
                    now.read_flags()
                    self.reason = f"interrupted by {self._interrupts.cause}"
                    self.exit_code = self._interrupts.exit_code
                    yield from self._fire(Interrupted, cause=self._interrupts.cause)
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
        yield from self._save_last()
        # A stop is honoured here. The last checkpoint keeps it, so that resuming a finished run does nothing;
        # the state in memory goes on where it is asked to.
        now.forget_stop()
        self.last = now.state
        yield from self._fire(FitEnd, reason=self.reason)

    def _finished(self) -> bool:
        now, plan = self._now, self.plan
        out_of_steps = plan.steps is not None and now.step >= plan.steps
        out_of_epochs = plan.epochs is not None and now.epoch.done >= plan.epochs
        if (out_of_steps or out_of_epochs) and now.unread:
            now.read_flags()
        if now.due["stop"]:
            self.reason = "; ".join(dict.fromkeys(now.why)) or "it had been stopped before this session began"
        elif out_of_steps:
            self.reason = f"reached {plan.steps} steps"
        elif out_of_epochs:
            self.reason = f"finished {plan.epochs} epoch{'s' if plan.epochs != 1 else ''}"
        return bool(self.reason)

    def _begin(self) -> Moments:
        now, pending = self._now, self._now.due["save"]
        yield from self._fire(FitBegin, fires=frozenset(self.step.fires), resumed=now.step > 0)
        if now.due["save"] and not pending:  # how often this event fires depends on interruptions, so no rewind target
            now.set(save=False)
            self._save("session")
        report, self._restored = self._restored, None
        if report is not None:
            yield from self._fire(
                Restored,
                path=str(report.path),
                missing=tuple(report.missing),
                extra=tuple(report.extra),
                different=tuple(report.different),
            )

    def _after_error(self, error: Exception) -> Moments:
        now = self._now
        if taken := self._root.is_taken:
            error.add_note(
                "The step had taken the memory of the state before it, and the callbacks have not seen all of the "
                "state after it: neither is saved. Resume from the last checkpoint."
            )
        else:
            # The state before the failing iteration is whole; the one in its middle may lack callbacks' part.
            now.abandon(self._root)
        try:
            now.read_flags()
            yield from self._fire(Interrupted, cause=f"{type(error).__name__}: {error}")
            if not taken:
                yield from self._save_last()
        except Exception as error:  # the first error is the one to raise
            warnings.warn(f"While ending after an error, this failed too: {error!r}.", RuntimeWarning, stacklevel=2)

    # Steps

    def _advance(self) -> Moments:
        """Steps, until something else is due."""
        now = self._now
        if now.due["begin_epoch"]:
            if now.unread and now.read_flags():
                return
            now.set(begin_epoch=False)
            yield from self._fire(EpochBegin)
            if now.anything_due:
                return
            self._root = now.branch()
        # No name here may hold a state: what somebody else holds is copied by a step that takes its memory.
        due, last, end = now.due, self._last_in_a_row(), now.epoch.end
        if now.position == end:  # found out after this state was retained, and the run has rewound to it
            now.set(end_epoch=True)
            return
        begins, ends = self._is_seen(StepBegin), self._is_seen(StepEnd)
        while True:
            count = self._strides.length(now.step, now.position, now.epoch)
            try:
                batches = self._feeding.next(now.position, now.epoch, count)
            except Abandoned:
                return
            if not batches:  # data of unknown length, which the state now keeps
                if now.unread and now.read_flags():
                    return
                now.count(now.epoch._replace(length=now.position - now.epoch.start))
                now.set(end_epoch=True)
                return
            outside: dict[str, Any] = {}
            if begins:
                outside = {name: kept for name, kept in now.state.slots.items() if name not in self._in_step}
                if not (yield from self._begin_step(batches)):
                    if now.read_flags(len(self._root.unread)) and self._root.unread:
                        # The run had stopped one step ago, so this event is undone.
                        now.abandon(self._root)
                        now.read_flags()
                    return
            self._root = now.thin(self._root)
            try:
                now.state, outputs = self._strides.take(now.state, batches)
            except Abandoned:
                now.abandon(self._root)
                return
            if now.unread and self._stopped_before_step(outside):
                return
            if len(outputs) > 1:
                outputs = outputs[: int(now.state.step) - now.step]  # stopped at one, those after it were not taken
            for output in outputs:
                now.step += 1
                now.position += 1
                if now.position == end:
                    now.set(end_epoch=True)
                if ends or output.control:
                    yield from self._tell(StepEnd, {"metrics": output.metrics}, output.control)[0]
                else:
                    self._publish.step(now.step, output.metrics)
            if now.due is not due or now.step >= last or self._interrupts.cause is not None:
                return
            self._root = now.branch()

    def _stopped_before_step(self, outside: Mapping[str, Any]) -> bool:
        """Reads the flags left on the device; returns whether one was set, so that the step returned its input.

        Args:
            outside: The loop's slots as they were before this step's StepBegin.
        """
        now = self._now
        if self._root.unread and now.read_flags(len(self._root.unread)):
            # The run had stopped one step ago, so what happened at this StepBegin is undone.
            now.unread = ()
            now.set(**{name: value for name, value in self._root.due.items() if name not in ("stop", "unsaved")})
            now.state = now.state.replace(slots={**now.state.slots, **outside})
            return True
        return bool(now.unread) and now.read_flags()

    def _begin_step(self, batches: Sequence[Any]) -> Generator[Moment, None, bool]:
        """Returns whether the step is to be taken."""
        now, asked = self._now, _NOTHING
        for index, batch in enumerate(batches):  # where there are several, no callback sees it
            at: dict[str, Any] = {"step": now.step + 1 + index, "position": now.position + index}
            asked = yield from self._fire(StepBegin, **at, batch=batch)
        if asked.any("skip_batch"):
            now.move_to(now.position + 1)
            if now.position == now.epoch.end:
                now.set(end_epoch=True)
            return False
        # If it is not, and the run goes on, the batch comes again.
        return not (now.due["stop"] or now.due["rewind"] or now.due["end_epoch"])

    def _last_in_a_row(self) -> float:
        """The step after which something beside requests is to be looked at."""
        now, every = self._now, self.plan.keep_every
        if self._saving.under_way:
            return now.step + 1
        limit = math.inf if self.plan.steps is None else self.plan.steps
        return min(limit, now.step - now.step % every + every) if every else limit

    # What is due, in its order

    def _settle(self) -> Moments:
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
                self._save()
                yield from self._tell_saved()
            else:
                return

    def _evaluate(self) -> Moments:
        now, eval_step = self._now, self.plan.eval_step
        if eval_step is None:
            raise ValueError(
                "An evaluation was asked for, and fit was given no eval_step and eval_data: give both, or take away "
                "the callback that asks."
            )
        # A branch: what happens in it counts once it is complete. Interrupted, it is forgotten and due again.
        root = now.branch()
        now.set(evaluate=False)
        yield from self._fire(EvalBegin)
        total: dict[str, Any] = {}
        seen = now.state if self.plan.eval_view is None else self.plan.eval_view(now.state)
        batches = measure(seen, leaving_compilation(eval_step), self._interrupts.leaving_waits(self.eval_data))
        try:
            for index, batch, output, total in batches:  # noqa: B007
                if self._interrupts.cause is not None:
                    raise Abandoned
                yield from self._fire(
                    EvalStep, index=index, batch=batch, metrics=output.metrics, outputs=output.outputs
                )
        except Abandoned:
            now.abandon(root)
            return
        measured = metrics.compute(total)
        memory = {"step": now.state.step.clone(), "metrics": {k: v.detach().clone() for k, v in measured.items()}}
        now.state = now.state.with_slot(EVALUATED, memory)
        yield from self._fire(EvalEnd, metrics=measured)

    def _epoch_lacks_evaluation(self) -> bool:
        """Whether the epoch is to end with an evaluation and no step asked for it.

        A step cannot where it was the last of data of unknown length, or where the batches after it were skipped.
        """
        last = self._now.state.slots.get(EVALUATED)
        return self.plan.evaluate_epochs and (last is None or int(last["step"]) != self._now.step)

    def _end_epoch(self) -> Moments:
        now, epoch = self._now, self._now.epoch
        if not epoch.length:
            raise ValueError(
                "expected data that knows its epoch length where a callback requests end_epoch, got data that is still "
                "in its first epoch. Give data that has a length."
            )
        if now.position < epoch.start + epoch.length:
            now.move_to(epoch.start + epoch.length)
        self._empty_epochs = 0 if now.step > self._step_of_last_epoch else self._empty_epochs + 1
        if self._empty_epochs >= _MAX_EMPTY_EPOCHS:
            raise ValueError(
                f"expected a step within {_MAX_EMPTY_EPOCHS} epochs, got none: a callback skips every batch or ends "
                "every epoch before its first step. Let it stop the run instead."
            )
        self._step_of_last_epoch = now.step
        now.count(Epoch(epoch.done + 1, start=now.position, length=self.data.epoch_length or epoch.length))
        now.set(end_epoch=False, begin_epoch=True)
        yield from self._fire(EpochEnd)

    def _save(self, role: Role = "trajectory") -> None:
        now = self._now
        now.keep_why()
        if self.plan.checkpointer is not None and hasattr(self.data, "snapshot"):
            now.state = now.state.with_slot(DATA, self.data.snapshot(now.epoch.data_index(now.position)))
        self._publish.flush(now.step)
        self._snapshots.save(now.snapshots)
        last_batch = self._feeding.last if self.plan.checkpointer is not None else None
        self._saving.save(now.state, self._metrics_of_this_step(), role, now.snapshots, LastBatch.of(last_batch))

    def _save_last(self) -> Moments:
        yield from self._tell_saved(wait=True)
        if self._saving.is_due_at_the_end(self._now.state) and not self._now.due["unsaved"]:
            self._save("session")  # a pending save, as one that waits for an evaluation, stays due: it is another one
            yield from self._tell_saved(wait=True)

    def _tell_saved(self, *, wait: bool = False) -> Moments:
        for step, path, measured in self._saving.news(wait=wait):
            yield from self._fire(Saved, step=step, path=str(path), metrics=measured)

    def _metrics_of_this_step(self) -> dict[str, float]:
        last = self._now.state.slots.get(EVALUATED)
        if last is None or int(last["step"]) != self._now.step:
            return {}
        return {name: float(value) for name, value in last["metrics"].items()}

    # The way back

    def _rewind(self) -> Moments:
        now, old, steps = self._now, self._now.state, self._now.due["rewind"]
        target = self._snapshots.newest_until(now.step - steps, now)
        now.set(rewind=0, evaluate=False, end_epoch=False, save=False)
        if target is None:
            now.stop(f"a rewind of {steps} steps was asked for at step {now.step}, and no state that old is kept")
            return
        to_step = int(target.step)
        times: dict[int, int] = dict(old.slots[REWINDS].tolist()) if REWINDS in old.slots else {}
        times[to_step] = times.get(to_step, 0) + 1
        yield from self._fire(
            Rewound,
            from_step=now.step,
            to_step=to_step,
            abandoned=range(int(target.position), now.position),
            times=times[to_step],
        )
        now.read_flags()
        # What callbacks wrote at this event is all that crosses, beside a request to stop.
        crossed = {name: memory for name, memory in now.state.slots.items() if memory is not old.slots.get(name)}
        crossed[REWINDS] = torch.tensor(sorted(times.items()), device=old.step.device)
        stop, unsaved, retained, length = now.due["stop"], now.due["unsaved"], now.snapshots, now.epoch.length
        now.take(target.replace(slots={**target.slots, **crossed}))
        if not now.epoch.length:  # what was found out of the data stays known
            now.count(now.epoch._replace(length=length))
        now.snapshots = retained
        self._snapshots.roll_back(now)
        # Save again, so the folder marks the abandoned steps and a resume starts from the new timeline.
        now.set(stop=stop, unsaved=unsaved, save=self.plan.checkpointer is not None)
        if times[to_step] > self.plan.rewind_limit:
            now.stop(f"went back to step {to_step} {times[to_step]} times, and it did not help")

    # Events

    def _fire(self, kind: type[Any], **fields: Any) -> Moments:
        """Tells of an event, if anybody sees it, and yields it; returns what was asked."""
        if not self._is_seen(kind):
            return _NOTHING
        moments, asked = self._tell(kind, fields)
        yield from moments
        return asked

    def _tell(
        self, kind: type[Any], fields: dict[str, Any], also: Control | None = None
    ) -> tuple[Sequence[Moment], Control]:
        """Folds an event, joins what was asked and publishes it. Returns what to yield of it, and what was asked.

        Args:
            kind: Its type.
            fields: What only such events have, and what else is not as the loop counts it.
            also: What was asked before.
        """
        now, plan = self._now, self.plan
        time = plan.clock() - self._start
        event = event_of(
            kind,
            {
                "step": now.step,
                "position": now.position,
                "epochs_done": now.epoch.done,
                "epoch_start": now.epoch.start,
                "epoch_length": now.epoch.length or None,
                "total_steps": plan.steps,
                "total_epochs": plan.epochs,
                "time": time,
                "previous_time": self._times.get(kind, 0.0),
                "data_wait": self._feeding.wait,
                **fields,
            },
        )
        self._times[kind] = time
        now.state, control = plan.callbacks(now.state, event)
        if also:
            control = also | control
        if control:
            now.ask(control)
        self._publish(now.state, event, control)
        return ((now.state, event, control),) if plan.every_event else (), control

    def _is_seen(self, kind: type[Any]) -> bool:
        return self.plan.every_event or kind in self.plan.callbacks.table or self._publish.is_seen(kind)


def _settings(step: Any) -> dict[str, str]:
    """What decides the bits of a step's result, as text by name."""
    return {"compiled by": getattr(step, "how", "nothing"), **getattr(step, "settings", {})}
