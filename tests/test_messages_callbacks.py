"""Mistakes in callbacks and observers say where each belongs, and what an event has."""

import pytest
import torch
from messages import DATA, fit, said
from tensorboardX import SummaryWriter

import fxtrain as fx
from fxtrain import callbacks, observers, writers


def stop_when(flag, kind=fx.StepEnd):
    def stop(state, event):
        return state, fx.Control(stop=flag(state, event))

    return fx.on(kind, stop)


def exhaust(state, event):
    next(iter(()))
    return state, fx.Control()


def observe(state, event, control): ...


async def awaited(state, event: fx.StepEnd):
    return state, fx.Control()


def yielded(state, event: fx.StepEnd):
    yield state, fx.Control()


def swapped(event: fx.StepEnd, state):
    return state, fx.Control()


def returning(result):
    def given(state, event):
        return result(state)

    return fx.on(fx.StepEnd, given)


MISTAKES = {
    "a callback among observers": (
        lambda: fit(observers=[callbacks.nan_guard()]),
        (
            "TypeError: observers: expected functions (state, event, control), got nan_guard, which does not "
            "take three arguments. Pass it in callbacks=."
        ),
    ),
    "a function for callbacks among observers": (
        lambda: fit(observers=[returning(lambda state: (state, fx.Control()))]),
        (
            "TypeError: observers: expected functions (state, event, control), got given, which does not take "
            "three arguments. Pass it in callbacks=."
        ),
    ),
    "an observer among callbacks": (
        lambda: fit(observers.progress()),
        (
            "TypeError: callbacks: expected functions (state, event), got Progress, which requires a third "
            "argument as observers do. Pass it in observers=."
        ),
    ),
    "a function for observers among callbacks": (
        lambda: fit(observe),
        (
            "TypeError: callbacks: expected functions (state, event), got observe, which requires a third "
            "argument as observers do. Pass it in observers=."
        ),
    ),
    "a writer among observers": (
        lambda: fit(observers=[writers.csv("a.csv")]),
        (
            "TypeError: observers: expected functions (state, event, control), got a CsvWriter. Pass it to an "
            "observer: observers=[fxtrain.observers.write(writer)]."
        ),
    ),
    "a function of writers among observers": (
        lambda: fit(observers=[writers.csv]),
        (
            "TypeError: observers: expected functions (state, event, control), got the function csv. Call it, "
            "and pass the writer to an observer: fxtrain.observers.write(fxtrain.writers.csv(...))."
        ),
    ),
    "a writer among callbacks": (
        lambda: fit(writers.csv("a.csv")),
        (
            "TypeError: callbacks: expected functions (state, event) -> (state, control), got a CsvWriter. "
            "Pass it to an observer: observers=[fxtrain.observers.write(writer)]."
        ),
    ),
    "a SummaryWriter among observers": (
        lambda: fit(observers=[SummaryWriter("tensorboard")]),
        (
            "TypeError: observers: expected functions (state, event, control), got a SummaryWriter. Use "
            "fxtrain's writer: observers=[fxtrain.observers.write(fxtrain.writers.tensorboard(folder))]."
        ),
    ),
    "a scheduler of torch among observers": (
        lambda: fit(observers=[torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.ones(1)], lr=0.1), 3)]),
        (
            "TypeError: expected each observer to be a function (state, event, control), got "
            "torch.optim.lr_scheduler.StepLR. Use fx.optim.sgd(fx.schedules.exponential(0.1, 3, "
            "decay_rate=0.1, staircase=True)).\n"
            "Its steps are optimizer updates. If scheduler.step() was called once per epoch, use lambda step: "
            "schedule(step // updates_per_epoch)."
        ),
    ),
    "a checkpointer among callbacks": (
        lambda: fit(fx.checkpointer("run")),
        (
            "TypeError: callbacks: expected functions (state, event) -> (state, control), got a Checkpointer. "
            "Pass it as checkpointer=, and save with callbacks=fxtrain.when(fxtrain.every(100), "
            "fxtrain.callbacks.save())."
        ),
    ),
    "a checkpointer among observers": (
        lambda: fit(observers=[fx.checkpointer("run")]),
        (
            "TypeError: observers: expected functions (state, event, control), got a Checkpointer. Pass it as "
            "checkpointer=, and save with callbacks=fxtrain.when(fxtrain.every(100), fxtrain.callbacks.save())."
        ),
    ),
    "a trigger among callbacks": (
        lambda: fit(fx.every(5)),
        (
            "TypeError: callbacks: expected functions (state, event) -> (state, control), got a Trigger. Gate "
            "a callback by it: fxtrain.when(every(5), callback)."
        ),
    ),
    "a list among callbacks": (
        lambda: fit([callbacks.nan_guard()]),
        (
            "TypeError: callbacks: expected functions (state, event) -> (state, control), got a list of length "
            "1. Unpack it, as in callbacks=[*several, another]."
        ),
    ),
    "a list in compose": (
        lambda: fx.compose([callbacks.nan_guard()]),
        (
            "TypeError: callbacks: expected functions (state, event) -> (state, control), got a list of length "
            "1. Unpack it, as in callbacks=[*several, another]."
        ),
    ),
    "a dict of callbacks": (
        lambda: fit(callbacks={"guard": callbacks.nan_guard()}),
        (
            "TypeError: callbacks: expected functions (state, event) -> (state, control), got a dict with keys "
            "'guard'. Pass the values in a list: callbacks=[...]."
        ),
    ),
    "a dict of observers": (
        lambda: fit(observers={"progress": observers.progress()}),
        (
            "TypeError: observers: expected functions (state, event, control), got a dict with keys "
            "'progress'. Pass the values in a list: observers=[...]."
        ),
    ),
    "None among callbacks": (
        lambda: fit(None),
        (
            "TypeError: callbacks: expected functions (state, event) -> (state, control), got None. Write such "
            "a function, or use one of fxtrain.callbacks."
        ),
    ),
    "a factory in when": (
        lambda: fx.when(fx.every(2), callbacks.save),
        "TypeError: callbacks: expected the result of fxtrain.callbacks.save(...), got the function itself. Call it.",
    ),
    "an async callback": (
        lambda: fit(awaited),
        "TypeError: awaited: expected a plain function, got an async function. Define it without async.",
    ),
    "a generator as a callback": (
        lambda: fit(yielded),
        (
            "TypeError: yielded: expected a plain function, got a generator function. Return the result "
            "instead of yielding it."
        ),
    ),
    "an event as the first parameter": (
        lambda: fit(swapped),
        (
            "TypeError: swapped: expected the parameters (state, event), got an event as the first one, "
            "(event, state). Swap the parameters."
        ),
    ),
    "no result": (
        lambda: fit(returning(lambda state: None)),
        (
            "TypeError: given: expected it to return (state, control) at StepEnd, got None. To request "
            "nothing, return state and Control()."
        ),
    ),
    "a control alone": (
        lambda: fit(returning(lambda state: fx.Control())),
        (
            "TypeError: given: expected it to return (state, control) at StepEnd, got a Control. To request "
            "nothing, return state and Control()."
        ),
    ),
    "a state alone": (
        lambda: fit(returning(lambda state: state)),
        (
            "TypeError: given: expected it to return (state, control) at StepEnd, got a TrainState. To request "
            "nothing, return state and Control()."
        ),
    ),
    "a flag for a control": (
        lambda: fit(returning(lambda state: (state, True))),
        (
            "TypeError: given: expected it to return (state, control) at StepEnd, got a tuple of (a "
            "TrainState, True). To request nothing, return state and Control()."
        ),
    ),
    "a control before the state": (
        lambda: fit(returning(lambda state: (fx.Control(), state))),
        (
            "TypeError: given: expected it to return (state, control) at StepEnd, got a tuple of (a Control, a "
            "TrainState). To request nothing, return state and Control()."
        ),
    ),
    "a slot of another callback": (
        lambda: fit(stop_when(lambda state, event: state.slots["ema"] > 1)),
        (
            "KeyError: 'ema'\n"
            "expected a key of event.metrics ('loss', 'learning_rate') or of state.slots (none) at StepEnd, "
            "got 'ema'."
        ),
    ),
    "a metric with a typo": (
        lambda: fit(stop_when(lambda state, event: event.metrics["los"] < 1)),
        (
            "KeyError: 'los'\n"
            "expected a key of event.metrics ('loss', 'learning_rate') or of state.slots (none) at StepEnd, "
            "got 'los'. Did you mean 'loss'?"
        ),
    ),
    "an evaluation metric at EpochEnd": (
        lambda: fit(stop_when(lambda state, event: event.metrics["val_loss"] < 1, fx.EpochEnd)),
        (
            "KeyError: 'val_loss'\n"
            "expected a key of event.metrics ('learning_rate', 'loss') or of state.slots (none) at EpochEnd, "
            "got 'val_loss'. Did you mean 'loss'?"
        ),
    ),
    "a metric of the evaluation among those of the epoch": (
        lambda: fit(
            stop_when(lambda state, event: event.metrics["error"] < 1, fx.EpochEnd),
            eval_step=fx.eval_step(lambda model, batch: {"error": model(batch["x"]).mean()}),
            eval_data=DATA,
        ),
        (
            "KeyError: 'error'\n"
            "expected a key of event.metrics ('learning_rate', 'loss') or of state.slots (none) at EpochEnd, got "
            "'error'. Read event.evaluation['error']."
        ),
    ),
    "metrics at EpochBegin": (
        lambda: fit(stop_when(lambda state, event: event.metrics["loss"] < 1, fx.EpochBegin)),
        (
            "AttributeError: expected a field of EpochBegin (step, position, epochs_done, epoch_start, "
            "epoch_length, total_steps, total_epochs, time, previous_time, data_wait), got 'metrics'. "
            "Subscribe to an event that has metrics: StepEnd, EvalStep, EvalEnd or EpochEnd."
        ),
    ),
    "a metric as a field of an event": (
        lambda: fit(stop_when(lambda state, event: event.loss < 1)),
        (
            "AttributeError: expected a field of StepEnd (step, position, epochs_done, epoch_start, "
            "epoch_length, total_steps, total_epochs, time, previous_time, data_wait, metrics, duration, "
            "outputs), got 'loss'. Read event.metrics['loss']."
        ),
    ),
    "a field of an event with a typo": (
        lambda: fit(stop_when(lambda state, event: event.total_step > 1)),
        (
            "AttributeError: expected a field of StepEnd (step, position, epochs_done, epoch_start, "
            "epoch_length, total_steps, total_epochs, time, previous_time, data_wait, metrics, duration, "
            "outputs), got 'total_step'. Did you mean 'total_steps'?"
        ),
    ),
    "an iterator that ended": (
        lambda: fit(fx.on(fx.StepEnd, exhaust)),
        (
            "RuntimeError: expected callbacks, steps and data that handle the ends of their own iterators, got "
            "StopIteration. Give next() a default, or iterate with a for loop."
        ),
    ),
    "an iterator that ended at the end": (
        lambda: fit(fx.on(fx.FitEnd, exhaust)),
        (
            "RuntimeError: expected callbacks, steps and data that handle the ends of their own iterators, got "
            "StopIteration. Give next() a default, or iterate with a for loop."
        ),
    ),
    "an unknown field of an event": (
        lambda: fit(stop_when(lambda state, event: event.trainer)),
        (
            "AttributeError: expected a field of StepEnd (step, position, epochs_done, epoch_start, "
            "epoch_length, total_steps, total_epochs, time, previous_time, data_wait, metrics, duration, "
            "outputs), got 'trainer'. help(fxtrain.StepEnd) describes the fields."
        ),
    ),
}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_in_callbacks_is_explained(mistake, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said(mistake) == message
