"""Evaluations with given losses, and the first of them at which a rule stops."""

import math

import torch

import fxtrain as fx

NAN, INF = math.nan, math.inf


def evaluations(values, every=10, epoch_length=20):
    return [
        fx.EvalEnd(step=every * n, position=every * n, epoch_length=epoch_length, metrics={"loss": torch.tensor(value)})
        for n, value in enumerate(values, start=1)
    ]


def stop_of(callback, events, state=None):
    """Returns the index of the first stopping event, counted from 1, and its first reason, or None."""
    composed = fx.compose(callback)
    state = fx.attach(fx.init(torch.nn.Linear(1, 1)) if state is None else state, composed)
    for number, event in enumerate(events, start=1):
        state = state.replace(step=torch.as_tensor(event.step), position=torch.as_tensor(event.position))
        state, control = composed(state, event)
        if reasons := control.reasons("stop"):
            return number, reasons[0]
    return None


def number_of(callback, values, **options):
    stop = stop_of(callback, evaluations([float(value) for value in values], **options))
    return stop and stop[0]
