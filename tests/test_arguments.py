"""Wrong arguments of fit, evaluate, init and compile raise errors that name the correction."""

import pytest
import torch
from torch import nn

import fxtrain as fx

BATCH = torch.ones(4, 2)
TX = fx.optim.sgd(0.1)


def loss_fn(m, b):
    return m(b).square().mean()


STATE = fx.init(nn.Linear(2, 1), TX)
STEP = fx.train_step(loss_fn, TX)
EVAL_STEP = fx.eval_step(loss_fn)
RESULT = fx.fit(STATE, STEP, [BATCH], epochs=1)


def of(library, name, **methods):
    return type(name, (), {"__module__": f"{library}.callbacks", **methods})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (nn.Linear(2, 1), STEP, [BATCH]),
            r"TrainState .*, got a Linear\. Make one .*fxtrain.init\(module",
        ),
        ((dict(nn.Linear(2, 1).state_dict()), STEP, [BATCH]), r"got a dict with keys .*load_state_dict\(fxtrain"),
        ((RESULT, STEP, [BATCH]), r"got a Result\. Continue from .* result.continue_from"),
        ((fx.init, STEP, [BATCH]), r"got the function init\. If init \(.*init.py:\d+\) returns a TrainState, call it"),
        (
            (STEP, STATE, [BATCH]),
            r"the first argument of fit\(state, step, data\), got the function train_step\(loss_fn\)\. .* this order",
        ),
        (([BATCH], STEP, STATE), r"got a list of length 1\. .* this order"),
        (
            (STATE, [BATCH], STEP),
            r"second argument of fit\(state, step, data\), got a list of length 1\. .* this order",
        ),
        ((STATE, STATE, [BATCH]), r"got a TrainState\. Give the arguments in this order"),
        ((STATE, TX, [BATCH]), r"got a GradientTransformation.*\. Give the arguments"),
        ((STATE, torch.optim.SGD([BATCH]), [BATCH]), r"got an SGD\. Make a step: fxtrain.train_step"),
        ((STATE, loss_fn, [BATCH]), r"got the loss function loss_fn \(.*test_arguments.py:\d+\)\. Make a step from it"),
        ((STATE, nn.Linear(2, 1), [BATCH]), r"got a Linear\. Make a step from a loss function"),
        ((STATE, lambda state: state, [BATCH]), r"got <lambda>\(state\) \(.*\)\. Define it with these two"),
        ((STATE, EVAL_STEP, [BATCH]), r"a training step, got <eval_step\(loss_fn\)>, which evaluates"),
        ((STATE, fx.compile(EVAL_STEP), [BATCH]), r"a training step, got .*, which evaluates"),
    ],
)
def test_fit_rejects_misplaced_arguments(arguments, message):
    with pytest.raises(TypeError, match=message):
        fx.fit(*arguments, epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_step": STEP}, r"expected eval_step from fxtrain.eval_step, got <step .*>, which trains"),
        ({"eval_step": fx.compile(STEP)}, r"got .*, which trains\. Make one: fxtrain.eval_step\(loss_fn\)"),
        ({"eval_step": loss_fn}, r"got the function loss_fn \(.*\)\. Make one: fxtrain.eval_step\(loss_fn\)"),
        ({"eval_step": nn.Linear(2, 1)}, r"got a Linear"),
        ({"eval_step": EVAL_STEP, "eval_when": "epoch"}, r"eval_when to be a positive int or a trigger, got 'epoch'\."),
        ({"checkpointer": "runs/1"}, r"a checkpointer, got the path 'runs/1'\. .*fxtrain.checkpointer\('runs/1'\)"),
        ({"checkpointer": fx.checkpointer}, r"a checkpointer, got checkpointer itself\. Call it"),
        ({"resume": "runs/1"}, "expected resume to be one of True, False, got 'runs/1'"),
    ],
)
def test_fit_rejects_options_of_wrong_type(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        fx.fit(STATE, STEP, [BATCH], epochs=1, eval_data=[BATCH] if "eval_step" in options else None, **options)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            fx.callbacks.early_stopping,
            r"expected the result of fxtrain.callbacks.early_stopping\(...\), .*\. Call it\.",
        ),
        (fx.callbacks.nan_guard, r"expected the result of fxtrain.callbacks.nan_guard\(...\)"),
        (fx.observers.progress, r"expected the result of fxtrain.observers.progress\(...\), .* Call it"),
        (
            of("lightning.pytorch", "EarlyStopping")(),
            r"got EarlyStopping of lightning\. Use .*early_stopping\(\"loss\"",
        ),
        (of("lightning.pytorch", "ModelCheckpoint"), r"got ModelCheckpoint of lightning\. Use .*checkpointer=fxtrain"),
        (of("transformers", "TrainerCallback")(), r"got TrainerCallback of transformers\. Give fxtrain.interop.hf"),
        (
            of("keras.src", "ReduceLROnPlateau")(),
            r"got ReduceLROnPlateau of keras\. Use .*reduce_on_plateau\(\"loss\"\)",
        ),
        (of("ignite", "Timer", __call__=lambda self, engine: None)(), r"got Timer of ignite\. Use .*time_limit"),
        (type("Mine", (of("lightning", "Callback"),), {})(), r"got Mine of lightning"),
        (
            object(),
            r"expected functions \(state, event\) -> \(state, control\), got an object",
        ),
    ],
)
def test_fit_rejects_foreign_callbacks_and_uncalled_factories(callback, message):
    with pytest.raises(TypeError, match=message):
        fx.fit(STATE, STEP, [BATCH], epochs=1, callbacks=[callback])


