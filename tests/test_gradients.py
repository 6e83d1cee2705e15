"""Gradients of a loss, and their application to the parameters of one entry."""

import re

import numpy as np
import pytest
import torch
from problem import SMALL_BATCH, linear, squares, train
from torch import nn

import fxtrain as fx
from fxtrain import testing


class TestGradients:
    def test_wrt_differentiates_one_entry(self):
        state = fx.init({"a": torch.tensor(2.0), "b": torch.tensor(5.0)})
        product = fx.gradients(lambda model, batch: model["a"] * model["b"], wrt="a")
        assert float(product(state, None).grads) == 5.0

    @pytest.mark.parametrize(
        ("module", "message"),
        [
            ({"a": linear(), "b": linear()}, "a key of a dict of modules, got 'c'. The model has the keys 'a', 'b'"),
            (linear(), "a key of a dict of modules, got 'c'. The model is not a dict"),
        ],
    )
    def test_unknown_wrt_entry_is_refused(self, module, message):
        with pytest.raises(ValueError, match=message):
            fx.gradients(squares, wrt="c")(fx.init(module), SMALL_BATCH)

    def test_state_without_a_model_is_refused(self):
        with pytest.raises(ValueError, match="expected a state with a model, got one without"):
            fx.gradients(squares)(fx.init(linear()).replace(model=None), SMALL_BATCH)

    def test_works_under_no_grad_and_inference_mode(self):
        state = fx.init(linear())
        wanted = fx.gradients(squares)(state, SMALL_BATCH)
        with torch.no_grad():
            testing.assert_equal(fx.gradients(squares)(state, SMALL_BATCH), wanted, "under no_grad")
        with torch.inference_mode():
            testing.assert_equal(fx.gradients(squares)(state, SMALL_BATCH), wanted, "under inference_mode")
            state, step = train()
            step(state, SMALL_BATCH)

    @pytest.mark.parametrize(
        ("returned", "error", "message"),
        [
            (
                lambda y: y,
                TypeError,
                r"bad .* to return a 0-d .*, got a float32 tensor of shape \[4, 1\]\. .* \.mean\(\)",
            ),
            (lambda y: y.sum()[None], TypeError, r"got a float32 tensor of shape \[1\]\. .* \.mean\(\)"),
            (lambda y: None, TypeError, "got None. End the function with return loss"),
            (lambda y: 1.0, TypeError, r"got 1\.0\. Return the tensor itself, without \.item\(\)"),
            (lambda y: np.float64(1.0), TypeError, r"got .*1\.0.*\. .* without \.item\(\)"),
            (lambda y: y.sum().long(), TypeError, r"got an int64 tensor of shape \[\]\. .* floating dtype"),
            (
                lambda y: (y.sum(), y),
                TypeError,
                r"a tuple of \(a float32 tensor of .*\)\. .* return loss, \{'accuracy'",
            ),
            (lambda y: (y.sum(),), TypeError, r"a tuple of \(a float32 tensor of shape \[\]\)\. Return the loss"),
            (lambda y: [y.sum()], TypeError, r"got a list of length 1\. Return the loss"),
            (lambda y: {"mae": y.sum()}, TypeError, "got a dict with keys 'mae'. .* under the name 'loss'"),
            (lambda y: {"loss": y}, TypeError, r"got a dict whose loss is a float32 tensor of shape \[4, 1\]"),
            (lambda y: nn.MSELoss(), TypeError, r"got an MSELoss\. Call an instance .* MSELoss\(\)\("),
            (
                lambda y: (y.sum(), {"error": 1.0}),
                TypeError,
                r"the metric 'error' of bad .* to be a 0-d tensor .*, got 1\.0\. .* without \.item",
            ),
            (lambda y: {"loss": y.sum(), "y": y}, TypeError, r"'y' of bad .* \[4, 1\]\. Reduce it, or leave it out"),
            (lambda y: (y.sum(), {"name": "a"}), TypeError, "'name' of bad .*, got 'a'. Leave it out"),
            (
                lambda y: (y.sum(), {"loss": y.sum()}),
                ValueError,
                "metrics of bad .* got a metric named 'loss'. Rename it",
            ),
        ],
    )
    def test_invalid_losses_are_refused(self, returned, error, message):
        def bad(model, batch):
            return returned(model(batch))

        with pytest.raises(error, match=message):
            fx.gradients(bad)(fx.init(linear()), SMALL_BATCH)


class TestApplyGradients:
    def test_updates_only_trainable_parameters_of_one_entry(self):
        tx = {"a": fx.optim.adam(0.1), "b": fx.optim.sgd(0.1)}
        modules = {"a": linear(), "b": linear()}
        modules["a"].bias.requires_grad_(False)
        state = fx.init(modules, tx)
        found = fx.gradients(lambda model, x: squares(model["a"], x) + squares(model["b"], x), wrt="a")(
            state, SMALL_BATCH
        )
        new, updates = fx.step.apply_gradients(state, found.grads, tx["a"], wrt="a")
        testing.assert_equal(new.params["b"], state.params["b"], "the other entry")
        testing.assert_equal(new.opt_state["b"], state.opt_state["b"], "the other memory")
        assert torch.equal(new.params["a"]["bias"], state.params["a"]["bias"])
        assert torch.equal(new.params["a"]["weight"], state.params["a"]["weight"] + updates["weight"])


class TestUpdate:
    def arguments(self, **changed):
        tx = {"a": fx.optim.sgd(0.1), "b": fx.optim.adam(0.1)}
        state = fx.init({"a": torch.tensor(1.0), "b": torch.tensor(1.0)}, tx)
        found = fx.gradients(lambda model, batch: model["a"] * model["b"], wrt="a")(state, None)
        return {"state": state, "found": found, "tx": tx["a"], "wrt": "a", **changed}

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"state": 1.0}, "expected a TrainState as the first argument, got 1.0"),
            ({"found": 1.0}, "update: expected the result of fxtrain.gradients, got 1.0"),
            ({"tx": {"a": fx.optim.sgd(0.1)}}, "Update one model at a time: give tx['a'], and wrt='a'."),
            ({"tx": fx.optim.sgd}, "expected tx to be a gradient transformation, got the function sgd"),
            ({"wrt": None}, "expected wrt to be one of a, b, because each has its own optimizer, got None"),
            ({"wrt": "c"}, "expected wrt to be one of a, b, because each has its own optimizer, got 'c'"),
        ],
    )
    def test_wrong_arguments_are_refused(self, changed, message):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            fx.step.update(**self.arguments(**changed))
