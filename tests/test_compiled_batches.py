"""Compiled steps see what the uncompiled step sees of a batch: the order of its keys, and lazily negated values."""

import pytest
import torch
from torch import nn

import fxtrain as fx

TX = fx.optim.sgd(0.1)


def in_order(model, batch):
    """A loss that depends on the order of keys."""
    return sum(factor * model(value).square().mean() for factor, value in enumerate(batch.values(), start=1))


def parts(model, batch):
    return (model(batch.real) + 2 * model(batch.imag)).square().mean()


def squares(model, batch):
    return model(batch).square().mean()


def assert_like_uncompiled(loss, batches, **options):
    """Asserts that a compiled step and the step itself agree on each batch."""
    torch.manual_seed(0)
    step, state = fx.train_step(loss, TX), fx.init(nn.Linear(3, 2), TX)
    compiled = fx.compile(step, **options)
    for batch in batches:
        found, expected = compiled(state, batch)[0], step(state, batch)[0]
        torch.testing.assert_close(found.params, expected.params)
    return compiled


X, Y = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1))
Z = torch.complex(X, Y)
ORDERS = [{"b": Y, "a": X}, {"a": X, "b": Y}, {"b": Y, "a": X}]


@pytest.mark.parametrize("options", [{}, {"check": False}, {"backend": "eager"}, {"dynamic": True}])
def test_order_of_keys_is_part_of_a_graph(interpreted, options):
    compiled = assert_like_uncompiled(in_order, ORDERS, on_recompile="allow", **options)
    assert compiled.graphs == 2


def test_other_order_of_nested_keys_recompiles_with_the_reason(interpreted):
    def loss(model, batch):
        return in_order(model, batch[0]["parts"])

    with pytest.warns(
        UserWarning, match=r"batch\[0\]\['parts'\]\.keys\(\): 'b', 'a' -> 'a', 'b'. The step may iterate"
    ):
        assert_like_uncompiled(loss, [({"parts": batch},) for batch in ORDERS])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"check": False}])
@pytest.mark.parametrize(
    ("loss", "batches"),
    [
        (squares, [Z.imag, Z.imag, Z.imag, Z.conj().imag]),
        (squares, [Z.conj().imag, Z.imag]),
        (parts, [Z, Z.conj(), Z]),
    ],
)
def test_lazily_negated_values_are_those_that_the_step_sees(loss, batches, options):
    assert_like_uncompiled(loss, batches, on_recompile="allow", **options)
