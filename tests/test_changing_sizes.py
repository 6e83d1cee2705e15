"""Compiled steps with batches of several sizes: declared sizes compile silently, others warn and name a remedy."""

import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxtrain as fx
from fxtrain.compiler.lowering import _route_order as routes
from fxtrain.compiler.lowering._trace import compile_traced
from fxtrain.data import bucketed, next_tokens, packed, pad, padded

TX = fx.optim.sgd(1e-1, momentum=0.9)  # traced faster than Adam


class Reader(nn.Module):
    """Predicts the next token from the mean of the tokens up to it."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(20, 6), nn.Linear(6, 20)

    def forward(self, tokens):
        counted = torch.arange(1, tokens.shape[1] + 1, dtype=self.tokens.weight.dtype)
        return self.head(torch.tanh(self.tokens(tokens).cumsum(1) / counted[:, None]))


def loss_fn(model, batch):
    targets = next_tokens(batch["x"], batch["mask"])
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), targets.flatten())


def texts(count=24, longest=12, seed=0):
    generator = random.Random(seed)
    return [[generator.randrange(1, 20) for _ in range(generator.randint(2, longest))] for _ in range(count)]


def start():
    torch.manual_seed(0)
    return fx.init(Reader(), TX, seed=0)


def test_declared_sizes_compile_once_without_warning():
    data = bucketed(texts(), 3, sizes=3, multiple=4, drop_last=False)
    assert len(data.sizes) > 2
    step = fx.compile(fx.train_step(loss_fn, TX), backend="eager", donate=True, on_recompile="warn")
    measure = fx.compile(fx.eval_step(lambda m, b: {"loss": loss_fn(m, b)}), backend="eager", on_recompile="error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = fx.fit(start(), step, fx.data.prefetch(data), eval_step=measure, eval_data=data, epochs=2)
        fx.evaluate(compiled.state, measure, data)
    assert step.graphs == measure.graphs == len(data.sizes)
    eager = fx.fit(start(), fx.train_step(loss_fn, TX), data, epochs=2)
    torch.testing.assert_close(compiled.state.params, eager.state.params, rtol=1e-5, atol=1e-6)


def test_undeclared_sizes_warn_once():
    step = fx.compile(fx.train_step(loss_fn, TX), backend="eager", donate=True)
    batches = [pad([text]) for text in ([1, 2], [1, 2, 3], [1, 2, 3, 4])]
    with pytest.warns(UserWarning, match="recompiles") as caught:
        fx.fit(start(), step, fx.data.sequence(batches, dynamic=True), epochs=1)
    (hint,) = [str(warning.message) for warning in caught if "recompiles" in str(warning.message)]
    assert "fxtrain.data.bucketed" in hint
    assert "fxtrain.compile(step, dynamic=True)" in hint
    refusing = fx.compile(fx.train_step(loss_fn, TX), backend="eager", on_recompile="error")
    with pytest.raises(RuntimeError, match=r"fxtrain\.data\.bucketed"):
        fx.fit(start(), refusing, fx.data.sequence(batches, dynamic=True), epochs=1)


def test_declared_sizes_do_not_cover_state_changes():
    data = bucketed(texts(), 3, sizes=3, multiple=4)
    step = fx.compile(fx.train_step(loss_fn, TX), backend="eager", on_recompile="error")
    step.expect_shapes(data.num_shapes)
    step(start(), data[0])
    with pytest.raises(RuntimeError, match=r"state\.params"):
        step(start().replace(params={**start().params, "more": torch.ones(1)}), data[0])


def test_bucketed_run_resumes_bitwise_mid_epoch(tmp_path):
    data, step = bucketed(texts(), tokens=24, sizes=3, multiple=4, drop_last="pad"), fx.train_step(loss_fn, TX)
    whole = fx.fit(start(), step, data, steps=data.epoch_length + 5)
    options = {"checkpointer": fx.checkpointer(tmp_path)}
    fx.fit(start(), step, data, steps=data.epoch_length // 2, **options)
    again = bucketed(texts(), tokens=24, sizes=3, multiple=4, drop_last="pad")
    rest = fx.fit(start(), step, again, steps=data.epoch_length + 5, resume=True, **options)
    for name, value in whole.state.params.items():
        assert torch.equal(value, rest.state.params[name])


def test_multi_step_accepts_mixed_sizes():
    data = bucketed(texts(), 3, sizes=2, multiple=4)
    assert len(data.sizes) == 2
    together = fx.compile(fx.train_step(loss_fn, TX), backend="eager", steps_per_call=2, on_recompile="error")
    found = fx.fit(start(), together, data, epochs=2)
    single = fx.fit(start(), fx.train_step(loss_fn, TX), data, epochs=2)
    torch.testing.assert_close(found.state.params, single.state.params, rtol=1e-5, atol=1e-6)


class Dropping(Reader):
    """``Reader`` with dropout and a linear layer on a 3-d input, which torch.func splits by its sizes."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, tokens):
        return self.head(F.dropout(torch.tanh(self.inner(self.tokens(tokens))), 0.4, self.training))


