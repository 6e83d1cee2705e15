"""Errors for optimizers of other libraries propose fxtrain expressions with identical results."""

import pytest
import torch
from proposals import GROUPS, assert_same_steps, evaluated, expression, message, net, no_decay
from torch import nn
from torch.optim import lr_scheduler

import fxtrain as fx
from fxtrain import optim
from fxtrain.equivalents import refuse_foreign

TRANSFORMATION = "a gradient transformation"


OPTIMIZERS = {
    "SGD": [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "maximize": True},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
        {"lr": torch.tensor(0.1), "foreach": False},
    ],
    "Adam": [{"lr": 0.01, "weight_decay": 0.1}, {"amsgrad": True, "lr": 0.1}, {"decoupled_weight_decay": True}],
    "AdamW": [
        {"lr": 3e-4, "weight_decay": 0.1, "betas": (0.9, 0.95)},
        {"lr": 0.01, "maximize": True, "amsgrad": True, "eps": 1e-3},
    ],
    "Adamax": [{"weight_decay": 0.1, "eps": 1e-2}],
    "NAdam": [{"lr": 0.01, "momentum_decay": 0.1, "weight_decay": 0.1}, {"decoupled_weight_decay": True}],
    "RAdam": [{"lr": 0.01, "eps": 1e-2, "weight_decay": 0.1}, {"decoupled_weight_decay": True}],
    "RMSprop": [{"centered": True, "weight_decay": 0.1}, {"momentum": 0.9, "alpha": 0.5}],
    "Adagrad": [{"weight_decay": 0.1, "initial_accumulator_value": 0.5}, {"lr_decay": 0.1}],
    "Adadelta": [{}, {"lr": 0.5, "rho": 0.5, "eps": 1e-3, "weight_decay": 0.1}],
    "ASGD": [{"lr": 0.1, "lambd": 0.1, "t0": 5.0, "weight_decay": 0.1}],
    "Rprop": [{"lr": 0.1, "etas": (0.3, 1.5), "step_sizes": (1e-3, 0.2)}, {}],
    "Adafactor": [{"lr": 0.5, "beta2_decay": -0.5, "eps": (1e-4, 1e-2), "d": 2.0, "weight_decay": 0.1}],
}
TABLE = [(name, options) for name, cases in OPTIMIZERS.items() for options in cases]


@pytest.mark.parametrize(("name", "options"), TABLE, ids=[f"{name} {options}" for name, options in TABLE])
def test_proposed_optimizer_takes_the_same_steps(name, options, double):
    module = net()
    optimizer = getattr(torch.optim, name)(module.parameters(), **options)
    assert_same_steps(evaluated(message(lambda: fx.init(module, optimizer))), module, optimizer)


def test_proposed_muon_takes_the_same_steps(double):
    module = nn.Linear(3, 4, bias=False, dtype=torch.float64)
    optimizer = torch.optim.Muon(module.parameters(), lr=0.1, nesterov=False)
    assert_same_steps(evaluated(message(lambda: fx.init(module, optimizer))), module, optimizer)


def test_every_supported_torch_optimizer_has_equivalent():
    kinds = {
        kind
        for kind in vars(torch.optim).values()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    for kind in kinds:
        text = message(lambda kind=kind: fx.train_step(lambda model, batch: model(batch), kind))
        assert "Use fx.optim." in text or kind.__name__ in ("LBFGS", "SparseAdam"), text
        if kind.__name__ not in ("LBFGS", "SparseAdam"):
            assert isinstance(evaluated(text), optim.GradientTransformation)


def test_proposed_expression_contains_betas_and_weight_decay():
    module = net(torch.float32)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-4, weight_decay=0.1, betas=(0.9, 0.95))
    for call in (
        lambda: fx.init(module, optimizer),
        lambda: fx.train_step(lambda model, batch: model(batch), optimizer),
    ):
        assert message(call) == (
            "expected tx to be a gradient transformation, got torch.optim.AdamW. "
            "Use fx.optim.adamw(0.0003, b1=0.9, b2=0.95, weight_decay=0.1)."
        )


@pytest.mark.parametrize("kind", ["AdamW", "AdamW amsgrad", "Adam"])
@pytest.mark.parametrize("groups", GROUPS)
def test_parameter_groups_become_masks_and_partitions(groups, kind, double):
    module = net()
    name, _, amsgrad = kind.partition(" ")
    optimizer = getattr(torch.optim, name)(GROUPS[groups](module), lr=0.01, amsgrad=bool(amsgrad))
    assert_same_steps(evaluated(message(lambda: fx.init(module, optimizer))), module, optimizer)


def test_groups_differing_only_in_weight_decay_become_mask():
    module = net()
    text = message(lambda: fx.init(module, torch.optim.AdamW(no_decay(module), lr=0.01)))
    assert expression(text) == "fx.optim.adamw(0.01, weight_decay=0.1, mask=lambda path, leaf: leaf.ndim > 1)"


def test_error_for_unnamed_groups_suggests_init():
    module = net()
    optimizer = torch.optim.SGD(GROUPS["one module apart"](module), lr=0.1)
    text = message(lambda: fx.optim.chain(optimizer))
    assert "Pass it to fx.init(module, optimizer)" in text
    named = torch.optim.SGD(
        [
            {"params": list(module.head.named_parameters("head")), "lr": 0.5},
            {"params": [*module.embedding.named_parameters("embedding"), *module.norm.named_parameters("norm")]},
        ],
        lr=0.1,
    )
    assert "path.startswith('head.')" in message(lambda: fx.optim.chain(named))


