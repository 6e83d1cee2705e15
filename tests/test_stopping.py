"""Stopping rules: the evaluation at which each stops, and its reason, from tables written by hand."""

import math

import problem
import pytest
import torch

import fxtrain as fx
from fxtrain import testing
from fxtrain.callbacks import (
    early_stopping,
    restore_best,
    save_best,
    stop_at,
    stop_on_divergence,
    stop_on_overfitting,
    time_limit,
)
from fxtrain.core import Epoch

NAN, INF = math.nan, math.inf


def evaluations(values, every=10, epoch_length=20):
    return [
        fx.EvalEnd(step=every * n, position=every * n, epoch_length=epoch_length, metrics={"loss": torch.tensor(value)})
        for n, value in enumerate(values, start=1)
    ]


def stop_of(callback, events, state=None):
    """Returns the index of the first stopping event, counted from 1, and its first reason, or None."""
    composed = fx.compose(callback)
    state = fx.attach(fx.init(torch.nn.Linear(1, 1)) if state is None else state, composed)
    for number, event in enumerate(events, start=1):
        state = state.replace(step=torch.as_tensor(event.step), position=torch.as_tensor(event.position))
        state, control = composed(state, event)
        if reasons := control.reasons("stop"):
            return number, reasons[0]
    return None


def number_of(callback, values, **options):
    stop = stop_of(callback, evaluations([float(value) for value in values], **options))
    return stop and stop[0]


