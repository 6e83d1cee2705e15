"""The signatures of the functions that users write: callbacks, observers and steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from fxtrain.core._control import Control
from fxtrain.core._pytrees import register_node
from fxtrain.core._state import TrainState


@dataclasses.dataclass(frozen=True)
class StepOutput:
    """The output of a step next to the new state.

    Args:
        metrics: 0-d tensors or ``fxtrain.metrics`` values by name. By convention, one of them is ``"loss"``.
        control: The requests of the traced callbacks, or None. A ``Step`` always returns a ``Control``.
        outputs: Other outputs of an evaluation step, which callbacks see at ``EvalStep``.
        weight: float64 []. Weight of the 0-d metrics in means over batches, from ``fxtrain.weighted``; None if the
            loss function returns no weight.
    """

    metrics: Mapping[str, Any]
    control: Control | None = None
    outputs: Any = None
    weight: Tensor | None = None


class Callback(Protocol):
    """A pure function that decides. The annotation of its second parameter selects the events that it sees."""

    def __call__(self, state: TrainState, event: Any, /) -> tuple[TrainState, Control]: ...


class Observer(Protocol):
    """A function with side effects, called after the fold. It cannot influence training."""

    def __call__(self, state: TrainState, event: Any, control: Control, /) -> None: ...


class StepFn(Protocol):
    """A pure function that advances the state by one batch."""

    def __call__(self, state: TrainState, batch: Any, /) -> tuple[TrainState, StepOutput]: ...


_OUTPUT = ("metrics", "control", "outputs", "weight")


def _flatten(output: StepOutput) -> tuple[list[Any], None]:
    # torch's pytree treats None as a leaf, which vmap refuses. An empty tuple has no leaves.
    return [() if (value := getattr(output, name)) is None else value for name in _OUTPUT], None


def _unflatten(_: None, children: Sequence[Any]) -> StepOutput:
    metrics, *others = children
    return StepOutput(metrics, *map(_present, others))


def _present(child: Any) -> Any:
    return None if isinstance(child, tuple) and not child else child  # pyright: ignore[reportUnknownVariableType]


register_node(StepOutput, _flatten, _unflatten, fields=_OUTPUT)
