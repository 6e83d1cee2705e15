"""Provided: whether there is all that callbacks say they need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxtrain import tree
from fxtrain.core import LOOP, TRACED, TrainState
from fxtrain.fold import Composed


def refuse_unprovided(
    callbacks: Composed, state: TrainState, step: Any, eval_step: Callable[..., Any] | None, eval_data: Any
) -> None:
    """What a callback needs and nobody provides is a mistake, found before the first step.

    Raises:
        ValueError: With the callback, what it needs, and what there is.
    """
    measured: list[str] | None = None
    for handler in callbacks.handlers:
        for event in handler.needs.events:
            if event not in step.fires:
                fires = ", ".join(kind.__name__ for kind in TRACED if kind in step.fires) or "none"
                raise ValueError(
                    f"{handler.name} needs {event.__name__}, and of the events inside the step this one fires {fires}: "
                    "say what a hand-written step fires, fxtrain.Step(function, callbacks=..., fires=...)."
                )
        for slot in handler.needs.slots:
            if slot not in state.slots:
                there = ", ".join(repr(slot) for slot in state.slots if not slot.startswith(LOOP)) or "none"
                raise ValueError(
                    f"{handler.name} needs the slot {slot!r}, and the state has {there}: give fit the callback that "
                    "keeps it too."
                )
        for metric in handler.needs.eval_metrics:
            if eval_step is None:
                raise ValueError(
                    f"{handler.name} needs the metric {metric!r} at EvalEnd, and there is no evaluation: give fit an "
                    "eval_step and eval_data."
                )
            measured = _measured(eval_step, state, eval_data) if measured is None else measured
            if measured and metric not in measured:
                raise ValueError(
                    f"{handler.name} needs the metric {metric!r} at EvalEnd, and the evaluation measures "
                    f"{', '.join(map(repr, measured))}: let eval_step measure it, or name one of these."
                )


def _measured(eval_step: Callable[..., Any], state: TrainState, data: Any) -> list[str]:
    """The names of the metrics of an evaluation; none where that cannot be told without one."""
    if data is None or data.epoch_length is None:  # a stream may give its first batch once only
        return []
    from torch._subclasses.fake_tensor import FakeTensorMode  # imported when used: few callbacks ask

    pure = getattr(eval_step, "step", eval_step)  # what is compiled, as it is
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        try:
            state, batch = tree.map(mode.from_tensor, (state, data[0]))
            return list(pure(state, batch).metrics)
        except Exception:  # it looks at values, say: then the first evaluation will tell
            return []
