"""The signatures of the functions that users write: callbacks, observers and steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from fxtrain.core._control import Control
from fxtrain.core._pytrees import register_node
from fxtrain.core._state import TrainState
from fxtrain.core._types import Batch, Metrics, Tree


@dataclasses.dataclass(frozen=True)
class StepOutput:
    """The output of a step next to the new state.

    Args:
        metrics: 0-d tensors or ``fxtrain.metrics`` values by name. By convention, one of them is ``"loss"``.
        control: The requests of the traced callbacks, or None. A ``Step`` always returns a ``Control``.
        outputs: Other outputs of the step, which callbacks see at ``StepEnd``, or at ``EvalStep`` of an evaluation.
        weight: float64 []. Weight of the 0-d metrics in means over batches, from ``fxtrain.weighted``; None if the
            loss function returns no weight.
    """

    metrics: Metrics
    control: Control | None = None
    outputs: Tree | None = None
    weight: Tensor | None = None


class Callback(Protocol):
    """A pure function that decides. The annotation of its second parameter selects the events that it sees.

    A function whose event parameter has a narrower type is a ``Callback`` too, so ``event`` has no type here.

    Args:
        state: The state left by the callbacks before it.
        event: The event that fired.

    Returns:
        The state, changed in the callback's own slots at most, and its requests.

    Example:
        >>> import fxtrain as fx
        >>> def stop_when_good(state: fx.TrainState, event: fx.EvalEnd) -> tuple[fx.TrainState, fx.Control]:
        ...     return state, fx.Control(stop=event.metrics["loss"] < 0.1, reason="loss below 0.1")
        >>> callback: fx.Callback = stop_when_good
    """

    def __call__(self, state: TrainState, event: Any, /) -> tuple[TrainState, Control]: ...


class Observer(Protocol):
    """A function with side effects, called after the fold. It cannot influence training.

    Args:
        state: The state after the fold, borrowed: ``state.copy()`` keeps one.
        event: The event that fired.
        control: The requests of all callbacks.

    Example:
        >>> import fxtrain as fx
        >>> def show_evaluation(state: fx.TrainState, event: fx.EvalEnd, control: fx.Control) -> None:
        ...     print(event.step, event.metrics)
        >>> observer: fx.Observer = show_evaluation
    """

    def __call__(self, state: TrainState, event: Any, control: Control, /) -> None: ...


class StepFn(Protocol):
    """A pure function that advances the state by one batch.

    Args:
        state: The state before the step.
        batch: One element of the data source.

    Returns:
        The state after the step, and its metrics and requests.

    Example:
        >>> import torch, fxtrain as fx
        >>> def count(state: fx.TrainState, batch: fx.Batch) -> tuple[fx.TrainState, fx.StepOutput]:
        ...     return state.replace(step=state.step + 1), fx.StepOutput({"size": torch.tensor(len(batch))})
        >>> step: fx.StepFn = count
    """

    def __call__(self, state: TrainState, batch: Batch, /) -> tuple[TrainState, StepOutput]: ...


_OUTPUT = ("metrics", "control", "outputs", "weight")


def _flatten(output: StepOutput) -> tuple[list[Any], None]:
    # torch's pytree treats None as a leaf, which vmap refuses. An empty tuple has no leaves.
    return [() if (value := getattr(output, name)) is None else value for name in _OUTPUT], None


def _unflatten(_: None, children: Sequence[Tree]) -> StepOutput:
    return StepOutput(*map(present, children))


def present(child: Tree) -> Tree:
    """Returns a child of a flattened node, with None in place of an empty tuple."""
    return None if isinstance(child, tuple) and not child else child  # pyright: ignore[reportUnknownVariableType]


register_node(StepOutput, _flatten, _unflatten, fields=_OUTPUT)
