"""Builds the arguments of ``fit`` from a program: state, steps and callbacks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fxtrain as fx
from benchmarks.fuzz.interpreted import interpreted, undonating
from benchmarks.fuzz.program import Ask, Program
from benchmarks.fuzz.sources import FEATURES
from fxtrain.core import EVENTS, TRACED
from fxtrain.precision import LossScale

NAMES = {kind.__name__: kind for kind in EVENTS}
_HASH_SIZE = 2**31 - 1
_CODES = {kind: 1 + index for index, kind in enumerate(EVENTS)}


def state_of(program: Program) -> fx.TrainState:
    """Returns the initial state of the run."""
    module, tx = _template(program.model, program.optimizer)
    return fx.init(module, tx, seed=program.seed)


def step_of(program: Program, callbacks: Any, called: Callable[[], None]) -> Any:
    """Returns the training step.

    Args:
        program: The program to build from.
        callbacks: All callbacks of the run, composed.
        called: Called once per step in eager programs, unused in compiled ones.
    """
    traced = fx.compose(*(h for h in callbacks.handlers if not h.events.isdisjoint(TRACED)))
    _, tx = _template(program.model, program.optimizer)
    if program.compiled:
        pure: Any = _machine(traced) if program.model == "machine" else _trained(program, tx, traced)
        step = fx.compile(pure, steps_per_call=program.steps_per_call, on_recompile="allow")
        return step if program.donate else undonating(step)
    pure = _machine(traced, called) if program.model == "machine" else _trained(program, tx, traced, called)
    if not program.donate and program.steps_per_call == 1:
        return pure
    return interpreted(pure, donate=program.donate, steps_per_call=program.steps_per_call)


def eval_step_of(program: Program, called: Callable[[], None]) -> Any:
    """Returns the evaluation step. Eager steps call ``called`` once per batch."""

    def measure(model: Any, batch: Any) -> Any:
        if not program.compiled:
            called()
        return _loss(model, batch)

    step = fx.eval_step(measure)
    return fx.compile(step, on_recompile="allow") if program.compiled else step


def callbacks_of(program: Program) -> Any:
    """Returns all callbacks of the run, composed."""
    made: list[Any] = []
    if program.counted:
        made.append(_counter(tuple(NAMES[name] for name in program.counted)))
    made += [READY[name]() for name in program.callbacks]
    made += [_ask(index, ask) for index, ask in enumerate(program.asks)]
    made += [_traced_ask(index, ask) for index, ask in enumerate(program.traced_asks)]
    return fx.compose(*made)


READY: dict[str, Callable[[], Any]] = {
    "early_stopping": lambda: fx.callbacks.early_stopping("loss", patience=2, min_delta=0.01),
    "restore_best": lambda: fx.compose(
        fx.callbacks.early_stopping("loss", patience=3), fx.callbacks.restore_best("loss")
    ),
    "ema": lambda: fx.callbacks.ema(0.7),
    "nan_guard": lambda: fx.callbacks.nan_guard(patience=3),
    "spike_guard": lambda: fx.callbacks.spike_guard(warmup=2, window=4, deviations=3.0, rewind=2, record=4),
    "epoch_mean": lambda: fx.callbacks.epoch_mean("loss"),
    "plateau": lambda: fx.callbacks.reduce_on_plateau("loss", patience=0, factor=0.5, min_delta=0.05),
    "save": lambda: fx.when(fx.every(2), fx.callbacks.save()),
    "save_at_evaluations": lambda: fx.on(fx.EvalEnd, _save),
}


def _save(state: fx.TrainState, event: Any) -> Any:
    return state, fx.Control(save=True, reason="after an evaluation")


@functools.cache
def _template(model: str, optimizer: str) -> tuple[Any, Any]:
    tx = {
        "sgd": lambda: fx.optim.sgd(0.1),
        "momentum": lambda: fx.optim.sgd(0.05, momentum=0.9),
        "adamw": lambda: fx.optim.chain(
            fx.optim.clip_by_global_norm(1.0), fx.optim.adamw(fx.schedules.cosine(1e-2, 20))
        ),
        "injected": lambda: fx.optim.inject_hyperparams(fx.optim.adamw)(learning_rate=0.02),
    }[optimizer]()
    if model == "mlp":
        parts = nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1)
    else:
        parts = (nn.Linear(FEATURES, 1),)
    module = nn.Sequential(*parts)
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(torch.linspace(-0.5, 0.7, parameter.numel()).reshape(parameter.shape) + 0.1 * index)
    return module, tx


def _loss(model: Any, batch: Any) -> Any:
    error = model(batch["x"]) - batch["y"]
    return error.square().mean(), {"mae": error.abs().mean()}


def _trained(program: Program, tx: Any, callbacks: Any, called: Callable[[], None] | None = None) -> Any:
    def loss_fn(model: Any, batch: Any) -> Any:
        if called is not None:
            called()
        return _loss(model, batch)

    scale = LossScale(initial=2.0**126, period=4)
    precision = fx.Policy(loss_scale=scale) if program.loss_scale else None
    return fx.train_step(loss_fn, tx, accumulate=program.accumulate, precision=precision, callbacks=callbacks)


def _machine(callbacks: Any, called: Callable[[], None] | None = None) -> Any:
    """Returns a cheap step whose parameters depend on every batch and on the order of the batches."""

    def machine(state: fx.TrainState, batch: Any) -> Any:
        if called is not None:
            called()
        before, number = state, state.step + 1
        pull = batch["x"].mean() + torch.sin(state.step + 3.0 * state.position + state.seed)
        grads = fx.tree.map(lambda leaf: 0.1 * leaf + pull, state.params)
        measured = {"loss": (pull * pull + sum(leaf.square().sum() for leaf in fx.tree.leaves(state.params))).float()}
        fields = {"step": number, "loss": measured["loss"], "metrics": measured, "grads": grads}
        state, first = callbacks(state, fx.Microbatch(index=0, **fields))
        state, second = callbacks(state, fx.Gradients(**fields))
        control = first | second
        skipped = torch.as_tensor(control.any("skip_update"))
        moved = fx.tree.map(lambda leaf, grad: leaf - 0.1 * grad, before.params, grads)
        state = state.replace(params=fx.tree.where(skipped, before.params, moved))
        updates = fx.tree.map(torch.sub, moved, before.params)
        state, third = callbacks(state, fx.Updated(updates=updates, skipped=skipped, **fields))
        return state, fx.StepOutput(measured, control | third)

    return fx.Step(machine, callbacks=callbacks, fires=TRACED)


def _counter(kinds: tuple[type[Any], ...]) -> Any:
    """Returns a callback whose state hashes all events of these types, in order.

    If ``kinds`` includes ``Rewound``, its update there carries the state across the rewind.
    """

    def update(state: fx.TrainState, event: Any, memory: Any) -> Any:
        seen = _CODES[type(event)] + 31 * int(event.step) + 1009 * event.position
        return (memory * 48271 + seen) % _HASH_SIZE, fx.Control()

    return fx.stateful("events", lambda state: torch.tensor(1), fx.on(kinds, update))


def _ask(index: int, ask: Ask) -> Any:
    """Returns a callback that makes a request at a loop event."""
    kind, name = NAMES[ask.event], f"ask {index}"
    reason = f"ask {index}: {ask.kind}"
    flag = ask.steps if ask.kind == "rewind" else True
    asked: dict[str, Any] = {ask.kind: torch.tensor(flag) if ask.tensor else flag, "final_save": ask.final_save}

    if ask.by_step or ask.at == 0:

        def stateless(state: fx.TrainState, event: Any) -> Any:
            asks = ask.at == 0 or event.step == ask.at
            return state, fx.Control(**asked, reason=reason) if asks else fx.Control()

        stateless.__name__ = name
        return fx.on(kind, stateless)

    def counted(state: fx.TrainState, event: Any, memory: Any) -> Any:
        if type(event) is kind:
            memory = memory + 1
            return memory, fx.Control(**asked, reason=reason) if int(memory) == ask.at else fx.Control()
        # Callback state updated at Rewound is kept across the rewind.
        return memory.clone(), fx.Control()

    kinds = (kind, fx.Rewound) if ask.crosses else (kind,)
    return fx.stateful(name, lambda state: torch.tensor(0), fx.on(kinds, counted))


def _traced_ask(index: int, ask: Ask) -> Any:
    """Returns a callback that makes a request inside the step, where the step number is a tensor."""

    def at_step(state: fx.TrainState, event: Any) -> Any:
        flag = event.step == ask.at
        return state, fx.Control(**{ask.kind: flag}, reason=f"traced ask {index}", final_save=ask.final_save)

    at_step.__name__ = f"traced ask {index}"
    return fx.on(NAMES[ask.event], at_step)