PATIENCE = [  # NaN counts as no improvement
    ({"patience": 1}, [3, 2, 1, 0], None),
    ({"patience": 1}, [3, 4], 2),
    ({"patience": 1}, [3, 3], 2),  # a tie is no improvement
    ({"patience": 2}, [3, 4, 2, 4, 3], 5),
    ({"patience": 2}, [3, 4, 3, 2], 3),
    ({"patience": 3}, [1, 2, 2, 0.5, 1, 1, 1], 7),
    ({"patience": 2}, [NAN, NAN], 2),
    ({"patience": 2}, [NAN, 1, NAN, 0.5, NAN, NAN], 6),
    ({"patience": 2}, [INF, INF], 2),
    ({"patience": 1}, [-INF, -INF], 2),
    ({"patience": 2, "min_delta": 0.5}, [3, 2.5, 2.5], 3),  # exactly min_delta better is not enough
    ({"patience": 2, "min_delta": 0.5}, [3, 2.6, 2.4, 2, 1.8], None),
    ({"patience": 1, "mode": "max"}, [1, 2, 3, 2.9], 4),
    ({"patience": 2, "mode": "max", "min_delta": 1.0}, [0, 1, 0.5], 3),
    ({"patience": 2, "baseline": 1.0}, [3, 2], 2),  # never better than the baseline
    ({"patience": 2, "baseline": 1.0}, [3, 0.9, 1, 0.8, 1, 1], 6),
    ({"patience": 1, "mode": "max", "baseline": 0.5}, [0.4], 1),
]
RELATIVE = [
    ({}, [10, 9.5, 9.0], 3),  # 9 is exactly a tenth better, which is not enough
    ({}, [10, 8.9, 8.0], None),  # 8.01 would be enough
    ({}, [10, 8.9, 8.1, 8.1], 4),
    ({}, [-10, -10.5, -10.9], 3),
    ({}, [-10, -11.5, -13, -15], None),
    ({"mode": "max"}, [10, 10.5, 11], 3),
    ({"mode": "max"}, [10, 11.5, 12.9, 14.3], None),
    ({"mode": "max"}, [-10, -9.5, -8.5, -7], None),
    ({}, [0, -0.0, 0], 3),  # a tenth of 0 is 0, and a tie is no improvement
    ({}, [INF, 5, 4.9, 4.8], 4),
    ({}, [NAN, NAN, 1], 2),
    ({"mode": "max"}, [NAN, 1, 1.05, 1.09], 4),
]
STEPS = [  # one evaluation per 10 steps
    (5, [1, 2], 2),
    (10, [1, 2], 2),
    (11, [1, 2], None),
    (11, [1, 2, 2], 3),
    (20, [1, 0.5, 0.7, 0.6], 4),
    (20, [1, 0.5, 0.7, 0.4, 0.5], None),
    (30, [1, 1, 1, 1], 4),
    (30, [1, 1, 1, 0], None),
    (10, [NAN], 1),
    (20, [NAN, NAN], 2),
    (20, [NAN, 1, NAN, NAN], 4),
    (1, [3, 2, 1], None),
]
EPOCHS = [  # one evaluation per 10 batches, 20 batches per epoch
    (1, [1, 2, 2], 3),
    (1, [1, 2, 0], None),
    (1, [1, 2, 0, 1, 1], 5),
    (2, [1, 2, 2, 2, 2], 5),
    (2, [1, 2, 2, 2, 0], None),
    (1, [NAN, NAN], 2),
    (1, [NAN], None),
    (2, [NAN, NAN, NAN, NAN], 4),
    (1, [1, 1, 1], 3),
    (3, [1] * 7, 7),
    (3, [1] * 6, None),
]
START = [
    ({"start_from": 2, "patience": 1}, [1, 2, 3], None),  # watching starts at the third, which is the best so far
    ({"start_from": 2, "patience": 1}, [0, 0, 3, 4], 4),
    ({"start_from": 2, "patience": 2}, [0, 0, 3, 4], None),
    ({"start_from": 2, "patience": 2}, [0, 0, 3, 4, 5], 5),
    ({"start_from": 1, "patience": 1}, [NAN, 2, 1], None),
    ({"start_from": 1, "patience": 1}, [NAN, 2, 2], 3),
    ({"start_from": 3, "patience": 1}, [NAN, NAN, NAN, NAN], 4),
    ({"start_from": 20, "unit": "steps", "patience": 10}, [1, 2, 2], 3),
    ({"start_from": 20, "unit": "steps", "patience": 10}, [1, 2, 1, 2], 4),
    ({"start_from": 30, "unit": "steps", "patience": 10}, [1, 2, 3, 2, 3], 5),
    ({"start_from": 1, "unit": "epochs", "patience": 1}, [1, 2, 2, 2], 4),
    ({"start_from": 1, "unit": "epochs", "patience": 1}, [1, 2, 3, 1, 1, 1], 6),
]
DIVERGED = [
    ("min", 10.0, [1, 9.9], None),
    ("min", 10.0, [1, 10], 2),
    ("min", 10.0, [1, 2, 50], 3),
    ("min", 10.0, [INF], 1),
    ("min", 10.0, [NAN, NAN], 1),
    ("min", 10.0, [-INF, 3], 1),
    ("max", 0.1, [0.5, 0.2], None),
    ("max", 0.1, [0.5, 0.1], 2),
    ("max", 0.1, [-INF], 1),
    ("max", 0.1, [0.2, 0.05], 2),
    ("max", -1.0, [0, -0.5, -2], 3),
]
FINITE = [
    ([1, NAN], 2),
    ([NAN], 1),
    ([1, INF], 2),
    ([1, -INF], 2),
    ([3, 2, 1], None),
    ([-INF, 1], 1),
    ([1e38, 1], None),
    ([0, -0.0], None),
    ([1, 2, NAN, 0], 3),
    ([1, 0.5, 0.2, 0.1, NAN], 5),
]


