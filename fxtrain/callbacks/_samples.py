"""Samples: what a model makes, as images, videos or anything else that can be logged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from fxtrain import rng
from fxtrain.core import Control, EvalEnd, LoopEvent, TrainState
from fxtrain.fold import Handler, on
from fxtrain.model import view


def samples(make: Callable[[Any, rng.Key], Any], *, name: str = "samples", at: type[LoopEvent] = EvalEnd) -> Handler:
    """Logs what ``make`` makes of the model.

    The random numbers are a function of the seed and the step: the same step makes the same samples, before and after
    a resume, and with another batch size.

    Args:
        make: From the model, as a view in evaluation mode, and a key for ``fxtrain.rng`` to one of ``fxtrain.values``,
            or a dict of some.
        name: What the value is logged as, or what goes before the names in the dict.
        at: When. ``fx.when(fx.every(500), samples(..., at=fx.StepEnd))`` is every 500 steps.

    Example:
        >>> import torch, fxtrain as fx
        >>> def digits(model, key):
        ...     noise = fx.rng.normal(key, (16, 8))
        ...     return fx.values.Image(model(noise).sigmoid().view(16, 4, 4, 1))
        >>> callback = samples(digits, name="digits")
        >>> _, control = callback(fx.init(torch.nn.Linear(8, 16)), fx.EvalEnd(step=10, metrics={}))
        >>> control.log["digits"].value
        Image 16 of 4 x 4, gray
    """

    def callback(state: TrainState, event: LoopEvent) -> tuple[TrainState, Control]:
        key = rng.key(state.seed, stream=rng.Stream.SAMPLE, step=event.step)
        with torch.no_grad():
            made = make(view(state, key=key), key)
        log = {f"{name}/{part}": value for part, value in made.items()} if isinstance(made, Mapping) else {name: made}
        return state, Control(log=log)

    callback.__name__ = name
    return on(at, callback)
