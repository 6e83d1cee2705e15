"""Torch function modes of fxtrain around functions that torch.compile splits into several graphs."""

import pytest
import torch

from fxtrain import rng
from fxtrain.model._first_call_checks import TensorReads
from fxtrain.precision import _Float32
from fxtrain.rng._frames import is_safe_below_compile
from fxtrain.step._missing_gradient import _Cuts


@torch._dynamo.disable(recursive=False)
def uncompiled(x):
    return x.mean(), x.sum(), x.exp(), x.neg(), torch.relu(x)


@pytest.fixture(autouse=True)
def no_compiled_frames():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [lambda: rng.functional(rng.key(0)), _Float32, lambda: TensorReads([]), _Cuts])
def test_compiled_frame_is_not_reused_for_another_operation(mode):
    def function(x):
        return uncompiled(x)

    x = torch.tensor([2.0, -1.0])
    with mode():
        found = torch.compile(function, backend="eager")(x)
    torch.testing.assert_close(found, uncompiled(x))


def test_traced_random_samples_equal_uncompiled_ones():
    def function(x):
        return torch.nn.functional.dropout(x, 0.5)

    x = torch.ones(8)
    with rng.functional(rng.key(0)):
        expected = function(x)
    with rng.functional(rng.key(0)):
        found = torch.compile(function, backend="eager", fullgraph=True)(x)
    assert torch.equal(found, expected)


def test_installed_torch_supports_modes_below_compile():
    assert is_safe_below_compile()
