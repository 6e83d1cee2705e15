"""Compiled steps are checked against their uncompiled selves: wrong results are refused, and rounding passes."""

import importlib
import logging
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

import fxtrain as fx
from fxtrain import _torch_internals as internals
from fxtrain.compiler.check._rounding_noise import RoundingNoise

trace = importlib.import_module("fxtrain.compiler.lowering._trace")

X = torch.linspace(-2, 2, 96).reshape(16, 6).sin()
Y = torch.arange(16) % 3
BATCH = {"x": X, "y": Y}
SETTINGS = {"scale": 1.0}


class Compiler(torch.fx.Interpreter):
    """Stands for Inductor: runs a graph operation by operation, computing each in float64."""

    def __init__(self, graph, change=lambda node, result: result):
        super().__init__(graph)
        self.change = change

    def run_node(self, node):
        if node.op != "call_function":
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        return self.change(node, self.computed(node, args, kwargs))

    def computed(self, node, args, kwargs):
        result = node.target(*args, **kwargs)
        writes = node.target._schema.is_mutable if hasattr(node.target, "_schema") else True
        if writes or not isinstance(result, torch.Tensor) or result.dtype != torch.float32 or result._is_view():
            return result
        double = tree_map(
            lambda leaf: leaf.double() if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32 else leaf,
            (args, kwargs),
        )
        try:
            precise = node.target(*double[0], **double[1])
        except RuntimeError:
            return result
        return precise.float() if precise.shape == result.shape else result


class Noisy(Compiler):
    """Stands for a compiler that rounds in another way."""

    def run(self, *args, **kwargs):
        with RoundingNoise(seed=77, sign=1.0, errors=4.0):
            return super().run(*args, **kwargs)

    def computed(self, node, args, kwargs):
        return node.target(*args, **kwargs)


