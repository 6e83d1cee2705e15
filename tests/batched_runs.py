"""A small regression in float64, states for a batch of its runs, and their comparison with single runs."""

import torch
from torch import nn

import fxtrain as fx
from fxtrain import tree

COUNT = 3


def data(count=4, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, 4, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.randn(count, size, 1, generator=generator, dtype=torch.float64)
    return [{"x": x[i], "y": (x[i].sum(-1, keepdim=True) + noise[i]).tanh()} for i in range(count)]


def module():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def loss_fn(model, batch):
    error = model(batch["x"]) - batch["y"]
    return error.square().mean(), {"mae": error.abs().mean()}


tx = fx.optim.inject_hyperparams(fx.optim.sgd)(learning_rate=0.05, momentum=0.9)
eval_step = fx.eval_step(loss_fn)


def step(**options):
    return fx.train_step(loss_fn, tx, **options)


def starts(count=COUNT, rates=(0.5, 0.05, 0.005), make=module):
    states = []
    for index in range(count):
        with torch.random.fork_rng():
            torch.manual_seed(index)
            state = fx.init(make(), tx, seed=index)
        rate = rates[index % len(rates)]
        states.append(state.replace(opt_state=fx.optim.set_hyperparams(state.opt_state, learning_rate=rate)))
    return states


def evaluation(**options):
    return {"eval_step": eval_step, "eval_data": data(2, seed=1), **options}


# The sums of an epoch's metrics are those of the batch, and restart with its next epoch.
SUMS = "loop/epoch_metrics"


def assert_same(member, alone, ignore=()):
    """Asserts that two states are equal up to the rounding of batched matmuls in float64."""
    ignore = (*ignore, SUMS)
    sides = [dict(zip(tree.paths(each, "state"), tree.leaves(each), strict=True)) for each in (member, alone)]
    names = [{path for path in side if not any(part in path for part in ignore)} for side in sides]
    assert names[0] == names[1]
    for path in names[0]:
        ours, theirs = (side[path] for side in sides)
        torch.testing.assert_close(
            ours, theirs, rtol=1e-7, atol=1e-9, equal_nan=True, msg=lambda text, path=path: f"{path}: {text}"
        )
