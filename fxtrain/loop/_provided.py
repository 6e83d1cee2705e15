"""Checks that the run provides the metrics, slots and events that callbacks declare as needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxtrain import tree
from fxtrain.core import LOOP, TRACED, StepBegin, TrainState, did_you_mean
from fxtrain.fold import Composed


def check_needs(
    callbacks: Composed, state: TrainState, step: Any, eval_step: Callable[..., Any] | None, eval_data: Any
) -> None:
    """Raises before the first step if a callback needs something that the run does not provide.

    Raises:
        ValueError: The message names the callback, the missing metric, slot or event, and the available ones.
    """
    count = getattr(step, "steps_per_call", 1)
    measured: list[str] | None = None
    for handler in callbacks.handlers:
        if count > 1 and StepBegin in handler.events:
            raise ValueError(
                f"expected no callback on StepBegin with steps_per_call={count}, got {handler.name}. Subscribe to "
                "StepEnd or compile with steps_per_call=1."
            )
        for event in handler.needs.events:
            if event not in step.fires:
                fires = ", ".join(kind.__name__ for kind in TRACED if kind in step.fires) or "none"
                raise ValueError(
                    f"expected a step that fires {event.__name__} for {handler.name}, got one that fires {fires}. "
                    "Declare the events of a hand-written step: fxtrain.Step(function, callbacks=..., fires=...)."
                )
        for slot in handler.needs.slots:
            if slot not in state.slots:
                there = ", ".join(repr(slot) for slot in state.slots if not slot.startswith(LOOP)) or "none"
                raise ValueError(
                    f"expected the slot {slot!r} in the state for {handler.name}, got {there}. Give fit the callback "
                    "that keeps it."
                )
        for metric in handler.needs.eval_metrics:
            if eval_step is None:
                raise ValueError(
                    f"expected the metric {metric!r} at EvalEnd for {handler.name}, got no evaluation. Give fit an "
                    "eval_step and eval_data."
                )
            measured = _measured(eval_step, state, eval_data) if measured is None else measured
            if measured and metric not in measured:
                raise ValueError(
                    f"expected the metric {metric!r} at EvalEnd for {handler.name}, got "
                    f"{', '.join(map(repr, measured))}.{did_you_mean(metric, measured)} Return it from eval_step, or "
                    "name one of these."
                )


def _measured(eval_step: Callable[..., Any], state: TrainState, data: Any) -> list[str]:
    """Returns the names of the evaluation's metrics, or none if they are unknown before an evaluation."""
    # A stream may yield its first batch only once.
    if data is None or data.epoch_length is None:
        return []
    # Imported here, because few callbacks declare metrics.
    from torch._subclasses.fake_tensor import FakeTensorMode

    pure = getattr(eval_step, "step", eval_step)  # the uncompiled step
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        try:
            state, batch = tree.map(mode.from_tensor, (state, data[0]))
            return list(pure(state, batch).metrics)
        except Exception:  # for example if the step depends on values; the first evaluation then finds a missing metric
            return []
