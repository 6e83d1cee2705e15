"""A package and a configuration for tests of ``fxtrain train``, as a user writes them."""

MODULE = """
import enum
import pathlib
import time

import torch
from torch import nn

import fxtrain as fx

MADE = []


def load(count: int = 64):
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    return {"x": x, "y": (x.sum(1) > 0).long()}


def examples():
    return [dict(zip("xy", pair)) for pair in zip(*load().values())]


def interrupted():
    raise KeyboardInterrupt


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


class Net(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, width), nn.Dropout(0.1), nn.Linear(width, 2))

    def forward(self, x):
        return self.layers(x)


class Wide(Net):
    width: str = "an attribute, not the argument"


class Log:
    def __init__(self, name: str = "log"):
        MADE.append(self)

    def __call__(self, state, event, control):
        pass


def pair(first, second, *, healthy: tuple[float, float] = (0.5, 2.0)):
    MADE.append((first, second))
    return lambda state, event, control: None


def is_matrix(path, leaf):
    return leaf.ndim == 2


def label(path, leaf):
    return "matrix" if leaf.ndim == 2 else "other"


class Speed(enum.Enum):
    FAST = 1


def typed(path: pathlib.Path, speed: Speed, dtype: torch.dtype, kind: type[nn.Module], *rest: float, **options: int):
    MADE.append((path, speed, dtype, kind, rest, options))
    return lambda state, event, control: None


def stop_when_good(threshold: float = 0.01):
    def stop(state, event: fx.EvalEnd):
        return state, fx.Control(stop=event.metrics["loss"] < threshold, reason="good enough")

    return stop


def slow(seconds: float):
    def wait(state, event: fx.StepEnd, control):
        time.sleep(seconds)

    return wait


def broken():
    return {}["nothing"]


def failing_loss(model, batch):
    raise RuntimeError("no loss today")


def baseline(width: int = 8, steps: int = 20, lr: float = 0.1):
    tx = fx.optim.adamw(lr)
    step = fx.train_step(loss_fn, tx)
    return dict(state=fx.init(Net(width), tx), step=step, data=fx.data.batches(load(), 16), steps=steps)


def misnamed():
    return {**baseline(), "callback": []}


def incomplete():
    return {"state": baseline()["state"]}


def nothing():
    pass
"""

CONFIG = """
model: {shop.Net: {width: 16}}
optimizer:
  chain:
  - clip_by_global_norm: [1.0]
  - adamw: {learning_rate: {cosine: {init_value: 1e-2, decay_steps: 100}}}
loss: shop.loss_fn
data: {batches: {source: {shop.load: {}}, batch_size: 16}}
eval_data: {batches: {source: {shop.load: {count: 32}}, batch_size: 16}}
callbacks:
- early_stopping: {metric: loss, patience: 3}
- shop.stop_when_good:
- when: {trigger: {every: {epochs: 2}}, callback: {save: {}}}
observers:
- write: {writers: [&log {jsonl: {path: $RUN/more.jsonl}}], every: 5}
- memory: {writers: [*log], every: 10}
epochs: 3
compile: false
"""
