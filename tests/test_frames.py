"""Modes of the library around functions that torch.compile cuts into several graphs."""

import pytest
import torch

from fxtrain import rng
from fxtrain.model._first_calls import Reads
from fxtrain.precision import _Float32
from fxtrain.rng._frames import is_safe_below_compile
from fxtrain.step._unreached import _Cuts


@torch._dynamo.disable(recursive=False)
def uncompiled(x):
    return x.mean(), x.sum(), x.exp(), x.neg(), torch.relu(x)


@pytest.fixture(autouse=True)
def no_compiled_frames():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [lambda: rng.functional(rng.key(0)), _Float32, lambda: Reads([]), _Cuts])
def test_a_graph_of_one_operation_is_not_used_for_another(mode):
    def function(x):
        return uncompiled(x)

    x = torch.tensor([2.0, -1.0])
    with mode():
        found = torch.compile(function, backend="eager")(x)
    torch.testing.assert_close(found, uncompiled(x))


def test_calls_are_inlined_while_tracing():
    def function(x):
        return torch.nn.functional.dropout(x, 0.5)

    x = torch.ones(8)
    with rng.functional(rng.key(0)):
        expected = function(x)
    with rng.functional(rng.key(0)):
        found = torch.compile(function, backend="eager", fullgraph=True)(x)
    assert torch.equal(found, expected)


def test_this_torch_has_the_interface():
    assert is_safe_below_compile()
