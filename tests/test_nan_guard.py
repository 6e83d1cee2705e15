"""The NaN guard: skipped steps, the stop, and the name of the first non-finite gradient."""

import math

import problem
import pytest
import torch

import fxtrain as fx
from fxtrain import testing

NAN, INF = math.nan, math.inf


def gradient_events(losses):
    return [
        fx.Gradients(
            step=torch.tensor(step),
            loss=torch.tensor(loss),
            metrics={"loss": torch.tensor(loss)},
            grads={"weight": torch.tensor([[loss]])},
        )
        for step, loss in enumerate(losses, start=1)
    ]


class TestNanGuard:
    @pytest.mark.parametrize(
        ("patience", "losses", "skips", "stop"),
        [
            (2, [1.0, NAN, 1.0, INF, 1.0], [2, 4], None),
            (2, [1.0, NAN, -INF, 1.0], [2, 3], 3),
            (1, [NAN], [1], 1),
            (3, [NAN, NAN, 1.0, NAN, NAN, NAN], [1, 2, 4, 5, 6], 6),
        ],
    )
    def test_skipped_and_stopping_steps_are_exact(self, patience, losses, skips, stop):
        guard = fx.compose(fx.callbacks.nan_guard(patience=patience))
        state = fx.attach(fx.init(torch.nn.Linear(1, 1)), guard)
        skipped, stopped = [], None
        for number, event in enumerate(gradient_events(losses), start=1):
            state, control = guard(state, event)
            skipped += [number] if control.reasons("skip_update") else []
            stopped = stopped or (number if control.reasons("stop") else None)
        assert (skipped, stopped) == (skips, stop)
        assert int(state.slots["nan_guard"].skipped) == len(skips)

    def test_run_survives_nan_batch(self):
        batches = problem.data()
        batches[1] = {**batches[1], "y": batches[1]["y"] * NAN}
        guard = fx.callbacks.nan_guard(patience=2)
        result = fx.fit(problem.start(), problem.step(callbacks=guard), batches, callbacks=guard, steps=6)
        assert all(leaf.isfinite().all() for leaf in result.state.params.values())
        assert all(leaf.isfinite().all() for leaf in result.state.buffers.values())
        assert result.history["nan_guard/skipped"].values.tolist() == [0, 1, 1, 1, 2, 2]

    def test_first_non_finite_gradient_is_named(self):
        def loss_fn(model, batch):
            return batch * model["fine"] + (batch - 2).sqrt() * model["wrong"]

        tx = fx.optim.sgd(0.1)
        guard = fx.callbacks.nan_guard(patience=2)
        step = fx.train_step(loss_fn, tx, callbacks=guard)
        start = fx.init({"fine": torch.tensor(1.0), "wrong": torch.tensor(1.0)}, tx)
        data = [torch.tensor(value) for value in (3.0, 1.0, 0.0)]
        result = fx.fit(start, step, data, callbacks=guard, epochs=1)
        assert result.reason == (
            "loss or gradients were not finite 2 times in a row; first non-finite: grads['wrong'] at step 3"
        )
        assert fx.callbacks.first_not_finite(start.with_slot("nan_guard", guard.init(start))) == ""

    def test_patience_is_validated(self):
        with pytest.raises(ValueError, match="expected patience to be a positive int, got 0"):
            fx.callbacks.nan_guard(patience=0)

    def test_callback_laws_hold(self):
        events = gradient_events([1.0, NAN, 2.0, INF, NAN])
        testing.check_laws(fx.callbacks.nan_guard(patience=2), fx.init(torch.nn.Linear(2, 1)), events)