class TestEarlyStopping:
    @pytest.mark.parametrize(("options", "values", "stop"), PATIENCE)
    def test_stops_after_patience_evaluations(self, options, values, stop):
        assert number_of(early_stopping("loss", **options), values) == stop

    @pytest.mark.parametrize(("options", "values", "stop"), RELATIVE)
    def test_relative_min_delta_scales_with_the_best(self, options, values, stop):
        rule = early_stopping("loss", patience=2, min_delta=0.1, relative=True, **options)
        assert number_of(rule, values) == stop

    @pytest.mark.parametrize(("patience", "values", "stop"), STEPS)
    def test_patience_counts_steps(self, patience, values, stop):
        rule = early_stopping("loss", patience=patience, unit="steps")
        assert number_of(rule, values) == stop

    @pytest.mark.parametrize(("patience", "values", "stop"), EPOCHS)
    def test_patience_counts_epochs(self, patience, values, stop):
        rule = early_stopping("loss", patience=patience, unit="epochs")
        assert number_of(rule, values) == stop

    @pytest.mark.parametrize(("options", "values", "stop"), START)
    def test_start_from_delays_watching(self, options, values, stop):
        assert number_of(early_stopping("loss", **options), values) == stop

    @pytest.mark.parametrize(("dtype", "stop"), [(torch.float64, None), (torch.float32, 3)])
    def test_float64_metrics_are_compared_in_float64(self, dtype, stop):
        values = [1.0, 1.0 - 1e-12, 1.0 - 2e-12, 1.0 - 3e-12]
        events = [fx.EvalEnd(step=i, metrics={"loss": torch.tensor(v, dtype=dtype)}) for i, v in enumerate(values)]
        found = stop_of(early_stopping("loss", patience=2), events)
        assert (found and found[0]) == stop

    def test_float64_evaluation_keeps_its_precision(self):
        tx = fx.optim.sgd(1e-12)
        step = fx.train_step(lambda model, batch: model["w"] * batch, tx)
        data = [torch.tensor(1.0, dtype=torch.float64)]
        state = fx.init({"w": torch.tensor(1.0, dtype=torch.float64)}, tx)
        evaluate = fx.eval_step(lambda model, batch: {"w": model["w"] * batch})
        rule = early_stopping("w", patience=1)
        result = fx.fit(state, step, data, callbacks=rule, eval_step=evaluate, eval_data=data, epochs=5)
        assert result.reason == "finished 5 epochs"

    def test_mode_function_decides_improvement(self):
        def nearer_to_one(value, best):
            return best.isnan() | ((value - 1).abs() < (best - 1).abs())

        rule = early_stopping("loss", patience=2, mode=nearer_to_one)
        assert number_of(rule, [3, -0.5, 0.8, 1.1, 1.1, 0.9]) == 6
        assert number_of(early_stopping(lambda metrics: metrics["loss"].abs(), patience=1), [-3, 2, -1, -2]) == 4

    def test_patience_starts_at_the_current_step(self):
        state = fx.init(torch.nn.Linear(1, 1)).replace(step=torch.tensor(1000), position=torch.tensor(1000))
        events = [
            fx.EvalEnd(step=s, position=s, epoch_length=10, metrics={"loss": torch.tensor(NAN)}) for s in (1010, 1020)
        ]
        rule = early_stopping("loss", patience=20, unit="steps")
        assert stop_of(rule, events, state)[0] == 2
        rule = early_stopping("loss", patience=2, unit="epochs")
        assert stop_of(rule, events, Epoch(done=100, start=1000, length=10).written_to(state))[0] == 2

    def test_best_and_waited_are_logged(self):
        composed = fx.compose(early_stopping("loss", patience=3))
        state = fx.attach(fx.init(torch.nn.Linear(1, 1)), composed)
        logs = []
        for event in evaluations([3.0, 2.5, 2.75]):
            state, control = composed(state, event)
            logs.append({name: float(entry.value) for name, entry in control.log.items() if bool(entry.when)})
        assert logs == [
            {"early_stopping/best": 3.0, "early_stopping/waited": 0.0},
            {"early_stopping/best": 2.5, "early_stopping/waited": 0.0, "early_stopping/improved_by": 0.5},
            {"early_stopping/best": 2.5, "early_stopping/waited": 1.0},
        ]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"patience": 0}, "expected patience to be a positive int, got 0"),
            ({"patience": 1.5, "unit": "steps"}, "expected patience to be a positive int, got 1.5"),
            ({"patience": 1, "min_delta": -1.0}, "expected min_delta to be a finite number of at least 0, got -1.0"),
            ({"patience": 1, "min_delta": NAN}, "expected min_delta to be a finite number of at least 0, got nan"),
            ({"patience": 1, "mode": "least"}, "expected mode to be 'min', 'max' or a function .*, got 'least'"),
            ({"patience": 1, "unit": "hours"}, "expected unit to be one of 'evaluations', 'steps', 'epochs'"),
            ({"patience": 1, "start_from": -1}, "expected start_from to be an int of at least 0, got -1"),
            ({"patience": 1, "mode": torch.lt, "min_delta": 0.1}, "expected mode .* with min_delta or relative"),
        ],
    )
    def test_invalid_options_are_refused(self, options, message):
        with pytest.raises((TypeError, ValueError), match=message):
            early_stopping("loss", **options)

    def test_unknown_epoch_length_is_refused(self):
        with pytest.raises(ValueError, match="expected data with a known epoch length"):
            number_of(early_stopping("loss", patience=1, unit="epochs"), [1.0], epoch_length=None)

    def test_unknown_metric_error_lists_the_metrics(self):
        with pytest.raises(KeyError, match="expected the metric 'acc' at EvalEnd for early_stopping, got 'loss'"):
            number_of(early_stopping("acc", patience=1), [1.0])


