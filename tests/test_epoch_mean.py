"""Means over epochs, of EpochEnd and of epoch_mean, against means of the history."""

import math
import os
import signal

import problem
import pytest
import torch
from problem import fit
from torch.nn import functional as F

import fxtrain as fx
from fxtrain import testing
from fxtrain.core import EPOCH_METRICS


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


def weighted_loss(model, batch):
    """A loss weighted by the examples of its batch, with metrics of each kind."""
    error = (model(batch["x"]) - batch["y"]).squeeze(-1).abs()
    kept = batch["x"][:, 0] > 0
    loss = fx.weighted((error.square() * kept).sum() / kept.sum().clamp(min=1), kept.sum())
    return loss, {
        "seen": kept.sum(),
        "mae": fx.metrics.Average.from_model_output(error, mask=kept),
        "spread": fx.metrics.Std.from_model_output(error),
    }


STEP = fx.train_step(weighted_loss, problem.transform())


def epoch_ends(**options):
    """Returns the result of a run, and for each epoch the step and the means as Python floats."""
    seen = []

    def note(state, event: fx.EpochEnd):
        seen.append((event.step, {name: float(value) for name, value in event.metrics.items()}))
        return state, fx.Control()

    return fit(step=STEP, **{"steps": 8, "callbacks": note, **options}), seen


class TestEpochEndMetrics:
    def test_callbacks_see_equal_means_in_any_order(self):
        seen = []

        def note(state, event: fx.EpochEnd):
            seen.append({name: value.item() for name, value in event.metrics.items()})
            return state, fx.Control()

        def observe(state, event: fx.EpochEnd, control):
            seen.append(dict(event.metrics))

        after = lambda state, event: note(state, event)  # noqa: E731
        mean = fx.callbacks.epoch_mean("loss", "mae")
        result = fit(
            callbacks=[note, mean, fx.on(fx.EpochEnd, after)], observers=[fx.observers.required(observe)], epochs=1
        )
        assert seen[0] == seen[1] == seen[2]
        assert {"loss", "mae"} <= set(seen[0])
        for name in ("loss", "mae"):
            assert result.history[f"epoch/{name}"].values.tolist() == [seen[0][name]]

    def test_means_are_weighted_and_merged(self):
        _, ((_, means), _) = epoch_ends(steps=6)
        batches = problem.data()
        kept = torch.cat([batch["x"][:, 0] > 0 for batch in batches])
        assert {"loss", "seen", "mae", "spread"} <= set(means)
        counts = torch.tensor([float((batch["x"][:, 0] > 0).sum()) for batch in batches])
        assert means["seen"] == pytest.approx(float((counts * counts).sum() / counts.sum()), rel=1e-6)
        assert counts.sum() == kept.sum()

    @pytest.mark.parametrize("cut", range(1, 8))
    def test_means_are_exact_after_resume_within_an_epoch(self, tmp_path, cut):
        _, whole = epoch_ends()
        options = {"checkpointer": fx.checkpointer(tmp_path), "resume": True}
        _, first = epoch_ends(**options, steps=cut)
        last, second = epoch_ends(**options)
        assert [*first, *second] == whole
        assert (EPOCH_METRICS in last.continue_from.slots) == (8 % problem.BATCHES != 0)
        _, more = epoch_ends(state=epoch_ends(steps=cut)[0].continue_from)
        assert [*first, *more] == whole

    @pytest.mark.parametrize("kind", [fx.StepEnd, fx.EvalStep, fx.EpochEnd])
    def test_means_are_exact_after_interrupt_before_the_epoch_ends(self, tmp_path, kind):
        evaluation = {"eval_step": problem.eval_step, "eval_data": problem.data(2)}
        _, whole = epoch_ends(**evaluation)

        def interrupt(state, event, control):
            if type(event) is kind and event.step == 3:
                os.kill(os.getpid(), signal.SIGINT)

        options = {"checkpointer": fx.checkpointer(tmp_path), "resume": True, **evaluation}
        _, first = epoch_ends(**options, observers=[fx.observers.required(interrupt)])
        _, second = epoch_ends(**options)
        assert [*first, *second] == whole

    def test_means_are_exact_after_error_at_the_end_of_an_epoch(self, tmp_path):
        _, whole = epoch_ends()
        failed = []

        def fail(state, event: fx.EpochEnd | fx.StepEnd):
            if event.step == 3 and type(event) not in failed:
                failed.append(type(event))
                raise RuntimeError("a bug")
            return state, fx.Control()

        options = {"checkpointer": fx.checkpointer(tmp_path), "resume": True}
        for _ in range(2):
            with pytest.raises(RuntimeError, match="a bug"):
                epoch_ends(**options, callbacks=fail)
        assert epoch_ends(**options)[1] == whole

    @pytest.mark.parametrize("resumed", [False, True])
    def test_means_of_rewound_epoch_have_no_abandoned_steps(self, tmp_path, resumed):
        def go_back(state, event: fx.StepEnd):
            again = bool(state.slots["loop/rewinds"].numel()) if "loop/rewinds" in state.slots else False
            return state, fx.Control(rewind=2 if event.step == 5 and not again else 0, reason="once")

        seen, told = [], []

        def note(state, event: fx.EpochEnd):
            seen.append({name: float(value) for name, value in event.metrics.items()})
            return state, fx.Control()

        def observe(state, event: fx.StepEnd, control):
            told.append((event.step, event.metrics["loss"]))

        options = {"callbacks": [go_back, note], "snapshot_every": 1, "observers": [fx.observers.required(observe)]}
        if resumed:
            options |= {"checkpointer": fx.checkpointer(tmp_path), "resume": True}
            fit(**options, steps=4)
        fit(**options)
        assert len(seen) == 2
        used = dict(told)
        assert len(told) == 6 + 2
        assert seen[1]["loss"] == pytest.approx(sum(used[step] for step in (4, 5, 6)) / 3, rel=1e-6)

    def test_steps_per_call_and_long_epochs_give_equal_means(self):
        data, means = problem.data(150), []

        def note(state, event: fx.EpochEnd):
            means.append(event.metrics["loss"].item())
            return state, fx.Control()

        for step in (problem.step(), problem.Together(problem.step(), 4)):
            result = fx.fit(problem.start(), step, data, callbacks=note, epochs=1)
        assert means[0] == means[1]
        assert means[0] == pytest.approx(result.history["train/loss"].values.mean(), rel=1e-12)

    def test_hand_written_step_has_means(self):
        @fx.Step
        def count(state, batch):
            return state, fx.StepOutput({"size": F.relu(batch["x"]).sum(), "number": torch.tensor(len(batch["x"]))})

        means = []

        def note(state, event: fx.EpochEnd):
            means.append(event.metrics)
            return state, fx.Control()

        fit(step=count, callbacks=note, epochs=1)
        expected = torch.stack([F.relu(batch["x"]).sum() for batch in problem.data()]).mean()
        assert float(means[0]["size"]) == pytest.approx(float(expected), rel=1e-6)
        assert float(means[0]["number"]) == 8

    def test_epoch_of_steps_without_weight_has_no_means(self):
        def nothing(model, batch):
            return fx.weighted(model(batch["x"]).sum() * 0, 0)

        seen = []

        def note(state, event: fx.EpochEnd):
            seen.append(dict(event.metrics))
            return state, fx.Control()

        fit(step=fx.train_step(nothing, problem.transform()), callbacks=note, epochs=1)
        assert "loss" not in seen[0]


