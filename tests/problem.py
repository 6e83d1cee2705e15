"""One small training problem with dropout, batch norm, a schedule and momentum, shared by most tests."""

import torch
from torch import nn

import fxtrain as fx
from fxtrain.step import ManySteps

BATCHES = 3


def data(count=BATCHES, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, 4, generator=generator)
    y = (x.sum(-1, keepdim=True) + 0.1 * torch.randn(count, size, 1, generator=generator)).tanh()
    return [{"x": x[i], "y": y[i]} for i in range(count)]


def module():
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
    torch.random.set_rng_state(generator_state)
    return made


def loss_fn(model, batch):
    error = model(batch["x"]) - batch["y"]
    return error.square().mean(), {"mae": error.abs().mean()}


def transform():
    return fx.optim.chain(fx.optim.clip_by_global_norm(1.0), fx.optim.adamw(fx.schedules.cosine(1e-2, 100)))


def start(seed=0):
    return fx.init(module(), transform(), seed=seed)


def step(**options):
    return fx.train_step(loss_fn, transform(), **options)


eval_step = fx.eval_step(loss_fn)


class Together:
    """An uncompiled multi-step: the interface that the loop requires of a compiled step."""

    def __init__(self, step, count):
        self.step, self.steps_per_call = step, count
        self.callbacks, self.fires = step.callbacks, step.fires

    def __call__(self, state, batch):
        return self.step(state, batch)

    def with_callbacks(self, callbacks):
        return Together(self.step.with_callbacks(callbacks), self.steps_per_call)

    def multi_step(self, state, batches):
        return ManySteps(self.step, self.steps_per_call)(state, batches)


def fit(state=None, step=None, **options):
    options = {"steps": 6, **options}
    return fx.fit(state or start(), step or fx.train_step(loss_fn, transform()), data(), **options)


def recorder(into):
    """Returns an observer that appends all events to ``into``."""

    def record(state, event, control):
        into.append(event)

    return record


def state_with(*callbacks):
    return fx.attach(fx.init(torch.nn.Linear(1, 1)), fx.compose(*callbacks))


def adder(name, amount):
    """A stateful callback that does not commute with other adders: new slot = 2 * (sum of all slots) + amount."""

    def update(state, event: fx.StepEnd, memory):
        seen = sum(state.slots.values())
        return 2 * seen + amount, fx.Control(log={f"{name}/{event.step}": memory})

    return fx.stateful(name, lambda state: torch.tensor(1), update)


events = [fx.StepEnd(step=step, metrics={"loss": torch.tensor(1.0 / step)}) for step in (1, 2, 3)]


SMALL_BATCH = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5], [2.0, 0.0]])


def linear(size=2):
    generator = torch.Generator().manual_seed(0)
    made = nn.Linear(size, 1)
    with torch.no_grad():
        made.weight.copy_(torch.randn(1, size, generator=generator))
        made.bias.zero_()
    return made


def squares(model, batch):
    return model(batch).square().mean()


def train(loss_fn=squares, tx=None, module=None, **options):
    """Returns a state and its step, with the slots attached."""
    tx = tx or fx.optim.sgd(0.1)
    step = fx.train_step(loss_fn, tx, **options)
    return fx.attach(fx.init(module or linear(), tx), step), step
