"""The events of a run, as a closed union of frozen dataclasses.

There are three kinds. *Traced* events fire inside the compiled step and *trajectory* events in the loop. Both are the
same in a run that was interrupted and resumed. How often *session* events fire depends on interruptions, so callbacks
may log and make requests there, but not change the state. ``FitEnd`` is the exception. ``Published`` is of the kind of
the event that it follows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fxtrain.core._history import History
from fxtrain.core._loop_event import LoopEvent
from fxtrain.core._record import Record
from fxtrain.core._run_info import RunInfo
from fxtrain.core._types import Batch, Metrics, Tree


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class _TracedEvent(Record):
    """The fields that all traced events have."""

    step: Tensor
    loss: Tensor
    metrics: Metrics
    grads: Tree
    weight: Tensor | None = None
    model: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Microbatch(_TracedEvent):
    """Traced event: fires after the backward pass of each microbatch.

    Forward and backward pass are one function of the graph, so no event fires between them. A loss function sees all
    values of the forward pass: it returns them as metrics, as outputs, or through ``fxtrain.tap``.

    Args:
        step: int64 []. Number of the step being taken; the first is 1.
        index: Index of the microbatch in its step, from 0.
        loss: float []. Loss of this microbatch.
        metrics: 0-d tensors or ``fxtrain.metrics`` values by name, including ``"loss"``.
        grads: Pytree like the trainable parameters: gradients of this microbatch.
        weight: float64 []. Weight of the microbatch in means, from ``fxtrain.weighted``; None if it is not used.
        model: Key of the model that is trained, in a step that trains several; None in a step with one optimizer.
    """

    index: int


class Gradients(_TracedEvent):
    """Traced event: fires when the gradients are computed, before the optimizer.

    Args:
        step: int64 []. Number of the step being taken.
        loss: float []. Average over the microbatches.
        metrics: As at ``Microbatch``, averaged or merged over the microbatches.
        grads: Pytree like the trainable parameters: averaged, unscaled, before clipping.
        weight: float64 []. Weight of the batch in means, from ``fxtrain.weighted``; None if it is not used.
        model: As at ``Microbatch``.
    """


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Updated(_TracedEvent):
    """Traced event: fires after the update, with the new state.

    Args:
        step: int64 []. Number of the step being taken.
        loss: As at ``Gradients``.
        metrics: As at ``Gradients``.
        grads: As at ``Gradients``.
        updates: Pytree like the trainable parameters: the updates, which were added to them unless skipped.
        skipped: bool []. Whether the update was skipped: parameters, optimizer state and buffers are unchanged.
        weight: As at ``Gradients``.
        model: As at ``Microbatch``.
    """

    updates: Tree
    skipped: Tensor


class EpochBegin(LoopEvent):
    """Trajectory event: fires when an epoch begins."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class StepBegin(LoopEvent):
    """Trajectory event: fires before a step, with its batch. ``skip_batch`` can be requested here.

    Args:
        batch: The batch, as the data returned it.
    """

    batch: Batch

    @property
    def batch_index(self) -> int:
        """Index of the batch in its epoch, from 0."""
        return self.position - self.epoch_start


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class StepEnd(LoopEvent):
    """Trajectory event: fires after a step.

    Args:
        metrics: The step's metrics by name: 0-d tensors on the step's device.
        duration: Seconds that the call of the step took, without the wait for the batch. An accelerator may still be
            computing: the mean of many steps is exact, a single value is not. Steps of one dispatch have equal shares.
        outputs: Other outputs of the loss function, detached; None unless the step was made with ``outputs=True``.
    """

    metrics: Metrics
    duration: float = 0.0
    outputs: Tree | None = None

    @property
    def batch_index(self) -> int:
        """Index of the step's batch in its epoch, from 0."""
        return self.position - self.epoch_start - 1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EvalBegin(LoopEvent):
    """Trajectory event: fires when an evaluation begins.

    Args:
        num_batches: Number of batches to evaluate; None if the data has no known length.
    """

    num_batches: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EvalStepBegin(LoopEvent):
    """Trajectory event: fires before each batch of an evaluation.

    Args:
        index: Index of the batch, from 0.
        batch: The batch, as the data returned it.
    """

    index: int
    batch: Batch


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EvalStep(LoopEvent):
    """Trajectory event: fires after each batch of an evaluation.

    Args:
        index: Index of the batch, from 0.
        batch: The batch, as the data returned it.
        metrics: Metrics of this batch by name.
        outputs: Other outputs of ``eval_step``, detached; None if it returned none.
    """

    index: int
    batch: Batch
    metrics: Metrics
    outputs: Tree | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EvalEnd(LoopEvent):
    """Trajectory event: fires when an evaluation ends.

    Args:
        metrics: Metrics over all of the evaluation data by name: 0-d tensors.
        duration: Seconds since ``EvalBegin``.
    """

    metrics: Metrics
    duration: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EpochEnd(LoopEvent):
    """Trajectory event: fires when an epoch ends, at its last batch or by an ``end_epoch`` request.

    Args:
        metrics: Means of the metrics of the epoch's steps by name, float64 []; empty if it has no steps. A step has
            weight 1, or the weight that ``fxtrain.weighted`` gives its loss. Metrics of ``fxtrain.metrics`` merge with
            their own weights. The means are the same in a run that was interrupted or has rewound. After a start from
            a copy of a state that ``fxtrain.steps`` yielded within the epoch, they are those of the steps since.
        evaluation: Metrics of the last evaluation, of this step or of an earlier one; None before the first.
        duration: Seconds since ``EpochBegin``, evaluations and saves included, or since the session began within the
            epoch.
    """

    metrics: Metrics = dataclasses.field(default_factory=dict[str, Tensor])
    evaluation: Metrics | None = None
    duration: float = 0.0

    @property
    def epoch_index(self) -> int:
        return self.epochs_done - 1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Rewound(LoopEvent):
    """Trajectory event: fires when the run rewinds, with the state that is about to be abandoned.

    Slots written at this event survive the rewind. Everything else returns to the earlier state.

    Args:
        from_step: Step of the state that is abandoned.
        to_step: Step of the state that is restored.
        abandoned: Data positions of the batches used in between.
        times: How often the run has rewound to this step, including this time.
    """

    from_step: int
    to_step: int
    abandoned: range
    times: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Published(LoopEvent):
    """Fires after the fold of an event that published values: the metrics of the step or evaluation, or a log.

    A callback sees here what all others logged at the event, whatever their order. Requests count as those of the
    event, and what it allows is allowed here. Values logged here are published with the others, and nothing fires
    again. Only callbacks and observers that name ``Published`` see it, and it costs nothing without them.

    Args:
        event: The event that published the values.
        log: The values by the names that writers see, such as ``train/loss`` and ``eval/loss``. Scalars may be 0-d
            tensors on the step's device. A value whose flag is false is left out, and its flag is read when it is
            looked up. Observers see Python scalars.

    Example:
        >>> import fxtrain as fx
        >>> def stop_when_flat(state, event: fx.Published):
        ...     is_flat = event.log.get("grad_norm/total", 1.0) < 1e-6
        ...     return state, fx.Control(stop=is_flat, reason="the gradient has vanished")
        >>> event = fx.Published(step=9, event=fx.StepEnd(step=9, metrics={}), log={"grad_norm/total": 1e-9})
        >>> fx.compose(stop_when_flat)(None, event)[1].reasons("stop")
        ['the gradient has vanished']
    """

    event: LoopEvent
    log: Mapping[str, Any]

    @property
    def epoch_index(self) -> int:
        return self.event.epoch_index


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FitBegin(LoopEvent):
    """Session event: fires when a session of the loop begins.

    Args:
        fires: The traced events that the step fires.
        resumed: Whether the state has already taken steps.
        num_shapes: Number of distinct batch shapes; None if it is unknown.
        batch_size: Number of examples in a batch; None if it is unknown or varies.
        num_examples: Number of examples in the training data; None if it is unknown.
        num_tokens: Number of tokens in the training data; None if it is unknown.
        step_description: The description of the step, such as its optimizer and precision, by name.
        run: The facts of the run given as ``fit(run=...)``, such as its name and configuration.
        history: All scalars published in this session, as a live, read-only mapping. Observers may keep it and read
            ``history["train/loss"].values[-1]`` at any event. A callback that decides by it does not resume exactly,
            because the history of earlier sessions is not part of the state.
    """

    fires: frozenset[type[Any]] = frozenset()
    resumed: bool = False
    num_shapes: int | None = 1
    batch_size: int | None = None
    num_examples: int | None = None
    num_tokens: int | None = None
    step_description: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    run: RunInfo | None = None
    history: History = dataclasses.field(default_factory=History)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Restored(LoopEvent):
    """Session event: fires when the state was restored from a checkpoint.

    Args:
        path: The folder of the checkpoint.
        missing: Slots that were not in it and were initialized.
        extra: Slots in it that no callback claims; they are kept.
        environment_changes: Differences from the saving environment that can break bitwise equality, one line each.
    """

    path: str
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    environment_changes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SaveBegin(LoopEvent):
    """Session event: fires before the state is copied for a checkpoint.

    Without a checkpointer nothing is saved, and it does not fire. What is logged here has the step of the checkpoint.

    Args:
        role: ``"trajectory"`` if a callback requested the save at a step, so that an uninterrupted run has it too.
            ``"session"`` at the end of the session, after a signal or an exception, or on a request at ``FitBegin``.
    """

    role: str


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Saved(LoopEvent):
    """Session event: fires when a checkpoint is committed.

    Checkpoints are written in the background. ``step`` is that of the checkpoint; the run may be further along.

    Args:
        path: The folder of the checkpoint.
        metrics: The metrics saved with it, as Python floats.
    """

    path: str
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Interrupted(LoopEvent):
    """Session event: fires when a signal or an exception ends the session early.

    After a signal, the final save and ``FitEnd`` follow. After an exception, the state is that before the failing
    event, the final save follows, observers are closed, and ``fit`` raises the exception: ``FitEnd`` does not fire.
    Release resources in ``close()`` of an observer, which is called in each case.

    Args:
        cause: The name of the signal, or of the exception with its message.
        history: As at ``FitBegin``.
    """

    cause: str
    history: History = dataclasses.field(default_factory=History)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FitEnd(LoopEvent):
    """Session event: fires when the session has ended, after the final save, unless an exception ended it.

    Callbacks may change the state here, for example to restore the best weights. It becomes ``result.state`` and is not
    saved. A run continues from ``result.continue_from``, the state before this event.

    Args:
        reason: Why the run ended.
        steps_taken: Number of steps by which this session advanced the run.
        evaluation: Metrics of the last evaluation, of this step or of an earlier one; None if there was none.
        history: All scalars published in this session, to log curves at the end:
            ``Control(log={"curves": values.Figure(event.history.plot())})``.
    """

    reason: str
    steps_taken: int = 0
    evaluation: Metrics | None = None
    history: History = dataclasses.field(default_factory=History)

    @property
    def duration(self) -> float:
        """Seconds of the session."""
        return self.time


Event = (
    Microbatch | Gradients | Updated
    | EpochBegin | StepBegin | StepEnd | EvalBegin | EvalStepBegin | EvalStep | EvalEnd | EpochEnd | Rewound
    | Published
    | FitBegin | Restored | SaveBegin | Saved | Interrupted | FitEnd
)  # fmt: skip
"""Any event."""

TRACED = (Microbatch, Gradients, Updated)
TRAJECTORY = (EpochBegin, StepBegin, StepEnd, EvalBegin, EvalStepBegin, EvalStep, EvalEnd, EpochEnd, Rewound)
SESSION = (FitBegin, Restored, SaveBegin, Saved, Interrupted, FitEnd)
EVENTS = (*TRACED, *TRAJECTORY, Published, *SESSION)