def of_length(length, rows=3):
    return pad([[1 + number % 19 for number in range(length)], *texts(rows - 1, longest=2)])


@pytest.fixture
def without_inductor(monkeypatch):
    """Runs traced graphs without Inductor, which takes most of a minute."""
    compiled = compile_traced
    monkeypatch.setattr(routes, "compile_traced", lambda *a, **k: compiled(*a, **{**k, "backend": "eager"}))


@pytest.mark.parametrize(("backend", "donate"), [(None, True), ("eager", False)])
def test_dynamic_sizes_share_one_graph_equal_to_eager(without_inductor, backend, donate):
    count = CompileCounterWithBackend("eager")
    step = fx.train_step(loss_fn, TX)
    compiled = fx.compile(step, backend=backend and count, dynamic=True, donate=donate, on_recompile="error")
    torch.manual_seed(0)
    state = fx.init(Dropping(), TX)
    expected, found = state, state.copy()
    for length in range(5, 21):
        batch = of_length(length, rows=2 + length % 3)
        expected, output = step(expected, batch)
        found, other = compiled(found, batch)
        assert torch.equal(output.metrics["loss"], other.metrics["loss"])
    assert compiled.graphs == 1
    assert count.frame_count == (0 if backend is None else 1)
    torch.testing.assert_close(found.params, expected.params, rtol=0, atol=0)


def test_dynamic_sizes_add_one_graph_for_single_rows(without_inductor):
    step = fx.compile(fx.train_step(loss_fn, TX), dynamic=True, on_recompile="error")
    state = start()
    for rows in (3, 1, 4, 1, 2):
        state, _ = step(state, of_length(6 + rows, rows=rows))
    assert step.graphs == 2


def test_dynamic_sizes_accept_any_strides(without_inductor):
    step = fx.train_step(lambda model, batch: (model["w"] * batch).mean(), TX)
    compiled, state = fx.compile(step, dynamic=True, on_recompile="error"), fx.init({"w": torch.tensor(1.0)}, TX)
    for batch in (torch.randn(3, 4), torch.randn(5, 2).t(), torch.randn(4, 9)[:, ::3]):
        torch.testing.assert_close(compiled(state, batch)[1].metrics, step(state, batch)[1].metrics)


def test_specialized_size_is_named(without_inductor):
    def read(model, batch):
        return (model["w"] * batch["x"]).mean() * int(batch["x"].shape[1])

    step = fx.compile(fx.train_step(read, TX), dynamic=True)
    state = fx.init({"w": torch.tensor(1.0)}, TX)
    step(state, {"x": torch.ones(2, 3)})
    with pytest.warns(UserWarning, match=r"requires batch\['x'\]\.shape\[1\] == 3.*fxtrain\.data\.bucketed"):
        _, output = step(state, {"x": torch.ones(4, 5)})
    assert output.metrics["loss"] == 5


def test_sizes_beyond_dynamo_limit_run_uncompiled():
    def fixed(model, batch):
        return (model["w"] * batch).mean() * {size: size for size in range(2, 40)}[batch.shape[0]]

    step = fx.compile(fx.train_step(fixed, TX), dynamic=True, backend="eager")
    state = fx.init({"w": torch.tensor(1.0)}, TX)
    with torch._dynamo.config.patch(recompile_limit=2), pytest.warns(UserWarning, match="run uncompiled") as caught:
        losses = [float(step(state, torch.ones(size))[1].metrics["loss"]) for size in range(2, 7)]
    assert losses == list(range(2, 7))
    assert len(caught) == 1


