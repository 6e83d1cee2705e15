"""Graphs as programs: each computes the same as its graph, in the same memory, with repeated parts compiled once."""

import importlib
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxtrain as fx
from fxtrain.compiler.passes import _repeats as repeats
from fxtrain.compiler.passes import _splitting as splitting

lowering = importlib.import_module("fxtrain.compiler.lowering._inductor")
traced = importlib.import_module("fxtrain.compiler.lowering._trace")

WRITE = torch.ops.aten.copy_.default


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
def small(monkeypatch):
    """Splits graphs of any size."""
    monkeypatch.setattr(splitting, "_MIN_ELEMENTS", 1)
    monkeypatch.setattr(repeats, "_MIN_SAVED", 8)


@pytest.fixture
def programs(monkeypatch, small):
    """Runs each program and its graph, operation by operation, and collects the programs."""
    found = []

    def compile_graph(graph, examples, *_):
        program = splitting.split(graph)
        found.append(program)

        def call(tensors):
            if program is None:
                return graph(*tensors)
            copies = [tensor.clone() for tensor in tensors]
            expected = graph(*copies)
            run = lowering._program([_boxed(part) for part in program.graphs], program.calls, program.outputs)
            outputs = run(list(tensors))
            for mine, theirs in zip([*outputs, *tensors], [*expected, *copies], strict=True):
                assert torch.equal(mine, theirs)
            return outputs

        return traced.Compiled(call, dict, {"kernels": 0})

    monkeypatch.setattr(traced, "compile_by_inductor", compile_graph)
    return found


def _boxed(part):
    def run(inputs):
        results = part(*inputs)
        inputs.clear()
        return results

    return run


def _calls(program):
    """Returns how often each graph of a program is called, most often first."""
    return sorted(Counter(call.graph for call in program.calls).values(), reverse=True)


