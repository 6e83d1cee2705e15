"""Events: what can happen in a run, as a closed union of frozen dataclasses.

There are three kinds. *Traced* events fire inside the compiled step, *trajectory* events in the loop, and
both are the same in a run that was interrupted and resumed. How often *session* events fire depends on the
interruptions, so callbacks may ask and log there, and change nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Microbatch:
    """A substep of gradient accumulation is done. Traced.

    Args:
        step: int64 []. The number of the step being taken; the first is 1.
        index: Which substep, from 0.
        loss: float []. Of this microbatch.
        metrics: 0-d tensors, or ``fxtrain.metrics`` values, by name; ``"loss"`` among them.
        grads: Pytree like the trainable parameters: this microbatch's gradients.
        weight: float64 []. How much the microbatch counts in means, from ``fxtrain.weighted``; None without it.
    """

    step: Tensor
    index: int
    loss: Tensor
    metrics: Mapping[str, Any]
    grads: Any
    weight: Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradients:
    """The gradients are there, and the optimizer has not seen them. Traced.

    Args:
        step: int64 []. The number of the step being taken.
        loss: float []. Averaged over the microbatches.
        metrics: As at ``Microbatch``, averaged or merged.
        grads: Pytree like the trainable parameters: averaged, unscaled, before clipping.
        weight: float64 []. How much the batch counts in means, from ``fxtrain.weighted``; None without it.
    """

    step: Tensor
    loss: Tensor
    metrics: Mapping[str, Any]
    grads: Any
    weight: Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Updated:
    """The parameters have moved; the state is the new one. Traced.

    Args:
        step: int64 []. The number of the step being taken.
        loss: float [].
        metrics: As at ``Gradients``.
        grads: As at ``Gradients``.
        updates: Pytree like the trainable parameters: what was added to them, had it not been skipped.
        skipped: bool []. Whether parameters, optimizer and buffers were kept instead.
        weight: As at ``Gradients``.
    """

    step: Tensor
    loss: Tensor
    metrics: Mapping[str, Any]
    grads: Any
    updates: Any
    skipped: Tensor
    weight: Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopEvent:
    """What every event of the loop carries. Callbacks take their clock from here and never read one.

    Args:
        step: The number of the step being taken, or between steps of the last one taken.
        position: Batches consumed of the data stream, this step's included at its end.
        epochs_done: Epochs finished.
        epoch_start: Position at which the current epoch began.
        epoch_length: Batches in an epoch; None while that is unknown, and for data without an end.
        total_steps: Steps that the run is to have, or None.
        total_epochs: Epochs that the run is to have, or None.
        time: Seconds since this session of the loop began.
        previous_time: The same at the previous event of this type, or 0.
        data_wait: Seconds that the loop waited for the last batch.
    """

    step: int
    position: int = 0
    epochs_done: int = 0
    epoch_start: int = 0
    epoch_length: int | None = None
    total_steps: int | None = None
    total_epochs: int | None = None
    time: float = 0.0
    previous_time: float = 0.0
    data_wait: float = 0.0

    @property
    def epoch(self) -> float | None:
        """Epochs done, with their fraction; None while the length of an epoch is unknown."""
        if self.epoch_length is None:
            return None
        return self.epochs_done + (self.position - self.epoch_start) / self.epoch_length


def event_of(kind: type[Any], fields: dict[str, Any]) -> Any:
    """An event of this type, made past ``__init__``, which sets each field by a call: there are some at each step."""
    event = object.__new__(kind)
    event.__dict__.update(fields)
    return event


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochBegin(LoopEvent):
    """An epoch begins. Trajectory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBegin(LoopEvent):
    """A batch is there, and the step has not seen it. Trajectory. ``skip_batch`` can be asked here.

    Args:
        batch: As the data gave it.
    """

    batch: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepEnd(LoopEvent):
    """A step was taken. Trajectory.

    Args:
        metrics: What the step measured, by name: 0-d tensors on the step's device.
    """

    metrics: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalBegin(LoopEvent):
    """An evaluation begins. Trajectory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalStep(LoopEvent):
    """A batch was evaluated. Trajectory.

    Args:
        index: Which batch, from 0.
        batch: As the data gave it.
        metrics: Of this batch, by name.
        outputs: What ``eval_step`` returned beside its metrics, detached; None where it returned nothing.
    """

    index: int
    batch: Any
    metrics: Mapping[str, Any]
    outputs: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalEnd(LoopEvent):
    """An evaluation is done. Trajectory.

    Args:
        metrics: Over the whole evaluation data, by name: 0-d tensors.
    """

    metrics: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochEnd(LoopEvent):
    """An epoch is over, or was ended. Trajectory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewound(LoopEvent):
    """The run goes back; folded over the state that is left. Trajectory.

    What a callback writes into its slot here is all that survives the way back.

    Args:
        from_step: Steps taken by the state that is left.
        to_step: Steps taken by the state that is returned to.
        abandoned: Positions of the batches that were used in between.
        times: How often the run has now gone back to this step.
    """

    from_step: int
    to_step: int
    abandoned: range
    times: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitBegin(LoopEvent):
    """A session of the loop begins. Session.

    Args:
        fires: The traced events that the step fires.
        resumed: Whether the state has taken steps before.
        sizes: How many shapes the batches have; None where that is unknown.
    """

    fires: frozenset[type[Any]] = frozenset()
    resumed: bool = False
    sizes: int | None = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored(LoopEvent):
    """The state came from a checkpoint. Session.

    Args:
        path: The folder of the checkpoint.
        missing: Slots that were not in it and were initialised.
        extra: Slots in it that no callback claims; they are kept.
        different: What is not as it was at the save, of all that bitwise equality needs: one line each.
    """

    path: str
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    different: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved(LoopEvent):
    """A checkpoint is committed. Session. It is written in the background: ``step`` is its own, and later steps may
    have been taken.

    Args:
        path: The folder of the checkpoint.
        metrics: Those it was saved with, as Python floats.
    """

    path: str
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interrupted(LoopEvent):
    """A signal or an exception ends the session early. Session.

    Args:
        cause: The name of the signal, or of the exception with its message.
    """

    cause: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitEnd(LoopEvent):
    """The session is over and saved. Session. The state returned here becomes ``result.state``, unsaved.

    Args:
        reason: Why the run ended, in words.
    """

    reason: str


Event = (
    Microbatch | Gradients | Updated
    | EpochBegin | StepBegin | StepEnd | EvalBegin | EvalStep | EvalEnd | EpochEnd | Rewound
    | FitBegin | Restored | Saved | Interrupted | FitEnd
)  # fmt: skip
"""Everything that can happen."""

TRACED = (Microbatch, Gradients, Updated)
TRAJECTORY = (EpochBegin, StepBegin, StepEnd, EvalBegin, EvalStep, EvalEnd, EpochEnd, Rewound)
SESSION = (FitBegin, Restored, Saved, Interrupted, FitEnd)
EVENTS = (*TRACED, *TRAJECTORY, *SESSION)
