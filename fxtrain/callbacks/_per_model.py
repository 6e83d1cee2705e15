"""Runs callbacks once for each model of a step that trains several, such as a GAN."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fxtrain.core import TRACED, Callback, Control, Event, Gradients, Microbatch, TrainState, Tree, Updated, describe
from fxtrain.fold import Handler
from fxtrain.fold._handler import handler_of
from fxtrain.model import model_of
from fxtrain.model._model import models_of


def per_model(callback: Callback) -> Handler:
    """Lifts a callback to steps that train several models, each with an own optimizer.

    In a state from ``init(modules, tx)`` with dicts, the slot holds one content for each model, by name. At a traced
    event the callback sees the event's model alone: its parameters, optimizer state, gradients and slot content. At
    other events it runs once for each model. Logged names and reasons are given the model: ``grad_norm/total`` becomes
    ``grad_norm/generator/total``. With one optimizer, the callback runs as it is.

    The monitors, the guards, ``epoch_mean`` and ``stop_on_overfitting`` are lifted already.

    Args:
        callback: A callback that changes its own slot only.

    Raises:
        ValueError: When it runs, if an event names no model with an own optimizer.

    Example:
        >>> import torch, fxtrain as fx
        >>> def count(state, event: fx.Updated, steps):
        ...     return steps + 1, fx.Control(log={"updates/count": steps + 1})
        >>> counter = per_model(fx.stateful("updates", lambda state: torch.tensor(0), count))
        >>> tx = {"a": fx.optim.sgd(0.1), "b": fx.optim.sgd(0.1)}
        >>> state = fx.attach(fx.init({"a": torch.tensor(1.0), "b": torch.tensor(1.0)}, tx), counter)
        >>> find = fx.gradients(lambda model, batch: model["a"] * model["b"], wrt="a")
        >>> state, output = fx.step.update(state, find(state, None), tx["a"], counter, wrt="a")
        >>> state.slots["updates"], list(output.control.log)
        ({'a': tensor(1), 'b': tensor(0)}, ['updates/a/count'])
    """
    handler = handler_of(callback)
    slot, init = handler.slot, handler.init

    def init_each(state: TrainState) -> Tree:
        assert init is not None
        names = models_of(state)
        return {name: init(_narrowed(state, name, None)) for name in names} if names else init(state)

    def run(state: TrainState, event: Event) -> tuple[TrainState, Control]:
        names = models_of(state)
        if not names and (not isinstance(event, TRACED) or event.model is None):
            return handler.function(state, event)
        total = Control()
        for name, part in _parts(handler, names, event):
            new, control = handler.function(_narrowed(state, name, slot), part)
            if slot is not None and new.slots[slot] is not state.slots[slot][name]:
                state = state.with_slot(slot, {**state.slots[slot], name: new.slots[slot]})
            if control:
                total = total | _named(control, slot, name)
        return state, total

    return dataclasses.replace(handler, function=run, init=None if init is None else init_each)


def _parts(handler: Handler, names: tuple[str, ...], event: Any) -> list[tuple[str, Any]]:
    """Returns the event as each model sees it."""
    if not isinstance(event, TRACED):
        return [(name, event) for name in names]
    if event.model in names:
        return [(event.model, event)]
    # One event for all models: gradients and updates are dicts like the parameters.
    if event.model is None and isinstance(event.grads, Mapping) and event.grads.keys() == set(names):
        return [(name, _of_model(event, name)) for name in names]
    there = f"the models with an own optimizer, {', '.join(names)}" if names else "a model, but there is one optimizer"
    raise ValueError(
        f"expected {type(event).__name__} for {handler.name} to name one of {there}, got model={describe(event.model)}."
        " Fire it with fxtrain.step.update(..., wrt=name), and give fxtrain.init a dict of optimizers."
    )


def _of_model(event: Microbatch | Gradients | Updated, name: str) -> Any:
    fields: dict[str, Any] = {"grads": event.grads[name], "model": name}
    if isinstance(event, Updated):
        fields["updates"] = event.updates[name]
    return dataclasses.replace(event, **fields)


def _narrowed(state: TrainState, name: str, slot: str | None) -> TrainState:
    """Returns a state with the trainable parameters, the optimizer state and the slot content of one model."""
    slots = state.slots if slot is None else {**state.slots, slot: state.slots[slot][name]}
    params = state.params[name] if state.model is None else model_of(state).split(state.params, name)
    return state.replace(model=None, params=params, opt_state=state.opt_state[name], slots=slots)


def _named(control: Control, slot: str | None, model: str) -> Control:
    """Returns the requests with the model in their reasons and in the logged names."""

    def named(name: str) -> str:
        prefix = f"{slot}/" if slot is not None and name.startswith(f"{slot}/") else name[: name.find("/") + 1]
        return f"{prefix}{model}/{name.removeprefix(prefix)}"

    return control.renamed(reason=lambda reason: f"{model}: {reason}" if reason else "", log=named)
