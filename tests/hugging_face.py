"""A model, data and runs of ``fit`` for tests of callbacks of transformers."""

import pytest
import torch
from torch import nn

import fxtrain as fx

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")

TrainerCallback = transformers.TrainerCallback
X = torch.arange(12.0).reshape(6, 2) / 10


class Model(nn.Module):
    """A regression whose loss Trainer and fxtrain can both compute."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2, 1)
        self.drop = nn.Dropout(0.0)

    def forward(self, x, labels=None):
        out = self.drop(self.linear(x))
        return {"loss": (out - labels).square().mean(), "logits": out}


def rows():
    return [{"x": x, "labels": x.sum(0, keepdim=True)} for x in X]


def loss_fn(model, batch):
    return model(batch["x"], batch["labels"])["loss"]


def batches(size=2):
    return fx.data.batches({"x": X, "labels": X.sum(1, keepdim=True)}, size, shuffle=False)


def arguments(folder, **options):
    options = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "report_to": "none"} | options
    return transformers.TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, **options)


def fit(callback, *, lr=0.1, tx=None, steps=None, epochs=None, **options):
    tx = tx or fx.optim.sgd(lr)
    state = fx.init(Model(), tx)
    evaluation = {"eval_step": fx.eval_step(loss_fn), "eval_data": batches()}
    step = fx.train_step(loss_fn, tx, **options.pop("step", {}))
    return fx.fit(state, step, batches(), callbacks=callback, steps=steps, epochs=epochs, **(evaluation | options))
