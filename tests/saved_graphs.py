"""Steps whose compiled graphs are saved in a folder, and a compiler that counts its graphs."""

import builtins
import json

import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import tree
from fxtrain.compiler.lowering import _trace as traced

TX = fx.optim.sgd(1e-2)


def loss_fn(model, batch):
    return model(batch).square().mean()


def start(width=4):
    torch.manual_seed(0)
    return fx.init(nn.Linear(3, width), TX, seed=0)


BATCH = torch.linspace(-1, 1, 24).view(8, 3)


def make(folder, **options):
    return fx.compile(fx.train_step(loss_fn, TX), artefacts=folder, **options)


def steps(step, count=3, state=None):
    state = start() if state is None else state
    for _ in range(count):
        state, _ = step(state, BATCH)
    return state


def same(first, second):
    return all(map(torch.equal, tree.leaves(first), tree.leaves(second)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the graph of one step, and the state after three of its steps."""
    parent = tmp_path_factory.mktemp("made")
    folder, cache = parent / "graphs", parent / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
        return folder, steps(make(folder))


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the folder."""
    copy = tmp_path / "artefacts"
    copy.mkdir()
    for path in made[0].glob("*.fxc"):
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """An empty cache, and a compiler that counts its graphs and runs them operation by operation."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    graphs = []

    def compile_graph(graph, *_):
        graphs.append(graph)
        code = f"def call(tensors):\n    return graph{len(graphs)}(*tensors)"
        calls = {"libraries": [], "kernels": {}, "functions": []}
        files = {"code.py": code.encode(), "calls.json": json.dumps(calls).encode()}
        setattr(builtins, f"graph{len(graphs)}", graph)
        return traced.Compiled(lambda tensors: graph(*tensors), lambda: files, {"kernels": 0})

    monkeypatch.setattr(traced, "compile_by_inductor", compile_graph)
    yield graphs
    for index in range(len(graphs)):
        delattr(builtins, f"graph{index + 1}")


def file_in(folder):
    (path,) = folder.glob("*.fxc")
    return path
