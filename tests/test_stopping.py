"""Stopping rules except early stopping: the evaluation at which each stops, and its reason, from tables by hand."""

import problem
import pytest
import torch
from stops import INF, NAN, evaluations, number_of, stop_of

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
