"""Batched dropout masks equal masks sampled one by one, bitwise, and other random samples are unchanged."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxtrain as fx
from fxtrain import rng

draws = importlib.import_module("fxtrain.compiler.passes._dropout")

SEED, STEP = torch.tensor(5), torch.tensor(3)
X, Y = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), torch.ones(4, 4)
XOR, SELECT = torch.ops.aten.bitwise_xor.Scalar, torch.ops.aten.select.int


def graph_of(function, *inputs):
    """Returns the traced graph, and a copy with batched masks."""

    def drawing(seed, step, *inputs):
        with rng.functional(rng.key(seed, step=step)):
            return function(*inputs)

    def traced():
        return make_fx(drawing, tracing_mode="fake", _allow_non_fake_inputs=True)(SEED, STEP, *inputs)

    together = traced()
    draws.merge_dropout_masks(together.graph)
    together.recompile()
    return traced(), together


def count(graph, target):
    return len(graph.graph.find_nodes(op="call_function", target=target))


def assert_drawn(function, *inputs, before, after):
    """Asserts the number of separate masks before and after batching, and bitwise equal results."""
    graph, together = graph_of(function, *inputs)
    assert (count(graph, XOR), count(together, XOR)) == (before, after)
    for seed, step in ((SEED, STEP), (SEED + 1, STEP), (SEED, STEP + (1 << 33))):
        torch.testing.assert_close(together(seed, step, *inputs), graph(seed, step, *inputs), rtol=0, atol=0)
        with rng.functional(rng.key(seed, step=step)):
            torch.testing.assert_close(together(seed, step, *inputs), function(*inputs), rtol=0, atol=0)
    return together


def test_dropouts_of_one_shape_are_batched():
    together = assert_drawn(lambda x: [F.dropout(x, 0.3) for _ in range(5)], X, before=5, after=0)
    assert count(together, SELECT) == 5


def test_each_shape_and_probability_is_batched_separately():
    def drop(x, y):
        return [F.dropout(z, p) for p in (0.3, 0.5) for z in (x, y, x)]

    # Each p has two masks of x, which are batched, and one of y, which is unchanged.
    assert_drawn(drop, X, Y, before=6, after=2)


def test_interleaved_sites_are_batched():
    def blocks(x, y):
        for _ in range(3):
            x, y = F.dropout(F.dropout(x, 0.1).exp(), 0.1), F.dropout(y, 0.1)
        return x, y

    together = assert_drawn(blocks, X, Y, before=9, after=0)
    assert count(together, torch.ops.aten.arange.start_step) == 3  # 0 3 6, 1 4 7 and 2 5 8


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: F.alpha_dropout(x, 0.2, True),
        lambda x: nn.Dropout1d(0.4)(x),
        lambda x: torch.bernoulli(torch.full_like(x, 0.25)),
        lambda x: x.new_empty(x.shape).bernoulli_(0.25) * x,
    ],
)
def test_other_masks_are_bitwise_equal(draw):
    graph, together = graph_of(lambda x: [draw(x), draw(x)], X)
    torch.testing.assert_close(together(SEED, STEP, X), graph(SEED, STEP, X), rtol=0, atol=0)


def test_float_samples_are_not_batched():
    assert_drawn(
        lambda x: [torch.randn_like(x), torch.randn_like(x), torch.rand(3), torch.rand(3)], X, before=4, after=4
    )


def test_keys_are_batched_separately():
    def drop(x):
        found = [F.dropout(x, 0.5)]
        for microbatch in range(2):
            with rng.functional(rng.key(7, microbatch=microbatch)):
                found += [F.dropout(x, 0.5), F.dropout(x, 0.5)]
        return found

    assert_drawn(drop, X, before=5, after=1)


def test_in_place_dropout_is_not_batched():
    def drop(x):
        x = x + 1
        return F.dropout(x, 0.5, inplace=True), F.dropout(x.exp(), 0.5)

    assert_drawn(drop, X, before=2, after=2)


def test_equal_outputs_do_not_share_memory():
    _, together = graph_of(lambda x: (SEED + 1, SEED + 1, x), X)
    first, second, _ = together(SEED, STEP, X)
    assert first.data_ptr() != second.data_ptr()


@given(sites=st.sets(st.integers(0, 60), min_size=1))
def test_progressions_cover_sites(sites):
    found = draws._progressions(sites)
    assert sorted(site for part in found for site in part) == sorted(sites)


def test_progressions_are_maximal():
    assert draws._progressions(range(5)) == [range(5)]
    assert draws._progressions([1, 2, 4, 5, 7, 8]) == [range(1, 10, 3), range(2, 11, 3)]
    assert draws._progressions([3]) == [range(3, 4)]


def test_compiled_step_equals_eager():
    def module():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.4)) for _ in range(3)])

    tx = fx.optim.sgd(0.1)
    step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx, accumulate=2)
    compiled = fx.compile(step, on_recompile="error")
    state = other = fx.init(module(), tx)
    for seed in range(3):
        batch = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))
        state, output = step(state, batch)
        other, its = compiled(other, batch)
        torch.testing.assert_close(its.metrics["loss"], output.metrics["loss"])
    torch.testing.assert_close(fx.tree.leaves(other.params), fx.tree.leaves(state.params))
