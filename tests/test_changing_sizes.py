"""Compiled steps and batches of several sizes: declared ones compile in silence, others lead to a remedy."""

import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxtrain as fx
from fxtrain.data import bucketed, next_tokens, pad

TX = fx.optim.adam(1e-2)


class Reader(nn.Module):
    """Predicts the next token from the mean of those before."""

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


@pytest.mark.parametrize("on_recompile", ["warn", "error"])
def test_declared_sizes_compile_once_each_without_a_warning(on_recompile):
    data = bucketed(texts(), 3, sizes=3, multiple=4, drop_last=False)
    assert len(data.sizes) > 2
    step = fx.compile(fx.train_step(loss_fn, TX), backend="eager", donate=True, on_recompile=on_recompile)
    measure = fx.compile(fx.eval_step(lambda m, b: {"loss": loss_fn(m, b)}), backend="eager", on_recompile=on_recompile)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = fx.fit(start(), step, fx.data.prefetch(data), eval_step=measure, eval_data=data, epochs=2)
        fx.evaluate(compiled.state, measure, data)
    assert step.graphs == measure.graphs == len(data.sizes)
    eager = fx.fit(start(), fx.train_step(loss_fn, TX), data, epochs=2)
    torch.testing.assert_close(compiled.last.params, eager.last.params, rtol=1e-5, atol=1e-6)


def test_sizes_that_nobody_declared_lead_to_one_hint():
    step = fx.compile(fx.train_step(loss_fn, TX), backend="eager", donate=True)
    batches = [pad([text]) for text in ([1, 2], [1, 2, 3], [1, 2, 3, 4])]
    with pytest.warns(UserWarning, match="to be compiled again") as caught:
        fx.fit(start(), step, fx.data.sequence(batches, dynamic=True), epochs=1)
    (hint,) = [str(warning.message) for warning in caught if "compiled again" in str(warning.message)]
    assert "fxtrain.data.bucketed" in hint
    assert "fxtrain.compile(step, dynamic=True)" in hint
    refusing = fx.compile(fx.train_step(loss_fn, TX), backend="eager", on_recompile="error")
    with pytest.raises(RuntimeError, match=r"fxtrain\.data\.bucketed"):
        fx.fit(start(), refusing, fx.data.sequence(batches, dynamic=True), epochs=1)


def test_a_declaration_covers_batches_and_no_change_of_the_state():
    data = bucketed(texts(), 3, sizes=3, multiple=4)
    step = fx.compile(fx.train_step(loss_fn, TX), backend="eager", on_recompile="error")
    step.expect(data.kinds)
    step(start(), data[0])
    with pytest.raises(RuntimeError, match=r"state\.params"):
        step(start().replace(params={**start().params, "more": torch.ones(1)}), data[0])


def test_a_run_over_buckets_resumes_bitwise_in_the_middle_of_an_epoch(tmp_path):
    data, step = bucketed(texts(), tokens=24, sizes=3, multiple=4, drop_last="pad"), fx.train_step(loss_fn, TX)
    whole = fx.fit(start(), step, data, steps=data.epoch_length + 5)
    options = {"checkpointer": fx.checkpointer(tmp_path)}
    fx.fit(start(), step, data, steps=data.epoch_length // 2, **options)
    again = bucketed(texts(), tokens=24, sizes=3, multiple=4, drop_last="pad")
    rest = fx.fit(start(), step, again, steps=data.epoch_length + 5, resume=True, **options)
    for name, value in whole.last.params.items():
        assert torch.equal(value, rest.last.params[name])


def test_several_steps_in_a_call_take_batches_of_several_sizes_one_by_one():
    data = bucketed(texts(), 3, sizes=3, multiple=4)
    together = fx.compile(fx.train_step(loss_fn, TX), backend="eager", steps_per_call=2, on_recompile="error")
    found = fx.fit(start(), together, data, epochs=2)
    single = fx.fit(start(), fx.train_step(loss_fn, TX), data, epochs=2)
    torch.testing.assert_close(found.last.params, single.last.params, rtol=1e-5, atol=1e-6)
