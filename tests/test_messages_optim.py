"""Mistakes in optimizers and schedules name the argument, with the equivalent of other libraries."""

import pytest
from messages import TX, net, said, start

import fxtrain as fx
from fxtrain import optim, schedules

MISTAKES = {
    "the name of torch for the learning rate": (
        lambda: optim.adam(lr=1e-3),
        (
            "TypeError: adam: expected the arguments learning_rate, b1, b2, eps, eps_root, mu_dtype, "
            "nesterov, amsgrad, got 'lr'. The learning rate comes first: fxtrain.optim.adam(1e-3)."
        ),
    ),
    "the name of torch for the decay rates": (
        lambda: optim.adamw(1e-3, betas=(0.9, 0.99)),
        (
            "TypeError: adamw: expected the arguments learning_rate, b1, b2, eps, eps_root, mu_dtype, "
            "weight_decay, mask, nesterov, amsgrad, got 'betas'. Use fxtrain.optim.adamw(1e-3, b1=0.9, b2=0.999)."
        ),
    ),
    "a weight decay in adam": (
        lambda: optim.adam(1e-3, weight_decay=0.1),
        (
            "TypeError: adam: expected the arguments learning_rate, b1, b2, eps, eps_root, mu_dtype, "
            "nesterov, amsgrad, got 'weight_decay'. Use fxtrain.optim.adamw(1e-3, weight_decay=0.01), or add the decay "
            "to the gradients: fxtrain.optim.chain(fxtrain.optim.add_decayed_weights(0.01), tx)."
        ),
    ),
    "an argument with a typo": (
        lambda: optim.sgd(learning_rat=0.1),
        (
            "TypeError: sgd: expected the arguments learning_rate, momentum, nesterov, dampening, "
            "accumulator_dtype, got 'learning_rat'. Did you mean 'learning_rate'?"
        ),
    ),
    "the name of torch for the length": (
        lambda: schedules.cosine(0.1, T_max=100),
        (
            "TypeError: cosine: expected the arguments init_value, decay_steps, alpha, exponent, got "
            "'T_max'. Use fxtrain.schedules.cosine(1e-3, decay_steps=1000)."
        ),
    ),
    "an argument of torch without an equivalent": (
        lambda: optim.sgd(0.1, maximize=True),
        (
            "TypeError: sgd: expected the arguments learning_rate, momentum, nesterov, dampening, "
            "accumulator_dtype, got 'maximize'. Negate the loss."
        ),
    ),
    "an unknown argument": (
        lambda: optim.sgd(0.1, zzz=True),
        (
            "TypeError: sgd: expected the arguments learning_rate, momentum, nesterov, dampening, "
            "accumulator_dtype, got 'zzz'. Leave it out."
        ),
    ),
    "a schedule that was not made": (
        lambda: optim.sgd(schedules.cosine),
        (
            "TypeError: expected learning_rate to be a schedule, got the function cosine of fxtrain.schedules. "
            "Call it, as in fx.schedules.cosine(...)."
        ),
    ),
    "a schedule that was not made, for the weight decay": (
        lambda: optim.adamw(1e-3, weight_decay=schedules.cosine),
        (
            "TypeError: expected weight_decay to be a schedule, got the function cosine of fxtrain.schedules. "
            "Call it, as in fx.schedules.cosine(...)."
        ),
    ),
    "a schedule that was not made, injected": (
        lambda: optim.inject_hyperparams(optim.sgd)(learning_rate=schedules.cosine),
        (
            "TypeError: expected learning_rate to be a schedule, got the function cosine of fxtrain.schedules. "
            "Call it, as in fx.schedules.cosine(...)."
        ),
    ),
    "a schedule without a step": (
        lambda: optim.sgd(lambda: 0.1),
        (
            "TypeError: expected learning_rate to be a function of the step, got <lambda>(). Give it one "
            "parameter, the step."
        ),
    ),
    "a list in chain": (
        lambda: optim.chain([optim.sgd(0.1)]),
        (
            "TypeError: expected argument 0 of chain to be a gradient transformation, got a list of length 1. "
            "Build one with fx.optim, such as fx.optim.sgd(0.1)."
        ),
    ),
    "a function in chain": (
        lambda: optim.chain(optim.clip_by_global_norm, optim.adam(0.1)),
        (
            "TypeError: expected argument 0 of chain to be a gradient transformation, got the function "
            "clip_by_global_norm. Build one with fx.optim, such as fx.optim.sgd(0.1)."
        ),
    ),
    "a norm of 0": (
        lambda: optim.clip_by_global_norm(0),
        "ValueError: expected max_norm to be above 0, got 0.",
    ),
    "a mask of one argument": (
        lambda: fx.init(net(), optim.adamw(1e-3, mask=lambda params: {"weight": True, "bias": False})),
        (
            "TypeError: expected mask to be a function (path, leaf), got <lambda>(params). It is called for "
            "each parameter, as in lambda path, leaf: leaf.ndim > 1, and not with the tree, as in optax."
        ),
    ),
    "a mask of one argument in masked": (
        lambda: fx.init(net(), optim.masked(TX, lambda leaf: leaf.ndim > 1)),
        (
            "TypeError: expected mask to be a function (path, leaf), got <lambda>(leaf). It is called for each "
            "parameter, as in lambda path, leaf: leaf.ndim > 1, and not with the tree, as in optax."
        ),
    ),
    "a mask with a string": (
        lambda: fx.init(net(), optim.adamw(1e-3, mask=lambda path, leaf: "yes")),
        "ValueError: expected mask to be True or False at params['bias'], got 'yes'. Return a bool.",
    ),
    "a mask before the transformation": (
        lambda: optim.masked(lambda path, leaf: True, TX),
        (
            "TypeError: expected tx to be a gradient transformation, got the function <lambda>. Build one with "
            "fx.optim, such as fx.optim.sgd(0.1)."
        ),
    ),
    "labels of one argument": (
        lambda: fx.init(net(), optim.partition({"a": TX}, lambda leaf: "a")),
        (
            "TypeError: expected labels to be a function (path, leaf), got <lambda>(leaf). It is called for "
            "each parameter, as in lambda path, leaf: leaf.ndim > 1, and not with the tree, as in optax."
        ),
    ),
    "labels of some parameters": (
        lambda: fx.init(net(), optim.partition({"a": TX}, {"weight": "a"})),
        (
            "ValueError: expected labels to have a leaf for params['bias'], got a tree without it. Pass a tree "
            "like the parameters, or a function (path, leaf)."
        ),
    ),
    "an unknown label": (
        lambda: fx.init(net(), optim.partition({"a": TX}, lambda path, leaf: "b")),
        (
            "ValueError: expected the label of params['bias'] to be one of 'a', got 'b'. Add a transformation "
            "for it, or set_to_zero() to freeze it."
        ),
    ),
    "phases in a list": (
        lambda: optim.unfreeze(TX, ["head.*"]),
        (
            "TypeError: expected phases to be a mapping from patterns to phases, got a list of length 1. Pass "
            'a dict, as in unfreeze(tx, {"head.*": 0, "*": 1000}).'
        ),
    ),
    "a parameter without a phase": (
        lambda: fx.init(net(), optim.unfreeze(TX, {"head.*": 3})),
        (
            "ValueError: expected phases to have a pattern for 'bias', got 'head.*'. Add a pattern, such as "
            "'*', with its phase."
        ),
    ),
    "a transformation to inject into": (
        lambda: optim.inject_hyperparams(optim.sgd(0.1)),
        (
            "TypeError: expected factory to be a function that makes a gradient transformation, got sgd(0.1) "
            "already made. Pass the function, and its arguments to the result, as in "
            "inject_hyperparams(optim.sgd)(learning_rate=0.1)."
        ),
    ),
    "a hyperparameter with another name": (
        lambda: optim.set_hyperparams(start(optim.inject_hyperparams(optim.sgd)(learning_rate=0.1)).opt_state, lr=0.2),
        (
            "ValueError: expected a hyperparameter in the optimizer state ('learning_rate'), got 'lr'. Inject "
            "it: fx.optim.inject_hyperparams(factory)(lr=...)."
        ),
    ),
    "no steps between updates": (
        lambda: optim.every_k(TX, 0),
        "ValueError: expected k to be a positive int, got 0.",
    ),
    "a name for a torch optimizer": (
        lambda: optim.from_torch("sgd"),
        (
            "TypeError: expected optimizer to be a torch.optim class with a functional form, got 'sgd'. There "
            "are ASGD, Adadelta, Adafactor, Adagrad, Adam, AdamW, Adamax, Muon, NAdam, RAdam, RMSprop, Rprop, "
            "SGD."
        ),
    ),
    "a fractional number of steps": (
        lambda: schedules.cosine(0.1, 1e4),
        "TypeError: expected decay_steps to be a positive int, got 10000.0.",
    ),
    "a number for a schedule": (
        lambda: schedules.warmup(100, schedules.constant(0.1)),
        (
            "TypeError: expected schedule to be a function of the step, got 100. For a constant, use "
            "fx.schedules.constant."
        ),
    ),
    "a schedule that was not made in warmup": (
        lambda: schedules.warmup(schedules.constant, 10),
        (
            "TypeError: expected schedule to be a schedule, got the function constant of fxtrain.schedules. "
            "Call it, as in fx.schedules.constant(...)."
        ),
    ),
    "a decay shorter than its warmup": (
        lambda: schedules.warmup_cosine_decay(0.0, 0.1, warmup_steps=100, decay_steps=50),
        "ValueError: expected decay_steps to be larger than warmup_steps=100, got 50. It includes the warmup.",
    ),
    "as many boundaries as schedules": (
        lambda: schedules.join([schedules.constant(0.1), schedules.constant(0.2)], [10, 20]),
        "ValueError: expected one more schedule than boundaries, got 2 schedules and 2 boundaries.",
    ),
    "decreasing boundaries": (
        lambda: schedules.join([schedules.constant(0.1)] * 3, [20, 10]),
        "ValueError: expected boundaries to be increasing, got [20, 10].",
    ),
    "boundaries in a list": (
        lambda: schedules.piecewise(0.1, [10, 20]),
        (
            "TypeError: expected boundaries_and_scales to be a mapping from steps to factors, got a list of "
            "length 2. Pass a dict, as in piecewise(0.1, {1000: 0.5})."
        ),
    ),
    "an interpolation with a typo": (
        lambda: schedules.piecewise(0.1, {10: 0.1}, interpolation="cos"),
        (
            "ValueError: expected interpolation to be one of 'constant', 'linear', 'cosine', got 'cos'. Did "
            "you mean 'cosine'?"
        ),
    ),
}


@pytest.mark.parametrize(("mistake", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_in_optimizer_is_explained(mistake, message):
    assert said(mistake) == message
