"""``from_torch`` and the equivalent fxtrain optimizers follow the trajectories of ``torch.optim``."""

import numpy as np
import pytest
import torch

from fxtrain import optim, schedules, tree

STEPS = 50
SHAPES = {"bias": (7,), "conv": (5, 2, 4), "matrix": (4, 6), "scalar": ()}

CASES = {
    "SGD": [
        {"lr": 0.1},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "dampening": 0.3},
    ],
    "Adam": [
        {},
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1},
        {"amsgrad": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    ],
    "AdamW": [{}, {"lr": 0.01, "weight_decay": 0.3, "amsgrad": True}],
    "Adamax": [{}, {"weight_decay": 0.1, "eps": 1e-2}],
    "NAdam": [
        {},
        {"lr": 0.01, "momentum_decay": 0.1, "weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
    "RAdam": [
        {},
        {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-2, "weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
    "RMSprop": [{}, {"centered": True, "momentum": 0.9, "weight_decay": 0.1, "eps": 1e-3}, {"alpha": 0.5}],
    "Adagrad": [{}, {"lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.5}],
    "Adadelta": [{}, {"lr": 0.5, "rho": 0.5, "eps": 1e-3, "weight_decay": 0.1}],
    "ASGD": [{}, {"lr": 0.1, "lambd": 0.1, "t0": 5.0, "weight_decay": 0.1}],
    "Rprop": [{}, {"lr": 0.1, "etas": (0.3, 1.5), "step_sizes": (1e-3, 0.2)}],
    "Adafactor": [{}, {"lr": 0.5, "beta2_decay": -0.5, "eps": (1e-4, 1e-2), "d": 2.0, "weight_decay": 0.1}],
    "Muon": [{}, {"lr": 0.1, "adjust_lr_fn": "match_rms_adamw", "nesterov": False}],
}
TABLE = [(name, options) for name, cases in CASES.items() for options in cases]
IDS = [f"{name} {options}" for name, options in TABLE]


def draw(seed, shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, dtype=dtype, generator=generator) for name, shape in shapes.items()}


def trajectories(tx, make, *, shapes=SHAPES, dtype=torch.float64, scheduler=None):
    """Yields the parameters of the transformation and of the torch optimizer after each step."""
    params = draw(0, shapes, dtype)
    theirs = tree.clone(params)
    optimizer = make(list(theirs.values()))
    schedule = scheduler(optimizer) if scheduler else None
    state = tx.init(params)
    for step in range(1, STEPS + 1):
        grads = draw(step, shapes, dtype)
        updates, state = tx.update(grads, state, params)
        params = optim.apply_updates(params, updates)
        for name, value in theirs.items():
            value.grad = grads[name].clone()
        optimizer.step()
        if schedule:
            schedule.step()
        yield params, theirs


def assert_same(pairs, tolerance):
    for params, expected in pairs:
        for name, value in expected.items():
            torch.testing.assert_close(params[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m)


def shapes_for(name):
    return {"tall": (6, 4), "wide": (3, 5)} if name == "Muon" else SHAPES


@pytest.mark.parametrize(("name", "options"), TABLE, ids=IDS)
def test_from_torch_matches_torch(name, options, double):
    kind = getattr(torch.optim, name)
    pairs = trajectories(
        optim.from_torch(kind, **options), lambda params: kind(params, **options), shapes=shapes_for(name)
    )
    assert_same(pairs, 1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("Adafactor", "Muon")])
def test_from_torch_treats_complex_parameters_as_pairs(name, double):
    kind, options = getattr(torch.optim, name), CASES[name][-1]
    pairs = trajectories(
        optim.from_torch(kind, **options), lambda params: kind(params, **options), dtype=torch.complex128
    )
    assert_same(pairs, 1e-12)


@pytest.mark.parametrize(
    ("name", "tx", "options"),
    [
        ("SGD", optim.sgd(0.1, momentum=0.9, nesterov=True), {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        ("SGD", optim.sgd(0.1, momentum=0.9, dampening=0.5), {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
        ("Adam", optim.adam(0.01, b1=0.8), {"lr": 0.01, "betas": (0.8, 0.999)}),
        ("AdamW", optim.adamw(0.01, weight_decay=0.1), {"lr": 0.01, "weight_decay": 0.1}),
        ("Adamax", optim.adamax(0.01), {"lr": 0.01}),
        ("NAdam", optim.nadam(0.01, momentum_decay=4e-3), {"lr": 0.01}),
        ("RAdam", optim.radam(0.01, correct_eps=True), {"lr": 0.01}),
        ("RMSprop", optim.rmsprop(0.01, decay=0.99, eps_in_sqrt=False, centered=True), {"lr": 0.01, "centered": True}),
        (
            "Adagrad",
            optim.adagrad(0.1, initial_accumulator_value=0.0, eps=1e-10, eps_in_sqrt=False),
            {"lr": 0.1},
        ),
        ("Adadelta", optim.adadelta(0.5), {"lr": 0.5}),
        ("Rprop", optim.rprop(0.1), {"lr": 0.1}),
    ],
)
def test_fxtrain_optimizers_match_torch(name, tx, options, double):
    assert_same(trajectories(tx, lambda params: getattr(torch.optim, name)(params, **options)), 1e-12)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adafactor"])
def test_from_torch_accepts_a_learning_rate_schedule(name, double):
    kind = getattr(torch.optim, name)
    tx = optim.from_torch(kind, lr=lambda step: 0.1 * 0.9 ** step.double(), weight_decay=0.1)
    pairs = trajectories(
        tx,
        lambda params: kind(params, lr=0.1, weight_decay=0.1),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    )
    assert_same(pairs, 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_from_torch_matches_torch_in_single_precision(name):
    kind = getattr(torch.optim, name)
    pairs = trajectories(optim.from_torch(kind), kind, shapes=shapes_for(name), dtype=torch.float32)
    # Muon's matmuls are in bfloat16, so a direction is accurate to 4e-3, and a step is 1e-3.
    assert_same(pairs, 2e-4 if name == "Muon" else 1e-5)


def test_injected_from_torch_matches_torch(double):
    options = {"lr": 0.01, "weight_decay": 0.1}
    tx = optim.inject_hyperparams(optim.from_torch)(torch.optim.AdamW, **options)
    assert sorted(tx.init({"w": torch.ones(2)}).hyperparams) == ["lr", "weight_decay"]
    assert_same(trajectories(tx, lambda params: torch.optim.AdamW(params, **options)), 1e-12)


def test_performance_flags_are_accepted():
    tx = optim.from_torch(torch.optim.AdamW, lr=1e-3, fused=True, foreach=False, capturable=True)
    assert len(tree.leaves(tx.init({"a": torch.ones(2), "b": torch.ones(2)}))) == 5


class Unknown(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: optim.from_torch(torch.optim.LBFGS),
            TypeError,
            "expected optimizer to be a torch.optim class with a functional form, got LBFGS, which evaluates the loss "
            "several times per step, while a transformation sees one gradient. There are ASGD, Adadelta, Adafactor, "
            "Adagrad, Adam, AdamW, Adamax, Muon, NAdam, RAdam, RMSprop, Rprop, SGD.",
        ),
        (
            lambda: optim.from_torch(torch.optim.SparseAdam),
            TypeError,
            "expected optimizer to be a torch.optim class with a functional form, got SparseAdam, which is for sparse "
            "gradients, while torch.func computes dense ones. There are",
        ),
        (
            lambda: optim.from_torch(Unknown),
            TypeError,
            "expected optimizer to be a torch.optim class with a functional form, got Unknown. There are",
        ),
        (
            lambda: optim.from_torch("adam"),
            TypeError,
            "expected optimizer to be a torch.optim class with a functional form, got 'adam'. There are",
        ),
        (
            lambda: optim.from_torch(torch.optim.SGD, learning_rate=0.1),
            TypeError,
            "expected an argument of torch.optim.SGD (lr, momentum, dampening, weight_decay, nesterov",
        ),
        (lambda: optim.from_torch(torch.optim.Adam, lr=-1.0), ValueError, "Invalid learning rate: -1.0"),
    ],
)
def test_unsupported_torch_optimizers_are_rejected(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(message)


def test_from_torch_accepts_an_fxtrain_schedule():
    tx = optim.from_torch(torch.optim.SGD, lr=schedules.linear(1.0, 0.0, transition_steps=2))
    params = torch.tensor(1.0)
    state, rates = tx.init(params), []
    for _ in range(3):
        update, state = tx.update(params, state, params)
        rates.append(-float(update))
    np.testing.assert_allclose(rates, [1.0, 0.5, 0.0])
