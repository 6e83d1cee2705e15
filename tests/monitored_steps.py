"""A model with known gradients, its monitored steps, and what monitors publish after them."""

import torch

import fxtrain as fx
from fxtrain import tree

START = {"first": torch.tensor([1.0, 2.0]), "second": torch.tensor([4.0]), "third": torch.tensor([3.0])}
RATE = 0.5


def loss_fn(model, batch):
    return (model["first"] * torch.tensor([3.0, -4.0])).sum() + batch * model["second"].sum() + 0 * model["third"].sum()


def after_a_step(monitor, scale=10.0, steps=1):
    """Returns the state after steps with gradients (3, -4), (scale,) and (0,)."""
    tx = fx.optim.sgd(RATE)
    step = fx.train_step(loss_fn, tx, callbacks=monitor)
    state = fx.attach(fx.init(START, tx), monitor)
    for _ in range(steps):
        state, _ = step(state, torch.tensor(scale))
    return state


def published(monitor, state, step=1):
    event = fx.StepEnd(step=step, metrics={})
    log = fx.compose(monitor)(state, event)[1].log
    return {name: entry.value for name, entry in log.items() if bool(entry.when)}


def updated(step, values, skipped=False):
    """Returns an Updated event of a model with one parameter of shape [2]."""
    loss = torch.tensor(0.0)
    grads = {"w": torch.tensor(values)}
    return fx.Updated(
        step=torch.tensor(step),
        loss=loss,
        metrics={"loss": loss},
        grads=grads,
        updates=tree.map(lambda g: -0.1 * g, grads),
        skipped=torch.tensor(skipped),
    )
