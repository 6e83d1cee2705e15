"""Modes of torch around compiled functions: function modes, and the detection of anomalies."""

import functools

import problem
import pytest
import torch
from canaries import uncompiled

import fxtrain as fx
from fxtrain import rng, testing
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


class Gated(torch.nn.Module):
    """Chooses one of two functions by a tensor, with a parameter that both read."""

    def __init__(self, choose=torch.cond):
        super().__init__()
        self.linear, self.scale = torch.nn.Linear(2, 3), torch.nn.Parameter(torch.ones(3))
        self.dropout = torch.nn.Dropout(0.3)
        self.choose = choose

    def forward(self, x):
        y = self.dropout(self.linear(x))
        return self.choose(x.mean() > 0, lambda y: (y * self.scale).relu(), lambda y: (y + self.scale).sin(), (y,))


def choose_in_python(flag, yes, no, operands):
    return (yes if flag else no)(*operands)


@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"accumulate": 2}], ids=["plain", "bf16", "accumulate"])
def test_torch_cond_in_a_loss_is_a_choice_in_python(options, no_compiled_frames):
    def trained(choose):
        state = fx.init(Gated(choose), tx, seed=0)
        state = state.replace(params={"linear.weight": weight, "linear.bias": torch.zeros(3), "scale": torch.ones(3)})
        step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx, **options)
        for shift in (1, -1, -1, 1):
            state, _ = step(state, batch + shift)
        return state.params

    tx, weight, batch = fx.optim.sgd(0.5), torch.randn(3, 2), torch.randn(4, 2)
    testing.assert_equal(trained(torch.cond), trained(choose_in_python), "parameters")


def test_flex_attention_is_evaluated(no_compiled_frames):
    flex_attention = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention

    def attend(query, key, value):
        return flex_attention(query, key, value, score_mod=lambda score, b, h, i, j: torch.where(i < j, -1e9, score))

    def loss(attention, model, batch):
        query, key, value = model(batch).reshape(2, 128, 3, 1, 16).permute(2, 0, 3, 1, 4)
        return attention(query, key, value).square().mean()

    state, batch = fx.init(torch.nn.Linear(8, 48)), torch.randn(2, 128, 8)
    causal = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    found, expected = (
        fx.eval_step(functools.partial(loss, attention))(state, batch).metrics for attention in (attend, causal)
    )
    torch.testing.assert_close(found, expected)