class SplittingNorms(internals.dispatch.TorchDispatchMode):
    """Runs norms as simpler operators, as Inductor does. A rounding error of a mean then reaches all elements."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        simpler = internals.tracing.decomposition(func) if "norm" in str(func) else None
        if simpler is None:
            return func(*args, **(kwargs or {}))
        with self:
            return simpler(*args, **(kwargs or {}))


class Split(Compiler):
    def run(self, *args, **kwargs):
        with SplittingNorms():
            return super().run(*args, **kwargs)

    def computed(self, node, args, kwargs):
        return node.target(*args, **kwargs)


@pytest.fixture(autouse=True)
def _same_parameters():
    torch.manual_seed(0)


@pytest.fixture
def compiled_by(monkeypatch):
    """Sets what compiles the graphs of traced steps."""

    def use(kind, *args):
        monkeypatch.setattr(trace, "_compiled", lambda graph, *_: lambda given: kind(graph, *args).run(*given))

    return use


def scaled(operation, factor=1.001, occurrence=0):
    """Returns a change that scales the result of one operation of a graph."""

    def change(node, result):
        found = [each for each in node.graph.nodes if operation in str(each.target)]
        return result * factor if found and node is found[occurrence] else result

    return change


def taken(step, state, batch=BATCH, steps=3):
    for _ in range(steps):
        state, output = step(state, batch)
    return state, output


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        return self.outer(self.drop(torch.tanh(self.norm(self.inner(x)))))


def cross_entropy(model, batch):
    logits = model(batch["x"])
    accuracy = (logits.argmax(-1) == batch["y"]).float().mean()
    return F.cross_entropy(logits, batch["y"]), {"accuracy": accuracy}


def squares(model, batch):
    return (model(batch["x"]) * SETTINGS["scale"]).square().mean()


class TestWrongResults:
    @pytest.mark.parametrize(
        ("operation", "donate"), [("mm", False), ("native_batch_norm", True), ("sqrt", True), ("mean", False)]
    )
    def test_operation_off_by_a_thousandth_is_refused(self, compiled_by, operation, donate):
        def change(node, result):
            if isinstance(result, tuple) and operation in str(node.target):
                return (result[0] * 1.001, *result[1:])
            return scaled(operation, occurrence=-1)(node, result)

        compiled_by(Compiler, change)
        tx = fx.optim.adamw(1e-3)
        step = fx.compile(fx.train_step(cross_entropy, tx), donate=donate)
        with pytest.raises(fx.MiscompiledError, match=r"first call .*(state|output)\.[\s\S]*check=False"):
            taken(step, fx.init(Classifier(), tx))

    @pytest.mark.parametrize("dropped", [0, 2, 3, 5])  # the others write what rounding hides
    def test_lost_write_is_refused(self, compiled_by, dropped):
        class Losing(Compiler):
            def run_node(self, node):
                writes = [each for each in node.graph.nodes if each.target is torch.ops.aten.copy_.default]
                if len(writes) > dropped and node is writes[dropped]:
                    return self.fetch_args_kwargs_from_env(node)[0][0]
                return super().run_node(node)

        compiled_by(Losing)
        tx = fx.optim.sgd(3e-5)  # updates of about 20 rounding errors of a weight
        step = fx.compile(fx.train_step(cross_entropy, tx), donate=True)
        with pytest.raises(fx.MiscompiledError):
            taken(step, fx.init(Classifier(), tx))

    def test_small_update_that_is_wrong_is_refused(self, compiled_by):
        tx = fx.optim.sgd(1e-5)
        compiled_by(Compiler, lambda node, result: result)
        step = fx.train_step(lambda model, batch: (model["w"] * batch).sum(), tx)
        state = fx.init({"w": torch.ones(4)}, tx)
        taken(fx.compile(step), state, torch.ones(4))
        last = scaled("mul", 1.3, -1)
        compiled_by(Compiler, last)
        with pytest.raises(fx.MiscompiledError, match=r"state\.params\['w'\]"):
            taken(fx.compile(step), state, torch.ones(4))

    def test_step_can_be_left_unchecked(self, compiled_by):
        compiled_by(Compiler, scaled("tanh"))
        tx = fx.optim.sgd(0.1)
        taken(fx.compile(fx.train_step(cross_entropy, tx), check=False), fx.init(Classifier(), tx))

    def test_evaluation_is_checked(self, compiled_by):
        compiled_by(Compiler, scaled("tanh", 1.01))
        step = fx.compile(fx.eval_step(cross_entropy))
        with pytest.raises(fx.MiscompiledError, match=r"output\.metrics\['loss'\]"):
            step(fx.init(Classifier()), BATCH)

    def test_several_steps_per_call_are_checked(self, compiled_by):
        compiled_by(Compiler, scaled("tanh", occurrence=1))
        tx = fx.optim.sgd(0.1)
        step = fx.compile(fx.train_step(cross_entropy, tx), steps_per_call=2)
        with pytest.raises(fx.MiscompiledError, match="2 of"):
            step.multi_step(fx.init(Classifier(), tx), [BATCH, BATCH])

    def test_each_size_of_a_dynamic_graph_is_checked(self, compiled_by):
        def change(node, result):
            return result * 1.01 if "tanh" in str(node.target) and len(result) == 9 else result

        compiled_by(Compiler, change)
        step = fx.compile(fx.eval_step(cross_entropy), dynamic=True)
        state = fx.init(Classifier())
        for size in (16, 12, 16, 10):
            step(state, {"x": X[:size], "y": Y[:size]})
        assert step.graphs == 1
        with pytest.raises(fx.MiscompiledError, match="another batch size"):
            step(state, {"x": X[:9], "y": Y[:9]})

    def test_backend_of_torch_compile_is_checked(self):
        def backend(graph, examples):
            return lambda *args: [each * 1.01 if each.is_floating_point() else each for each in graph(*args)]

        tx = fx.optim.sgd(0.1)
        step = fx.compile(fx.train_step(cross_entropy, tx), backend=backend)
        with pytest.raises(fx.MiscompiledError):
            taken(step, fx.init(Classifier(), tx))

    def test_noise_of_a_value_that_was_zero_explains_nothing_at_the_second_call(self, compiled_by):
        extra = [1e-7]

        def change(node, result):
            return result + extra[0] if "aten.sub" in str(node.target) else result

        compiled_by(Compiler, change)
        step = fx.compile(fx.eval_step(lambda model, batch: {"zero": (batch * 0.1 * 10 - batch).sum()}))
        state = fx.init(nn.ReLU())
        step(state, torch.ones(4))
        extra[0] = 5.0
        with pytest.raises(fx.MiscompiledError, match=r"second call .*output\.metrics\['zero'\]"):
            step(state, torch.ones(4))

    def test_integers_must_be_equal(self, compiled_by):
        compiled_by(Compiler, lambda node, result: result + 1 if "sum" in str(node.target) else result)
        step = fx.compile(fx.eval_step(lambda model, batch: {"count": (batch > 0).sum()}))
        with pytest.raises(fx.MiscompiledError, match=r"got another at output\.metrics"):
            step(fx.init(nn.ReLU()), X)


class TestFrozenValues:
    def test_global_that_changes_is_found_at_second_call(self, compiled_by, monkeypatch):
        compiled_by(Compiler)
        tx = fx.optim.sgd(0.1)
        step = fx.compile(fx.train_step(squares, tx))
        state, _ = step(fx.init(Classifier(), tx), BATCH)
        monkeypatch.setitem(SETTINGS, "scale", 2.0)
        with pytest.raises(fx.MiscompiledError, match=r"second call .*A value was frozen when the step was compiled"):
            step(state, BATCH)

    @pytest.mark.parametrize("sample", [random.random, np.random.random])
    def test_sample_of_a_hand_written_step_is_found_at_first_call(self, compiled_by, sample):
        @fx.Step
        def noisy(state, batch):
            return state.replace(params=state.params + sample()), fx.StepOutput({"mean": batch.mean()})

        compiled_by(Compiler)
        with pytest.raises((fx.MiscompiledError, RuntimeError), match="frozen when the step was compiled"):
            fx.compile(noisy)(fx.init(torch.tensor(1.0)), X)


class TestWithoutTraces:
    def test_global_generators_are_left_as_without_the_check(self, compiled_by):
        compiled_by(Noisy)
        tx = fx.optim.adam(1e-3)
        states = []
        for check in (False, True):
            torch.manual_seed(1), random.seed(1), np.random.seed(1)
            taken(fx.compile(fx.train_step(cross_entropy, tx), check=check), fx.init(Classifier(), tx, seed=3))
            states.append((torch.rand(3).tolist(), random.random(), np.random.random()))
        assert states[0] == states[1]

    @pytest.mark.parametrize("donate", [False, True])
    def test_results_are_bitwise_those_without_the_check(self, compiled_by, donate):
        compiled_by(Noisy)
        tx = fx.optim.adam(1e-3)
        step, state = fx.train_step(cross_entropy, tx), fx.init(Classifier(), tx)
        states = [taken(fx.compile(step, check=check, donate=donate), state.copy()) for check in (False, True)]
        for one, two in zip(*map(fx.tree.leaves, states), strict=True):
            assert torch.equal(one, two)

    def test_step_runs_only_for_the_first_two_calls(self, compiled_by):
        compiled_by(Compiler)
        calls = []

        @fx.Step
        def counted(state, batch):
            calls.append(1)
            return state.replace(params=state.params * 0.5), fx.StepOutput({"first": batch[0, 0]})

        step, state, counts = fx.compile(counted), fx.init(torch.tensor(1.0)), []
        for _ in range(5):
            state, _ = step(state, X)
            counts.append(len(calls))
        assert counts[1] - counts[0] == 1
        assert counts[1:] == counts[1:2] * 4

    def test_uncompiled_route_is_not_run_twice(self):
        calls = []

        @fx.Step
        def by_value(state, batch):
            calls.append(float(batch.sum()))
            with open("/dev/null") as file:
                file.read()
            return state.replace(params=state.params * 0.5), fx.StepOutput({"mean": batch.mean()})

        step, state = fx.compile(by_value), fx.init(torch.tensor(1.0))
        with pytest.warns(UserWarning, match="cannot be traced"):
            state, _ = step(state, X)
        before = len(calls)
        step(state, X)
        assert len(calls) == before + 1

    def test_large_state_is_not_checked_and_said(self, compiled_by, monkeypatch, caplog):
        obstacles = importlib.import_module("fxtrain.compiler.lowering._obstacles")
        monkeypatch.setattr(obstacles, "available_bytes", lambda device: 100)
        compiled_by(Compiler, scaled("tanh"))
        tx = fx.optim.sgd(0.1)
        taken(fx.compile(fx.train_step(cross_entropy, tx)), fx.init(Classifier(), tx))
        said = [each.getMessage() for each in caplog.records if "not checked" in each.getMessage()]
        assert len(said) == 1
        assert re.search(r"GB on cpu, of which .* are free", said[0])

    def test_several_processes_are_not_checked(self, compiled_by, monkeypatch, caplog):
        obstacles = importlib.import_module("fxtrain.compiler.lowering._obstacles")
        monkeypatch.setattr(obstacles, "_processes", lambda: 2)
        compiled_by(Compiler, scaled("tanh"))
        tx = fx.optim.sgd(0.1)
        taken(fx.compile(fx.train_step(cross_entropy, tx)), fx.init(Classifier(), tx))
        assert "not checked against the uncompiled step: torch.distributed runs several processes" in caplog.text


class TestMark:
    @pytest.fixture
    def checks(self, monkeypatch, tmp_path, caplog):
        """An empty cache, and a function that returns how many checks have passed."""
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        caplog.set_level(logging.INFO, "fxtrain")
        return lambda: sum(message.startswith("Checked") for message in caplog.messages)

    def test_graph_that_has_passed_is_not_checked_again(self, checks, tmp_path):
        tx = fx.optim.sgd(0.1)
        step = fx.train_step(squares, tx)
        for compiled, count in ((fx.compile(step), 2), (fx.compile(step), 2)):
            taken(compiled, fx.init(nn.Linear(6, 2), tx))
            assert checks() == count
        (mark,) = tmp_path.glob("fxtrain/*.checked")
        mark.unlink()
        taken(fx.compile(step), fx.init(nn.Linear(6, 2), tx))
        assert checks() == 4

    @pytest.mark.parametrize("reason", ["refused", "obstacle"])
    def test_graph_that_has_not_passed_is_checked_again(self, checks, tmp_path, monkeypatch, reason):
        tx = fx.optim.sgd(0.1)
        step = fx.train_step(squares, tx)
        compiled = fx.compile(step)
        state, _ = compiled(fx.init(nn.Linear(6, 2), tx), BATCH)
        if reason == "refused":
            monkeypatch.setitem(SETTINGS, "scale", 2.0)
            with pytest.raises(fx.MiscompiledError):
                compiled(state, BATCH)
        else:
            obstacles = importlib.import_module("fxtrain.compiler.lowering._obstacles")
            monkeypatch.setattr(obstacles, "available_bytes", lambda device: 100)
            taken(compiled, state)
        assert checks() == 1
        assert not list(tmp_path.glob("fxtrain/*.checked"))


class Attention(nn.Module):
    """Keys have biases whose true gradient is zero."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(64, 8)  # of which a batch uses a few rows
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, tokens):
        hidden = self.table(tokens)
        return self.head(self.norm(hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]).mean(1))


class BiasBeforeNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32))
        self.norm, self.head = nn.BatchNorm1d(32), nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.norm(self.layers(x)))


def attention_loss(model, batch):
    tokens = (batch["x"] * 10).long() % 64
    return F.cross_entropy(model(tokens), batch["y"])


LEGITIMATE = {
    "biases before norms": (BiasBeforeNorm, cross_entropy),
    "keys of attention and unused embeddings": (Attention, attention_loss),
}


@pytest.mark.parametrize("name", LEGITIMATE)
def test_rounding_is_no_false_alarm(compiled_by, name):
    compiled_by(Compiler)
    module, loss_fn = LEGITIMATE[name]
    for seed in range(2):
        torch.manual_seed(seed)
        tx = fx.optim.chain(fx.optim.clip_by_global_norm(1.0), fx.optim.adamw(1e-3))
        step = fx.compile(fx.train_step(loss_fn, tx), donate=seed == 1)
        taken(step, fx.init(module(), tx, seed=seed), steps=2)


LOSSES = {
    "mean": lambda model, batch: model(batch).mean(),  # zero but for rounding, without an activation
    "sum": lambda model, batch: model(batch).sum(),
    "squares": lambda model, batch: (model(batch) - 1).square().mean(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU])
def test_rounding_errors_of_statistics_are_no_false_alarm(compiled_by, loss, activation):
    compiled_by(Split)
    batch = torch.randn(16384, 6, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    tx = fx.optim.adam(1e-3)
    state = fx.init(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), activation()), tx)
    taken(fx.compile(fx.train_step(LOSSES[loss], tx)), state, batch, steps=2)