def trained(losses, number):
    return [
        fx.Updated(
            step=torch.tensor(number),
            loss=torch.tensor(loss),
            metrics={"loss": torch.tensor(loss)},
            grads={},
            updates={},
            skipped=torch.tensor(False),
        )
        for loss in losses
    ]


OVERFIT = [  # per round: the training losses since the last evaluation, and the evaluation's loss
    ([([1], 2), ([1], 3), ([1], 4)], 3),  # gaps 1, 2, 3 grow twice in a row
    ([([1], 2), ([1], 3), ([1], 3)], None),
    ([([1], 2), ([1], 2), ([1], 2)], None),
    ([([3], 2), ([2], 2), ([1], 2)], 3),
    ([([1], 2), ([1], 3), ([2], 3), ([1], 3), ([1], 4)], 5),
    ([([1, 3], 3), ([1, 1], 3), ([0, 0], 3)], 3),
    ([([1], 2), ([1], 3), ([], 9), ([1], 4)], 4),  # a round without training steps has no gap
    ([([1], 2), ([1], NAN), ([1], 4), ([1], 5)], None),  # a comparison with NaN is no growth
    ([([1], 2), ([NAN, 1], 3), ([1], 4)], 3),  # non-finite losses, as of skipped steps, are ignored
    ([([1], 2), ([1], 2.1), ([1], 2.2)], None),  # each growth is below min_delta
    ([([1], 2), ([1], 2.3), ([1], 2.6)], 3),
    ([([2], 1), ([2], 1.5), ([2], 2)], 3),
]


class TestOverfitting:
    @pytest.mark.parametrize(("rounds", "stop"), OVERFIT)
    def test_growing_gap_stops(self, rounds, stop):
        rule = fx.compose(stop_on_overfitting("loss", patience=2, min_delta=0.25))
        state = fx.attach(fx.init(torch.nn.Linear(1, 1)), rule)
        stopped = None
        for number, (losses, value) in enumerate(rounds, start=1):
            for event in trained([float(loss) for loss in losses], number):
                state, _ = rule(state, event)
            (event,) = evaluations([float(value)])
            state, control = rule(state, event)
            if stopped is None and control.reasons("stop"):
                stopped = number
        assert stopped == stop

    def test_gap_is_mirrored_for_mode_max(self):
        rule = fx.compose(stop_on_overfitting("loss", patience=1, mode="max"))
        state = fx.attach(fx.init(torch.nn.Linear(1, 1)), rule)
        reasons = []
        for number, (train, value) in enumerate([(0.8, 0.7), (0.9, 0.7)], start=1):
            for event in trained([train], number):
                state, _ = rule(state, event)
            state, control = rule(state, evaluations([value])[0])
            reasons = control.reasons("stop")
        assert reasons == ["the gap between loss and the training loss grew 1 evaluation in a row"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"patience": 0}, "expected patience to be a positive int, got 0"),
            ({"patience": 1, "min_delta": -1.0}, "expected min_delta to be at least 0, got -1.0"),
            ({"patience": 1, "mode": torch.lt}, "expected mode to be one of 'min', 'max', got"),
        ],
    )
    def test_invalid_options_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            stop_on_overfitting("loss", **options)

    def test_gap_is_measured_in_a_run(self):
        rule = stop_on_overfitting("loss", patience=99)
        step = problem.step(callbacks=rule)
        result = fx.fit(
            problem.start(),
            step,
            problem.data(),
            callbacks=rule,
            eval_step=problem.eval_step,
            eval_data=problem.data(),
            epochs=2,
        )
        memory = result.continue_from.slots["overfitting"]
        assert int(memory.count) == 0
        assert memory.gap.isfinite()


