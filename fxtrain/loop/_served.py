"""Checks that every callback will see the events that it subscribes to."""

from __future__ import annotations

from typing import Any

from fxtrain.core import TRACED, StepBegin
from fxtrain.fold import Composed, as_composed


def refuse_unserved(callbacks: Composed, step: Any) -> None:
    """Raises ValueError before the first step if a callback would never see an event that it subscribes to."""
    folded = as_composed(step).handlers
    for handler in callbacks.handlers:
        for kind in (kind for kind in TRACED if kind in handler.events):
            if kind not in step.fires:
                fires = ", ".join(kind.__name__ for kind in TRACED if kind in step.fires) or "none"
                raise ValueError(
                    f"{handler.name} subscribes to {kind.__name__}, which fires inside the step, and of these events "
                    f"this step fires {fires}: use fxtrain.train_step(..., callbacks=), or say what a hand-written "
                    "step fires, fxtrain.Step(function, callbacks=..., fires=...)."
                )
            if handler not in folded:
                raise ValueError(
                    f"{handler.name} subscribes to {kind.__name__}, which fires inside the step, and the step was "
                    "built without it: make the callback once, and give it to train_step(..., callbacks=) and to fit."
                )
    for handler in folded:
        outside = [kind.__name__ for kind in handler.events if kind not in TRACED]
        if outside and handler not in callbacks.handlers:
            raise ValueError(
                f"{handler.name} was given to the step, and subscribes to {', '.join(sorted(outside))} too, which "
                "the loop fires: make the callback once, and give it to fit(..., callbacks=) as well."
            )
    count = getattr(step, "steps_per_call", 1)
    between = [handler.name for handler in callbacks.handlers if StepBegin in handler.events]
    if count > 1 and between:
        raise ValueError(
            f"{between[0]} subscribes to StepBegin, where it may ask to skip the batch, and with "
            f"steps_per_call={count} steps are taken {count} at a time: subscribe to StepEnd, or compile with "
            "steps_per_call=1."
        )
