"""Texts by which optimizers, schedules and steps describe themselves."""

import contextlib
import functools
import inspect

import problem
import pytest
import torch

import fxtrain as fx
from fxtrain import optim, schedules


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (optim.sgd(0.1), "sgd(0.1)"),
        (optim.sgd(learning_rate=0.1, momentum=None), "sgd(0.1)"),
        (optim.adamw(3e-4, b2=0.95, nesterov=False), "adamw(0.0003, b2=0.95)"),
        (optim.adamw(torch.tensor(0.5)), "adamw(tensor(0.5000))"),
        (optim.adam(0.1, mu_dtype=torch.bfloat16), "adam(0.1, mu_dtype=torch.bfloat16)"),
        (
            optim.adamw(schedules.warmup(schedules.cosine(1e-3, 900, alpha=0.1), 100), weight_decay=0.1),
            "adamw(warmup(cosine(0.001, 900, alpha=0.1), 100), weight_decay=0.1)",
        ),
        (
            optim.chain(optim.clip_by_global_norm(1.0), optim.every_k(optim.lion(1e-4), 4)),
            "chain(clip_by_global_norm(1.0), every_k(lion(0.0001), 4))",
        ),
        (
            optim.partition({"body": optim.sgd(0.1), "head": optim.set_to_zero()}, {"a": "body", "b": "head"}),
            "partition({'body': sgd(0.1), 'head': set_to_zero()}, {'a': 'body', 'b': 'head'})",
        ),
        (optim.unfreeze(optim.sgd(0.1), {"head.*": 0, "*": (1, 3)}), "unfreeze(sgd(0.1), {'head.*': 0, '*': (1, 3)})"),
        (optim.inject_hyperparams(optim.adamw)(0.1, b1=0.8), "inject_hyperparams(adamw)(0.1, b1=0.8)"),
        (
            optim.from_torch(torch.optim.AdamW, lr=0.1, betas=(0.9, 0.95)),
            "from_torch(AdamW, lr=0.1, betas=(0.9, 0.95))",
        ),
        (
            optim.add_decayed_weights(mask=dict.fromkeys("abcdefgh", True)),
            "add_decayed_weights(mask={'a': True, 'b': True, 'c': True, 'd': True, 'e': True, 'f': True, ...})",
        ),
        (schedules.warmup(schedules.constant(1.0), 0), "warmup(constant(1.0), 0)"),
        (
            schedules.join([schedules.constant(1.0), schedules.linear(1.0, 0.0, transition_steps=5)], [3]),
            "join([constant(1.0), linear(1.0, 0.0, transition_steps=5)], [3])",
        ),
        (schedules.piecewise(1.0, {10: 0.1}), "piecewise(1.0, {10: 0.1})"),
    ],
)
def test_optimizers_and_schedules_show_the_call_that_made_them(made, text):
    assert repr(made) == text


@pytest.mark.parametrize("package", [optim, schedules])
def test_every_factory_describes_what_it_makes(package):
    returned = {optim: "GradientTransformation", schedules: "Schedule"}[package]
    functions = {name: value for name in package.__all__ if inspect.isfunction(value := getattr(package, name))}
    made = [name for name, value in functions.items() if value.__annotations__.get("return") == returned]
    assert len(made) > 10
    assert not [name for name in made if not hasattr(functions[name], "__wrapped__")]


def test_user_made_transformations_and_schedules_show_their_names():
    def signs(strength):
        def update(updates, opt_state, params=None):
            return updates, opt_state

        return optim.GradientTransformation(lambda params: (), update)

    def halving(step):
        return 0.5**step

    assert repr(optim.chain(signs(2), optim.sgd(halving))) == "chain(signs(...), sgd(halving))"
    assert repr(optim.sgd(functools.partial(halving))) == "sgd(halving)"
    assert repr(optim.GradientTransformation(lambda params: (), halving)) == "halving"


def test_descriptions_of_arguments_leave_the_arguments_unchanged():
    schedule = schedules.cosine(0.1, 10)
    schedules.warmup(schedule, 0)
    assert repr(schedule) == "cosine(0.1, 10)"


def test_large_tensors_are_not_printed():
    tx = optim.masked(optim.sgd(0.1), {"a": torch.ones(1000, dtype=torch.bool)})
    assert repr(tx) == "masked(sgd(0.1), {'a': <a bool tensor of shape [1000]>})"


class TestStep:
    tx = optim.adamw(schedules.cosine(1e-2, 100), weight_decay=0.1)

    def test_step_is_described_by_its_parts_and_settings(self):
        step = fx.train_step(problem.loss_fn, self.tx, accumulate=2, precision="bf16", unused="zero")
        assert step.description == {
            "loss": "loss_fn",
            "optimizer": "adamw(cosine(0.01, 100), weight_decay=0.1)",
            "learning_rate": "cosine(0.01, 100)",
            "precision": "bf16",
            "accumulate": "2",
            "unused": "zero",
        }

    def test_description_names_the_learning_rate_of_each_group(self):
        tx = optim.partition({"a": optim.sgd(0.1), "b": optim.sgd(0.2)}, lambda path, leaf: "a")
        described = fx.train_step(problem.loss_fn, tx).description
        assert (described["learning_rate/a"], described["learning_rate/b"]) == ("0.1", "0.2")

    def test_policy_is_described_by_its_dtypes(self):
        step = fx.train_step(problem.loss_fn, self.tx, precision=fx.Policy(compute=torch.bfloat16))
        assert step.description["precision"] == "param float32, compute bfloat16, output float32"

    def test_compiled_and_wrapped_steps_pass_the_description_through(self):
        step = fx.train_step(problem.loss_fn, self.tx)
        wrapped = fx.wrap_step(fx.compile(step, donate=True), contextlib.nullcontext)
        assert step.description.items() < wrapped.description.items()
        assert wrapped.description["donation"] == "yes"
        assert wrapped.description["compiled"]
        assert fx.compile(step).description["donation"] == "no"

    def test_added_callbacks_keep_the_description(self):
        step = fx.train_step(problem.loss_fn, self.tx)
        assert step.with_callbacks(fx.callbacks.grad_norms()).description == step.description

    def test_hand_written_step_has_a_description_of_its_own(self):
        step = fx.Step(lambda state, batch: (state, fx.StepOutput({})), description={"optimizer": self.tx})
        assert step.description == {"optimizer": repr(self.tx)}
        assert fx.Step(lambda state, batch: (state, fx.StepOutput({}))).description == {}
