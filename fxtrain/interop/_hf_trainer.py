"""The objects of ``Trainer`` that callbacks see: its state with the log history, its control and its arguments."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor

from fxtrain.core import Control, FitBegin, LoopEvent, StepBegin, StepEnd
from fxtrain.interop._hf_memory import Json, ObjectMemory

# Set from each event, or on the history's own way to the slot.
_NOT_MEMORY = frozenset(
    (
        *("global_step", "max_steps", "num_train_epochs", "log_history", "stateful_callbacks"),
        *("is_local_process_zero", "is_world_process_zero", "train_batch_size"),
    )
)


def library() -> Any:
    """Returns the package transformers, which is optional."""
    import transformers  # pyright: ignore[reportMissingImports]

    return transformers


_LOGGED_NAMES = {"grad_norm/total": "grad_norm"}


class TrainerFacts:
    """The arguments of callbacks besides the model, and the state of all objects that are saved.

    Args:
        callbacks: The callbacks.
        args: The arguments of ``Trainer``; None for the defaults of ``hf``.
        transient: Names of attributes of callbacks that are not saved.

    Attributes:
        args: The arguments.
        state: The state of ``Trainer``.
        control: The control, one object for the whole run.
        progress: The state of the adapter.
    """

    def __init__(self, callbacks: Sequence[Any], args: Any, transient: frozenset[str]) -> None:
        self.has_default_args = args is None
        self.args: Any = args or library().TrainingArguments(
            eval_strategy="epoch", save_strategy="no", metric_for_best_model="loss", greater_is_better=False
        )
        self.state, self.control = library().TrainerState(), library().TrainerControl()
        self.progress = SimpleNamespace(
            logged_step=0,  # step of the last log of training metrics
            total_loss=0.0,  # sum of the losses that were logged
            is_epoch_open=False,  # between on_epoch_begin and on_epoch_end
            is_save_requested=False,
            is_stop_requested=False,
            stopped_by="",  # the callback that set should_training_stop
        )
        targets = [*callbacks, self.state, self.control, self.progress]
        self._memories = [_memory_of(target, transient) for target in targets]
        self._names = [*(type(callback).__name__ for callback in callbacks), "state", "control", "progress"]
        uses_best = args is not None or any(isinstance(each, library().EarlyStoppingCallback) for each in callbacks)
        self.needs_best = uses_best and self.best_metric is not None

    # Memory

    def capture(self, size: int) -> bytes:
        """Returns the state of all objects.

        Args:
            size: The maximum size in bytes.

        Raises:
            ValueError: If it is larger. The message names the largest attribute.
        """
        found = [memory.capture() for memory in self._memories]
        text = json.dumps(found, separators=(",", ":")).encode()
        if len(text) > size:
            raise ValueError(self._too_large(found, len(text), size))
        return text

    def restore(self, text: bytes) -> None:
        """Restores what ``capture`` returned. An empty text resets all objects."""
        found: list[dict[str, Json]] = json.loads(text) if text else [{}] * len(self._memories)
        for memory, each in zip(self._memories, found, strict=True):
            memory.restore(each)

    def continue_after_stop(self) -> None:
        """Clears a stop that was requested, as ``Trainer`` does, so that a run that was stopped can be continued."""
        if self.progress.is_stop_requested:
            self.progress.is_stop_requested = self.control.should_training_stop = False

    def _too_large(self, found: Sequence[Mapping[str, Json]], size: int, limit: int) -> str:
        sizes = {
            f"{name}.{attribute}": len(json.dumps(value))
            for name, each in zip(self._names, found, strict=True)
            for attribute, value in {**each.get("set", {}), "state()": each.get("exported")}.items()
        }
        largest = max(sizes, key=sizes.__getitem__)
        return (
            f"expected at most {limit:,} bytes of attributes in callbacks of transformers, got {size:,}, of which "
            f"{largest} has {sizes[largest]:,}. Reserve more with fxtrain.interop.hf(..., memory={2 * size}), or name "
            "attributes that need not be resumed in transient=."
        )

    # Flags

    def reset_step_flags(self) -> None:
        """Resets the flags that ``Trainer`` resets at the beginning of a step."""
        self.control.should_log = self.control.should_evaluate = self.control.should_save = False
        self.progress.is_save_requested = False

    def requests(self, *allowed: str) -> Control:
        """Returns the requests of the flags, where ``Trainer`` reads them.

        Args:
            allowed: The requests that are possible at the event.
        """
        control, progress = self.control, self.progress
        flags = {
            "stop": ("should_training_stop", control.should_training_stop),
            "end_epoch": ("should_epoch_stop", control.should_epoch_stop),
            "evaluate": ("should_evaluate", control.should_evaluate),
            "save": ("should_save", control.should_save and not progress.is_save_requested),
        }
        found = Control()
        for kind in allowed:
            name, is_set = flags[kind]
            if is_set:
                who = progress.stopped_by if kind == "stop" else "a callback of transformers"
                request: dict[str, Any] = {kind: True}
                found |= Control(**request, reason=f"{who} set {name}")
        progress.is_stop_requested |= bool(found.stop)
        progress.is_save_requested |= bool(found.save)
        return found

    # State

    def begin(self, event: FitBegin) -> None:
        """Sets the fields that are constant in a session."""
        state = self.state
        state.train_batch_size, state.epoch = event.batch_size, event.epoch or 0.0
        state.is_world_process_zero = self.args.process_index == 0
        state.is_local_process_zero = self.args.local_process_index == 0
        state.compute_steps(self.args, _max_steps(event))

    def follow(self, event: LoopEvent) -> None:
        """Sets the counters of an event."""
        state, length = self.state, event.epoch_length
        # StepBegin has the number of the step to take, and Trainer that of the steps taken.
        state.global_step = event.step - 1 if isinstance(event, StepBegin) else event.step
        state.max_steps = _max_steps(event)
        if isinstance(event, StepEnd) and event.epoch is not None:
            state.epoch = event.epoch
        state.num_train_epochs = event.total_epochs or (math.ceil(state.max_steps / length) if length else 0)

    def logs_of_step(self, published: Mapping[str, Any]) -> dict[str, float]:
        """Returns the scalars that were published at a step, besides its loss, by the names of ``Trainer``.

        Reads them, which synchronizes with the device.
        """
        scalars = {k: float(v) for k, v in published.items() if isinstance(v, int | float) or _is_scalar(v)}
        scalars.pop("train/loss", None)
        return {_LOGGED_NAMES.get(name, name.removeprefix("train/")): value for name, value in scalars.items()}

    def is_new_best(self, metrics: Mapping[str, float]) -> bool:
        """Updates the best metric from those of an evaluation. Returns whether it improved."""
        name, state, args = self.best_metric, self.state, self.args
        if name is None or (self.has_default_args and name not in metrics):
            return False
        value = metrics[name]
        better = np.greater if args.greater_is_better else np.less
        before = state.best_metric
        if before is None:
            state.best_metric = before = -math.inf if args.greater_is_better else math.inf
        if not better(value, before):
            return False
        state.best_metric, state.best_global_step = value, state.global_step
        return True

    @property
    def best_metric(self) -> str | None:
        """The name of the best metric, with its prefix."""
        name: str | None = self.args.metric_for_best_model
        return name if name is None or name.startswith("eval_") else f"eval_{name}"


def _is_scalar(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0


def _memory_of(target: Any, transient: frozenset[str]) -> ObjectMemory:
    exportable = library().trainer_callback.ExportableState
    if isinstance(target, library().TrainerState):
        return ObjectMemory(target, transient=_NOT_MEMORY)
    if isinstance(target, library().ProgressCallback):  # its counters belong to the bar of a session
        return ObjectMemory(target, transient=frozenset(vars(target)) | {"current_step"})
    if not isinstance(target, exportable) or isinstance(target, library().TrainerControl):
        return ObjectMemory(target, transient=transient)

    def write(exported: Mapping[str, Any]) -> None:
        vars(target).update(vars(type(target).from_state(exported)))

    return ObjectMemory(target, transient=transient, read=target.state, write=write)


def _max_steps(event: LoopEvent) -> int:
    by_epochs = event.total_epochs * event.epoch_length if event.total_epochs and event.epoch_length else None
    return min((count for count in (event.total_steps, by_epochs) if count is not None), default=0)