@pytest.mark.parametrize("donate", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_a_program_computes_the_same_bits(model, optimizer, donate, programs):
    torch.manual_seed(0)
    tx = OPTIMIZERS[optimizer]()
    state = fx.init(MODELS[model](), tx, seed=0)
    step = fx.compile(fx.train_step(loss_fn, tx), donate=donate)
    for _ in range(3):
        state, _ = step(state, {"x": torch.randn(5, 8 if model == "deep" else 16)})
    (program,) = programs
    assert program is not None
    assert _calls(program)[0] >= 2


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_layers_and_updates_are_compiled_once(dropout, programs):
    tx = fx.optim.adamw(1e-2)
    state = fx.init(Stack(layers=6, dropout=dropout), tx, seed=0)
    fx.compile(fx.train_step(loss_fn, tx), donate=True)(state, {"x": torch.randn(5, 16)})
    (program,) = programs
    forward_backward_update = _calls(program)[:3]
    assert min(forward_backward_update) >= 5  # the backward pass of the first layer may differ


def test_guards_and_moving_averages_are_part_of_repeated_updates(programs):
    tx = fx.optim.adamw(1e-2)
    callbacks = [fx.callbacks.nan_guard(), fx.callbacks.ema(0.9)]
    state = fx.init(Stack(layers=6), tx, seed=0)
    data = [{"x": torch.randn(5, 16)}] * 3
    fx.fit(state, fx.compile(fx.train_step(loss_fn, tx)), data, steps=3, callbacks=callbacks)
    assert programs[0] is not None
    written = [sum(node.target is WRITE for node in part.graph.nodes) for part in programs[0].graphs]
    repeated = Counter(call.graph for call in programs[0].calls)
    assert any(count >= 4 * 6 and repeated[index] >= 6 for index, count in enumerate(written))  # p, two moments, ema


def test_updates_that_monitors_read_are_written_where_they_are_computed(programs):
    """All that would be left of them is a choice between old and new values, one more pass over memory."""
    tx, watching = fx.optim.adamw(1e-2), fx.compose(fx.callbacks.weight_stats(), fx.callbacks.update_ratios())
    state = fx.attach(fx.init(Stack(layers=6), tx, seed=0), watching)
    fx.compile(fx.train_step(loss_fn, tx, callbacks=watching), donate=True)(state, {"x": torch.randn(5, 16)})
    (program,) = programs
    repeated = Counter(call.graph for call in program.calls)
    assert repeated.most_common(1)[0][1] >= 5  # layers
    shared = [part.graph for index, part in enumerate(program.graphs) if repeated[index] > 1]
    assert not any(node.target is WRITE for graph in shared for node in graph.nodes)


def test_updates_follow_the_gradients_that_they_read(programs):
    tx = fx.optim.adamw(1e-2)
    state = fx.init(Stack(layers=6), tx, seed=0)
    fx.compile(fx.train_step(loss_fn, tx), donate=True)(state, {"x": torch.randn(5, 16)})
    (program,) = programs
    writes = [any(node.target is WRITE for node in program.graphs[call.graph].graph.nodes) for call in program.calls]
    assert writes.index(True) < len(writes) - writes.count(True)  # not all of them at the end


def test_values_are_freed_once_nothing_reads_them(programs):
    tx = fx.optim.sgd(1e-2)
    state = fx.init(Stack(layers=6), tx, seed=0)
    fx.compile(fx.train_step(loss_fn, tx), donate=True)(state, {"x": torch.randn(5, 16)})
    (program,) = programs
    freed = Counter(slot for call in program.calls for slot in call.frees)
    assert set(freed.values()) == {1}
    for index, call in enumerate(program.calls):
        assert freed.keys().isdisjoint(program.outputs)
        assert all(slot not in later.reads for later in program.calls[index + 1 :] for slot in call.frees)


def test_a_program_that_would_take_more_memory_is_not_used(programs, monkeypatch):
    """Updates of wide layers without a graph of their own would keep all gradients until the end."""
    monkeypatch.setattr(splitting, "_FREE_BYTES", 0)
    monkeypatch.setattr(splitting, "repeated_layers", lambda *_: [])
    tx = fx.optim.adamw(1e-2)
    module = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    fx.compile(fx.train_step(loss_fn, tx), donate=True)(fx.init(module, tx, seed=0), {"x": torch.randn(2, 64)})
    assert programs == [None]


@pytest.mark.slow
@pytest.mark.parametrize("donate", [True, False])
def test_compiled_programs_are_saved_and_loaded(donate, small, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    tx = fx.optim.adamw(1e-2)
    module, batch = Stack(layers=2), {"x": torch.randn(5, 16)}
    states, parts = [], []
    compiled = lowering._compiled

    def counted(graph, *args, **options):
        parts.append(graph)
        return compiled(graph, *args, **options)

    monkeypatch.setattr(lowering, "_compiled", counted)
    for whole in (False, False, True):
        if whole:
            monkeypatch.setattr(lowering, "split", lambda graph: None)
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "other"))
        state = fx.init(module, tx, seed=0)
        step = fx.compile(fx.train_step(loss_fn, tx), donate=donate, check=False)
        for _ in range(2):
            state, _ = step(state, batch)
        states.append(fx.tree.leaves(state))
        parts.append(None)
    first, second = parts.index(None), parts.index(None, parts.index(None) + 1)
    assert first > 2  # several graphs
    assert second == first + 1  # loaded
    for program, loaded, whole in zip(*states, strict=True):
        assert torch.equal(program, loaded)
        torch.testing.assert_close(program, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_flags_that_a_step_reads_and_overwrites(small, monkeypatch, tmp_path):
    """A guard undoes steps with NaNs, and counts them, in a program as in one graph."""
    tx = fx.optim.adamw(1e-2)
    module = Stack(layers=2)
    batches = [{"x": torch.randn(5, 16)} for _ in range(5)]
    batches[1]["x"][0] = float("nan")
    batches[3]["x"][0] = float("nan")
    found, calls = [], []
    programs = lowering._program
    monkeypatch.setattr(lowering, "_program", lambda *args: calls.append(args) or programs(*args))
    for name in ("program", "whole"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / name))
        state, step = fx.init(module, tx, seed=0), fx.compile(fx.train_step(loss_fn, tx), check=False)
        callbacks = [fx.callbacks.nan_guard(), fx.callbacks.ema(0.9)]
        found.append(fx.tree.leaves(fx.fit(state, step, batches, steps=5, callbacks=callbacks).state))
        monkeypatch.setattr(lowering, "split", lambda graph: None)
    assert len(calls) == 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory", ["recompute", 0.9])
def test_steps_that_take_as_little_memory_as_possible_are_compiled_as_a_whole(memory, small, monkeypatch, tmp_path):
    """A part cannot reuse the memory of its inputs for its results, as a whole graph can."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = []
    monkeypatch.setattr(lowering, "split", found.append)
    tx = fx.optim.sgd(0.1)
    step = fx.compile(fx.train_step(loss_fn, tx), memory=memory)
    step(fx.init(Stack(2, 4), tx), {"x": torch.randn(8, 4)})
    assert len(found) == (0 if memory == "recompute" else 1)


def test_a_graph_that_cannot_be_split_is_compiled_as_a_whole(monkeypatch, caplog):
    def broken(graph):
        raise KeyError("a case that nobody thought of")

    monkeypatch.setattr(lowering, "split", broken)
    with caplog.at_level("DEBUG", logger=lowering.__name__):
        assert lowering._split(torch.fx.symbolic_trace(nn.Linear(2, 1))) is None
    assert "cannot be split" in caplog.text
