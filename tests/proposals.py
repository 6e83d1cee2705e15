"""The expressions of fxtrain that errors propose for optimizers of torch, and the steps that both take."""

import re

import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import optim


def message(call):
    with pytest.raises(TypeError) as caught:
        call()
    return str(caught.value)


def expression(text):
    return re.search(r"Use (.*?)\.?(\n|$)", text).group(1)


def evaluated(text):
    return eval(expression(text), {"fx": fx, "torch": torch})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 2)


def net(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    module = Net()
    for value in module.parameters():
        value.data = torch.randn(value.shape, generator=generator, dtype=dtype)
    return module


def grads_of(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    return {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        for name, value in params.items()
    }


def assert_same_steps(tx, module, optimizer, scheduler=None, *, steps=20, tolerance=1e-12):
    params = {name: value.detach().clone() for name, value in module.named_parameters()}
    state = tx.init(params)
    named = dict(module.named_parameters())
    for step in range(steps):
        grads = grads_of(params, step)
        updates, state = tx.update(grads, state, params)
        params = optim.apply_updates(params, updates)
        for name, value in named.items():
            value.grad = grads[name].clone()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    for name, value in named.items():
        torch.testing.assert_close(
            params[name], value.detach(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m
        )


def no_decay(module):
    decayed = [value for value in module.parameters() if value.ndim > 1]
    others = [value for value in module.parameters() if value.ndim <= 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


GROUPS = {
    "decay by dimensions": no_decay,
    "one module apart": lambda module: [
        {"params": module.head.parameters(), "lr": 0.5},
        {"params": [*module.embedding.parameters(), *module.norm.parameters()]},
    ],
    "one name apart": lambda module: [
        {"params": [module.norm.bias, module.head.bias], "lr": 0.5},
        {"params": [module.norm.weight, module.head.weight, module.embedding.weight]},
    ],
    "scattered": lambda module: [
        {"params": [module.norm.bias, module.head.weight], "lr": 0.5},
        {"params": [module.norm.weight], "eps": 0.1},
        {"params": [module.head.bias, module.embedding.weight]},
    ],
    "some left out": lambda module: [{"params": module.head.parameters()}],
    "equal groups": lambda module: [{"params": module.head.parameters()}, {"params": module.norm.parameters()}],
}
