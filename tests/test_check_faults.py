"""Faults that the check of compiled steps must find, each injected into the trace of an otherwise correct step."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxtrain as fx

trace = importlib.import_module("fxtrain.compiler.lowering._trace")

X = torch.linspace(-2, 2, 96).reshape(16, 6).sin()
BATCH = {"x": X, "y": torch.arange(16) % 3}


@pytest.fixture(autouse=True)
def _graphs_run_as_traced(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(trace, "_compiled", lambda graph, *_: lambda given: torch.fx.Interpreter(graph).run(*given))


def is_at_fault():
    """Faults are in the compiled step only."""
    return bool(torch.compiler.is_compiling())


def with_gradient_times(factor, value):
    return value * factor - (value * (factor - 1)).detach()


def tanh_gelu(model, hidden):
    return hidden + (F.gelu(hidden, approximate="tanh") - F.gelu(hidden)).detach()


def wrong_bias_gradient(model, logits):
    bias = model.outer.bias
    return logits + (with_gradient_times(1.01, bias) - bias)


def wrong_embedding_row(model, hidden):
    return with_gradient_times(torch.ones(len(hidden), 1).index_fill(0, torch.tensor([3]), 1.01), hidden)


MODEL_FAULTS = {
    "approximate activation": ("gelu", tanh_gelu),
    "dropout without scaling": ("dropout", lambda model, hidden: hidden * 0.8),
    "dropout scaled by 0.999": ("dropout", lambda model, hidden: hidden * 0.999),
    "normalization off by 1e-4": ("norm", lambda model, hidden: hidden * 0.9999),
    "activations rounded to bfloat16": ("gelu", lambda model, hidden: hidden.bfloat16().float()),
    "activations rounded to float16": ("gelu", lambda model, hidden: hidden.half().float()),
    "gradient of one bias": ("logits", wrong_bias_gradient),
    "gradient of one embedding row": ("table", wrong_embedding_row),
}


class Model(nn.Module):
    """The gradient of ``inner.bias`` is zero but for rounding."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.table, self.inner, self.norm = nn.Embedding(20, 6), nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.drop, self.outer = nn.Dropout(0.2), nn.Linear(8, 3)

    def forward(self, x):
        table = self.at("table", self.table((x[:, 0] * 5).long() % 20))
        hidden = self.at("norm", self.norm(self.inner(x + table)))
        hidden = self.at("dropout", self.drop(self.at("gelu", F.gelu(hidden))))
        return self.at("logits", self.outer(hidden))

    def at(self, place, value):
        where, change = MODEL_FAULTS.get(self.fault, (None, None))
        return change(self, value) if where == place and is_at_fault() else value


def loss_of(fault):
    def loss_fn(model, batch):
        logits = model(batch["x"])
        smoothing = 1e-3 if fault == "label smoothing" and is_at_fault() else 0.0
        correct = (logits.argmax(-1) == batch["y"]).sum()
        if fault == "count of correct answers" and is_at_fault():
            correct = correct + 1
        return F.cross_entropy(logits, batch["y"], label_smoothing=smoothing), {"correct": correct}

    return loss_fn


def taken(step, state, steps=2):
    for _ in range(steps):
        state, output = step(state, BATCH)
    return state, output


@pytest.mark.parametrize("fault", [*MODEL_FAULTS, "label smoothing", "count of correct answers"])
def test_fault_in_the_loss_is_found(fault):
    tx = fx.optim.sgd(1e-3, momentum=0.9)
    step = fx.compile(fx.train_step(loss_of(fault), tx))
    with pytest.raises(fx.MiscompiledError):
        step(fx.init(Model(fault), tx), BATCH)


OPTIMIZER_FAULTS = {
    "schedule off by one": lambda: fx.optim.sgd(lambda step: 1e-5 * (step + 1 + is_at_fault())),
    "lost update": lambda: fx.optim.sgd(0.0 if is_at_fault() else 1e-5),
    "momentum": lambda: fx.optim.sgd(1e-3, momentum=0.899 if is_at_fault() else 0.9),
    "decay of weights": lambda: fx.optim.adamw(1e-3, weight_decay=0.0 if is_at_fault() else 0.01),
    "epsilon of Adam": lambda: fx.optim.adam(1e-3, eps=1e-7 if is_at_fault() else 1e-8),
    "clipping": lambda: fx.optim.chain(fx.optim.clip_by_global_norm(0.1 + 0.001 * is_at_fault()), fx.optim.sgd(1e-3)),
}


@pytest.mark.parametrize("fault", OPTIMIZER_FAULTS)
def test_fault_in_the_optimizer_is_found(fault):
    make = OPTIMIZER_FAULTS[fault]
    tx = fx.optim.GradientTransformation(make().init, lambda *args, **options: make().update(*args, **options))
    step = fx.compile(fx.train_step(loss_of(None), tx))
    with pytest.raises(fx.MiscompiledError):
        taken(step, fx.init(Model(None), tx))


def test_step_without_fault_passes():
    tx = fx.optim.adamw(1e-3)
    taken(fx.compile(fx.train_step(loss_of(None), tx)), fx.init(Model(None), tx))


@pytest.mark.parametrize("steps", [0, 1])
def test_donated_state_survives_a_mismatch(steps):
    scale = [1.0]

    def loss_fn(model, batch):
        return (model(batch["x"]) * (scale[0] + is_at_fault() * (1 - steps))).square().mean()

    tx = fx.optim.adam(1e-3)
    uncompiled = fx.train_step(loss_fn, tx)
    step = fx.compile(uncompiled, donate=True)
    state, _ = taken(step, fx.init(nn.Linear(6, 3), tx), steps) if steps else (fx.init(nn.Linear(6, 3), tx), None)
    scale[0], copy = 1.5, state.copy()
    with pytest.raises(fx.MiscompiledError):
        step(state, BATCH)
    for one, two in zip(fx.tree.leaves(state), fx.tree.leaves(copy), strict=True):
        assert torch.equal(one, two)
    # The user can go on.
    new, _ = uncompiled(state, BATCH)
    assert int(new.step) == steps + 1
