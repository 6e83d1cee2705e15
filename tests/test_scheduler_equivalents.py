"""Errors for schedulers of other libraries propose schedules and callbacks with identical results."""

import functools
import importlib
import re

import pytest
import torch
from proposals import GROUPS, assert_same_steps, evaluated, message, net
from torch import nn
from torch.optim import lr_scheduler
from zoo.operators import import_without_operators

import fxtrain as fx
from fxtrain import optim

STEPS = 300


def transformers(name, **arguments):
    def make(optimizer):
        pytest.importorskip("transformers")
        import_without_operators()
        return getattr(importlib.import_module("transformers.optimization"), name)(optimizer, **arguments)

    return make


def sequential(optimizer):
    parts = [
        lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=20),
        lr_scheduler.ConstantLR(optimizer, factor=1.0, total_iters=1),
        lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=0.01),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[20, 50])


def chained(optimizer):
    parts = [
        lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=20),
        lr_scheduler.ExponentialLR(optimizer, 0.99),
        lr_scheduler.StepLR(optimizer, 30, 0.5),
    ]
    return lr_scheduler.ChainedScheduler(parts, optimizer)


S = functools.partial
SCHEDULERS = {
    "StepLR": S(lr_scheduler.StepLR, step_size=7, gamma=0.9),
    "MultiStepLR": S(lr_scheduler.MultiStepLR, milestones=[3, 50, 50, 100], gamma=0.5),
    "ConstantLR": S(lr_scheduler.ConstantLR, factor=0.25, total_iters=11),
    "ConstantLR without steps": S(lr_scheduler.ConstantLR, factor=0.25, total_iters=0),
    "LinearLR": S(lr_scheduler.LinearLR, start_factor=0.1, end_factor=0.7, total_iters=33),
    "ExponentialLR": S(lr_scheduler.ExponentialLR, gamma=0.98),
    "PolynomialLR": S(lr_scheduler.PolynomialLR, total_iters=120, power=2),
    "CosineAnnealingLR": S(lr_scheduler.CosineAnnealingLR, T_max=90, eta_min=0.001),
    "CosineAnnealingLR to zero": S(lr_scheduler.CosineAnnealingLR, T_max=400),
    "CosineAnnealingWarmRestarts": S(lr_scheduler.CosineAnnealingWarmRestarts, T_0=13, eta_min=0.001),
    "CosineAnnealingWarmRestarts longer": S(lr_scheduler.CosineAnnealingWarmRestarts, T_0=7, T_mult=2),
    "CosineAnnealingWarmRestarts thrice": S(lr_scheduler.CosineAnnealingWarmRestarts, T_0=1, T_mult=3),
    "OneCycleLR": S(lr_scheduler.OneCycleLR, max_lr=0.5, total_steps=STEPS, cycle_momentum=False),
    "OneCycleLR between steps": S(
        lr_scheduler.OneCycleLR, max_lr=0.5, total_steps=STEPS + 3, pct_start=0.257, cycle_momentum=False
    ),
    "OneCycleLR three phases": S(
        lr_scheduler.OneCycleLR,
        max_lr=0.5,
        total_steps=STEPS + 7,
        three_phase=True,
        anneal_strategy="linear",
        cycle_momentum=False,
    ),
    "OneCycleLR momentum": S(lr_scheduler.OneCycleLR, max_lr=0.5, total_steps=STEPS),
    "CyclicLR": S(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.2, step_size_up=20),
    "CyclicLR uneven": S(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.2, step_size_up=20, step_size_down=9),
    "CyclicLR halved": S(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.2, step_size_up=20, mode="triangular2"),
    "CyclicLR exponential": S(
        lr_scheduler.CyclicLR,
        base_lr=0.01,
        max_lr=0.2,
        step_size_up=20,
        step_size_down=30,
        mode="exp_range",
        gamma=0.99,
    ),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "constant": transformers("get_constant_schedule"),
    "constant warmup": transformers("get_constant_schedule_with_warmup", num_warmup_steps=10),
    "linear": transformers("get_linear_schedule_with_warmup", num_warmup_steps=10, num_training_steps=200),
    "linear without warmup": transformers(
        "get_linear_schedule_with_warmup", num_warmup_steps=0, num_training_steps=200
    ),
    "cosine": transformers("get_cosine_schedule_with_warmup", num_warmup_steps=10, num_training_steps=200),
    "cosine cycles": transformers(
        "get_cosine_schedule_with_warmup", num_warmup_steps=10, num_training_steps=200, num_cycles=2.5
    ),
    "hard restarts": transformers(
        "get_cosine_with_hard_restarts_schedule_with_warmup", num_warmup_steps=10, num_training_steps=200, num_cycles=5
    ),
    "polynomial": transformers(
        "get_polynomial_decay_schedule_with_warmup", num_warmup_steps=10, num_training_steps=200, lr_end=1e-3, power=2.0
    ),
    "inverse_sqrt": transformers("get_inverse_sqrt_schedule", num_warmup_steps=10),
    "min lr": transformers(
        "get_cosine_with_min_lr_schedule_with_warmup", num_warmup_steps=10, num_training_steps=200, min_lr=0.01
    ),
    "min lr rate": transformers(
        "get_cosine_with_min_lr_schedule_with_warmup_lr_rate",
        num_warmup_steps=10,
        num_training_steps=200,
        min_lr_rate=0.1,
    ),
    "min lr rate warmup": transformers(
        "get_cosine_with_min_lr_schedule_with_warmup_lr_rate",
        num_warmup_steps=10,
        num_training_steps=200,
        min_lr_rate=0.1,
        warmup_lr_rate=0.2,
    ),
    "wsd": transformers(
        "get_wsd_schedule", num_warmup_steps=10, num_decay_steps=50, num_training_steps=200, min_lr_ratio=0.1
    ),
    "wsd cosine warmup": transformers(
        "get_wsd_schedule",
        num_warmup_steps=10,
        num_decay_steps=50,
        num_training_steps=200,
        warmup_type="cosine",
        decay_type="linear",
    ),
    "wsd roots": transformers(
        "get_wsd_schedule",
        num_warmup_steps=10,
        num_decay_steps=50,
        num_training_steps=200,
        warmup_type="1-sqrt",
        decay_type="1-sqrt",
        min_lr_ratio=0.1,
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_proposed_schedule_has_the_same_values(name):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    text = message(lambda: optim.adamw(scheduler))
    schedule = evaluated(text)
    cycled = re.search(r"Its momentum follows (.*)\.\n", text)
    momentum = eval(cycled.group(1), {"fx": fx}) if cycled else None
    rates, momenta = [], []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        scheduler.step()
    steps = torch.arange(STEPS)
    expected = torch.tensor(rates, dtype=torch.float64)
    torch.testing.assert_close(schedule(steps).expand(STEPS), expected, rtol=1e-12, atol=1e-14)
    if momentum is not None:
        expected = torch.tensor(momenta, dtype=torch.float64)
        torch.testing.assert_close(momentum(steps), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("kind", "options"), [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {}), (torch.optim.Adam, {})]
)
def test_scheduler_with_cycled_momentum_takes_the_same_steps(kind, options, double):
    module = net()
    optimizer = kind(module.parameters(), lr=0.1, **options)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=21)
    assert_same_steps(evaluated(message(lambda: fx.init(module, scheduler))), module, optimizer, scheduler)


def test_scheduler_with_parameter_groups_takes_the_same_steps(double):
    module = net()
    optimizer = torch.optim.AdamW(GROUPS["scattered"](module), lr=0.1)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert "There is no equivalent expression: LambdaLR" in message(lambda: fx.init(module, scheduler))
    scheduler = lr_scheduler.StepLR(optimizer, 5, 0.5)
    tx = evaluated(message(lambda: fx.init(module, scheduler)))
    assert_same_steps(tx, module, optimizer, scheduler)


def test_plateau_scheduler_becomes_callback():
    module = net(torch.float32)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.3, patience=2, threshold_mode="abs")
    text = message(lambda: fx.compose(scheduler))
    assert text == (
        "expected each callback to be a function (state, event) -> (state, control), got "
        "torch.optim.lr_scheduler.ReduceLROnPlateau. Use fx.optim.inject_hyperparams(fx.optim.sgd)(learning_rate=0.5, "
        "momentum=0.9).\nAdd the callback fx.callbacks.reduce_on_plateau('loss', factor=0.3, patience=2, mode='max', "
        "relative=False) to fx.fit, with the name of the metric at EvalEnd."
    )
    evaluated(text)