def test_fit_rejects_uncalled_observer_factories():
    for observer in (fx.observers.progress, fx.observers.memory):
        with pytest.raises(
            TypeError, match=rf"observers: expected the result of fxtrain.observers.{observer.__name__}"
        ):
            fx.fit(STATE, STEP, [BATCH], epochs=1, observers=[observer])


def test_single_observer_needs_no_list():
    seen = []
    fx.fit(STATE, STEP, [BATCH], epochs=1, observers=lambda state, event, control: seen.append(event))
    assert seen


def test_evaluate_step_and_compile_reject_wrong_arguments():
    with pytest.raises(
        TypeError, match=r"first argument of evaluate\(state, eval_step, data\), got the function eval_step"
    ):
        fx.evaluate(EVAL_STEP, STATE, [BATCH])
    with pytest.raises(TypeError, match="which trains"):
        fx.evaluate(STATE, STEP, [BATCH])
    with pytest.raises(TypeError, match=r"first argument of train_step\(loss_fn\), got a Linear"):
        STEP(nn.Linear(2, 1), BATCH)
    with pytest.raises(TypeError, match="got the loss function loss_fn"):
        fx.compile(loss_fn)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.DataParallel(nn.Linear(2, 1)), r"got model, made by DataParallel\. Give the module itself, the .module"),
        (nn.Sequential(nn.DataParallel(nn.Linear(2, 1))), "got model.0, made by DataParallel"),
        (type("FSDPLinear", (type("FSDPModule", (), {}), nn.Linear), {})(2, 1), r"FSDPModule\. .* without fully_shard"),
        (STATE, "got a TrainState, which is already initialized"),
        (nn.Linear, r"got the class Linear at model\. Make an instance: Linear\(...\)"),
        (nn.Linear(2, 1).parameters(), r"got a generator at model\. Give the module itself"),
        (loss_fn, r"got the function loss_fn at model\. Give the module that the loss function calls"),
    ],
)
def test_init_requires_plain_module(model, message):
    with pytest.raises(TypeError, match=message):
        fx.init(model, TX)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_init_rejects_jit_submodule():
    with pytest.raises(TypeError, match=r"got a compiled one .* at model.0"):
        fx.init(nn.Sequential(torch.jit.script(nn.Linear(2, 1))), TX)


def test_fit_rejects_state_on_meta_device():
    state = fx.init(nn.Linear(2, 1, device="meta"), TX)
    with pytest.raises(ValueError, match=r"expected a state with values, got state.step on the meta device"):
        fx.fit(state, STEP, [BATCH], epochs=1)
    state = fx.init(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, device="meta")), TX)
    with pytest.raises(ValueError, match=r"got state.params\['1.bias'\] on the meta device"):
        fx.fit(state, STEP, [BATCH], epochs=1)


def test_fit_rejects_surrounding_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match=r'outside of torch.autocast, got a call inside. Give precision="bf16"'):
            fx.fit(STATE, STEP, [BATCH], epochs=1)
        with pytest.raises(ValueError, match=r"outside of torch.autocast"):
            fx.evaluate(STATE, EVAL_STEP, [BATCH])


@pytest.mark.parametrize(
    "surrounding",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autograd.detect_anomaly(check_nan=False),
        lambda: torch.device("meta"),
    ],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_surrounding_context_does_not_change_fit(surrounding):
    with surrounding():
        found = fx.fit(STATE, STEP, [BATCH, BATCH], epochs=2).state
    torch.testing.assert_close(
        found.params, fx.fit(STATE, STEP, [BATCH, BATCH], epochs=2).state.params, rtol=0.0, atol=0.0
    )
