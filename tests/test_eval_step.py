"""Evaluation steps: metrics and outputs in eval mode, and invalid results."""

import problem
import pytest
import torch
from problem import SMALL_BATCH, linear

import fxtrain as fx
from fxtrain import testing


class TestEvalStep:
    def test_runs_in_eval_mode_without_changing_the_state(self):
        state, batch = problem.start(), problem.data()[0]
        before = state.copy()
        module = problem.module().eval()
        loss, measured = problem.loss_fn(module, batch)
        output = problem.eval_step(state, batch)
        torch.testing.assert_close(output.metrics, {"loss": loss.detach(), "mae": measured["mae"].detach()})
        testing.assert_equal(state, before, "the state measured")
        assert output.outputs is None
        assert repr(problem.eval_step) == "<eval_step(loss_fn)>"

    def test_returns_outputs(self):
        step = fx.eval_step(lambda model, batch: ({"size": model(batch).sum()}, {"y": model(batch)}), outputs=True)
        output = step(fx.init(linear()), SMALL_BATCH)
        assert list(output.metrics) == ["size"]
        assert output.outputs["y"].shape == (4, 1)

    @pytest.mark.parametrize(
        ("measure", "outputs", "message"),
        [
            (lambda model, batch: model(batch), False, r"return a 0-d .*, got a float32 tensor of shape \[4, 1\]"),
            (lambda model, batch: {"y": model(batch)}, False, r"the metric 'y' of <lambda> .* got a float32 tensor"),
            (lambda model, batch: model(batch).sum(), True, r"to return a pair \(metrics, outputs\) .*, got a float32"),
        ],
    )
    def test_invalid_return_values_are_refused(self, measure, outputs, message):
        with pytest.raises(TypeError, match=message):
            fx.eval_step(measure, outputs=outputs)(fx.init(linear()), SMALL_BATCH)