class TestSaveBest:
    step = fx.train_step(lambda model, batch: (model["w"] - batch).square(), fx.optim.sgd(0.75))

    def saved(self, folder, steps, **options):
        """Trains with an evaluation at each step and returns the steps of all checkpoints."""
        # w: 1.5, 0.75, 1.125, 0.9375, 1.03125
        checkpointer = fx.checkpointer(folder, keep=None, best="far", mode=options.get("mode", "min"))
        fx.fit(
            fx.init({"w": torch.tensor(0.0)}, fx.optim.sgd(0.75)),
            self.step,
            [torch.tensor(1.0)],
            steps=steps,
            callbacks=save_best("far", **options),
            eval_step=fx.eval_step(lambda model, batch: {"far": (model["w"] - batch).abs()}),
            eval_data=[torch.tensor(1.0)],
            checkpointer=checkpointer,
            resume=True,
        )
        return checkpointer.steps(), checkpointer.best()

    def test_each_improvement_is_saved(self, tmp_path):
        assert self.saved(tmp_path, 5) == ([1, 2, 3, 4, 5], 5)

    def test_evaluations_without_improvement_are_not_saved(self, tmp_path):
        assert self.saved(tmp_path, 5, mode="max") == ([1, 5], 1)  # the last is the session's own

    def test_margin_is_compared_with_the_saved_value(self, tmp_path):
        assert self.saved(tmp_path, 4, min_delta=0.3) == ([1, 3, 4], 3)  # far: 0.5, 0.25, 0.125, 0.0625

    def test_resumed_run_remembers_the_best(self, tmp_path):
        self.saved(tmp_path, 3, mode="max")
        assert self.saved(tmp_path, 5, mode="max") == ([1, 3, 5], 1)

    def test_unknown_mode_is_refused(self):
        with pytest.raises(ValueError, match="expected mode to be 'min', 'max' or a function"):
            save_best("far", mode="lowest")


class TestRestoreBest:
    # The metric is best after the first step, because the learning rate overshoots the minimum.
    tx = fx.optim.sgd(0.75)
    step = fx.train_step(lambda model, batch: (model["w"] - batch).square(), tx)

    def run(self, source=None, callbacks=(), state=None, **options):
        rule = restore_best("far", checkpointer=source)
        evaluate = fx.eval_step(lambda model, batch: {"far": (model["w"] - 1.6).abs()})
        return fx.fit(
            fx.init({"w": torch.tensor(0.0)}, self.tx) if state is None else state,
            self.step,
            [torch.tensor(1.0)],
            epochs=5,
            callbacks=[rule, *callbacks],
            eval_step=evaluate,
            eval_data=[torch.tensor(1.0)],
            **options,
        )

    def test_best_is_restored_from_memory(self):
        result = self.run()
        # w: 1.5, 0.75, 1.125, 0.9375, 1.03125
        assert float(result.state.params["w"]) == 1.5
        assert float(result.continue_from.params["w"]) == 1.03125

    def test_run_never_continues_from_restored_weights(self, tmp_path):
        result = self.run()
        with pytest.raises(ValueError, match=r"expected a state to continue .* Continue from result\.continue_from\."):
            self.run(state=result.state)
        with pytest.raises(ValueError, match=r"Continue from result\.continue_from"):
            fx.steps(result.state.copy(), self.step, [torch.tensor(1.0)], steps=9)
        with pytest.raises(ValueError, match=r"Continue from result\.continue_from"):
            self.run(state=fx.restore(fx.save(tmp_path / "best", result.state), result.continue_from))

    def test_resume_ignores_restored_weights(self, tmp_path):
        options = {"checkpointer": fx.checkpointer(tmp_path), "resume": True}
        with pytest.raises(ValueError, match=r"Continue from result\.continue_from"):  # nothing is saved yet
            self.run(state=self.run().state, **options)
        first = self.run(**options)
        again = self.run(state=first.state, **options)
        testing.assert_equal(again.continue_from, first.continue_from, "resumed")
        restored = options["checkpointer"].restore(first.state)
        assert float(restored.params["w"]) == 1.03125
        assert fx.fit(restored, self.step, [torch.tensor(1.0)], steps=6).reason == "reached 6 steps"

    def test_only_the_final_state_changes(self):
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

    def test_baseline_of_early_stopping_does_not_matter(self):
        assert float(self.run(callbacks=[early_stopping("far", patience=99, baseline=0.01)]).state.params["w"]) == 1.5

    def test_mode_function_decides_the_best(self):
        def farther(value, best):
            return best.isnan() | (value > best)

        callback = fx.compose(restore_best("loss", mode=farther))
        state = fx.attach(fx.init({"w": torch.tensor(0.0)}), callback)
        for number, event in enumerate(evaluations([NAN, 1.0, 3.0, 2.0]), start=1):
            state = state.replace(step=torch.tensor(number), params={"w": torch.tensor(float(number))})
            state, _ = callback(state, event)
        assert float(callback(state, fx.FitEnd(step=4, reason=""))[0].params["w"]) == 3.0

    def test_checkpointer_must_be_one(self):
        with pytest.raises(TypeError, match="expected checkpointer to be a checkpointer or None, got 'disk'"):
            restore_best("loss", checkpointer="disk")

    def test_best_is_restored_from_the_checkpoint(self, tmp_path):
        checkpointer = fx.checkpointer(tmp_path, best="far")
        result = self.run(checkpointer, checkpointer=checkpointer)
        assert float(result.state.params["w"]) == 1.5
        assert float(result.continue_from.params["w"]) == 1.03125
        assert result.continue_from.slots["restore_best"].kept == ()
        assert 1 in checkpointer.steps()

    def test_missing_best_checkpoint_is_refused(self, tmp_path):
        checkpointer = fx.checkpointer(tmp_path, keep=1)
        with pytest.raises(ValueError, match=r"expected a checkpoint of step 1, where far was best, got steps"):
            self.run(checkpointer, checkpointer=checkpointer, callbacks=[fx.callbacks.save()])


