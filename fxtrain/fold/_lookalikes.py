"""Detects values that look like callbacks: factories that were not called, and callbacks of other libraries."""

from __future__ import annotations

import types

_COUNTERPARTS = {
    "early": "fxtrain.callbacks.early_stopping(metric, patience=)",
    "checkpoint": "checkpointer=fxtrain.checkpointer(folder)",
    "plateau": "fxtrain.callbacks.reduce_on_plateau(metric)",
    "learningratemonitor": "the metric learning_rate that fxtrain.train_step adds",
    "lrscheduler": "a schedule of fxtrain.schedules as the optimizer's learning rate",
    "learningratescheduler": "a schedule of fxtrain.schedules as the optimizer's learning rate",
    "averaging": "fxtrain.callbacks.swa(start=)",
    "ema": "fxtrain.callbacks.ema(decay)",
    "accumulation": "fxtrain.train_step(..., accumulate=)",
    "nan": "fxtrain.callbacks.nan_guard()",
    "timer": "fxtrain.callbacks.time_limit(hours=)",
    "timelimit": "fxtrain.callbacks.time_limit(hours=)",
    "progress": "observers=[fxtrain.observers.progress()]",
    "tqdm": "observers=[fxtrain.observers.progress()]",
    "tensorboard": "observers=[fxtrain.observers.write(writer)]",
    "wandb": "observers=[fxtrain.observers.write(writer)]",
    "logger": "observers=[fxtrain.observers.write(writer)]",
    "summary": "observers=[fxtrain.observers.summary()]",
}
"""From parts of class names, in lower case, to their counterparts in fxtrain."""

_LIBRARIES = ("lightning", "pytorch_lightning", "transformers", "keras", "tf_keras", "ignite", "fastai", "composer")


def refuse_lookalikes(callback: object, argument: str) -> None:
    """Raises if a callback or an observer is a factory that was not called, or belongs to another library.

    Args:
        callback: The value that was passed.
        argument: ``"callbacks"`` or ``"observers"``, for errors.

    Raises:
        TypeError: The message names the value and what to pass in its place.
    """
    module = getattr(callback, "__module__", None) or ""
    if (
        isinstance(callback, types.FunctionType)
        and module.startswith(("fxtrain.callbacks.", "fxtrain.observers."))
        and "." not in callback.__qualname__
        and not callback.__name__.startswith("_")
    ):
        room = ".".join(module.split(".")[:2])
        raise TypeError(
            f"{argument}: expected the result of {room}.{callback.__name__}(...), got the function itself. Call it."
        )
    kind: type[object] = callback if isinstance(callback, type) else type(callback)
    library = next((root for base in kind.__mro__ if (root := base.__module__.partition(".")[0]) in _LIBRARIES), None)
    if library is not None:
        name = kind.__name__.lower()
        counterpart = next((found for part, found in _COUNTERPARTS.items() if part in name), None)
        remedy = f"Use {counterpart}" if counterpart else "See fxtrain.callbacks and fxtrain.observers"
        what = "functions (state, event, control)" if argument == "observers" else "functions (state, event)"
        raise TypeError(f"{argument}: expected {what}, got {kind.__name__} of {library}. {remedy}.")
