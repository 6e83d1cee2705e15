"""Modes of torch around compiled functions: function modes, and the detection of anomalies."""

import problem
import pytest
import torch
from canaries import uncompiled

import fxtrain as fx
from fxtrain import rng
from fxtrain.model._tensor_access import TensorReads
from fxtrain.precision._policy import Float32Norms
from fxtrain.step._loss_mistakes import _Cuts


@pytest.fixture
def no_compiled_frames():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [lambda: rng.functional(rng.key(0)), Float32Norms, lambda: TensorReads([]), _Cuts])
def test_compiled_frame_is_not_reused_for_another_operation(mode, no_compiled_frames):
    def function(x):
        return uncompiled(x)

    x = torch.tensor([2.0, -1.0])
    with mode():
        found = torch.compile(function, backend="eager")(x)
    torch.testing.assert_close(found, uncompiled(x))


def test_traced_random_samples_equal_uncompiled_ones(no_compiled_frames):
    def function(x):
        return torch.nn.functional.dropout(x, 0.5)

    x = torch.ones(8)
    with rng.functional(rng.key(0)):
        expected = function(x)
    with rng.functional(rng.key(0)):
        found = torch.compile(function, backend="eager", fullgraph=True)(x)
    assert torch.equal(found, expected)


def test_anomaly_detection_ends_where_a_trace_begins(interpreted):
    """It would read values, which a trace does not have."""
    step, state, (batch,) = problem.step(), problem.start(), problem.data(1)
    with torch.autograd.set_detect_anomaly(True):
        compiled = fx.compile(step, fullgraph=True)
        with pytest.warns(RuntimeWarning, match="detect_anomaly does not reach into a compiled step"):
            found, _ = compiled(state, batch)
        assert torch.is_anomaly_enabled()
    assert "traced" in compiled.route
    torch.testing.assert_close(dict(found.params), dict(step(state, batch)[0].params))
