"""Means over epochs against means of the history."""

import math

import problem
import pytest
import torch

import fxtrain as fx


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
