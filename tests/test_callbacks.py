"""Early stopping, the NaN guard and epoch means against values computed by hand, and the laws of callbacks."""

import math

import problem
import pytest
import torch

import fxtrain as fx
from fxtrain import testing

NAN, INF = math.nan, math.inf


def evaluations(values, name="loss"):
    return [fx.EvalEnd(step=10 * (i + 1), metrics={name: torch.tensor(v)}) for i, v in enumerate(values)]


class TestRestoreBest:
    def test_restore_best_changes_only_final_state(self):
        callback = fx.compose(fx.callbacks.restore_best("loss"))
        state = fx.attach(fx.init(torch.nn.Linear(1, 1)), callback)
        for value, event in zip([5.0, 1.0, 7.0], evaluations([0.5, 0.1, 0.3]), strict=True):
            params = {name: torch.full_like(leaf, value) for name, leaf in state.params.items()}
            state, _ = callback(state.replace(params=params), event)
        assert float(state.params["weight"]) == 7.0
        harvest, _ = callback(state, fx.FitEnd(step=30, reason=""))
        assert float(harvest.params["weight"]) == 1.0
        assert int(harvest.slots["restore_best"].step) == int(state.step)

    def test_final_state_is_last_without_evaluation(self):
        callback = fx.compose(fx.callbacks.restore_best("loss"))
        state = fx.attach(fx.init(torch.nn.Linear(1, 1)), callback)
        harvest, _ = callback(state, fx.FitEnd(step=0, reason=""))
        testing.assert_equal(harvest.params, state.params, "harvest")


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


def test_epoch_mean_averages_each_epoch():
    mean = fx.callbacks.epoch_mean("loss", "mae")
    result = fx.fit(problem.start(), problem.step(callbacks=mean), problem.data(), callbacks=mean, epochs=3)
    for name in ("loss", "mae"):
        by_epoch = torch.tensor(result.history[f"train/{name}"].values).reshape(3, 3).mean(1)
        torch.testing.assert_close(torch.tensor(result.history[f"epoch/{name}"].values), by_epoch, rtol=1e-6, atol=0)
    other = fx.callbacks.epoch_mean("accuracy")
    with pytest.raises(KeyError, match="expected the step metric 'accuracy' for epoch_mean, got 'loss', 'mae'"):
        fx.fit(problem.start(), problem.step(callbacks=other), problem.data(), callbacks=other, steps=1)


def test_epoch_mean_of_skipped_epoch_is_not_logged():
    mean = fx.callbacks.epoch_mean("loss")

    def skip(state, event: fx.StepBegin):
        return state, fx.Control(skip_batch=3 <= event.position < 6, reason="the second epoch")

    logged = []

    def watch(state, event: fx.EpochEnd, control):
        logged.append((event.step, list(control.log)))

    result = fx.fit(
        problem.start(),
        problem.step(callbacks=mean),
        problem.data(),
        callbacks=[skip, mean],
        epochs=3,
        observers=[fx.observers.required(watch)],
    )
    curve = result.history["epoch/loss"]
    assert curve.steps.tolist() == [3, 6]
    assert all(map(math.isfinite, curve.values))
    assert logged == [(3, ["epoch/loss"]), (3, []), (6, ["epoch/loss"])]


LAWS = {
    "early_stopping": (
        lambda: fx.compose(fx.callbacks.early_stopping("loss", patience=2), fx.callbacks.restore_best("loss")),
        [*evaluations([3.0, 2.0, NAN, 2.5, 1.0]), fx.FitEnd(step=50, reason="")],
    ),
    "nan_guard": (lambda: fx.callbacks.nan_guard(patience=2), gradient_events([1.0, NAN, 2.0, INF, NAN])),
    "save": (lambda: fx.when(fx.every(2), fx.callbacks.save()), [fx.StepEnd(step=i, metrics={}) for i in range(1, 5)]),
    "evaluate": (fx.callbacks.evaluate, [fx.StepEnd(step=1, metrics={})]),
}


@pytest.mark.parametrize("name", LAWS)
def test_callback_laws_hold(name):
    make, events = LAWS[name]
    testing.check_laws(make(), fx.init(torch.nn.Linear(2, 1)), events)
