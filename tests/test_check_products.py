"""The check of compiled steps where products round their float32 inputs, as cuDNN does by default."""

import importlib

import pytest
import torch
from torch import nn
from torch.fx import Interpreter

import fxtrain as fx

trace = importlib.import_module("fxtrain.compiler.lowering._trace")


class Rounding(Interpreter):
    """Stands for kernels that round the inputs of products to bfloat16."""

    def run_node(self, node):
        if not any(name in str(node.target) for name in ("mm", "convolution")):
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        rounded = [arg.bfloat16().float() if isinstance(arg, torch.Tensor) else arg for arg in args]
        return node.target(*rounded, **kwargs)


@pytest.fixture
def rounds():
    """Sets whether products of a kind round their inputs to bfloat16."""
    settings = {kind: getattr(torch.backends.mkldnn, kind) for kind in CASES}
    before = {kind: setting.fp32_precision for kind, setting in settings.items()}

    def rounds(kind):
        settings[kind].fp32_precision = "bf16"

    yield rounds
    for kind, setting in settings.items():
        setting.fp32_precision = before[kind]


def step(network, x):
    torch.manual_seed(0)
    tx = fx.optim.adam(1e-3)
    compiled = fx.compile(fx.train_step(lambda model, batch: model(batch).square().mean(), tx))
    return compiled(fx.init(network(), tx), torch.randn(x, generator=torch.Generator().manual_seed(0)))


CASES = {
    "matmul": (lambda: nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)), (64, 16)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh()), (16, 3, 8, 8)),
}


@pytest.mark.parametrize("kind", CASES)
def test_rounded_inputs_are_a_false_alarm_only_without_the_setting(kind, rounds, monkeypatch):
    monkeypatch.setattr(trace, "_compiled", lambda graph, *_: lambda given: Rounding(graph).run(*given))
    with pytest.raises(fx.MiscompiledError):
        step(*CASES[kind])
    rounds(kind)
    step(*CASES[kind])


def test_wrong_products_are_found_with_the_setting(rounds, monkeypatch):
    class Wrong(Rounding):
        def run_node(self, node):
            result = super().run_node(node)
            return result * 1.1 if "mm" in str(node.target) else result

    monkeypatch.setattr(trace, "_compiled", lambda graph, *_: lambda given: Wrong(graph).run(*given))
    rounds("matmul")
    with pytest.raises(fx.MiscompiledError):
        step(*CASES["matmul"])
