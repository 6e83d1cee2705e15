"""Callbacks that request saves and evaluations."""

import pytest
import torch

import fxtrain as fx
from fxtrain import testing


@pytest.mark.parametrize("ask", [fx.callbacks.save, fx.callbacks.evaluate])
class TestRequests:
    def test_request_is_made_at_the_given_steps(self, ask):
        callback, state = fx.compose(ask(every=2)), fx.init(torch.nn.Linear(1, 1))
        found = [callback(state, fx.StepEnd(step=step, metrics={}))[1].any(ask.__name__) for step in (1, 2, 3, 4)]
        assert found == [False, True, False, True]

    def test_callback_laws_hold(self, ask):
        events = [fx.StepEnd(step=step, metrics={}) for step in range(1, 5)]
        testing.check_laws(ask(every=fx.every(2)), fx.init(torch.nn.Linear(2, 1)), events)
