"""Graphs are compiled to the same code with and without what Inductor would generate in vain."""

import contextlib
import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fxtrain._torch_internals import inductor, kernels, tracing
from fxtrain.compiler.lowering._inductor import _unwrapped

scheduler = pytest.importorskip("torch._inductor.scheduler")
cpp = pytest.importorskip("torch._inductor.codegen.cpp")
cpu_vec_isa = pytest.importorskip("torch._inductor.cpu_vec_isa")

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


def code(function, given, monkeypatch, *, without=None):
    """Returns generated code, with buffers numbered by their first use, and the numbers of nodes and kernels.

    Args:
        without: The context of ``inductor`` to leave out.
    """
    graph = tracing.make_fx(function, tracing_mode="fake")(*given)
    fakes = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    scheduled, generated = [], []
    start, generate = scheduler.Scheduler.__init__, cpp.CppVecKernel.__init__
    with monkeypatch.context() as patch:
        # Nothing runs, so nothing has to be compiled.
        patch.setattr(kernels, "begin_build", lambda given, submit: lambda: [lambda *arguments: None for _ in given])
        patch.setattr(scheduler.Scheduler, "__init__", lambda self, n: scheduled.append(len(n)) or start(self, n))
        patch.setattr(cpp.CppVecKernel, "__init__", lambda self, *a: generated.append(self) or generate(self, *a))
        if without is not None:
            patch.setattr(inductor, without, contextlib.nullcontext)
        compiled = inductor.compile_graph(graph, fakes, {"force_disable_caches": True})
    numbers: dict[str, str] = {}
    returned: Any = graph.graph.output_node().args[0]
    source = re.sub(r"# AOT ID: .*", "", _unwrapped(compiled, len(returned)).source_code)
    source = re.sub(r"\bbuf\d+\b", lambda at: numbers.setdefault(at[0], f"buf{len(numbers)}"), source)
    return source, sum(scheduled), len(generated)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_code_is_the_same(seed, monkeypatch):
    choose = random.Random(seed)
    given: list[Tensor] = [torch.ones(choose.choice(SHAPES), dtype=choose.choice(DTYPES)) for _ in range(5)]
    seed = choose.random()
    found, nodes, kernels = code(update(random.Random(seed)), given, monkeypatch)
    expected, more_nodes, _ = code(update(random.Random(seed)), given, monkeypatch, without="dead_values_skipped")
    assert found == expected
    assert nodes <= more_nodes
    expected, _, more_kernels = code(update(random.Random(seed)), given, monkeypatch, without="empty_tails_skipped")
    assert found == expected
    assert kernels <= more_kernels
    expected, *_ = code(update(random.Random(seed)), given, monkeypatch, without="dtype_rules_kept")
    assert found == expected


def test_intermediate_results_of_an_update_are_not_scheduled(monkeypatch):
    def function(parameter, moment, gradient):
        new = moment + 0.1 * (gradient - moment)
        parameter.copy_(parameter - 0.01 * (parameter * 0.1 + new / (new.abs().sqrt() + 1e-8)))
        moment.copy_(new)
        return [gradient.sum()]

    given = [torch.ones(32) for _ in range(3)]
    _, few, _ = code(function, given, monkeypatch)
    _, many, _ = code(function, given, monkeypatch, without="dead_values_skipped")
    assert few == 5  # two values, each with a copy, and the sum
    assert many > few


@pytest.mark.parametrize(
    ("rows", "columns", "extra", "skips"),
    [
        (1, 2, (0, 0), True),
        (0.5, 2, (0, 0), False),
        (1, 2, (0, -1), False),
        (2, 4, (0, 0), True),
        (2, 4, (0, 1), False),
        (2, 4, (1, 0), False),
    ],
)
def test_loops_without_a_remainder_have_no_kernel_for_it(rows, columns, extra, skips, monkeypatch):
    """Rows and columns are given in vectors, whose size depends on the processor, and in further elements."""

    def function(x, y):
        return [(x + y.T).T.contiguous() * 2]

    width = cpu_vec_isa.pick_vec_isa().nelements()
    shape = int(rows * width) + extra[0], columns * width + extra[1]
    given = [torch.ones(shape), torch.ones(shape).T.contiguous()]
    found, _, kernels = code(function, given, monkeypatch)
    expected, _, more_kernels = code(function, given, monkeypatch, without="empty_tails_skipped")
    assert found == expected
    assert (kernels < more_kernels) is skips


def test_reductions_keep_the_kernel_for_a_remainder(monkeypatch):
    given = [torch.ones(8, 32)]
    found, *_ = code(lambda x: [x.sum(1), x.exp().amax(0)], given, monkeypatch)
    expected, *_ = code(lambda x: [x.sum(1), x.exp().amax(0)], given, monkeypatch, without="empty_tails_skipped")
    assert found == expected
