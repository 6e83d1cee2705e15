"""Mistakes in requests, slots, triggers and the factories of callbacks name the argument and the value."""

import pytest
import torch
from messages import STEP, fit, said, start

import fxtrain as fx
from fxtrain import callbacks, observers, writers


def counting(init=lambda state: torch.tensor(0), update=lambda state, event, content: (content, fx.Control())):
    return fx.stateful("n", init, update)


def assign(control):
    control.stop = True


MISTAKES = {
    "a number in a slot": (
        lambda: fit(counting(lambda state: 0)),
        "TypeError: expected state.slots['n'] to be a tensor, got 0. Use torch.tensor(0).",
    ),
    "a string in a slot": (
        lambda: fit(counting(lambda state: "0")),
        (
            "TypeError: expected state.slots['n'] to be a tensor, got '0'. Convert it to a tensor, or keep it "
            "outside of the state."
        ),
    ),
    "a slot that becomes a number": (
        lambda: fit(counting(update=lambda state, event, content: (1, fx.Control()))),
        "TypeError: expected state.slots['n'] to be a tensor, got 1. Use torch.tensor(1).",
    ),
    "a slot that changes its shape": (
        lambda: fit(counting(update=lambda state, event, content: (torch.stack([content] * 2), fx.Control()))),
        (
            "ValueError: n changed state.slots['n'] at EpochBegin: expected an int64 tensor of shape [] on "
            "cpu, got an int64 tensor of shape [2] on cpu. A run can only be resumed into the structure that "
            "it started with: keep it, or start the run with the new one."
        ),
    ),
    "a tensor for the initial content": (
        lambda: counting(torch.tensor(0)),
        (
            "TypeError: expected init of slot 'n' to be a function (state) -> content, got an int64 tensor of "
            "shape []. Pass a function."
        ),
    ),
    "an initial content without the state": (
        lambda: counting(lambda: torch.tensor(0)),
        (
            "TypeError: expected init of slot 'n' to be a function (state) -> content, got <lambda>, which "
            "does not take one argument. Take the state: lambda state: torch.tensor(0)."
        ),
    ),
    "a number for the update": (
        lambda: counting(update=3),
        (
            "TypeError: expected the update of slot 'n' to be a function (state, event, content) -> (content, "
            "control), got 3. Pass a function."
        ),
    ),
    "a name after the content": (
        lambda: fx.stateful(lambda state: torch.tensor(0), "n", lambda state, event, content: (content, fx.Control())),
        "ValueError: expected a non-empty string as the slot's name, got the function <lambda>. Give the name first.",
    ),
    "an update that returns the content alone": (
        lambda: fit(counting(update=lambda state, event, content: content + 1)),
        (
            "TypeError: n: expected its update to return (content of the slot, control) at EpochBegin, got an "
            "int64 tensor of shape []. To request nothing, return the content and Control()."
        ),
    ),
    "a request with a typo": (
        lambda: fx.Control(stopp=True),
        (
            "TypeError: expected requests of Control (stop, end_epoch, evaluate, save, skip_batch, "
            "skip_update, rewind), or log, reason and final_save, got 'stopp'. Did you mean 'stop'?"
        ),
    ),
    "a request without a name": (
        lambda: fx.Control(True),
        (
            "TypeError: expected requests of Control (stop, end_epoch, evaluate, save, skip_batch, "
            "skip_update, rewind), or log, reason and final_save, got True without a name. Name the request, "
            "as in Control(stop=True)."
        ),
    ),
    "several flags": (
        lambda: fx.Control(stop=torch.tensor([True, False])),
        (
            "TypeError: expected stop to be a bool, a bool tensor of shape [], or a mapping from reasons to "
            "these, got a bool tensor of shape [2]. Compare first (loss < 0.1), and reduce with .any() or "
            ".all()."
        ),
    ),
    "a number as a log": (
        lambda: fx.Control(log=3),
        (
            "TypeError: expected log to be a mapping from names to values, got 3. Pass a dict, as in "
            'Control(log={"accuracy": accuracy}).'
        ),
    ),
    "a number as a logged name": (
        lambda: fx.Control(log={1: 2.0}),
        "TypeError: expected the names in log to be strings, got 1. Convert it with str.",
    ),
    "an assignment to a control": (
        lambda: assign(fx.Control()),
        (
            "FrozenInstanceError: expected Control to stay unchanged, got an assignment to stop. Unite it with "
            "another: control | fxtrain.Control(stop=...)."
        ),
    ),
    "a callback for the trigger of when": (
        lambda: fx.when(callbacks.save(), fx.every(2)),
        (
            "TypeError: expected trigger to be a function of the event, got Handler, which does not take one "
            "argument. Define it as lambda event: ..., and give it before the callback."
        ),
    ),
    "a trigger of two arguments": (
        lambda: fx.when(lambda state, event: True, callbacks.save()),
        (
            "TypeError: expected trigger to be a function of the event, got <lambda>, which does not take one "
            "argument. Define it as lambda event: ..., and give it before the callback."
        ),
    ),
    "a number combined with a trigger": (
        lambda: fx.every(2) & 3,
        "TypeError: expected a trigger after &, got 3. Make one: fxtrain.every(100).",
    ),
    "triggers combined by and": (
        lambda: fx.every(2) and fx.every(3),
        "TypeError: expected every(2) to be called with an event, got bool(). Combine triggers with &, | and ~.",
    ),
    "a list of steps": (
        lambda: fx.at([1, 2]),
        "TypeError: expected a step of at to be an int of at least 0, got a list of length 2.",
    ),
    "a callback before its events": (
        lambda: fx.on(callbacks.save(), fx.StepEnd),
        (
            "TypeError: expected an event type or a union of event types, got <callback save on StepEnd>. The "
            "event types are Microbatch, Gradients, Updated, EpochBegin, StepBegin, StepEnd, EvalBegin, "
            "EvalStepBegin, EvalStep, EvalEnd, EpochEnd, Rewound, Published, FitBegin, Restored, SaveBegin, "
            "Saved, Interrupted, FitEnd."
        ),
    ),
    "a number for a metric": (
        lambda: callbacks.early_stopping(5, patience=5),
        (
            "TypeError: expected metric to be a name or a function of all metrics, got 5. Name it first, as in "
            'early_stopping("loss", patience=5).'
        ),
    ),
    "a value before the metric": (
        lambda: callbacks.stop_at(0.1, "loss"),
        (
            "TypeError: expected metric to be a name or a function of all metrics, got 0.1. Name it first, as "
            'in early_stopping("loss", patience=5).'
        ),
    ),
    "a decay above 1": (
        lambda: callbacks.ema(2.0),
        "ValueError: expected decay to be between 0 and 1, got 2.0.",
    ),
    "two averages of one name": (
        lambda: fit(callbacks.ema(0.9), callbacks.ema(0.99)),
        "ValueError: expected one callback for the slot 'ema', got ema and ema. Give one of them another name.",
    ),
    "a mean of an unknown metric": (
        lambda: fit(callbacks.epoch_mean("accuracy")),
        (
            "KeyError: \"expected the step metric 'accuracy' for epoch_mean, got 'loss', 'learning_rate'. "
            'Return it from the loss function, or name one of these."'
        ),
    ),
    "an average that is not kept": (
        lambda: callbacks.averaged(start()),
        (
            "KeyError: \"expected a state with the average 'ema', got one with none. Give fit the callback that "
            'keeps it, such as fxtrain.callbacks.ema(0.99)."'
        ),
    ),
    "a number for a function of samples": (
        lambda: callbacks.samples(3),
        "TypeError: expected make to be a function (view, key) -> value, got 3. Pass a function.",
    ),
    "a string for a function of predictions": (
        lambda: callbacks.predictions("x"),
        "TypeError: expected show to be a function (batch) -> values, got 'x'. Pass a function.",
    ),
    "gradients for grads": (
        lambda: callbacks.histograms("gradients"),
        "ValueError: expected of to be one of 'grads', 'weights', 'updates', got 'gradients'. Did you mean 'grads'?",
    ),
    "a norm in capitals": (
        lambda: callbacks.grad_norms(norm="L2"),
        "ValueError: expected norm to be one of 'l2', 'l1', 'linf', 'mean', got 'L2'. Did you mean 'l2'?",
    ),
    "a layer that does not exist": (
        lambda: fit(callbacks.grad_norms(layer="encoder.*")),
        (
            "ValueError: expected 'encoder.*' to match a layer, got no match among weight, bias. Use a shell "
            "pattern such as 'blocks.*.attn'."
        ),
    ),
    "a step before a state in attach": (
        lambda: fx.attach(STEP, start()),
        (
            "TypeError: expected a TrainState in attach(state, callbacks), got the function "
            "train_step(loss_fn). Make one with fxtrain.init(module, tx), and give the arguments in this order."
        ),
    ),
    "a required callback": (
        lambda: observers.required(callbacks.nan_guard()),
        (
            "TypeError: expected an observer for required(), got nan_guard, which does not take (state, event, "
            "control). Pass callbacks to fit in callbacks=."
        ),
    ),
    "a writer on one rank": (
        lambda: observers.rank_zero(writers.console()),
        (
            "TypeError: observers: expected functions (state, event, control), got a ConsoleWriter. Pass it to "
            "an observer: observers=[fxtrain.observers.write(writer)]."
        ),
    ),
}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_in_requests_is_explained(mistake, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said(mistake) == message
