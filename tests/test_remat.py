"""Recomputed activations: checkpoints of torch, ``fx.remat`` and ``compile(memory=)`` change nothing but memory."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from recomputations import (
    HOWS,
    IN_GRAPH,
    Attention,
    Block,
    marked,
    marked_but_matmuls,
    nested,
    network,
    plain,
    reentrant,
    without_reentry,
)
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fxtrain as fx
from fxtrain import testing, tree
from fxtrain.compiler.lowering import _trace as traced

TX = fx.optim.sgd(0.1)


class Residual(nn.Module):
    """Residual blocks of which each is recomputed."""

    def __init__(self, how=plain, *, layers=3, dropout=0.3):
        super().__init__()
        self.first, self.head = nn.Linear(8, 16), nn.Linear(16, 1)
        self.blocks = nn.Sequential(*(Block(how, width=16, dropout=dropout) for _ in range(layers)))

    def forward(self, x):
        return self.head(self.blocks(self.first(x)))


def start(make, *args, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return fx.init(make(*args, **options), TX, seed=1)


def batch(rows=16):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(2))


def squares(model, x):
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def trained(step, state, steps=2, rows=16):
    for _ in range(steps):
        state, _ = step(state, batch(rows))
    return state


@functools.cache
def kept():
    """Returns the state after two steps of a graph that keeps all activations. For tests with ``interpreted``."""
    return trained(fx.compile(fx.train_step(squares, TX), fullgraph=True), start(network, IN_GRAPH, False))


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


def peak_of(step, how=plain, layers=3):
    state, x = start(Residual, how, layers=layers, dropout=0.0), batch(4096)
    for _ in range(2):  # the calls that are checked
        step(state.copy(), x)
    given = [state]
    return peak(lambda: step(given.pop(), x))


class TestCheckpoints:
    @pytest.mark.parametrize("hows", [HOWS[:5], HOWS[5:9], HOWS[9:]])
    def test_uncompiled_step_is_bitwise_unchanged_and_silent(self, hows):
        before = torch.get_rng_state()
        step = fx.train_step(squares, TX, differentiate="autograd")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = trained(step, start(network, hows, True))
        same(found, trained(step, start(network, hows, False)))
        assert torch.equal(torch.get_rng_state(), before)

    def test_graph_is_bitwise_unchanged(self, interpreted):
        step = fx.compile(fx.train_step(squares, TX), fullgraph=True)
        same(trained(step, start(network, IN_GRAPH, True)), kept())

    def test_vmapped_step_is_bitwise_unchanged(self):
        def end(is_recomputed):
            states = tree.map(lambda leaf: torch.stack([leaf, leaf]), start(network, HOWS[:5], is_recomputed))
            step, x = fx.train_step(squares, TX), batch()
            return torch.func.vmap(lambda state: step(state, x)[0])(states)

        same(end(True), end(False))

    def test_checkpoints_are_differentiated_by_autograd_silently(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = trained(fx.train_step(squares, TX), start(Residual, reentrant))
        same(found, trained(fx.train_step(squares, TX), start(Residual)))

    @pytest.mark.parametrize("is_compiled", [False, True])
    def test_evaluation_is_unchanged(self, interpreted, is_compiled):
        evaluate = fx.eval_step(lambda model, x: {"loss": squares(model, x)})
        evaluate = fx.compile(evaluate) if is_compiled else evaluate
        found, expected = (evaluate(start(Residual, how), batch()) for how in (without_reentry, plain))
        testing.assert_equal(found, expected, "output")

    @pytest.mark.slow
    def test_dynamo_backend_is_unchanged(self):
        step = fx.train_step(squares, TX)
        compiled = fx.compile(step, backend="eager", fullgraph=True)
        with torch.random.fork_rng():
            layer = nn.Linear(8, 8)
            starts = []
            for first in (fx.remat(layer), layer):
                torch.manual_seed(0)
                starts.append(fx.init(nn.Sequential(first, nn.Dropout(0.5), nn.Linear(8, 1)), TX))
        # Dynamo's eager backend runs the operations of the uncompiled step.
        same(trained(compiled, starts[0], steps=1), trained(step, starts[1], steps=1))


class Centered(nn.Module):
    """Replaces a buffer inside a region, which reads it."""

    def __init__(self, how):
        super().__init__()
        self.how, self.linear = how, nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))

    def center(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.linear(x - self.mean)

    def forward(self, x):
        return self.how(self.center, self.how(self.center, x))


@pytest.mark.parametrize("how", [without_reentry, reentrant, nested, marked, marked_but_matmuls])
@pytest.mark.parametrize("options", [{}, {"differentiate": "autograd"}, {"accumulate": 2}])
def test_buffer_that_a_region_replaces_is_replaced_once(how, options):
    step = fx.train_step(squares, TX, **options)
    same(trained(step, start(Centered, how)), trained(step, start(Centered, plain)))


class InPlace(nn.Module):
    """Writes into the results of matmuls in place."""

    def __init__(self, how):
        super().__init__()
        self.how, self.cell, self.linear = how, nn.GRUCell(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.how(lambda y: self.linear(self.cell(y)).sigmoid_(), self.how(self.cell, x))


@pytest.mark.parametrize("options", [{}, {"differentiate": "autograd"}, {"precision": "bf16"}])
def test_kept_matmuls_are_not_written_in_place(options):
    step = fx.train_step(squares, TX, **options)
    same(trained(step, start(InPlace, marked_but_matmuls)), trained(step, start(InPlace, plain)))


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
    @pytest.mark.parametrize(("memory", "is_recomputed"), [("recompute", True), (0.7, False)])
    def test_results_are_bitwise_unchanged(self, interpreted, memory, is_recomputed):
        step = fx.compile(fx.train_step(squares, TX), memory=memory)
        same(trained(step, start(network, IN_GRAPH, is_recomputed)), kept())

    def test_options_of_steps_compose(self, interpreted):
        ends = []
        for memory in ("save", "recompute"):
            step = fx.compile(
                fx.train_step(squares, TX, accumulate=2, callbacks=in_step, precision="bf16"),
                memory=memory,
                donate=True,
                steps_per_call=2,
            )
            ends.append(step.multi_step(start(Residual, layers=1), [batch(), batch()])[0])
        same(*ends)

    def test_peak_of_memory_falls(self, interpreted):
        def keeps_all(function, *args):
            return fx.remat(function, lambda operator: True)(*args)

        def compiled(memory):
            return fx.compile(fx.train_step(squares, TX), memory=memory, donate=True)

        uncompiled = fx.train_step(squares, TX)
        assert max(peak_of(uncompiled, how) for how in (without_reentry, nested)) < 0.75 * peak_of(uncompiled)
        hows = plain, keeps_all, marked_but_matmuls, marked, nested
        peaks = {how: peak_of(compiled("save"), how) for how in hows}
        assert peaks[keeps_all] == peaks[plain]
        assert peaks[marked] < peaks[marked_but_matmuls] < peaks[plain]
        assert max(peaks[marked], peaks[nested], peak_of(compiled("recompute"))) < 0.75 * peaks[plain]
        assert peak_of(compiled(0.8)) < 1.1 * 0.8 * peaks[plain]

    def test_compiler_cannot_merge_products_with_their_copies(self, monkeypatch):
        graphs = []
        monkeypatch.setattr(
            traced, "_compiled", lambda graph, *_: graphs.append(graph) or (lambda tensors: graph(*tensors))
        )
        trained(fx.compile(fx.train_step(squares, TX), memory="recompute"), start(Residual, dropout=0.0), steps=1)
        products = graphs[0].graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
        assert len({product.args for product in products}) == len(products)

    def test_attention_without_dropout_is_recomputed_with_its_norm(self, monkeypatch):
        graphs = {}
        state = start(Attention, layers=4)
        for memory in ("save", "recompute"):

            def keep(graph, *_, memory=memory):
                graphs[memory] = graph
                return lambda tensors: graph(*tensors)

            monkeypatch.setattr(traced, "_compiled", keep)
            step = fx.compile(fx.train_step(lambda model, x: model(x).square().mean(), TX), memory=memory)
            step(state, torch.ones(2, 8, 16))
        operators = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, torch.ops.aten.native_layer_norm
        for operator in operators:
            saved, recomputed = (
                len(graphs[memory].graph.find_nodes(op="call_function", target=operator.default))
                for memory in ("save", "recompute")
            )
            assert (saved, recomputed) == (4, 7)  # the last block's backward pass comes first

    def test_unreachable_fraction_warns_and_trains(self, interpreted):
        step = fx.compile(fx.train_step(squares, TX), memory=0.01)
        with pytest.warns(UserWarning, match="to fit in 0.01 of the memory of memory='save', got 0"):
            trained(step, start(Residual, dropout=0.0), steps=1)

    @pytest.mark.parametrize("memory", [0, -0.5, 1.5, True, "host", None, float("nan")])
    def test_wrong_value_is_rejected(self, memory):
        with pytest.raises(ValueError, match="expected memory to be 'save', 'recompute', 'offload' or a fraction in"):
            fx.compile(fx.train_step(squares, TX), memory=memory)

    @pytest.mark.parametrize("options", [{"backend": "aot_eager"}, {"dynamic": True}])
    def test_options_without_a_traced_graph_are_rejected(self, options):
        with pytest.raises(ValueError, match="expected memory='recompute' without backend and dynamic"):
            fx.compile(fx.train_step(squares, TX), memory="recompute", **options)

    @pytest.mark.slow
    def test_inductor_keeps_copies_apart(self):
        steps = [fx.compile(fx.train_step(squares, TX), memory=memory) for memory in ("save", "recompute")]
        same(*(trained(step, start(Residual, layers=4, dropout=0.0), rows=4096) for step in steps))
        saved, recomputed = (peak_of(step, layers=4) for step in steps)
        assert recomputed < 0.8 * saved

    def test_explanation_lists_what_lives_at_the_peak(self, interpreted):
        state = start(Residual, dropout=0.0)
        found = {
            memory: fx.explain(fx.compile(fx.train_step(squares, TX), memory=memory), state, batch(), calls=0)
            for memory in ("save", "recompute")
        }
        assert 0 < found["recompute"].activation_bytes < found["save"].activation_bytes
        largest = found["save"].at_peak[0]
        assert largest.nbytes * largest.count > 0
        assert sum(each.nbytes for each in found["save"].at_peak) == found["save"].activation_bytes
        assert any(f"{__file__}:" in each.where for each in found["save"].at_peak)
        (gradients,) = (each for each in found["save"].at_peak if each.where == "backward pass")
        assert gradients.values.startswith("mm")
        assert "of activations at their peak" in repr(found["save"])


@pytest.fixture
def offloaded(monkeypatch):
    """Offloads all activations, on the CPU as on a GPU. Returns a list that receives the graphs."""
    graphs, offload = [], traced.offload

    def all_of(graph, device):
        graphs.append(graph)
        return offload(graph, device, least_bytes=0)

    monkeypatch.setattr(traced, "only_gpu", lambda tensors: torch.device("cpu"))
    monkeypatch.setattr(traced, "offload", all_of)
    return graphs


class TestOffload:
    @pytest.mark.parametrize("network", [Residual, Attention])
    def test_results_are_bitwise_unchanged(self, network, interpreted, offloaded):
        ends = []
        for memory in ("save", "offload"):
            step = fx.compile(fx.train_step(lambda model, x: model(x).square().mean(), TX), memory=memory, donate=True)
            state = start(network, layers=6)
            for seed in range(2):
                shape = (2, 8, 16) if network is Attention else batch().shape
                x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                state, _ = step(state, x)
            ends.append(state)
        same(*ends)
        assert len(offloaded) == 1

    def test_activations_leave_memory_between_the_passes(self, interpreted, offloaded):
        step = fx.compile(fx.train_step(lambda model, x: model(x).square().mean(), TX), memory="offload")
        step(start(Attention, layers=6), torch.ones(2, 8, 16))
        order = {node: index for index, node in enumerate(offloaded[0].nodes)}
        pairs = []
        for host in offloaded[0].find_nodes(op="call_function", target=torch.ops.fxtrain.to_host.default):
            (back,), source = host.users, host.args[0]
            assert back.target == torch.ops.fxtrain.from_host.default
            assert max(order[user] for user in source.users) < order[back]
            pairs.append(order[back] - order[host])
        assert len(pairs) >= 6
        assert min(pairs) >= 16

    @pytest.mark.slow
    def test_inductor_compiles_transfers(self, offloaded):
        steps = [fx.compile(fx.train_step(squares, TX), memory=memory) for memory in ("save", "offload")]
        same(*(trained(step, start(Residual, layers=4, dropout=0.0)) for step in steps))
        assert offloaded[0].find_nodes(op="call_function", target=torch.ops.fxtrain.to_host.default)

    def test_step_on_the_cpu_warns_and_trains(self, interpreted):
        step = fx.compile(fx.train_step(squares, TX), memory="offload")
        with pytest.warns(UserWarning, match="to run on one GPU with memory='offload', got a state or batch elsewhere"):
            trained(step, start(Residual, dropout=0.0), steps=1)