class TestEpochEndEvaluation:
    def test_last_evaluation_is_seen_at_epoch_end(self):
        seen, evaluated = [], []

        def observe(state, event: fx.EpochEnd | fx.EvalEnd, control):
            (seen if isinstance(event, fx.EpochEnd) else evaluated).append(event)

        options = {"eval_step": problem.eval_step, "eval_data": problem.data(2)}
        fit(**options, observers=[fx.observers.required(observe)])
        assert [dict(end.evaluation) for end in seen] == [dict(end.metrics) for end in evaluated]
        assert all(isinstance(value, float) for end in seen for value in end.evaluation.values())

    def test_evaluation_is_none_before_the_first(self):
        seen = []

        def note(state, event: fx.EpochEnd):
            seen.append(event.evaluation)
            return state, fx.Control()

        options = {"eval_step": problem.eval_step, "eval_data": problem.data(2), "eval_when": 5}
        fit(**options, callbacks=note)
        assert seen[0] is None
        assert set(seen[1]) == {"loss", "mae"}


def test_state_within_a_session_has_no_epoch_sums():
    states = [
        set(state.slots) for state, event, _ in fx.steps(problem.start(), problem.step(), problem.data(), steps=2)
    ]
    assert all(EPOCH_METRICS not in slots for slots in states[:-1])
    testing.assert_equal(fit(steps=2).continue_from, fit(steps=2).continue_from, "two runs")


@pytest.mark.parametrize("step_of_copy", [1, 2, 4])
def test_copy_within_a_session_continues_exactly_except_for_the_means_of_its_epoch(step_of_copy):
    whole, wanted = epoch_ends(steps=6)
    run = fx.steps(problem.start(), STEP, problem.data(), steps=6)
    copied = next(s.copy() for s, event, _ in run if type(event) is fx.StepEnd and event.step == step_of_copy)
    run.close()
    again, means = epoch_ends(state=copied, steps=6)
    testing.assert_equal(again.continue_from, whole.continue_from, "continued from a copy")
    assert [step for step, _ in means] == [step for step, _ in wanted if step > step_of_copy]
    since = whole.history["train/seen"].values[step_of_copy : means[0][0]]
    assert means[0][1]["seen"] == pytest.approx((since**2).sum() / since.sum(), rel=1e-6)  # weighted by itself
    *_, (last, event, _) = fx.steps(problem.start(), STEP, problem.data(), steps=step_of_copy)
    assert type(event) is fx.FitEnd
    _, means = epoch_ends(state=last.copy(), steps=6)
    assert means == [each for each in wanted if each[0] > step_of_copy]
