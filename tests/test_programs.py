"""Graphs as programs: each computes the same as its graph, in the same memory, with repeated parts compiled once."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule

import fxtrain as fx
from fxtrain.compiler.passes import _repeats as repeats
from fxtrain.compiler.passes import _splitting as splitting

inductor = importlib.import_module("fxtrain.compiler.lowering._inductor")
traced = importlib.import_module("fxtrain.compiler.lowering._trace")


class Block(nn.Module):
    def __init__(self, width, dropout=0.0):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.down(F.silu(self.up(self.norm(x)))))


class Stack(nn.Module):
    def __init__(self, layers=4, width=16, dropout=0.0):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(layers))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Gated(nn.Module):
    """Layers whose norms and gates are elementwise, as in Llama."""

    def __init__(self, layers=3, width=16):
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.ups = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.downs = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(width)) for _ in range(layers))

    def forward(self, x):
        for gate, up, down, scale in zip(self.gates, self.ups, self.downs, self.scales, strict=True):
            normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale
            x = x + down(F.silu(gate(normed)) * up(normed))
        return x


class Shared(nn.Module):
    """A stack that applies the same block several times."""

    def __init__(self, width=16):
        super().__init__()
        self.block, self.head = Block(width), nn.Linear(width, 3)

    def forward(self, x):
        for _ in range(4):
            x = self.block(x)
        return self.head(x)


class Convolutions(nn.Module):
    def __init__(self, layers=4, width=8):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(layers))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(layers))

    def forward(self, x):
        x = x.view(len(x), 1, 4, 4).expand(-1, 8, -1, -1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + F.relu(norm(layer(x)))
        return x.mean((2, 3))[:, :3]


MODELS = {
    "stack": Stack,
    "dropout": lambda: Stack(dropout=0.2),
    "gated": Gated,
    "shared": Shared,
    "convolutions": Convolutions,
    "deep": lambda: Stack(layers=9, width=8),
}
OPTIMIZERS = {
    "adamw": lambda: fx.optim.adamw(1e-2),
    "sgd": lambda: fx.optim.sgd(1e-2, momentum=0.9),
    "clipped": lambda: fx.optim.chain(fx.optim.clip_by_global_norm(1.0), fx.optim.adamw(1e-2)),
    "scheduled": lambda: fx.optim.adamw(fx.schedules.cosine(1e-2, 100)),
    "lion": lambda: fx.optim.lion(1e-3),
}


def loss_fn(model, batch):
    return model(batch["x"]).square().mean()


@pytest.fixture
def splits(monkeypatch):
    """Checks each program against its graph, operation by operation, and collects them."""
    found = []

    def compile_graph(graph, examples, *_):
        program = splitting.split(graph)
        found.append(program)

        def call(tensors):
            if program is None:
                return graph(*tensors)
            copies = [tensor.clone() for tensor in tensors]
            expected = graph(*copies)
            run = inductor._program([_boxed(part) for part in program.graphs], program.calls, program.outputs)
            outputs = run(list(tensors))
            for mine, theirs in zip([*outputs, *tensors], [*expected, *copies], strict=True):
                assert torch.equal(mine, theirs)
            return outputs

        return traced.Compiled(call, dict, {"kernels": 0})

    monkeypatch.setattr(splitting, "_MIN_ELEMENTS", 1)
    monkeypatch.setattr(repeats, "_MIN_SAVED", 8)
    monkeypatch.setattr(traced, "compile_by_inductor", compile_graph)
    return found


def _boxed(part: GraphModule):
    def run(inputs):
        results = part(*inputs)
        inputs.clear()
        return results

    return run


@pytest.mark.parametrize("donate", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_a_program_computes_the_same_bits(model, optimizer, donate, splits):
    torch.manual_seed(0)
    tx = OPTIMIZERS[optimizer]()
    state = fx.init(MODELS[model](), tx, seed=0)
    step = fx.compile(fx.train_step(loss_fn, tx), donate=donate)
    width = 8 if model == "deep" else 16
    for _ in range(3):
        state, _ = step(state, {"x": torch.randn(5, width)})
    print(
        model,
        optimizer,
        donate,
        None if splits[-1] is None else ([len(g.graph.nodes) for g in splits[-1].graphs], len(splits[-1].calls)),
    )
