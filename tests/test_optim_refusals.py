"""Wrong arguments of optimizers and their wrappers raise errors with exact messages."""

import pytest
import torch
from named_parameters import ONES, PARAMS, one

from fxtrain import optim, schedules

BAD = {"other": torch.ones(2)}
REFUSALS = [
    (lambda: optim.sgd(-0.1), ValueError, "expected learning_rate to be at least 0, got -0.1."),
    (lambda: optim.sgd(float("nan")), ValueError, "expected learning_rate to be at least 0, got nan."),
    (
        lambda: optim.sgd("0.1"),
        TypeError,
        "expected learning_rate to be a float or a tensor of shape [], got '0.1'.",
    ),
    (
        lambda: optim.sgd(torch.ones(2)),
        ValueError,
        "expected learning_rate to be a float or a tensor of shape [], got a float32 tensor of shape [2].",
    ),
    (
        lambda: optim.sgd(0.1, nesterov=True),
        ValueError,
        "expected momentum with nesterov or dampening, got None. Pass it, as in momentum=0.9.",
    ),
    (
        lambda: optim.sgd(0.1, momentum=0.9, nesterov=True, dampening=0.1),
        ValueError,
        "expected nesterov or dampening, got both. Nesterov momentum is defined without dampening.",
    ),
    (lambda: optim.adam(0.1, b1=1.0), ValueError, "expected b1 to be in [0, 1), got 1.0."),
    (lambda: optim.adamw(0.1, b2=-0.1), ValueError, "expected b2 to be in [0, 1), got -0.1."),
    (lambda: optim.adamw(0.1, eps=-1e-8), ValueError, "expected eps to be at least 0, got -1e-08."),
    (lambda: optim.adamw(0.1, weight_decay=-1.0), ValueError, "expected weight_decay to be at least 0, got -1.0."),
    (
        lambda: optim.adam(0.1, nesterov=True, amsgrad=True),
        ValueError,
        "expected nesterov or amsgrad, got both. Choose one.",
    ),
    (
        lambda: optim.rmsprop(0.1, nesterov=True),
        ValueError,
        "expected momentum with nesterov, got None. Pass it, as in momentum=0.9.",
    ),
    (lambda: optim.clip_by_global_norm(0.0), ValueError, "expected max_norm to be above 0, got 0.0."),
    (
        lambda: optim.apply_if_finite(optim.sgd(0.1), max_consecutive=0),
        ValueError,
        "expected max_consecutive to be a positive int, got 0.",
    ),
    (
        lambda: optim.muon(0.1, ns_coeffs=(1.0, 2.0)),
        ValueError,
        "expected three coefficients, or three per step, got a tuple of (1.0, 2.0).",
    ),
    (
        lambda: optim.scale_by_schedule(0.1),
        TypeError,
        "expected schedule to be a function of the step, got 0.1. For a number, use fx.optim.scale.",
    ),
    (
        lambda: optim.chain(optim.sgd(0.1), 0.1),
        TypeError,
        "expected argument 1 of chain to be a gradient transformation, got 0.1. Build one with fx.optim, such as "
        "fx.optim.sgd(0.1).",
    ),
    (
        lambda: optim.partition({"a": None}, {}),
        TypeError,
        "expected transforms['a'] to be a gradient transformation, got None. Build one with fx.optim, such as "
        "fx.optim.sgd(0.1).",
    ),
    (
        lambda: optim.chain(optim.sgd(0.1), optim.scale(1.0)).update(ONES, (), PARAMS),
        ValueError,
        "expected the state of a chain of 2 transformations, got 0 states. Pass the state from this chain's init.",
    ),
    (
        lambda: one(optim.adam(0.1), BAD),
        ValueError,
        "expected updates and the optimizer state to have the same structure, got ['other'] only in updates and "
        "['body.bias'] only in the optimizer state. Pass trees like the parameters given to init.",
    ),
    (
        lambda: one(optim.adam(0.1), {**ONES, "body.bias": torch.ones(3)}),
        ValueError,
        "expected updates['body.bias'] to have shape [2] as in the optimizer state, got [3]. Pass trees like the "
        "parameters given to init.",
    ),
    (
        lambda: one(optim.adafactor(0.1), {"body.bias": torch.ones(2)}),
        ValueError,
        "expected updates and the optimizer state to have the same structure, got ['body.weight'] only in the "
        "optimizer state. Pass trees like the parameters given to init.",
    ),
    (
        lambda: optim.apply_updates(PARAMS, {"body.bias": torch.ones(2)}),
        ValueError,
        "expected params and updates to have the same structure, got ['body.weight'] only in params. Pass trees like "
        "the parameters given to init.",
    ),
    (
        lambda: optim.adamw(0.1).update(ONES, optim.adamw(0.1).init(PARAMS)),
        ValueError,
        "expected params for add_decayed_weights, got None. Call update(grads, opt_state, params).",
    ),
    (
        lambda: optim.lamb(0.1).update(ONES, optim.lamb(0.1).init(PARAMS)),
        ValueError,
        "expected params for scale_by_trust_ratio, got None. Call update(grads, opt_state, params).",
    ),
    (
        lambda: optim.adam(0.1).init({"layer": {"count": torch.tensor(True)}}),
        TypeError,
        "expected params['layer']['count'] to be a floating-point or complex tensor, got a bool tensor of shape []. "
        "Leave it out of the parameters.",
    ),
    (
        lambda: optim.adam(0.1).init({"w": 1.0}),
        TypeError,
        "expected params['w'] to be a floating-point or complex tensor, got 1.0. Leave it out of the parameters.",
    ),
    (
        lambda: optim.scale_by_muon().init(PARAMS),
        ValueError,
        "expected scale_by_muon to get only matrices, got a float32 tensor of shape [2] at params['body.bias']. Use "
        "muon, which trains the rest with AdamW, or exclude it by masked or partition.",
    ),
    (
        lambda: one(optim.masked(optim.sgd(0.1), {"body.bias": True})),
        ValueError,
        "expected mask to have a leaf for params['body.weight'], got a tree without it. Pass a tree like the "
        "parameters, or a function (path, leaf).",
    ),
    (
        lambda: one(optim.masked(optim.sgd(0.1), lambda path, leaf: leaf.ndim)),
        ValueError,
        "expected mask to be True or False at params['body.bias'], got 1. Return a bool.",
    ),
    (
        lambda: one(optim.partition({"a": optim.sgd(0.1)}, lambda path, leaf: "b")),
        ValueError,
        "expected the label of params['body.bias'] to be one of 'a', got 'b'. Add a transformation for it, or "
        "set_to_zero() to freeze it.",
    ),
    (
        lambda: optim.inject_hyperparams(optim.sgd)(learning_rate=-1.0),
        ValueError,
        "expected learning_rate to be at least 0, got -1.0.",
    ),
    (
        lambda: optim.inject_hyperparams(optim.clip_by_global_norm)(1),
        TypeError,
        "expected inject_hyperparams(clip_by_global_norm) to get a float, a tensor or a schedule, got none. Pass at "
        "least one hyperparameter, such as learning_rate=3e-4.",
    ),
    (
        lambda: optim.inject_hyperparams(optim.chain)(optim.sgd(0.1)),
        TypeError,
        "expected a factory whose arguments can be passed by name, got one with 'transforms', which cannot. Wrap it "
        "in a function with named arguments.",
    ),
    (
        lambda: optim.set_hyperparams(optim.sgd(0.1).init(PARAMS), learning_rate=0.1),
        ValueError,
        "expected a hyperparameter in the optimizer state (it has none), got 'learning_rate'. Inject it: "
        "fx.optim.inject_hyperparams(factory)(learning_rate=...).",
    ),
    (
        lambda: optim.set_hyperparams(optim.inject_hyperparams(optim.adam)(0.1, b1=0.5).init(PARAMS), lr=0.1),
        ValueError,
        "expected a hyperparameter in the optimizer state ('b1', 'learning_rate'), got 'lr'. Inject it: "
        "fx.optim.inject_hyperparams(factory)(lr=...).",
    ),
    (
        lambda: optim.set_hyperparams(
            optim.inject_hyperparams(optim.sgd)(schedules.constant(0.1)).init(PARAMS), learning_rate=0.1
        ),
        ValueError,
        "expected learning_rate to be a constant, got a hyperparameter that follows a schedule. To set it, pass a "
        "float to inject_hyperparams.",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS, ids=[message[:60] for _, _, message in REFUSALS])
def test_error_messages_are_exact(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
