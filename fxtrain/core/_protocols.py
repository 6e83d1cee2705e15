"""The shapes of the functions that users write."""

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
    """What a step tells beside the state.

    Args:
        metrics: 0-d tensors or ``fxtrain.metrics`` values by name; ``"loss"`` among them by custom.
        control: What the traced callbacks asked; None is nothing. After a ``Step`` it is always a ``Control``.
        outputs: Anything else, for an evaluation step: it reaches callbacks at ``EvalStep``.
        weight: float64 []. How much its 0-d tensors count in means over batches, from ``fxtrain.weighted``; None if the
            loss function returns no weight.
    """

    metrics: Mapping[str, Any]
    control: Control | None = None
    outputs: Any = None
    weight: Tensor | None = None


class Callback(Protocol):
    """A pure function that decides. Its second parameter's annotation says which events it sees."""

    def __call__(self, state: TrainState, event: Any, /) -> tuple[TrainState, Control]: ...


class Observer(Protocol):
    """A function that acts on the world, after the fold, and can influence nothing."""

    def __call__(self, state: TrainState, event: Any, control: Control, /) -> None: ...


class StepFn(Protocol):
    """A pure function that moves the state forward by one batch."""

    def __call__(self, state: TrainState, batch: Any, /) -> tuple[TrainState, StepOutput]: ...


_OUTPUT = ("metrics", "control", "outputs", "weight")


def _flatten(output: StepOutput) -> tuple[list[Any], None]:
    # torch's pytree takes None for a leaf, which vmap refuses; an empty tuple has none.
    return [() if (value := getattr(output, name)) is None else value for name in _OUTPUT], None


def _unflatten(_: None, children: Sequence[Any]) -> StepOutput:
    metrics, *others = children
    return StepOutput(metrics, *map(_present, others))


def _present(child: Any) -> Any:
    return None if isinstance(child, tuple) and not child else child  # pyright: ignore[reportUnknownVariableType]


register_node(StepOutput, _flatten, _unflatten, fields=_OUTPUT)