def test_rounding_to_half_precision_is_no_false_alarm_where_noise_cannot_run(compiled_by, monkeypatch):
    """Some operators refuse to run in a dispatch mode. The inputs get noise instead, which autocast must not remove."""
    real = RoundingNoise.__torch_dispatch__

    def fails(noise, func, types, args=(), kwargs=None):
        if noise._errors > 4.0 and "gelu_backward" in str(func):
            raise NotImplementedError(str(func))
        return real(noise, func, types, args, kwargs)

    monkeypatch.setattr(RoundingNoise, "__torch_dispatch__", fails)
    compiled_by(Noisy)
    torch.manual_seed(0)
    tx = fx.optim.sgd(0.1)
    network = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 8))
    step = fx.compile(fx.train_step(lambda model, batch: model(batch).float().square().mean(), tx, precision="bf16"))
    taken(step, fx.init(network, tx), torch.randn(256, 64), steps=2)


def test_noise_of_inputs_is_that_of_the_coarsest_dtype():
    noise, given = RoundingNoise(seed=0, sign=1.0), torch.full((1000,), 0.1)
    before = (noise.added_to(given) / given - 1).abs().max()
    with noise:
        given.bfloat16() * 0.3
    after = (noise.added_to(given) / given - 1).abs().max()
    assert before < 1e-5
    assert 0.9 < after / (2 * torch.finfo(torch.bfloat16).eps) <= 1.0
