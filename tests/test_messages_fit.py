"""Mistakes in the call of fit, in states, and in what a step returns are named before anything is lost."""

import re

import numpy as np
import pytest
import torch
from messages import BATCH, DATA, EVAL_STEP, STEP, fit, fit_loss, loss_fn, net, said, start
from torch.utils.data import DataLoader, TensorDataset

import fxtrain as fx


def assign(owner, name, value):
    setattr(owner, name, value)


def stacked():
    return fx.tree.map(lambda *leaves: torch.stack(leaves), start(seed=0), start(seed=1))


def stop_on(event_type, flag):
    return fx.on(event_type, lambda state, event: (state, fx.Control(stop=flag(state, event))))


def trained(tx):
    return fx.fit(start(), fx.train_step(loss_fn, tx), DATA, epochs=1)


MISTAKES = {
    "another optimizer in init, without state": (
        lambda: trained(fx.optim.adam(0.1)),
        (
            "ValueError: expected the optimizer state of adam(0.1), got one without "
            "state.opt_state[0].count.values and 4 more. Give the same tx to fxtrain.init and to "
            "fxtrain.train_step."
        ),
    ),
    "another optimizer in init, with more state": (
        lambda: fx.fit(start(fx.optim.adam(0.1)), STEP, DATA, epochs=1),
        (
            "ValueError: expected the optimizer state of sgd(0.1), got one with "
            "state.opt_state[0].count.values and 4 more. Give the same tx to fxtrain.init and to "
            "fxtrain.train_step."
        ),
    ),
    "another optimizer in init, with clipping": (
        lambda: fx.fit(
            start(fx.optim.adam(0.1)),
            fx.train_step(loss_fn, fx.optim.chain(fx.optim.clip_by_global_norm(1.0), fx.optim.adam(0.1))),
            DATA,
            epochs=1,
        ),
        (
            "ValueError: expected the optimizer state of chain(clip_by_global_norm(1.0), adam(0.1)), got one "
            "without state.opt_state[1][0].count.values and 4 more. Give the same tx to fxtrain.init and to "
            "fxtrain.train_step."
        ),
    ),
    "no optimizer in init": (
        lambda: fx.fit(fx.init(net()), fx.train_step(loss_fn, fx.optim.adam(0.1)), DATA, epochs=1),
        (
            "ValueError: expected the optimizer state of adam(0.1), got one without "
            "state.opt_state[0].count.values and 4 more. Give the same tx to fxtrain.init and to "
            "fxtrain.train_step."
        ),
    ),
    "another optimizer in init, in a call of the step": (
        lambda: fx.train_step(loss_fn, fx.optim.adam(0.1))(start(), BATCH),
        (
            "ValueError: expected the optimizer state of adam(0.1), got one without "
            "state.opt_state[0].count.values and 4 more. Give the same tx to fxtrain.init and to "
            "fxtrain.train_step."
        ),
    ),
    "states stacked along two axes": (
        lambda: fx.fit(fx.tree.map(lambda leaf: leaf[None], stacked()), STEP, DATA, epochs=1),
        (
            "ValueError: expected the states of runs stacked along one axis, got state.step of shape [1, 2]. "
            "Stack the states of single runs: fxtrain.ensemble.stack(states)."
        ),
    ),
    "a batch on another device": (
        lambda: STEP(start(), {"x": torch.ones(4, 2, device="meta"), "y": torch.zeros(4, 1)}),
        (
            "RuntimeError: Tensor on device cpu is not on the expected device meta!\n"
            "The batch has batch['x']: float32 [4, 2] on meta, batch['y']: float32 [4, 1]. The state is on "
            "cpu. Move the batch there, as fit does."
        ),
    ),
    "a loader of tuples for a loss that reads keys": (
        lambda: fit(data=DataLoader(TensorDataset(torch.ones(8, 2), torch.zeros(8, 1)), batch_size=4)),
        (
            "TypeError: list indices must be integers or slices, not str\n"
            "The batch has batch[0]: float32 [4, 2], batch[1]: float32 [4, 1]. It is a list, so unpack it: x, "
            "y = batch."
        ),
    ),
    "a missing key of the batch": (
        lambda: fit_loss(lambda model, batch: model(batch["X"]).mean()),
        "KeyError: 'X'\nThe batch has batch['x']: float32 [4, 2], batch['y']: float32 [4, 1]. Did you mean 'x'?",
    ),
    "another key of the batch": (
        lambda: fit_loss(lambda model, batch: model(batch["inputs"]).mean()),
        "KeyError: 'inputs'\nThe batch has batch['x']: float32 [4, 2], batch['y']: float32 [4, 1].",
    ),
    "another size of the batch": (
        lambda: fit(data=[{"x": torch.ones(4, 3), "y": torch.zeros(4, 1)}]),
        (
            "RuntimeError: mat1 and mat2 shapes cannot be multiplied (4x3 and 2x1)\n"
            "The batch has batch['x']: float32 [4, 3], batch['y']: float32 [4, 1]."
        ),
    ),
    "integers for a model of floats": (
        lambda: fit(data=[{"x": torch.ones(4, 2).long(), "y": torch.zeros(4, 1)}]),
        (
            "RuntimeError: expected the model (Linear) to compute with tensors of matching dtypes, got int64 "
            "and float32 at FILE: mat1 and mat2 must have the same dtype, but got Long and Float. Cast the "
            "batch, the tensors on that line, or the parameters with fxtrain.init(..., dtype=...).\n"
            "The batch has batch['x']: int64 [4, 2], batch['y']: float32 [4, 1]."
        ),
    ),
    "an attribute that the model does not have": (
        lambda: fit_loss(lambda model, batch: model.encode(batch["x"]).mean()),
        (
            "AttributeError: 'Linear' object has no attribute 'encode'\n"
            "The batch has batch['x']: float32 [4, 2], batch['y']: float32 [4, 1]."
        ),
    ),
    "a missing key in an evaluation": (
        lambda: fx.evaluate(start(), fx.eval_step(lambda model, batch: model(batch["inputs"]).mean()), DATA),
        "KeyError: 'inputs'\nThe batch has batch['x']: float32 [4, 2], batch['y']: float32 [4, 1].",
    ),
    "an assignment to a state": (
        lambda: assign(start(), "step", 3),
        (
            "FrozenInstanceError: expected TrainState to stay unchanged, got an assignment to step. Make a new "
            "state: state = state.replace(step=...)."
        ),
    ),
    "a deletion from a state": (
        lambda: delattr(start(), "slots"),
        (
            "FrozenInstanceError: expected TrainState to stay unchanged, got a deletion of slots. Make a new "
            "state: state = state.replace(slots=...)."
        ),
    ),
    "an unknown field in replace": (
        lambda: start().replace(stepp=torch.tensor(3)),
        (
            "TypeError: expected a field of TrainState (step, params, buffers, opt_state, seed, position, "
            "slots, due, model), got 'stepp'. Did you mean 'step'?"
        ),
    ),
    "a loss read from a state": (
        lambda: start().loss,
        (
            "AttributeError: expected a field of TrainState (step, params, buffers, opt_state, seed, position, "
            "slots, due), got 'loss'. Metrics are in the output of a step, in the events and in result.history."
        ),
    ),
    "parameters of a state as of a module": (
        lambda: start().parameters(),
        (
            "AttributeError: expected a field of TrainState (step, params, buffers, opt_state, seed, position, "
            "slots, due), got 'parameters'. The parameters are state.params."
        ),
    ),
    "the nearest field of a state": (
        lambda: start().opt_stat,
        (
            "AttributeError: expected a field of TrainState (step, params, buffers, opt_state, seed, position, "
            "slots, due), got 'opt_stat'. Did you mean 'opt_state'?"
        ),
    ),
    "a method of a module called on a state": (
        lambda: start().forward,
        (
            "AttributeError: expected a field of TrainState (step, params, buffers, opt_state, seed, position, "
            "slots, due), got 'forward'. The model with its weights is fxtrain.view(state)."
        ),
    ),
    "a call of the model of a state": (
        lambda: start().model(torch.ones(1, 2)),
        (
            "TypeError: expected a model with parameters, got a call of state.model, which has none. Use the model "
            "with the parameters of a state: fxtrain.view(state), or fxtrain.to_module(state, module)."
        ),
    ),
    "a method of a module called on the model of a state": (
        lambda: start().model.eval(),
        (
            "AttributeError: expected a field of Model (trainable), got 'eval'. Use the model with the parameters of a "
            "state: fxtrain.view(state), or fxtrain.to_module(state, module)."
        ),
    ),
    "a loss read from a result": (
        lambda: fit().loss,
        (
            "AttributeError: expected a field of Result (state, continue_from, reason, history, exit_code), "
            "got 'loss'. Curves are in result.history, and the parameters in result.state.params."
        ),
    ),
    "parameters read from a result": (
        lambda: fit().params,
        (
            "AttributeError: expected a field of Result (state, continue_from, reason, history, exit_code), "
            "got 'params'. Curves are in result.history, and the parameters in result.state.params."
        ),
    ),
    "a callback as the checkpointer": (
        lambda: fit(checkpointer=fx.callbacks.save()),
        "TypeError: expected a checkpointer, got a Handler. Make one: fxtrain.checkpointer(folder).",
    ),
    "another object as the checkpointer": (
        lambda: fit(checkpointer=object()),
        "TypeError: expected a checkpointer, got an object. Make one: fxtrain.checkpointer(folder).",
    ),
    "best without an evaluation": (
        lambda: fit(checkpointer=fx.checkpointer("run", best="loss")),
        (
            "ValueError: expected the metric 'loss' at EvalEnd for checkpointer(best=...), got no evaluation. "
            "Give fit an eval_step and eval_data."
        ),
    ),
    "an evaluation step without data": (
        lambda: fit(eval_step=EVAL_STEP),
        "ValueError: expected eval_step and eval_data together, got no eval_data. Give both or neither.",
    ),
    "evaluation data without a step": (
        lambda: fit(eval_data=DATA),
        "ValueError: expected eval_step and eval_data together, got no eval_step. Give both or neither.",
    ),
    "epochs below 0": (
        lambda: fit(epochs=-1),
        "ValueError: expected epochs to be an int of at least 0, got -1.",
    ),
    "a fraction of an epoch": (
        lambda: fit(epochs=1.5),
        "TypeError: expected epochs to be an int of at least 0, got 1.5.",
    ),
    "epochs as a bool": (
        lambda: fit(epochs=True),
        "TypeError: expected epochs to be an int of at least 0, got True.",
    ),
    "steps as a string": (
        lambda: fx.fit(start(), STEP, DATA, steps="10"),
        "TypeError: expected steps to be an int of at least 0, got '10'.",
    ),
    "val_data": (
        lambda: fx.fit(start(), STEP, DATA, epochs=1, val_data=DATA),
        (
            "TypeError: fit: expected the arguments callbacks, eval_step, eval_data, eval_when, "
            "eval_view, epochs, steps, observers, progress, checkpointer, resume, snapshot_every, snapshots, "
            "snapshots_on_host, rewind_limit, lag, clock, run, mesh, got 'val_data'. Did you mean 'eval_data'?"
        ),
    ),
    "a name for the run": (
        lambda: fit(run="my run"),
        (
            "TypeError: expected run to be an fxtrain.RunInfo, got 'my run'. Make one: "
            "fxtrain.RunInfo(name=..., config=...)."
        ),
    ),
    "a module in evaluate": (
        lambda: fx.evaluate(net(), EVAL_STEP, DATA),
        (
            "TypeError: expected a TrainState as the first argument of evaluate(state, eval_step, data), got a "
            "Linear. Make one of the module: fxtrain.init(module, tx)."
        ),
    ),
    "a curve that does not exist": (
        lambda: fit().history["los"],
        "KeyError: \"expected a published name, got 'los'. Published: 'train/learning_rate', 'train/loss'.\"",
    ),
}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_in_fit_is_explained(mistake, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said(mistake) == message


def test_comparison_of_numpy_numbers_stops_a_run():
    stop = stop_on(fx.StepEnd, lambda state, event: np.float64(event.metrics["loss"]) < np.inf)
    assert int(fit(stop).state.step) == 1


def test_reason_names_a_parameter_that_is_not_finite():
    def loss(model, batch):
        return model(batch["x"]).mean() * batch["scale"]

    scales = [1.0, 1.0, float("nan")]
    result = fit_loss(loss, data=[{**BATCH, "scale": torch.tensor(scale)} for scale in scales], epochs=2)
    assert re.fullmatch(r"finished 2 epochs, but state\.params\['\w+'\] is not finite", result.reason)
    assert fit_loss(loss, data=[{**BATCH, "scale": torch.tensor(1.0)}]).reason == "finished 1 epoch"


def test_epochs_are_counted_by_the_batches_of_each_session():
    rows = {"x": torch.ones(64, 2), "y": torch.zeros(64, 1)}
    first = fit(data=fx.data.batches(rows, 4), epochs=2)
    again = fx.fit(first.continue_from, STEP, fx.data.batches(rows, 16), epochs=6)
    assert (int(first.state.step), int(again.state.step), again.reason) == (32, 48, "finished 6 epochs")
