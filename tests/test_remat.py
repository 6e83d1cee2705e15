"""Recomputed activations: checkpoints of torch, ``fx.remat`` and ``compile(memory=)`` change nothing but memory."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, create_selective_checkpoint_contexts

import fxtrain as fx
from fxtrain import testing, tree
from fxtrain.compiler.lowering import _trace as traced

TX = fx.optim.sgd(0.1)


@pytest.fixture
def interpreted(monkeypatch):
    """Runs traced graphs operation by operation, which takes less time than to compile them."""
    monkeypatch.setattr(traced, "_compiled", lambda graph, *_: lambda tensors: graph(*tensors))


def plain(function, *args, **kwargs):
    return function(*args, **kwargs)


def without_reentry(function, *args, **kwargs):
    return checkpoint(function, *args, use_reentrant=False, **kwargs)


def reentrant(function, *args):
    return checkpoint(function, *args, use_reentrant=True)


def nested(function, *args, **kwargs):
    return without_reentry(lambda *inner: without_reentry(function, *inner, **kwargs), *args)


def selective(function, *args, **kwargs):
    operators = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = lambda: create_selective_checkpoint_contexts(operators)  # noqa: E731
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def marked(function, *args, **kwargs):
    return fx.remat(function)(*args, **kwargs)


def marked_but_matmuls(function, *args, **kwargs):
    return fx.remat(function, "matmuls")(*args, **kwargs)


HOWS = [without_reentry, reentrant, nested, selective, marked, marked_but_matmuls]


class Residual(nn.Module):
    """Residual blocks with normalization, a wide middle, and dropout in the first block."""

    def __init__(self, how=plain, *, layers=2, dropout=0.3, width=16):
        super().__init__()
        self.how, self.first, self.head = how, nn.Linear(8, width), nn.Linear(width, 1)
        self.dropout = dropout
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Identity() if index else nn.Dropout(dropout),
                nn.Linear(4 * width, width),
            )
            for index in range(layers)
        )

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + self.how(block, x)
        return self.head(F.dropout(x, self.dropout / 2) if self.training and self.dropout else x)


class Images(nn.Module):
    """Convolutions and batch norms."""

    def __init__(self, how=plain):
        super().__init__()
        self.how, self.first, self.head = how, nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.2 if index else 0.0)
            )
            for index in range(2)
        )

    def forward(self, x):
        x = self.first(x.reshape(-1, 1, 4, 2).repeat(1, 1, 2, 4))
        for block in self.blocks:
            x = self.how(block, x)
        return self.head(x.mean((2, 3)))


class Counting(nn.Module):
    """A region that reads a buffer and then writes it in place."""

    average: torch.Tensor

    def __init__(self, how=plain):
        super().__init__()
        self.how, self.inner, self.head = how, nn.Linear(8, 8), nn.Linear(8, 1)
        self.register_buffer("average", torch.ones(8))

    def region(self, x):
        y = self.inner(x * self.average).tanh()
        self.average.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        return y * 2

    def forward(self, x):
        return self.head(self.how(self.region, x))


def cases():
    """Each way with the residual network, and the ways of torch with networks that write buffers."""
    found = [(Residual, how) for how in HOWS]
    found += [(kind, how) for kind in (Images, Counting) for how in (without_reentry, nested, selective)]
    return pytest.mark.parametrize(("kind", "how"), found, ids=lambda value: value.__name__)


def start(kind, how=plain, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return fx.init(kind(how, **options), TX, seed=1)


def batch(rows=64):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(2))


def squares(model, x):
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def trained(step, state, steps=2, rows=64):
    for _ in range(steps):
        state, _ = step(state, batch(rows))
    return state


@functools.cache
def saved(kind):
    """Returns the state after two steps of a graph that keeps all activations. For tests with ``interpreted``."""
    return trained(fx.compile(fx.train_step(squares, TX), fullgraph=True), start(kind))


def same(found, expected):
    """Asserts that two states are bitwise equal."""
    testing.assert_equal(found.params, expected.params, "params")
    testing.assert_equal(found.buffers, expected.buffers, "buffers")


def peak(function):
    """Returns the most bytes that a call has allocated at one time, from the events of torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    total = most = 0
    for event in recorded.profiler.kineto_results.events():  # pyright: ignore[reportOptionalMemberAccess]
        if event.name() == "[memory]":
            total += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            most = max(most, total)
    return most


def peak_of(step, state, x):
    step(state.copy(), x)
    given = [state.copy()]
    return peak(lambda: step(given.pop(), x))


