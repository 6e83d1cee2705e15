"""Graphs specialized on the values that a step reads: each call checks these values, and others use another graph."""

import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fxtrain as fx
from fxtrain import tree
from fxtrain.compiler.lowering._executable import uncompiled
from fxtrain.compiler.lowering._specialization import compile_specialized
from fxtrain.compiler.lowering._value_reads import UncheckedReadError

TX = fx.optim.adamw(1e-2)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.drop = torch.nn.Linear(4, 8), torch.nn.Linear(8, 3), torch.nn.Dropout(0.5)
        self.register_buffer("is_started", torch.tensor(False))

    def forward(self, x):
        return self.outer(self.drop(torch.tanh(self.inner(x))))


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"])


def by_branch(model, batch):
    loss = cross_entropy(model, batch)
    return loss * 3 if batch["x"].sum() > 0 else loss


def by_branch_on_a_random_number(model, batch):
    loss = cross_entropy(model, batch)
    return loss * 3 if torch.rand(()) > 0.5 else loss


def by_branch_on_an_activation_in_a_loop(model, batch):
    for _ in range(2):
        if model(batch["x"]).mean().abs() * batch["x"].sum() > 0:
            return cross_entropy(model, batch)
    return cross_entropy(model, batch) * 2


def by_buffer(model, batch):
    scale = 1.0 if model.is_started else 5.0
    model.is_started = torch.ones_like(model.is_started)
    return cross_entropy(model, batch) * scale


def by_equality(model, batch):
    return cross_entropy(model, batch) * (2 if torch.equal(batch["y"], batch["y"].sort().values) else 1)


def by_closeness(model, batch):
    return cross_entropy(model, batch) * (2 if torch.allclose(-batch["x"].sum(), batch["x"].abs().sum()) else 1)


def by_length(model, batch):
    count = int(batch["count"].max())
    return F.cross_entropy(model(batch["x"])[:count], batch["y"][:count])


def by_list(model, batch):
    return sum(F.cross_entropy(model(batch["x"])[:count], batch["y"][:count]) for count in batch["count"].tolist())


def by_mask(model, batch):
    rows = batch["x"][:, 0] > 0
    return F.cross_entropy(model(batch["x"][rows]), batch["y"][rows], reduction="sum") / 8


def by_masked_activation(model, batch):
    found = model(batch["x"])
    return found[found > 0].square().sum() + found.masked_select(found < 0).sum()


def by_place(model, batch):
    (rows,) = torch.where(batch["x"][:, 0] > 0)
    return F.cross_entropy(model(batch["x"]).index_select(0, rows), batch["y"][rows], reduction="sum") / 8


def by_rows_if_any(model, batch):
    return by_place(model, batch) if len(batch["x"][batch["x"][:, 0] > 0]) else model(batch["x"]).square().mean()


def by_repetition(model, batch):
    return model(batch["x"][:2]).repeat_interleave(batch["count"], 0).square().sum() / 8


LOSSES = [
    by_branch,
    by_branch_on_a_random_number,
    by_branch_on_an_activation_in_a_loop,
    by_buffer,
    by_equality,
    by_closeness,
    by_length,
    by_list,
    by_mask,
    by_masked_activation,
    by_place,
    by_rows_if_any,
    by_repetition,
]


def batch(number):
    drawn = torch.Generator().manual_seed(number)
    x, y = torch.randn(8, 4, generator=drawn), torch.randint(0, 3, (8,), generator=drawn)
    if number % 2:
        x, y = -x.abs(), y.sort().values
    return {"x": x, "y": y, "count": torch.randint(1, 8, (2,), generator=drawn)}


def examples(number):
    return {name: batch(number)[name] for name in ("x", "y")}


def start():
    torch.manual_seed(0)
    return fx.init(Model(), TX, seed=0)


class Checked:
    """A step compiled by ``compile_specialized``, with the uncompiled step as its fallback."""

    def __init__(self, loss_fn, **options):
        self.step = fx.train_step(loss_fn, TX, **options)
        self.calls = 0
        first = examples(0) if options else batch(0)
        self.executable = compile_specialized(
            self.step, start(), first, mode=None, in_place=False, backend="eager", otherwise=self.otherwise
        )

    def otherwise(self, state, batch):
        self.calls += 1
        return uncompiled(self.step, state, batch, in_place=False)

    def __call__(self, state, batch):
        new, output = self.executable.run(tree.leaves(state), tree.leaves(batch))
        return tree.unflatten(tree.structure(state), new), output

    @property
    def graphs(self):
        return self.executable.run._graphs


def assert_same(ours, theirs):
    torch.testing.assert_close(dict(enumerate(tree.leaves(ours))), dict(enumerate(tree.leaves(theirs))))