def test_parameter_paths_include_key_of_module():
    modules = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
    params = [value for module in modules.values() for value in module.parameters()]
    optimizer = torch.optim.SGD([{"params": params[:1], "lr": 0.5}, {"params": params[1:]}], lr=0.1)
    assert "path in {'a.weight'}" in message(lambda: fx.init(modules, optimizer))


@pytest.mark.parametrize(
    "call",
    [
        lambda tx, rate: optim.chain(optim.clip_by_global_norm(1.0), tx),
        lambda tx, rate: optim.partition({"a": tx}, {"a": "a"}),
        lambda tx, rate: optim.masked(tx, lambda path, leaf: True),
        lambda tx, rate: optim.every_k(tx, 2),
        lambda tx, rate: optim.lookahead(tx, period=2),
        lambda tx, rate: optim.apply_if_finite(tx, max_consecutive=2),
        lambda tx, rate: optim.active_when(tx, lambda count: count > 1),
        lambda tx, rate: optim.unfreeze(tx, {"*": 1}),
        lambda tx, rate: optim.from_torch(tx),
        lambda tx, rate: optim.sgd(rate),
        lambda tx, rate: optim.from_torch(torch.optim.SGD, lr=rate),
        lambda tx, rate: optim.inject_hyperparams(optim.adamw)(learning_rate=rate),
        lambda tx, rate: optim.inject_hyperparams(torch.optim.AdamW),
        lambda tx, rate: optim.add_decayed_weights(rate),
        lambda tx, rate: fx.schedules.warmup(rate, 10),
        lambda tx, rate: fx.schedules.join([fx.schedules.constant(0.1), rate], [10]),
        lambda tx, rate: fx.callbacks.schedule_hyperparam("weight_decay", rate),
        lambda tx, rate: fx.attach(fx.init(nn.Linear(1, 1)), [rate]),
        lambda tx, rate: fx.fit(fx.init(nn.Linear(1, 1)), lambda *_: None, [], callbacks=[tx], steps=1),
    ],
)
def test_every_public_function_proposes_the_equivalent(call):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    text = message(lambda: call(optimizer, lr_scheduler.StepLR(optimizer, 10)))
    assert text.startswith("expected ")
    evaluated(text)


class Accelerated(torch.optim.Optimizer):
    __module__ = "accelerate.optimizer"

    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize(
    "pack",
    [
        lambda optimizer, scheduler: ([optimizer], [scheduler]),
        lambda optimizer, scheduler: {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}},
        lambda optimizer, scheduler: [Accelerated(optimizer), scheduler],
    ],
)
def test_lightning_and_accelerate_containers_are_unpacked(pack):
    module = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    text = message(lambda: fx.init(module, pack(optimizer, lr_scheduler.StepLR(optimizer, 10))))
    assert expression(text) == "fx.optim.sgd(fx.schedules.exponential(0.5, 10, decay_rate=0.1, staircase=True))"
    wrapped = Accelerated(torch.optim.SGD(module.parameters(), lr=0.5))
    assert expression(message(lambda: fx.init(module, wrapped))) == "fx.optim.sgd(0.5)"
    scheduler = lr_scheduler.ConstantLR(wrapped.optimizer, 1.0, total_iters=0)
    scheduler.optimizer = wrapped
    assert expression(message(lambda: fx.init(module, scheduler))) == "fx.optim.sgd(fx.schedules.constant(0.5))"


class Custom(torch.optim.SGD):
    pass


class Lion(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (torch.optim.LBFGS, "evaluates the loss several times"),
        (torch.optim.SparseAdam, "gradients are dense"),
        (Custom, "It derives from torch.optim.SGD"),
        (Lion, "The closest is fx.optim.lion(lr, weight_decay=...)"),
    ],
)
def test_error_without_equivalent_says_what_to_do(kind, words):
    text = message(lambda: fx.init(nn.Linear(1, 1), kind([nn.Parameter(torch.zeros(1))])))
    assert "There is no equivalent expression" in text
    assert words in text


def test_optax_transformations_become_equivalents():
    import jax.numpy as jnp
    import optax

    params = {"w": torch.tensor([1.0, -2.0])}
    for theirs in (
        optax.adamw(3e-4, b2=0.95),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9, nesterov=True)),
        optax.rmsprop(0.1),
    ):
        tx = evaluated(message(lambda theirs=theirs: fx.init(nn.Linear(1, 1), theirs)))
        updates, _ = tx.update(params, tx.init(params), params)
        arrays = {"w": jnp.asarray(params["w"].numpy())}
        expected, _ = theirs.update(arrays, theirs.init(arrays), arrays)
        torch.testing.assert_close(updates["w"], torch.tensor(list(map(float, expected["w"]))))
    text = message(lambda: optim.chain(optax.adam(optax.linear_schedule(0.1, 0.0, 10))))
    assert "Build it from fx.optim" in text
    assert "Use fx.schedules.cosine with the same values" in message(
        lambda: optim.sgd(optax.cosine_decay_schedule(0.1, 10))
    )


def test_other_values_are_not_rejected():
    for value in (None, 1, 0.1, torch.tensor(1.0), "adamw", optim.sgd(0.1), fx.schedules.constant(1.0), nn.Linear):
        refuse_foreign("tx", TRANSFORMATION, value)
