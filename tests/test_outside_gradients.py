"""Tensors outside the state that require gradients, such as a teacher's, leave no graph in what a step returns."""

import warnings

import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import testing, tree

TX = fx.optim.adamw(0.1)
BATCH = torch.linspace(-1, 1, 32).reshape(8, 4).sin()


class Unregistered(nn.Module):
    """Has a layer in a list, so that it is not part of the model."""

    def __init__(self, requires_grad):
        super().__init__()
        self.layers = [nn.Linear(4, 4).requires_grad_(requires_grad)]
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.layers[0](x).tanh())


def of_a_teacher(requires_grad):
    teacher = nn.Linear(4, 1).requires_grad_(requires_grad)
    return nn.Linear(4, 1), lambda model, batch: (model(batch) - teacher(batch)).square().mean()


def of_a_hidden_layer(requires_grad):
    return Unregistered(requires_grad), lambda model, batch: (model(batch) - 1).square().mean()


def trained(make, requires_grad, compiled, **options):
    torch.manual_seed(0)
    module, loss = make(requires_grad)
    state, step = fx.init(module, TX, seed=0), fx.train_step(loss, TX, **options)
    step = compiled(step)
    for _ in range(3):
        state, output = step(state, BATCH)
    return state, output


OPTIONS = ({}, {"differentiate": "func"}, {"differentiate": "autograd"}, {"accumulate": 2}, {"precision": "bf16"})


@pytest.mark.parametrize("make", [of_a_teacher, of_a_hidden_layer])
@pytest.mark.parametrize("options", OPTIONS, ids=map(str, OPTIONS))
@pytest.mark.parametrize("backend", [None, "eager"])
def test_results_have_no_graph_and_are_those_without_gradients(make, options, backend):
    def compiled(step):
        return step if backend is None else fx.compile(step, backend=backend)

    found, expected = (trained(make, requires_grad, compiled, **options) for requires_grad in (True, False))
    assert not any(leaf.requires_grad for leaf in tree.leaves(found))
    testing.assert_equal(found, expected, "state and output")


@pytest.mark.parametrize("make", [of_a_teacher, of_a_hidden_layer])
def test_compiled_steps_do_not_warn_of_operators_without_gradients(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        state, _ = trained(make, True, fx.compile)
    assert not any(leaf.requires_grad for leaf in tree.leaves(state))