def test_run_publishes_graphs_and_padding():
    data = bucketed(texts(), 3, sizes=3, multiple=4, drop_last=False, seed=1)
    step, begun = fx.compile(fx.train_step(lambda m, b: (m["w"] * b["x"]).mean(), TX), backend="eager"), []

    def see(state, event: fx.FitBegin, control):
        begun.append(event)

    state = fx.init({"w": torch.tensor(1.0)}, TX)
    result = fx.fit(state, step, fx.data.prefetch(data).map(lambda batch: batch), epochs=2, observers=[see])
    assert begun[0].num_shapes == len(data.sizes)
    assert result.history["compile/graphs"].values.tolist() == [len(data.sizes)]
    assert result.history["compile/seconds"].values[0] > 0
    real = [int(sum(data[i]["mask"].sum() for i in range(n, n + data.epoch_length))) for n in (0, data.epoch_length)]
    slots = [sum(data[i]["mask"].numel() for i in range(n, n + data.epoch_length)) for n in (0, data.epoch_length)]
    share = [1 - r / s for r, s in zip(real, slots, strict=True)]
    assert result.history["data/padding"].values.tolist() == pytest.approx(share, rel=1e-12)
    assert result.history["data/padding"].steps.tolist() == [data.epoch_length, 2 * data.epoch_length]


MAKERS = {
    "padded": lambda: padded(texts(), 4, multiple=2, drop_last="pad", seed=3),
    "bucketed": lambda: bucketed(texts(), tokens=24, sizes=3, multiple=4, drop_last=False, seed=3),
    "packed": lambda: packed(texts(), 14, 2, drop_last="pad", seed=3),
}


@pytest.mark.parametrize("name", MAKERS)
def test_prefetched_run_resumes_bitwise_in_later_epoch(name, tmp_path):
    def loss(model, batch):
        targets = next_tokens(batch["x"], batch.get("segments", batch["mask"]))
        value = F.cross_entropy(F.dropout(model(batch["x"]), 0.2).flatten(0, 1), targets.flatten())
        return fx.weighted(value, (targets != -100).sum())

    def run(steps, **options):
        return fx.fit(start(), fx.train_step(loss, TX), fx.data.prefetch(MAKERS[name]()), steps=steps, **options)

    length = MAKERS[name]().epoch_length
    cuts, total = (length // 2, length, length + 2), 2 * length + 1
    whole = run(total)
    for cut in cuts:
        options = {"checkpointer": fx.checkpointer(tmp_path / str(cut))}
        run(cut, **options)
        rest = run(total, resume=True, **options)
        assert all(torch.equal(value, rest.state.params[key]) for key, value in whole.state.params.items())
        shares = whole.history["data/padding"]
        later = shares.steps > cut
        assert rest.history["data/padding"].values.tolist()[-1:] == shares.values[later].tolist()[-1:]


@pytest.mark.parametrize("dynamic", [False, True])
def test_repeated_tensor_in_batch_is_two_inputs(without_inductor, dynamic):
    step = fx.train_step(lambda model, batch: (model["w"] * batch["x"] - batch["y"]).sum(), TX)
    compiled, state = fx.compile(step, dynamic=dynamic, on_recompile="error"), fx.init({"w": torch.tensor(1.0)}, TX)
    same = torch.ones(2, 3)
    for batch in ({"x": same, "y": same}, {"x": torch.ones(2, 3), "y": torch.zeros(2, 3)}):
        assert compiled(state, batch)[1].metrics["loss"] == step(state, batch)[1].metrics["loss"]


def test_repeated_tensor_in_batch_is_two_inputs_of_regions():
    def by_value(model, batch):
        loss = (model["w"] * batch["x"]).sum() - batch["y"].sum()
        return loss if loss > -100 else loss * 2

    step = fx.train_step(by_value, TX)
    state, same = fx.init({"w": torch.tensor(1.0)}, TX), torch.ones(2, 3)
    compiled = fx.compile(step, backend="eager")
    with pytest.warns(UserWarning, match="cannot be traced as one graph"):
        compiled(state, {"x": same, "y": same})
    assert compiled.route == "eager, regions"
    other = {"x": torch.ones(2, 3), "y": torch.zeros(2, 3)}
    assert compiled(state, other)[1].metrics["loss"] == step(state, other)[1].metrics["loss"]
