"""Graphs are compiled to the same code with and without AOTAutograd."""

import random
import re
import types

import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import tree
from fxtrain._torch_internals import decomposed, inductor, tracing
from tests.test_dead_values import DTYPES, SHAPES, code, update

utils = pytest.importorskip("torch._inductor.utils")

CONSTANT = torch.ones(3, 3)


class Block(nn.Module):
    """Attention with dropout, in-place activations and a norm."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True)
        self.perceptron = nn.Sequential(nn.Linear(16, 32), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(32, 16))

    def forward(self, x):
        y = self.norm(x)
        return x + self.perceptron(x + self.attention(y, y, y, need_weights=False)[0])


class Gathered(nn.Module):
    """Embeddings, a cumulative sum, a sort, and writes to slices of intermediate results."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)

    def forward(self, x):
        rows = self.embedding((x.abs() * 10).long() % 10).cumsum(1)
        rows[:, 0] *= 2
        rows[..., 1:3].copy_(rows[..., :2].clone())
        return rows.sort(-1).values.logsumexp(-1)


def convolutions():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten())


CASES = {
    "MLP": (lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1)), (3, 4)),
    "batch norm": (convolutions, (2, 1, 8, 8)),
    "attention": (Block, (2, 5, 16)),
    "LSTM": (lambda: nn.LSTM(4, 6, batch_first=True), (2, 3, 4)),
    "writes": (Gathered, (3, 4)),
}


def normalized(source):
    """Returns code with kernels named by their first use, without the graph's number."""
    names: dict[str, str] = {}
    source = re.sub(r"# AOT ID: .*\n", "", source).strip()
    source = re.sub(r"# Topologically Sorted.*|# kernel path.*", "", source)
    return re.sub(r"\b(buf\d+|cpp_fused_\w*)\b", lambda at: names.setdefault(at[0], f"name{len(names)}"), source)


def direct(monkeypatch, *, allowed=True):
    """Returns a list that receives whether each graph was compiled without AOTAutograd."""
    compiled, real = [], decomposed.compile_decomposed

    def seen(*given):
        found = real(*given) if allowed else None
        compiled.append(found is not None)
        return found

    monkeypatch.setattr(inductor, "compile_decomposed", seen)
    return compiled


@pytest.mark.parametrize(("name", "donate"), [*((name, True) for name in CASES), ("attention", False)])
@pytest.mark.slow
def test_steps_have_the_same_code(name, donate, monkeypatch):
    build, shape = CASES[name]
    module, batch = build(), torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)
    tx = fx.optim.chain(fx.optim.clip_by_global_norm(1.0), fx.optim.adamw(1e-3))

    def loss_fn(model, batch):
        return tree.leaves(model(batch))[0].square().mean()

    codes, states = [], []
    for allowed in (True, False):
        state = fx.init(module, tx, seed=1)
        step = fx.compile(fx.train_step(loss_fn, tx), donate=donate, check=False)
        with monkeypatch.context() as patch, utils.fresh_cache():
            compiled = direct(patch, allowed=allowed)
            (state, _), found = utils.run_and_get_code(step, state, batch)
            state, _ = step(state, batch)
        assert compiled == [allowed]
        codes.append("".join(map(normalized, found)))
        states.append(state)
    assert codes[0] == codes[1]
    assert all(map(torch.equal, tree.leaves(states[0]), tree.leaves(states[1])))


@pytest.mark.parametrize("seed", range(8))
def test_random_graphs_have_the_same_code(seed, monkeypatch):
    choose = random.Random(seed)
    given = [torch.ones(choose.choice(SHAPES), dtype=choose.choice(DTYPES)) for _ in range(5)]
    seed = choose.random()
    found, *_ = code(update(random.Random(seed)), given, monkeypatch)
    with monkeypatch.context() as patch:
        direct(patch, allowed=False)
        expected, *_ = code(update(random.Random(seed)), given, monkeypatch)
    assert normalized(found) == normalized(expected)


def test_graph_is_left_to_aotautograd_if_an_interface_has_changed(monkeypatch):
    def forward():
        pytest.fail("another signature")

    monkeypatch.setattr(decomposed, "FORWARD", types.SimpleNamespace(exists=True, get=lambda: forward))
    compiled = direct(monkeypatch)
    step = fx.compile(fx.eval_step(lambda model, batch: {"loss": model(batch).mean()}))
    with utils.fresh_cache():
        step(fx.init(nn.Linear(3, 2)), torch.ones(4, 3))
    assert compiled == [False]


@pytest.mark.parametrize(
    ("function", "is_simple"),
    [
        (lambda x, y: [x @ y], True),
        (lambda x, y: [x.copy_(y) + 1], True),
        (lambda x, y: [x + torch.ones(3, 3)], True),
        (lambda x, y: [x + CONSTANT], False),
        (lambda x, y: [x[y > 2]], False),
    ],
)
def test_graphs_with_constants_or_unknown_sizes_are_left_to_aotautograd(function, is_simple):
    given = [torch.ones(3, 3), torch.ones(3, 3)]
    graph = tracing.make_fx(function, tracing_mode="fake")(*given)
    fakes = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    assert (decomposed.compile_decomposed(graph, fakes, torch._inductor.config) is not None) == is_simple