class TestTimeLimit:
    @pytest.mark.parametrize(
        ("limit", "times", "stop"),
        [
            (10, [4, 8, 12], 3),
            (10, [4, 8, 9.9], None),
            (10, [10], 1),
            (10, [0, 0, 0], None),
            (10, [4, 8, 1, 3], 4),  # the first session took 8 s, so 3 s of the second exceed the limit
            (10, [9, 0.5, 0.9, 1], 4),
            (0.5, [0.6], 1),
            (3600, [3599, 3600], 2),
            (10, [11, 1], 1),
            (10, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 10),
        ],
    )
    def test_limit_covers_all_sessions(self, limit, times, stop):
        events, before = [], 0.0
        for step, time in enumerate(times, start=1):
            before = before if time >= before else 0.0
            events.append(fx.StepEnd(step=step, metrics={}, time=float(time), previous_time=before))
            before = float(time)
        found = stop_of(time_limit(seconds=limit), events)
        assert (found and found[0]) == stop

    def test_limit_continues_after_a_resume(self, tmp_path):
        clock = iter(range(10**6))
        options = {
            "callbacks": time_limit(seconds=40),
            "clock": lambda: float(next(clock)),
            "checkpointer": fx.checkpointer(tmp_path),
        }
        first = fx.fit(problem.start(), problem.step(), problem.data(), steps=2, **options)
        assert first.reason == "reached 2 steps"
        second = fx.fit(problem.start(), problem.step(), problem.data(), steps=99, resume=True, **options)
        assert second.reason == "reached the time limit of 40 s"
        assert int(second.continue_from.step) < 99

    @pytest.mark.parametrize("given", [{}, {"seconds": -1}, {"hours": INF}, {"minutes": NAN}])
    def test_invalid_limits_are_refused(self, given):
        with pytest.raises(ValueError, match="expected the time limit to be positive and finite"):
            time_limit(**given)


