"""Taps measure the activations of modules with exact values."""

import problem
import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import testing
from fxtrain.callbacks import activation_stats


class TestTap:
    @pytest.mark.parametrize("compiled", [False, True])
    def test_activation_stats_have_exact_values(self, compiled):
        module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))

        def loss_fn(model, batch):
            return model(batch).square().mean()

        state = fx.init(module, fx.optim.sgd(0.0))
        step = fx.train_step(fx.tap(loss_fn, ["1", "2"], activation_stats), fx.optim.sgd(0.0))
        step = fx.compile(step, backend="eager") if compiled else step
        batch = torch.randn(8, 2)
        _, output = step(state, batch)
        inside = module[1](module[0](batch))
        wanted = {
            "activations/1/mean": inside.mean(),
            "activations/1/std": inside.std(unbiased=False),
            "activations/1/zeros": (inside == 0).float().mean(),
            "activations/1/max": inside.abs().max(),
        }
        for name, value in wanted.items():
            torch.testing.assert_close(output.metrics[name], value.detach())
        assert len(output.metrics) == 10  # the loss and the learning rate too
        assert not any(part._forward_hooks for part in module.modules())

    @pytest.mark.usefixtures("fresh_dynamo")
    def test_step_with_tap_and_patterns_is_one_dynamo_graph(self):
        counts = fx.callbacks.histograms(parameter="4.*", every=1)
        tx = fx.optim.sgd(0.1)
        step = fx.train_step(fx.tap(problem.loss_fn, ["0", "[24]"], activation_stats), tx, callbacks=counts)
        state, batch = fx.attach(fx.init(problem.module(), tx), step), problem.data()[0]
        wanted, eager = step(state, batch)
        new, output = torch.compile(step, fullgraph=True, backend="eager")(state, batch)
        assert list(output.metrics) == list(eager.metrics)
        for got, want in ((output.metrics, eager.metrics), (new.slots, wanted.slots), (new.params, wanted.params)):
            testing.assert_equal(got, want, "compiled")

    def test_tap_leaves_gradients_unchanged(self):
        state, batch = problem.start(), problem.data()[0]
        plain = fx.gradients(problem.loss_fn)(state, batch)
        tapped = fx.gradients(fx.tap(problem.loss_fn, "*", activation_stats))(state, batch)
        testing.assert_equal(tapped.grads, plain.grads, "gradients")

    def test_hooks_are_removed_after_an_error(self):
        state, batch, calls = problem.start(), problem.data()[0], []

        def count(output):
            calls.append(output)
            return activation_stats(output)

        def fails(model, batch):
            problem.loss_fn(model, batch)
            raise RuntimeError("on purpose")

        with pytest.raises(RuntimeError, match="on purpose"):
            fx.gradients(fx.tap(fails, "*", count))(state, batch)
        assert calls
        calls.clear()
        fx.gradients(problem.loss_fn)(state, batch)
        assert not calls

    def test_tap_reaches_into_dicts_of_modules(self):
        state = fx.init({"a": nn.Linear(1, 1), "b": nn.Sequential(nn.Tanh())})

        def loss_fn(model, batch):
            return model["b"](model["a"](batch)).sum()

        found = fx.gradients(fx.tap(loss_fn, "b.0", lambda y: y.amax(), prefix="out"))(state, torch.ones(1, 1))
        assert sorted(found.metrics) == ["loss", "out/b.0"]

    def test_unmatched_pattern_and_duplicate_names_are_rejected(self):
        state, batch = problem.start(), problem.data()[0]
        with pytest.raises(ValueError, match=r"expected 'nobody' to match a module, got no match among 0, 1"):
            fx.gradients(fx.tap(problem.loss_fn, "nobody", activation_stats))(state, batch)
        twice = fx.tap(fx.tap(problem.loss_fn, "0", activation_stats), "0", activation_stats)
        with pytest.raises(ValueError, match="Choose another prefix"):
            fx.gradients(twice)(state, batch)
