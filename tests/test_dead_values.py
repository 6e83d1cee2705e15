"""Graphs that write in place are compiled to the same code with and without values that nothing reads."""

import contextlib
import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fxtrain._torch_internals import inductor, kernels, tracing
from fxtrain.compiler.lowering._trace import _unwrapped

scheduler = pytest.importorskip("torch._inductor.scheduler")

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.int64)
SHAPES = ((4, 16), (4, 16), (16,), (1,), (64, 1))


def update(choose):
    """Returns a random function that overwrites its arguments, with views, dead code and reads after writes."""

    def combined(one, two):
        kind = choose.randrange(6)
        if kind == 0:
            return one.lerp(two.to(one.dtype), 0.1) if one.is_floating_point() and one.shape == two.shape else one + 1
        if kind == 1:
            return torch.where(one > 0, one, (one * 3).to(one.dtype))
        if kind == 2:
            return one.float().sin().to(one.dtype)
        if kind == 3:
            return one - one.float().mean(-1, keepdim=True).to(one.dtype)
        if kind == 4:
            return one.flip(0) + one.flatten()[-1]
        return one * two.flatten()[0].to(one.dtype)

    def view(x):
        return choose.choice((x, x[-3:], x.flatten()[::2], x.T if x.ndim == 2 else x))

    def function(*given):
        values = list(given)
        for _ in range(choose.randrange(4, 9)):
            one, two = choose.choice(values), choose.choice(values)
            values.append(combined(view(one), two))
            if choose.random() < 0.4:
                target = view(choose.choice(given))
                target.copy_(combined(target.clone(), choose.choice(values)))
        for target in choose.sample(given, 3):
            target.copy_(combined(combined(target, choose.choice(values)), choose.choice(given)))
        return [value.clone() for value in choose.sample(values, 2)]

    return function


def code(function, given, monkeypatch, *, skipped):
    """Returns generated code, with buffers numbered by their first use, and the number of scheduled nodes."""
    graph = tracing.make_fx(function, tracing_mode="fake")(*given)
    fakes = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    scheduled = []
    start = scheduler.Scheduler.__init__
    with monkeypatch.context() as patch:
        # Nothing runs, so nothing has to be compiled.
        patch.setattr(kernels, "build", lambda given, submit: [lambda *arguments: None for _ in given])
        patch.setattr(scheduler.Scheduler, "__init__", lambda self, n: scheduled.append(len(n)) or start(self, n))
        if not skipped:
            patch.setattr(inductor, "dead_values_skipped", contextlib.nullcontext)
        compiled = inductor.compile_graph(graph, fakes, {"force_disable_caches": True})
    numbers: dict[str, str] = {}
    returned: Any = graph.graph.output_node().args[0]
    source = re.sub(r"# AOT ID: .*", "", _unwrapped(compiled, len(returned)).source_code)
    return re.sub(r"\bbuf\d+\b", lambda at: numbers.setdefault(at[0], f"buf{len(numbers)}"), source), sum(scheduled)


@pytest.mark.parametrize("seed", range(5))
def test_code_is_the_same(seed, monkeypatch):
    choose = random.Random(seed)
    given: list[Tensor] = [torch.ones(choose.choice(SHAPES), dtype=choose.choice(DTYPES)) for _ in range(5)]
    seed = choose.random()
    found, few = code(update(random.Random(seed)), given, monkeypatch, skipped=True)
    expected, many = code(update(random.Random(seed)), given, monkeypatch, skipped=False)
    assert found == expected
    assert few <= many


def test_intermediate_results_of_an_update_are_not_scheduled(monkeypatch):
    def function(parameter, moment, gradient):
        new = moment + 0.1 * (gradient - moment)
        parameter.copy_(parameter - 0.01 * (parameter * 0.1 + new / (new.abs().sqrt() + 1e-8)))
        moment.copy_(new)
        return [gradient.sum()]

    given = [torch.ones(32) for _ in range(3)]
    (_, few), (_, many) = (code(function, given, monkeypatch, skipped=skipped) for skipped in (True, False))
    assert few == 5  # two values, each with a copy, and the sum
    assert many > few
