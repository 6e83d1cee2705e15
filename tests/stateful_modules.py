"""A linear layer that tests extend with Python state, and its losses."""

import torch
from torch import nn

import fxtrain as fx

X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])


class Base(nn.Module):
    """A linear layer, extended by each test."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 1)
        with torch.no_grad():
            self.inner.weight.copy_(torch.tensor([[0.5, -0.25]]))
            self.inner.bias.fill_(0.1)
        self.start()

    def start(self):
        pass


def loss_fn(model, batch):
    return model(batch).square().mean()


def losses(module, *, loss_fn=loss_fn, backend="eager", steps=4, rate=0.0):
    """Returns the losses of some steps. At the default learning rate of 0 they are equal for a pure module."""
    tx = fx.optim.sgd(rate)
    step = fx.train_step(loss_fn, tx)
    if backend != "eager":
        step = fx.compile(step) if backend == "traced" else fx.compile(step, backend="eager")
    state, found = fx.init(module, tx), []
    for _ in range(steps):
        state, output = step(state, X)
        found.append(float(output.metrics["loss"]))
    return found


class Caches(Base):
    """Writes attributes that libraries write: caches, flags, the last output, statistics for inspection."""

    def start(self):
        self.table, self.last, self.initialized, self.options = None, None, False, {"seen": set(), "shapes": []}

    def forward(self, x):
        if self.table is None or self.table.shape[0] < len(x):
            self.table = torch.linspace(1.0, 2.0, len(x))[:, None]
        self.initialized = True
        self.options["seen"].add(tuple(x.shape))
        if x.shape not in self.options["shapes"]:
            self.options["shapes"].append(x.shape)
        self.last = self.inner(x) * self.table
        self.memo = {"last": [self.last]}
        return self.last
