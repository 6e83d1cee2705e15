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
                    f"expected a step that fires {kind.__name__} for {handler.name}, got one that fires {fires}. Use "
                    "fxtrain.train_step(..., callbacks=), or declare the events of a hand-written step: "
                    "fxtrain.Step(function, callbacks=..., fires=...)."
                )
            if handler not in folded:
                raise ValueError(
                    f"expected a step built with {handler.name}, which subscribes to {kind.__name__} inside the step, "
                    "got one without it. Make the callback once, and give it to both train_step(callbacks=) and fit."
                )
    for handler in folded:
        outside = [kind.__name__ for kind in handler.events if kind not in TRACED]
        if outside and handler not in callbacks.handlers:
            raise ValueError(
                f"expected {handler.name} in the callbacks of fit, because it subscribes to "
                f"{', '.join(sorted(outside))}, got it in the step alone. Make the callback once, and give it to both "
                "train_step(callbacks=) and fit."
            )
    count = getattr(step, "steps_per_call", 1)
    between = [handler.name for handler in callbacks.handlers if StepBegin in handler.events]
    if count > 1 and between:
        raise ValueError(
            f"expected no callback on StepBegin with steps_per_call={count}, got {between[0]}. Subscribe to StepEnd "
            "or compile with steps_per_call=1."
        )