class TestCheckpoints:
    @cases()
    def test_uncompiled_step_is_bitwise_unchanged_and_silent(self, kind, how):
        expected = trained(fx.train_step(squares, TX), start(kind))
        before = torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = trained(fx.train_step(squares, TX), start(kind, how))
        same(found, expected)
        assert torch.equal(torch.get_rng_state(), before)

    @cases()
    def test_graph_is_bitwise_unchanged(self, interpreted, kind, how):
        same(trained(fx.compile(fx.train_step(squares, TX), fullgraph=True), start(kind, how)), saved(kind))

    @pytest.mark.parametrize("how", [without_reentry, reentrant, marked])
    def test_vmapped_step_is_bitwise_unchanged(self, how):
        def ends(how):
            states = tree.map(lambda leaf: torch.stack([leaf, leaf]), start(Residual, how))
            step, x = fx.train_step(squares, TX), batch()
            return torch.func.vmap(lambda state: step(state, x)[0])(states)

        same(ends(how), ends(plain))

    @pytest.mark.slow
    def test_dynamo_backend_is_unchanged(self):
        def end(layer):
            state = fx.init(nn.Sequential(layer, nn.Dropout(0.5), nn.Linear(8, 1)), TX)
            return trained(fx.compile(fx.train_step(squares, TX), backend="eager", fullgraph=True), state, steps=1)

        with torch.random.fork_rng():
            layer = nn.Linear(8, 8)
            ends = []
            for first in (fx.remat(layer), layer):
                torch.manual_seed(0)
                ends.append(end(first))
        same(*ends)

    @pytest.mark.parametrize("is_compiled", [False, True])
    @pytest.mark.parametrize("how", [without_reentry, nested], ids=lambda how: how.__name__)
    def test_peak_memory_falls(self, interpreted, how, is_compiled):
        step = fx.train_step(squares, TX)
        if is_compiled:
            step = fx.compile(step)
        options = {"layers": 3, "dropout": 0.0}
        kept, recomputed = (peak_of(step, start(Residual, way, **options), batch(4096)) for way in (plain, how))
        assert recomputed < 0.75 * kept

    def test_sequential_checkpoints_work(self, interpreted):
        class Model(nn.Module):
            def __init__(self, segments):
                super().__init__()
                self.layers = nn.Sequential(
                    *(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
                )
                self.segments = segments

            def forward(self, x):
                if self.segments is None:
                    return self.layers(x)
                return checkpoint_sequential(self.layers, self.segments, x, use_reentrant=False)

        for compiled in (False, True):
            step = fx.train_step(squares, TX)
            step = fx.compile(step) if compiled else step
            same(trained(step, start(Model, 2)), trained(step, start(Model, None)))

    def test_checkpoint_reads_captured_activation(self, interpreted):
        class Model(nn.Module):
            def __init__(self, how):
                super().__init__()
                self.how, self.first, self.head = how, nn.Linear(8, 8), nn.Linear(8, 1)

            def forward(self, x):
                y = self.first(x).tanh()
                return self.head(self.how(lambda z, scale: (z * y * scale).sin(), x, scale=3.0))

        for compiled in (False, True):
            step = fx.train_step(squares, TX)
            step = fx.compile(step) if compiled else step
            same(trained(step, start(Model, without_reentry)), trained(step, start(Model)))

    def test_evaluation_is_unchanged(self):
        evaluate = fx.eval_step(lambda model, x: {"loss": squares(model, x)})
        found, expected = (evaluate(start(Images, how), batch()) for how in (without_reentry, plain))
        testing.assert_equal(found, expected, "output")


class TestRemat:
    def test_module_keeps_names_type_and_tensors(self):
        block = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        found = fx.remat(block)
        assert isinstance(found, nn.Sequential)
        assert list(found.state_dict()) == list(block.state_dict())
        assert found[0].weight is block[0].weight
        assert type(block) is nn.Sequential

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
    def test_recomputing_module_is_copied_and_pickled(self, duplicate):
        block = fx.remat(nn.Linear(2, 2))
        found = duplicate(block)
        assert type(found) is type(block)
        assert torch.equal(found(torch.ones(2)), block(torch.ones(2)))

    def test_policy_decides_what_is_kept(self, interpreted):
        def peak_with(save):
            how = plain if save is None else lambda function, x: fx.remat(function, save)(x)
            return peak_of(fx.compile(fx.train_step(squares, TX)), start(Residual, how, dropout=0.0), batch(4096))

        everything, matmuls, nothing = map(peak_with, (lambda operator: True, "matmuls", "nothing"))
        assert everything == peak_with("everything") == peak_with(None)
        assert nothing < matmuls < everything

    @pytest.mark.parametrize("save", ["dots", "", 3, None])
    def test_unknown_policy_is_rejected(self, save):
        with pytest.raises(ValueError, match="expected save to be one of 'nothing', 'matmuls', 'everything'"):
            fx.remat(nn.Linear(1, 1), save)

    def test_value_that_is_no_function_is_rejected(self):
        with pytest.raises(TypeError, match="expected a function or a module, got"):
            fx.remat(3)  # pyright: ignore[reportArgumentType]


def in_step(state, event: fx.Gradients):
    return state, fx.Control(skip_update=event.loss > 1e6, reason="large", log={"seen": event.loss})


class TestMemory:
    @pytest.mark.parametrize(
        ("kind", "memory"),
        [(Residual, "recompute"), (Residual, 0.8), (Images, "recompute"), (Images, 0.7), (Counting, "recompute")],
    )
    def test_results_are_bitwise_unchanged(self, interpreted, kind, memory, recwarn):
        same(trained(fx.compile(fx.train_step(squares, TX), memory=memory), start(kind)), saved(kind))

    @pytest.mark.parametrize(
        ("options", "compiled"),
        [
            ({}, {"donate": True}),
            ({"accumulate": 2}, {"donate": True}),
            ({"callbacks": in_step}, {}),
            ({"precision": "bf16"}, {}),
            ({}, {"steps_per_call": 2}),
        ],
    )
    def test_options_of_steps_compose(self, interpreted, options, compiled):
        ends = []
        for memory in ("save", "recompute"):
            step = fx.compile(fx.train_step(squares, TX, **options), memory=memory, **compiled)
            state = start(Residual, layers=1)
            if compiled.get("steps_per_call"):
                state, _ = step.multi_step(state, [batch(), batch()])
            ends.append(trained(step, state))
        same(*ends)

    def test_fraction_limits_the_peak(self, interpreted):
        def peak_with(memory):
            step = fx.compile(fx.train_step(squares, TX), memory=memory, donate=True)
            return peak_of(step, start(Residual, layers=6, dropout=0.0), batch(4096))

        saved = peak_with("save")
        assert peak_with(0.6) < 1.1 * 0.6 * saved
        assert peak_with("recompute") < 0.5 * saved

    def test_unreachable_fraction_warns_and_trains(self, interpreted):
        step = fx.compile(fx.train_step(squares, TX), memory=0.01)
        with pytest.warns(UserWarning, match="to fit in 0.01 of the memory of memory='save', got 0"):
            trained(step, start(Residual), steps=1)

    @pytest.mark.parametrize("memory", [0, -0.5, 1.5, True, "offload", None, float("nan")])
    def test_wrong_value_is_rejected(self, memory):
        with pytest.raises(ValueError, match="expected memory to be 'save', 'recompute' or a fraction in"):
            fx.compile(fx.train_step(squares, TX), memory=memory)

    @pytest.mark.parametrize("options", [{"backend": "aot_eager"}, {"dynamic": True}])
    def test_options_without_a_traced_graph_are_rejected(self, options):
        with pytest.raises(ValueError, match="expected memory='recompute' without backend and dynamic"):
            fx.compile(fx.train_step(squares, TX), memory="recompute", **options)

    @pytest.mark.slow
    def test_inductor_keeps_copies_apart(self):
        ends, peaks = [], []
        for memory in ("save", "recompute"):
            step = fx.compile(fx.train_step(squares, TX), memory=memory, fullgraph=True)
            ends.append(trained(step, start(Residual, layers=3, dropout=0.0), rows=4096))
            peaks.append(peak_of(step, start(Residual, layers=3, dropout=0.0), batch(4096)))
        same(*ends)
        assert peaks[1] < 0.8 * peaks[0]

    def test_explanation_lists_what_lives_at_the_peak(self, interpreted):
        found = {
            memory: fx.explain(fx.compile(fx.train_step(squares, TX), memory=memory), start(Residual), batch(), calls=0)
            for memory in ("save", "recompute")
        }
        assert 0 < found["recompute"].activation_bytes < found["save"].activation_bytes
        largest = found["save"].at_peak[0]
        assert largest.nbytes * largest.count > 0
        assert sum(each.nbytes for each in found["save"].at_peak) == found["save"].activation_bytes
        assert any(f"{__file__}:" in each.where for each in found["save"].at_peak)
        assert "of activations at their peak" in repr(found["save"])
