"""Calls the methods of transformers' callbacks at the events of a run, and turns their flags into requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxtrain import tree
from fxtrain.core import (
    Callback,
    Control,
    EpochBegin,
    EpochEnd,
    EvalBegin,
    EvalEnd,
    EvalStep,
    FitBegin,
    FitEnd,
    Interrupted,
    LoopEvent,
    Published,
    Saved,
    StepBegin,
    StepEnd,
    TrainState,
    check_choice,
    check_positive_int,
    describe,
)
from fxtrain.fold import Composed, as_composed, compose, needs, on, slotted
from fxtrain.interop._hf_arguments import SharedArguments
from fxtrain.interop._hf_gradients import BeforeUpdate, keep_before_update
from fxtrain.interop._hf_slot import Slot
from fxtrain.interop._hf_trainer import TrainerFacts, library

_BEFORE_OPTIMIZER = ("on_substep_end", "on_pre_optimizer_step", "on_optimizer_step")
_OUTSIDE_FIT = ("on_predict", "on_push_begin")


def composed(
    callbacks: Sequence[Any],
    args: Any,
    *,
    shared: Mapping[str, object],
    name: str | None,
    transient: frozenset[str],
    sizes: tuple[int, int],
) -> Composed:
    """Returns the callback of ``fxtrain.interop.hf``, which documents the arguments."""
    if not callbacks:
        raise ValueError("expected a callback of transformers, got none. Give at least one.")
    for argument, size in zip(("memory", "history"), sizes, strict=True):
        check_positive_int(argument, size)
    made = [callback() if isinstance(callback, type) else callback for callback in callbacks]
    for callback in made:
        if not isinstance(callback, library().TrainerCallback):
            raise TypeError(
                f"expected callbacks of transformers, got {describe(callback)}. Give callbacks of fxtrain to fit as "
                "they are."
            )
    facts = TrainerFacts(made, args, transient)
    slot = Slot(name or "hf/" + "+".join(type(callback).__name__ for callback in made), facts, sizes)
    adapter = _Adapter(slot, made, facts, SharedArguments(shared))
    handler = slotted(slot.name, slot.init, on(adapter.events, adapter))
    if facts.needs_best:
        handler = needs(handler, eval_metrics=[str(facts.best_metric).removeprefix("eval_")])
    if not adapter.sees_gradients:
        return compose(handler)
    return compose(keep_before_update(f"{slot.name}/gradients"), handler)


def fired(
    hook: str, state: TrainState, callbacks: Callback | Iterable[Callback], metrics: Mapping[str, float] | None
) -> TrainState:
    """Calls a method outside ``fit``. See ``fxtrain.interop.hf_event``."""
    check_choice("hook", hook, _OUTSIDE_FIT)
    found = [handler.function for handler in as_composed(callbacks) if isinstance(handler.function, _Adapter)]
    if not found:
        raise ValueError("expected callbacks made by fxtrain.interop.hf, got none. Give those that fit was given.")
    for adapter in found:
        state = adapter.fire_outside(hook, state, metrics or {})
    return state


class _Adapter:
    """Callbacks of transformers that share a control, as a callback of fxtrain.

    Args:
        slot: Their slot.
        callbacks: The callbacks.
        facts: The objects of ``Trainer`` that they see.
        shared: The other arguments of their methods.
    """

    def __init__(self, slot: Slot, callbacks: Sequence[Any], facts: TrainerFacts, shared: SharedArguments) -> None:
        self._slot, self._callbacks, self._facts, self._shared = slot, callbacks, facts, shared
        self._base = library().TrainerCallback
        self.sees_gradients = any(map(self._has, _BEFORE_OPTIMIZER))
        self._evaluated = (0, 0)  # batches and examples of the current evaluation
        self._was_interrupted = False
        self._handlers: dict[type[Any], Callable[[Any], Control]] = {
            FitBegin: self._fit_begin,
            EpochBegin: self._epoch_begin,
            StepBegin: self._step_begin,
            StepEnd: self._step_end,
            Published: self._published,
            EvalBegin: self._eval_begin,
            EvalStep: self._eval_step,
            EvalEnd: self._eval_end,
            EpochEnd: self._epoch_end,
            Saved: self._saved,
            Interrupted: self._interrupted,
            FitEnd: self._fit_end,
        }
        if not self._has("on_step_begin"):
            del self._handlers[StepBegin]
        self.events = tuple(self._handlers)

    def __call__(self, state: TrainState, event: LoopEvent) -> tuple[TrainState, Control]:
        if state.step.ndim:
            raise TypeError(
                f"expected a state of one run for {self._slot.name}, got one of {state.step.shape[0]}. Callbacks of "
                "transformers are Python objects and cannot be vmapped. Use one of fxtrain.callbacks."
            )
        kind = type(event)
        is_session = kind in (FitBegin, Saved, Interrupted, FitEnd)
        if not is_session:
            self._slot.recall(state)
            self._loss = self._slot.read(state).loss
        if kind is not StepEnd:
            self._facts.follow(event)
        with self._shared.showing(state, event, is_writable=not is_session or kind is FitEnd):
            control = self._handlers[kind](event)
            state = self._shared.state
        return (state if is_session else self._slot.remember(state, self._loss)), control

    def fire_outside(self, hook: str, state: TrainState, metrics: Mapping[str, float]) -> TrainState:
        """Calls ``on_predict`` or ``on_push_begin``, and returns the state with their writes."""
        self._slot.recall(state)
        named = {"metrics": {f"test_{key.removeprefix('test_')}": value for key, value in metrics.items()}}
        with self._shared.showing(state, None, is_writable=True):
            self._fire(hook, **(named if hook == "on_predict" else {}))
            state = self._shared.state
        return self._slot.remember(state, self._slot.read(state).loss)

    def _has(self, hook: str) -> bool:
        return any(getattr(type(each), hook) is not getattr(self._base, hook) for each in self._callbacks)

    def _fire(self, hook: str, **named: object) -> None:
        """Calls a method of each callback that has its own."""
        control, facts = self._facts.control, self._facts
        for callback in self._callbacks:
            if getattr(type(callback), hook) is getattr(self._base, hook):
                continue
            who, had_stop = f"{type(callback).__name__}.{hook}", control.should_training_stop
            with self._shared.watching(who):
                result = getattr(callback, hook)(facts.args, facts.state, control, **self._shared.named, **named)
            if result is not None and result is not control:
                vars(control).update(vars(result))
            if control.should_training_stop and not had_stop:
                facts.progress.stopped_by = type(callback).__name__

    # Events, in the order in which they fire

    def _fit_begin(self, event: FitBegin) -> Control:
        facts = self._facts
        self._was_interrupted = False
        self._slot.begin()
        self._slot.recall(self._shared.state)
        self._loss = self._slot.read(self._shared.state).loss
        facts.begin(event)
        self._fire("on_init_end")
        facts.control.should_training_stop = False
        self._fire("on_train_begin")
        self._slot.begin()
        self._slot.keep_beginning()
        return Control()

    def _epoch_begin(self, event: EpochBegin) -> Control:
        self._begin_epoch()
        return Control()

    def _begin_epoch(self) -> None:
        if not self._facts.progress.is_epoch_open:
            self._facts.control.should_epoch_stop = False
            self._facts.progress.is_epoch_open = True
            self._fire("on_epoch_begin")

    def _step_begin(self, event: StepBegin) -> Control:
        self._begin_epoch()  # of a run that was stopped within an epoch, and is continued
        self._facts.reset_step_flags()
        self._fire("on_step_begin")
        return Control()

    def _step_end(self, event: StepEnd) -> Control:
        facts = self._facts
        facts.state.global_step = event.step - 1
        if StepBegin not in self._handlers:
            self._begin_epoch()
            facts.reset_step_flags()
        if self.sees_gradients:
            self._before_optimizer()
        facts.follow(event)
        self._shared.published = {f"train/{name}": value for name, value in event.metrics.items()}
        self._add_loss(event)
        args, step = facts.args, event.step
        if step == 1 and args.logging_first_step:
            facts.control.should_log = True
        if args.logging_strategy == "steps" and step % facts.state.logging_steps == 0:
            facts.control.should_log = True
        self._fire("on_step_end")
        return Control()

    def _published(self, event: Published) -> Control:
        # Here the logs include what other callbacks logged at the step, such as the norm of the gradients.
        if type(event.event) is not StepEnd:
            return Control()
        self._shared.published = event.log
        self._log_training()
        if self._facts.control.should_training_stop and not self._facts.control.should_evaluate:
            self._end_epoch()  # as in Trainer
        return self._facts.requests("stop", "end_epoch", "evaluate", "save")

    def _before_optimizer(self) -> None:
        """Calls the methods that ``Trainer`` calls between the backward pass and the end of the step."""
        kept: BeforeUpdate = self._shared.state.slots[f"{self._slot.name}/gradients"]
        self._shared.show_before_update(kept)
        for _ in range(int(kept.microbatches) - 1):
            self._fire("on_substep_end")
        self._fire("on_pre_optimizer_step")
        self._shared.show_after_update(kept)
        self._fire("on_optimizer_step")
        self._shared.show_state()

    def _eval_begin(self, event: EvalBegin) -> Control:
        self._evaluated = (0, 0)
        self._shared.eval_data.length = event.num_batches
        ends_epoch = bool(self._shared.state.due.end_epoch)
        is_open = self._facts.progress.is_epoch_open
        if ends_epoch and is_open and self._facts.args.eval_strategy == "epoch":
            self._end_epoch()
            return self._facts.requests("stop", "save")  # it evaluates already
        return Control()

    def _eval_step(self, event: EvalStep) -> Control:
        batches, examples = self._evaluated
        self._evaluated = (batches + 1, examples + _num_examples(event.batch))
        self._fire("on_prediction_step")
        return Control()

    def _eval_end(self, event: EvalEnd) -> Control:
        facts = self._facts
        measured = {f"eval_{name}": float(value) for name, value in event.metrics.items()}
        batches, examples = self._evaluated
        metrics = {**measured, **_speed("eval", event.duration, examples, batches)}
        self._log(metrics)
        facts.control.should_evaluate = False
        self._fire("on_evaluate", metrics=metrics)
        is_best = facts.is_new_best(metrics)
        if facts.args.save_strategy == "best":
            facts.control.should_save = is_best
        if facts.control.should_training_stop:
            self._end_epoch()
        return facts.requests("stop", "end_epoch", "save")

    def _epoch_end(self, event: EpochEnd) -> Control:
        self._end_epoch()
        return self._facts.requests("stop", "evaluate", "save")

    def _end_epoch(self) -> None:
        facts = self._facts
        if not facts.progress.is_epoch_open:
            return
        facts.progress.is_epoch_open = False
        if facts.args.logging_strategy == "epoch":
            facts.control.should_log = True
        self._fire("on_epoch_end")
        self._log_training()

    def _saved(self, event: Saved) -> Control:
        facts = self._facts
        if event.step == facts.state.best_global_step:
            facts.state.best_model_checkpoint = event.path
        facts.control.should_save = False
        self._fire("on_save")
        return facts.requests("stop")

    def _interrupted(self, event: Interrupted) -> Control:
        self._was_interrupted = True
        return Control()

    def _fit_end(self, event: FitEnd) -> Control:
        facts = self._facts
        if not self._was_interrupted:
            self._end_epoch()
        total = facts.progress.total_loss + float(self._loss)
        examples = event.steps_taken * (facts.state.train_batch_size or 0)
        speed = _speed("train", event.duration, examples, event.steps_taken)
        self._log({**speed, "total_flos": facts.state.total_flos, "train_loss": total / max(event.step, 1)})
        self._fire("on_train_end")
        return Control()

    # Logs and requests

    def _add_loss(self, event: StepEnd) -> None:
        loss = event.metrics.get("loss")
        if not isinstance(loss, Tensor) or loss.ndim:
            return
        loss = loss.detach().to(self._loss)
        if self._facts.args.logging_nan_inf_filter:
            since = self._facts.state.global_step - self._facts.progress.logged_step
            loss = torch.where(loss.isfinite(), loss, self._loss / since)
        self._loss = self._loss + loss

    def _log_training(self) -> None:
        """Logs the metrics of training, if a flag says so and there are steps since the last log."""
        facts, step = self._facts, self._facts.state.global_step
        since = step - facts.progress.logged_step
        if not facts.control.should_log or since <= 0:
            return
        total = float(self._loss)
        facts.progress.total_loss += total
        facts.progress.logged_step = step
        self._loss = torch.zeros_like(self._loss)
        self._log({"loss": total / since, **facts.logs_of_step(self._shared.published)})

    def _log(self, logs: dict[str, float]) -> None:
        facts = self._facts
        logs["epoch"] = facts.state.epoch
        facts.state.log_history.append({**logs, "step": facts.state.global_step})
        facts.control.should_log = False
        self._fire("on_log", logs=logs)


def _num_examples(batch: Any) -> int:
    tensors = [leaf for leaf in tree.leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    return tensors[0].shape[0] if tensors else 0


def _speed(prefix: str, seconds: float, examples: int, steps: int) -> dict[str, float]:
    """Returns the metrics of speed that ``Trainer`` adds."""
    found = {f"{prefix}_runtime": round(seconds, 4)}
    if seconds > 0:
        if examples:
            found[f"{prefix}_samples_per_second"] = round(examples / seconds, 3)
        found[f"{prefix}_steps_per_second"] = round(steps / seconds, 3)
    return found