class TestStopAt:
    @pytest.mark.parametrize(
        ("mode", "value", "values", "stop"),
        [
            ("min", 0.1, [1, 0.1], 2),
            ("min", 0.1, [1, 0.2], None),
            ("min", 0.1, [NAN, 0.05], 2),
            ("min", 0.0, [0], 1),
            ("min", -1.0, [0, -1], 2),
            ("max", 0.9, [0.8, 0.95], 2),
            ("max", 0.9, [0.8, 0.89], None),
            ("max", 0.9, [NAN, NAN], None),
            ("max", 0.9, [INF], 1),
            ("max", -1.0, [-2, -1], 2),
            ("min", 0.1, [1, 0.11], None),
            ("min", 0.1, [0.05], 1),
            ("min", -5.0, [-4.9, -5.1], 2),
            ("max", 0.9, [0.5, 0.9], 2),
            ("max", 0.9, [-INF, NAN, 0.95], 3),
        ],
    )
    def test_reached_value_stops(self, mode, value, values, stop):
        assert number_of(stop_at("loss", value, mode=mode), values) == stop

    def test_trigger_delays_the_stop(self):
        assert number_of(fx.when(fx.after(20), stop_at("loss", 1.0)), [0, 0, 3, 1]) == 4

    def test_value_is_rounded_to_the_dtype_of_the_metric(self):
        events = [fx.EvalEnd(step=1, metrics={"accuracy": torch.tensor(0.9)})]
        assert stop_of(stop_at("accuracy", 0.9, mode="max"), events)[0] == 1

    def test_value_of_a_step_metric_stops(self):
        events = [fx.StepEnd(step=n, metrics={"loss": torch.tensor(value)}) for n, value in ((1, 2.0), (2, 0.5))]
        assert stop_of(stop_at("loss", 1.0, on=fx.StepEnd), events) == (2, "loss reached 1")
        with pytest.raises(KeyError, match="expected the metric 'acc' at StepEnd for stop_at, got 'loss'"):
            stop_of(stop_at("acc", 1.0, on=fx.StepEnd), events)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"value": NAN}, "expected value to be finite, got nan"),
            ({"value": 1.0, "mode": "best"}, "expected mode to be one of 'min', 'max', got 'best'"),
            ({"value": 1.0, "on": fx.EpochEnd}, "expected on to be EvalEnd or StepEnd, got the class EpochEnd"),
        ],
    )
    def test_invalid_options_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            stop_at("loss", **options)


class TestStopOnDivergence:
    @pytest.mark.parametrize(("mode", "limit", "values", "stop"), DIVERGED)
    def test_diverged_value_stops(self, mode, limit, values, stop):
        assert number_of(stop_on_divergence("loss", limit, mode=mode), values) == stop

    @pytest.mark.parametrize(("values", "stop"), FINITE)
    def test_non_finite_value_stops(self, values, stop):
        assert number_of(stop_on_divergence("loss"), values) == stop

    def test_infinite_limit_is_refused(self):
        with pytest.raises(ValueError, match="expected limit to be finite, got inf"):
            stop_on_divergence("loss", INF)


def test_each_stop_has_its_reason():
    rule = fx.compose(early_stopping("loss", patience=1), stop_at("loss", 0.1), stop_on_divergence("loss", 10.0))
    for values, reason in (
        ([1.0, 1.0], "loss has not improved for 1 evaluation"),
        ([0.05], "loss reached 0.1"),
        ([11.0], "loss diverged: it reached 10"),
        ([NAN], "loss is not finite"),
    ):
        reasons = []
        composed = fx.compose(rule)
        state = fx.attach(fx.init(torch.nn.Linear(1, 1)), composed)
        for event in evaluations(values):
            state, control = composed(state, event)
            reasons = control.reasons("stop")
        assert reason in reasons


@pytest.mark.parametrize(
    ("callback", "events"),
    [
        (restore_best("loss"), [*evaluations([3.0, 2.0, NAN, 2.5, 1.0]), fx.FitEnd(step=50, reason="")]),
        (save_best("loss", min_delta=0.6), evaluations([3.0, 2.5, NAN, 2.0, 1.0])),
        (early_stopping("loss", patience=2), evaluations([3.0, 2.0, NAN, 2.5, 1.0])),
        (early_stopping("loss", patience=15, unit="steps"), evaluations([3.0, 2.0, 2.5, 1.0, 1.5, 1.5])),
        (
            stop_on_overfitting("loss", patience=2),
            [event for n in (1, 2, 3) for event in (*trained([1.0, 2.0], n), *evaluations([2.0 + n]))],
        ),
        (
            time_limit(seconds=3),
            [fx.StepEnd(step=n, metrics={}, time=float(n), previous_time=n - 1.0) for n in (1, 2, 3, 4)],
        ),
        (stop_at("loss", 1.0), evaluations([3.0, 0.5])),
        (stop_on_divergence("loss", 1.0), evaluations([0.5, NAN])),
    ],
)
def test_rules_obey_the_callback_laws(callback, events):
    testing.check_laws(callback, fx.init(torch.nn.Linear(1, 1)), events)