class TestEqualsEager:
    @pytest.mark.parametrize("loss_fn", LOSSES)
    def test_batches_with_different_branches(self, loss_fn):
        checked = Checked(loss_fn)
        plain = ours = start()
        for number in (0, 1, 2, 1, 0, 3):
            plain, expected = checked.step(plain, batch(number))
            ours, output = checked(ours, batch(number))
            assert_same(output.metrics, expected.metrics)
        assert_same(ours, plain)
        assert len(checked.graphs) + checked.calls >= 2  # otherwise all batches took the same branch

    @pytest.mark.parametrize("options", [{"differentiate": "autograd"}, {"accumulate": 2}])
    def test_autograd_and_microbatches(self, options):
        checked = Checked(by_branch, **options)
        for number in range(3):
            assert_same(checked(start(), examples(number)), checked.step(start(), examples(number)))
        assert len(checked.graphs) >= 2
        assert checked.calls == 0

    def test_evaluation(self):
        measure = fx.eval_step(by_branch)
        executable = compile_specialized(
            measure, start(), batch(0), mode=None, in_place=False, backend="eager", otherwise=pytest.fail
        )
        for number in range(3):
            _, output = executable.run(tree.leaves(start()), tree.leaves(batch(number)))
            assert_same(output.metrics, measure(start(), batch(number)).metrics)

    def test_mixed_precision(self):
        def loss_fn(model, batch):
            with torch.autocast("cpu", torch.bfloat16):
                found = model(batch["x"])
            with torch.autocast("cpu", enabled=False):
                exact = batch["x"] @ batch["x"].T
                assert torch.equal(exact, exact.to(torch.bfloat16).float()) is False
            return found.float().square().mean()

        checked = Checked(loss_fn)
        assert_same(checked(start(), batch(0)), checked.step(start(), batch(0)))
        assert checked.calls == 0


class TestGraphs:
    def test_one_graph_per_value(self):
        checked = Checked(by_branch)
        for number in (0, 1, 0, 1, 1):
            checked(start(), batch(number))
        assert [graph.reads.values for graph in checked.graphs] == [[False], [True]]
        assert checked.calls == 0

    @pytest.mark.parametrize(("loss_fn", "numbers"), [(by_length, (0, 1, 2, 3)), (by_place, (0, 2, 4, 6))])
    def test_changing_values_stop_new_graphs(self, loss_fn, numbers):
        checked = Checked(loss_fn)
        for number in numbers:
            assert_same(checked(start(), batch(number)), checked.step(start(), batch(number)))
        assert (len(checked.graphs), checked.calls) == (2, 1)

    @pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: float(x.max()), lambda x: x[0].tolist()[1]])
    def test_float_reads_are_rejected(self, read):
        with pytest.raises(RuntimeError, match="floating-point"):
            Checked(lambda model, batch: cross_entropy(model, batch) * read(batch["x"]))

    @pytest.mark.parametrize("draw", [random.random, np.random.rand])
    def test_host_random_samples_are_rejected(self, draw):
        with pytest.raises(UncheckedReadError, match="random"):
            Checked(lambda model, batch: by_branch(model, batch) * float(draw()))

    @pytest.mark.parametrize("read", [lambda x: x.numpy().sum(), lambda x: x.detach().cpu().numpy()[0, 0]])
    def test_numpy_reads_are_rejected(self, read):
        with pytest.raises((RuntimeError, TypeError)):
            Checked(lambda model, batch: cross_entropy(model, batch) * float(read(batch["x"])))

    def test_write_before_read_leaves_batch_unchanged(self):
        given = batch(0)
        kept = tree.clone(given)

        def loss_fn(model, batch):
            doubled = batch["x"].clone().mul_(2)
            return cross_entropy(model, batch) * (2 if doubled.sum() > 0 else 1)

        checked = Checked(loss_fn)
        checked(start(), given)
        assert_same(given, kept)


class TestErrors:
    def test_error_in_branch_is_raised(self):
        def loss_fn(model, batch):
            if batch["y"].max() > 2:
                raise ValueError("expected labels below 3")
            return cross_entropy(model, batch)

        checked = Checked(loss_fn)
        wrong = batch(1) | {"y": torch.full((8,), 3)}
        for _ in range(2):
            with pytest.raises(ValueError, match="labels below 3"):
                checked(start(), wrong)
        assert_same(checked(start(), batch(2)), checked.step(start(), batch(2)))
        assert (len(checked.graphs), checked.calls) == (1, 0)


class TestRoute:
    def test_checked_route_ends_when_values_keep_changing(self, monkeypatch):
        # Eager graphs suffice here and are fast, because the tests above compare results.
        from fxtrain.compiler.lowering import _route_order as routes
        from fxtrain.compiler.lowering import _trace as traced

        def fast(compiler):
            return lambda *args, **options: compiler(*args, **{**options, "backend": "eager"})

        monkeypatch.setattr(routes, "compile_traced", fast(traced.compile_traced))
        monkeypatch.setattr(routes, "compile_specialized", fast(compile_specialized))

        def without_dynamo(*_, **__):
            raise RuntimeError("no dynamo here")

        monkeypatch.setattr(routes, "compile_by_dynamo", without_dynamo)
        monkeypatch.setattr(routes, "compile_in_regions", without_dynamo)
        step = fx.train_step(by_rows_if_any, TX)
        for donate in (False, True):
            compiled = fx.compile(step, donate=donate)
            plain = ours = start()
            said, routes_taken = [], []
            for number in (0, 2, 4, 6):
                plain, _ = step(plain, batch(number))
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    ours, _ = compiled(ours, batch(number))
                said += [str(warning.message) for warning in caught]
                routes_taken.append(compiled.route)
            assert_same(ours, plain)
            assert routes_taken == [*["inductor, traced with checks"] * 2, "uncompiled", "uncompiled"]
            assert len(said) == 2
            assert all(f"{__file__}:" in each and len(each.splitlines()) <= 15 for each in said)
