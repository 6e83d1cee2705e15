"""Masks that are drawn together: the same bits as one by one, and of what else is drawn nothing changes."""

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

draws = importlib.import_module("fxtrain.compiler._dropout")

SEED, STEP = torch.tensor(5), torch.tensor(3)
X, Y = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)), torch.ones(4, 4)
XOR, SELECT = torch.ops.aten.bitwise_xor.Scalar, torch.ops.aten.select.int


def graph_of(function, *inputs):
    """The graph as it is traced, and as it is made of it."""

    def drawing(seed, step, *inputs):
        with rng.functional(rng.key(seed, step=step)):
            return function(*inputs)

    def traced():
        return make_fx(drawing, tracing_mode="fake", _allow_non_fake_inputs=True)(SEED, STEP, *inputs)

    together = traced()
    draws.with_draws_together(together.graph)
    together.recompile()
    return traced(), together


def count(graph, target):
    return len(graph.graph.find_nodes(op="call_function", target=target))


def assert_drawn(function, *inputs, before, after):
    """So many draws become so many, and not a bit changes."""
    graph, together = graph_of(function, *inputs)
    assert (count(graph, XOR), count(together, XOR)) == (before, after)
    for seed, step in ((SEED, STEP), (SEED + 1, STEP), (SEED, STEP + (1 << 33))):
        torch.testing.assert_close(together(seed, step, *inputs), graph(seed, step, *inputs), rtol=0, atol=0)
        with rng.functional(rng.key(seed, step=step)):
            torch.testing.assert_close(together(seed, step, *inputs), function(*inputs), rtol=0, atol=0)
    return together


def test_dropouts_of_one_shape_are_one_draw():
    together = assert_drawn(lambda x: [F.dropout(x, 0.3) for _ in range(5)], X, before=5, after=0)
    assert count(together, SELECT) == 5


def test_each_shape_and_each_probability_is_a_draw():
    def drop(x, y):
        return [F.dropout(z, p) for p in (0.3, 0.5) for z in (x, y, x)]

    # Two masks of x for each p; one of y for each, which stay as they are.
    assert_drawn(drop, X, Y, before=6, after=2)


def test_sites_in_turns():
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
def test_other_masks(draw):
    graph, together = graph_of(lambda x: [draw(x), draw(x)], X)
    torch.testing.assert_close(together(SEED, STEP, X), graph(SEED, STEP, X), rtol=0, atol=0)


def test_numbers_that_take_more_than_a_byte_stay_where_they_are():
    assert_drawn(
        lambda x: [torch.randn_like(x), torch.randn_like(x), torch.rand(3), torch.rand(3)], X, before=4, after=4
    )


def test_keys_are_not_mixed():
    def drop(x):
        found = [F.dropout(x, 0.5)]
        for microbatch in range(2):
            with rng.functional(rng.key(7, microbatch=microbatch)):
                found += [F.dropout(x, 0.5), F.dropout(x, 0.5)]
        return found

    assert_drawn(drop, X, before=5, after=1)


def test_where_memory_is_written_over_nothing_changes():
    def drop(x):
        x = x + 1
        return F.dropout(x, 0.5, inplace=True), F.dropout(x.exp(), 0.5)

    assert_drawn(drop, X, before=2, after=2)


def test_equal_numbers_that_are_returned_are_two():
    _, together = graph_of(lambda x: (SEED + 1, SEED + 1, x), X)
    first, second, _ = together(SEED, STEP, X)
    assert first.data_ptr() != second.data_ptr()


@given(sites=st.sets(st.integers(0, 60), min_size=1))
def test_progressions_are_the_sites(sites):
    found = draws._progressions(sites)
    assert sorted(site for part in found for site in part) == sorted(sites)


def test_progressions_are_long():
    assert draws._progressions(range(5)) == [range(5)]
    assert draws._progressions([1, 2, 4, 5, 7, 8]) == [range(1, 10, 3), range(2, 11, 3)]
    assert draws._progressions([3]) == [range(3, 4)]


def test_a_step_is_the_eager_one():
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
