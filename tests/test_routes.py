"""Compilation routes of steps that cannot be traced as one graph."""

import functools
import gc
import logging
import random
import time
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fxtrain as fx
from fxtrain import testing
from fxtrain._torch_internals.interface import INTERFACES
from fxtrain.compiler.lowering._specialization import compile_specialized
from fxtrain.compiler.lowering._value_reads import UncheckedReadError

TX = fx.optim.chain(fx.optim.clip_by_global_norm(1.0), fx.optim.sgd(1e-1, momentum=0.9))  # traced faster than AdamW


class Branching(torch.nn.Module):
    """A value-dependent branch with dropout on both sides, and batch statistics."""

    def __init__(self):
        super().__init__()
        self.norm, self.outer = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x):
        hidden = self.drop(torch.tanh(self.norm(x)))
        if hidden.mean() > 0:
            hidden = self.drop(hidden * 2)
        return self.outer(self.drop(hidden))


def branching(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"])


def by_item(model, batch):
    loss = branching(model, batch)
    return loss * 2 if loss.item() > 1 else loss


def by_list(model, batch):
    return sum(F.cross_entropy(model(batch["x"])[:count], batch["y"][:count]) for count in batch["count"][0].tolist())


def by_distribution(model, batch):
    return -torch.distributions.Categorical(logits=model(batch["x"]), validate_args=True).log_prob(batch["y"]).mean()


def data_dependent_loop(model, batch):
    x = batch["x"]
    while x.abs().max() > 0.5:
        x = x / 2
    return F.cross_entropy(model(x), batch["y"])


LOSSES = [branching, by_item, by_list, by_distribution, data_dependent_loop]
# Each loss with and without accumulation, with and without donation, and each pair of these.
EACH_PAIR = [
    (loss_fn, accumulate, (index + accumulate) % 2 == 0)
    for index, loss_fn in enumerate(LOSSES)
    for accumulate in (1, 2)
]


def batch(number, rows=8):
    drawn = torch.Generator().manual_seed(number)
    return {
        "x": torch.randn(rows, 4, generator=drawn),
        "y": torch.randint(0, 3, (rows,), generator=drawn),
        "count": torch.randint(1, rows, (1, 2), generator=drawn),
    }


def start(tx=TX):
    torch.manual_seed(0)
    return fx.init(Branching(), tx, seed=0)


def quietly(function, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args)


def is_fallback(warning):
    return "cannot be traced as one graph" in str(warning.message)


def assert_same(ours, theirs):
    torch.testing.assert_close(dict(enumerate(fx.tree.leaves(ours))), dict(enumerate(fx.tree.leaves(theirs))))


class TestEqualsEager:
    @pytest.mark.parametrize(("loss_fn", "accumulate", "donate"), EACH_PAIR)
    def test_batches_with_different_branches(self, loss_fn, accumulate, donate):
        step = fx.train_step(loss_fn, TX, accumulate=accumulate)
        compiled = fx.compile(step, backend="eager", donate=donate)
        plain, ours = start(), start()
        for number in range(4):
            plain, expected = step(plain, batch(number))
            ours, output = quietly(compiled, ours, batch(number))
            assert_same(output.metrics, expected.metrics)
        assert_same(ours, plain)

    def test_uncompilable_forward_pass_runs_uncompiled(self, monkeypatch):
        def refusing(function, **_):
            raise RuntimeError("no compiler here")

        monkeypatch.setattr(torch, "compile", refusing)
        step = fx.train_step(branching, TX)
        compiled = fx.compile(step, backend="eager")
        plain, ours = start(), start()
        for number in range(3):
            plain, _ = step(plain, batch(number))
            ours, _ = quietly(compiled, ours, batch(number))
        assert compiled.route == "eager, eager forward"
        assert_same(ours, plain)

    def test_forward_pass_runs_uncompiled_if_modes_are_unsafe_below_compile(self, monkeypatch):
        strategy = INTERFACES["torch._C._dynamo.eval_frame.set_code_exec_strategy"]
        monkeypatch.setattr(strategy, "path", "torch._removed")
        compiled = fx.compile(fx.train_step(branching, TX), backend="eager")
        quietly(compiled, start(), batch(0))
        assert compiled.route == "eager, eager forward"

    def test_wrong_gradients_of_a_compiler_are_not_used(self, monkeypatch):
        def wrong(function, fullgraph=False, **_):
            if fullgraph:
                raise RuntimeError("no graph here")
            return lambda *args: function(*args) * 1.5

        monkeypatch.setattr(torch, "compile", wrong)
        compiled = fx.compile(fx.train_step(branching, TX), backend="eager")
        quietly(compiled, start(), batch(0))
        assert compiled.route == "eager, eager forward"

    def test_step_without_fx_gradients_runs_uncompiled(self):
        def by_hand(state, batch):
            if batch.sum() > 0:
                return state.replace(params=state.params + 1), fx.StepOutput({})
            return state, fx.StepOutput({})

        compiled = fx.compile(by_hand, backend="eager", donate=True)
        state = fx.init(torch.tensor(0.0))
        for sign in (1.0, -1.0, 1.0):
            state, _ = quietly(compiled, state, torch.tensor([sign]))
        assert (compiled.route, float(state.params), int(state.step)) == ("uncompiled", 2.0, 3)

    def test_two_models_with_alternating_updates(self):
        def losses(model, batch):
            found = (model["a"] * model["b"] - batch).square().sum()
            return found * 2 if found > 1 else found

        tx = {"a": fx.optim.adam(0.1), "b": fx.optim.adam(0.1)}
        by_a, by_b = fx.gradients(losses, wrt="a"), fx.gradients(losses, wrt="b")

        @fx.Step
        def step(state, batch):
            state, _ = fx.apply_gradients(state, by_a(state, batch).grads, tx["a"], wrt="a")
            found = by_b(state, batch, 1)
            state, _ = fx.apply_gradients(state, found.grads, tx["b"], wrt="b")
            return state, fx.StepOutput({"loss": found.loss})

        compiled = fx.compile(step, backend="eager")
        plain = ours = fx.init({"a": torch.ones(2), "b": torch.ones(2)}, tx)
        for number in range(3):
            plain, _ = step(plain, torch.full((2,), float(number)))
            ours, _ = quietly(compiled, ours, torch.full((2,), float(number)))
        assert compiled.route == "eager, regions"
        assert_same(ours, plain)

    def test_averages_weights_and_a_loss_scale(self):
        def weighted(model, batch):
            return fx.weighted(branching(model, batch), batch["y"].float().sum() + 1)

        step = fx.train_step(weighted, TX, accumulate=2, callbacks=fx.callbacks.ema(0.9), precision="fp16")
        compiled = fx.compile(step, backend="eager", donate=True, on_recompile="allow")
        plain, ours = start(), start()
        for number, rows in enumerate((8, 6, 8)):
            plain, expected = step(plain, batch(number, rows))
            ours, output = quietly(compiled, ours, batch(number, rows))
            assert_same(output.metrics, expected.metrics)
        assert compiled.route == "eager, regions"
        assert_same(ours, plain)

    def test_evaluation_step(self):
        measure = fx.eval_step(by_item)
        compiled = fx.compile(measure, backend="eager")
        for number in range(3):
            assert_same(quietly(compiled, start(), batch(number)).metrics, measure(start(), batch(number)).metrics)

    def test_whole_run(self):
        step, data = fx.train_step(branching, TX), [batch(number) for number in range(4)]
        plain = fx.fit(start(), step, data, epochs=2)
        ours = quietly(lambda: fx.fit(start(), fx.compile(step, backend="eager"), data, epochs=2))
        assert_same(ours.state, plain.state)

    def test_multiple_steps_per_call(self):
        step, data = fx.train_step(branching, TX), [batch(number) for number in range(4)]
        plain = fx.fit(start(), step, data, epochs=1)
        compiled = fx.compile(step, backend="eager", steps_per_call=2)
        assert_same(quietly(lambda: fx.fit(start(), compiled, data, epochs=1)).state, plain.state)

    def test_batches_of_changing_sizes(self):
        step = fx.train_step(branching, TX)
        compiled = fx.compile(step, backend="eager", on_recompile="allow")
        plain, ours = start(), start()
        for rows in (8, 6, 8):
            plain, _ = step(plain, batch(rows, rows))
            ours, _ = quietly(compiled, ours, batch(rows, rows))
        assert_same(ours, plain)

    @pytest.mark.slow
    def test_inductor_backend(self):
        tx = fx.optim.chain(fx.optim.clip_by_global_norm(1.0), fx.optim.adamw(1e-2))
        step = fx.train_step(by_item, tx)
        compiled = fx.compile(step, donate=True)
        plain, ours = start(tx), start(tx)
        for number in range(4):
            plain, _ = step(plain, batch(number))
            ours, _ = quietly(compiled, ours, batch(number))
        assert compiled.route == "inductor, regions"
        assert_same(ours, plain)


class TestGarbage:
    @pytest.mark.parametrize("was_enabled", [True, False])
    def test_collector_is_off_between_routes_and_as_before_afterwards(self, monkeypatch, was_enabled):
        during = []

        def refusing(function, **_):
            during.append(gc.isenabled())
            raise RuntimeError("no compiler here")

        monkeypatch.setattr(torch, "compile", refusing)
        (gc.enable if was_enabled else gc.disable)()
        try:
            quietly(fx.compile(fx.train_step(branching, TX), backend="eager"), start(), batch(0))
            assert len(during) > 1
            assert not any(during[1:])
            assert gc.isenabled() == was_enabled
        finally:
            gc.enable()


class TestWarning:
    def test_warning_names_the_line_once_and_is_short(self, capfd):
        compiled = fx.compile(fx.train_step(by_item, TX), backend="eager", on_recompile="allow")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for rows in (8, 6):
                compiled(start(), batch(0, rows))
        (said,) = [str(warning.message) for warning in caught if is_fallback(warning)]
        assert f"{__file__}:" in said
        assert "if hidden.mean() > 0:" in said
        assert "fx.explain" in said
        assert len(said.splitlines()) <= 15
        assert capfd.readouterr().err == ""

    def test_step_in_one_graph_does_not_warn(self, recwarn):
        compiled = fx.compile(fx.train_step(lambda model, batch: model(batch).mean(), TX), backend="eager")
        compiled(fx.init(torch.nn.Linear(2, 1), TX), torch.ones(3, 2))
        assert not [warning for warning in recwarn if is_fallback(warning)]

    def test_torch_logs_nothing_in_later_steps(self):
        step = fx.compile(fx.train_step(branching, TX), backend="eager")
        quietly(step, start(), batch(0))
        records = []
        handler = logging.Handler()
        handler.emit = records.append
        logger = logging.getLogger("torch._dynamo")  # its records do not propagate to the logger of torch
        logger.addHandler(handler)
        try:
            with torch._dynamo.config.patch(recompile_limit=2):
                for rows in range(2, 6):  # more sizes than Dynamo's limit of recompilations
                    quietly(step, start(), batch(0, rows))
        finally:
            logger.removeHandler(handler)
        assert records == []


READS = {
    "numpy": lambda _: np.random.rand(),
    "numpy's array": lambda _: float(np.random.rand(3)[0]),
    "Python": lambda _: random.random(),
    "without a seed": lambda _: random.Random().random(),
    "clock": lambda _: float(time.perf_counter_ns() % 1_000_000),
    "file": lambda path: float(path.read_text()),
}


class TestValuesFromOutside:
    """Values that change between calls are read at each call or refused, and never become constants of a graph."""

    @pytest.fixture(params=READS)
    def loss_fn(self, request, tmp_path):
        self.path = tmp_path / "value"
        self.path.write_text("0")
        read = functools.partial(READS[request.param], self.path)
        return lambda branches, model, batch: model(batch, branches).sum() * 0 + read()

    def losses(self, step):
        tx, found = fx.optim.sgd(0.1), []
        compiled, state = fx.compile(fx.train_step(step, tx), backend="eager"), fx.init(Outside(), tx)
        for number in range(3):
            self.path.write_text(str(number))
            state, output = quietly(compiled, state, torch.ones(3, 2))
            found.append(float(output.metrics["loss"]))
        return compiled.route, found

    @pytest.mark.parametrize("backend", [None, "eager"])
    def test_full_graph_refuses_outside_values(self, backend, loss_fn):
        tx = fx.optim.sgd(0.1)
        compiled = fx.compile(fx.train_step(functools.partial(loss_fn, False), tx), backend=backend, fullgraph=True)
        with pytest.raises((fx.GraphBreakError, RuntimeError), match="expected "):
            compiled(fx.init(Outside(), tx), torch.ones(3, 2))
        assert compiled.graphs == 0

    def test_checked_graph_refuses_outside_values(self, loss_fn):
        tx = fx.optim.sgd(0.1)
        step, state = fx.train_step(functools.partial(loss_fn, True), tx), fx.init(Outside(), tx)
        with pytest.raises((UncheckedReadError, RuntimeError), match="expected "):
            compile_specialized(
                step, state, torch.ones(3, 2), mode=None, in_place=False, otherwise=None, backend="eager"
            )

    def test_regions_read_current_values(self, loss_fn):
        how, found = self.losses(functools.partial(loss_fn, True))
        assert how in ("eager, regions", "eager, eager forward")
        assert len(set(found)) == 3

    def test_uncompiled_forward_pass_reads_current_values(self, loss_fn, monkeypatch):
        def refusing(function, **_):
            raise RuntimeError("no compiler here")

        monkeypatch.setattr(torch, "compile", refusing)
        how, found = self.losses(functools.partial(loss_fn, True))
        assert how == "eager, eager forward"
        assert len(set(found)) == 3


class Outside(torch.nn.Module):
    """A layer with an optional branch on a value."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x, branches):
        hidden = self.layer(x)
        return hidden * 2 if branches and hidden.sum() > 1e9 else hidden


class TestFullGraph:
    def test_graph_break_error_is_short_and_names_the_line(self):
        compiled = fx.compile(fx.train_step(branching, TX), fullgraph=True)
        with pytest.raises(fx.GraphBreakError, match=r"expected a step that is one graph .*fullgraph=True") as caught:
            compiled(start(), batch(0))
        said = str(caught.value)
        assert "if hidden.mean() > 0:" in said
        assert len(said.splitlines()) <= 15
        assert caught.value.__suppress_context__

    def test_error_of_the_step_is_raised_unchanged(self):
        def wrong(model, batch):
            return model(batch["z"]).mean()

        with pytest.raises(KeyError, match="z"):
            fx.compile(fx.train_step(wrong, TX), backend="eager")(start(), batch(0))


class TestRecordedRoute:
    def run(self, folder, step, steps, **options):
        data = [batch(number) for number in range(4)]
        return fx.fit(start(), step, data, steps=steps, checkpointer=fx.checkpointer(folder), **options)

    def test_checkpoint_names_the_route_of_the_first_call(self, tmp_path):
        step = fx.train_step(branching, TX)
        first = fx.compile(step, backend="eager")
        quietly(self.run, tmp_path, first, 2)
        assert fx.checkpointer(tmp_path).read(start()).environment["compiled by"] == "eager, regions"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resumed = self.run(tmp_path, fx.compile(step, backend="eager"), 4, resume=True)
        assert not [warning for warning in caught if "compiled by" in str(warning.message)]
        whole = quietly(self.run, tmp_path / "whole", first, 4)
        testing.assert_equal(resumed.state, whole.state, "resumed on the same route")

    def test_resume_on_another_route_warns(self, tmp_path):
        step = fx.train_step(branching, TX)
        quietly(self.run, tmp_path, fx.compile(step, backend="eager"), 2)
        with pytest.warns(UserWarning, match="compiled by: eager, regions at the save, nothing now"):
            resumed = self.run(tmp_path, step, 4, resume=True)
        assert_same(resumed.state, self.run(tmp_path / "whole", step, 4).state)

    def test_resume_with_a_different_first_route_warns_once(self, tmp_path, monkeypatch):
        def refusing(function, **_):
            raise RuntimeError("no compiler here")

        step = fx.train_step(branching, TX)
        quietly(self.run, tmp_path, fx.compile(step, backend="eager"), 2)
        monkeypatch.setattr(torch, "compile", refusing)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resumed = self.run(tmp_path, fx.compile(step, backend="eager"), 6, resume=True)
        said = [str(warning.message) for warning in caught if "compiled by" in str(warning.message)]
        assert len(said) == 1
        assert "(compiled by: eager, regions at the save, eager, eager forward now)" in said[0]
        assert_same(resumed.state, self.run(tmp_path / "whole", step, 6).state)


class TestUserErrors:
    @pytest.mark.parametrize("options", [{}, {"dynamic": True}, {"fullgraph": True}], ids=str)
    @pytest.mark.parametrize("build", [lambda loss_fn: fx.train_step(loss_fn, TX), fx.eval_step])
    def test_error_of_a_single_call_is_raised(self, build, options):
        calls = []

        def flaky(model, batch):
            calls.append(1)
            if len(calls) == 1:
                raise OSError("the disk is away")
            return F.cross_entropy(model(batch["x"]), batch["y"])

        plain = fx.init(torch.nn.Linear(4, 3), TX)
        compiled = fx.compile(build(flaky), backend="eager", **options)
        with pytest.raises(OSError, match="the disk is away"):
            compiled(plain, batch(0))

    @pytest.mark.parametrize("donate", [False, True])
    def test_error_in_a_later_batch_names_the_line_and_leaves_saved_tensor_hooks_enabled(self, donate):
        def loss_fn(model, batch):
            return F.cross_entropy(model(batch["x"]), batch["y"])

        step = fx.compile(fx.train_step(loss_fn, TX), backend="eager", donate=donate)
        state, _ = step(fx.init(torch.nn.Linear(4, 3), TX), batch(0))
        with pytest.raises(IndexError, match="Target 50 is out of bounds") as caught:
            step(state, {**batch(0), "y": torch.full((8,), 50)})
        assert "return F.cross_entropy(model" in "".join(str(line.statement) for line in caught.traceback)
        x = torch.ones(2, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved * 2, lambda saved: saved):
            y = x * x
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == [4.0, 4.0]

    def test_error_prints_nothing_of_torch(self, capfd):
        def wrong(model, batch):
            return (model(batch["x"]) @ torch.ones(5, 5)).mean()

        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            fx.compile(fx.train_step(wrong, TX), backend="eager")(fx.init(torch.nn.Linear(4, 3), TX), batch(0))
        assert capfd.readouterr().err == ""
