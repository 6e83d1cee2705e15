"""The throughput monitor: exact values under a fake clock."""

import math

import problem
import pytest
import torch

import fxtrain as fx
from fxtrain import testing
from fxtrain.callbacks import throughput


def step_end(step, time, data_wait=0.0):
    return fx.StepEnd(step=step, metrics={}, time=time, previous_time=max(0.0, time - 0.5), data_wait=data_wait)


def logged(callback, events, state=None):
    callback = fx.compose(callback)
    state = fx.attach(fx.init({"w": torch.tensor(1.0)}) if state is None else state, callback)
    found = []
    for event in events:
        state, control = callback(state, event)
        if control.log:
            found.append({name: float(entry.value) for name, entry in control.log.items()})
    return found


class TestThroughput:
    def test_rates_cover_steps_since_last_publication(self):
        callback = throughput(samples=8, tokens=80, flops=1e6, peak=4e6, every=3)
        first, second = logged(callback, [step_end(i, 0.5 * i, data_wait=0.1) for i in range(1, 7)])
        assert first == pytest.approx(
            {
                "throughput/steps_per_second": 2,
                "throughput/data_wait": 0.2,
                "throughput/samples_per_second": 16,
                "throughput/tokens_per_second": 160,
                "throughput/flops_per_second": 2e6,
                "throughput/utilization": 0.5,
            }
        )
        assert second == pytest.approx(first)

    def test_first_step_of_session_is_excluded(self):
        (found,) = logged(throughput(every=1), [step_end(1, 0.5)])
        assert all(math.isnan(value) for value in found.values())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"samples": 0}, "expected samples to be positive and finite, got 0"),
            ({"tokens": -1}, "expected tokens to be positive and finite, got -1"),
            ({"flops": math.inf}, "expected flops to be positive and finite, got inf"),
            ({"peak": 1e12}, "expected flops together with peak"),
        ],
    )
    def test_invalid_options_are_rejected(self, options, message):
        with pytest.raises(ValueError, match=message):
            throughput(**options)

    def test_throughput_obeys_callback_laws(self):
        testing.check_laws(
            throughput(samples=8, every=2),
            fx.init({"w": torch.tensor(1.0)}),
            [step_end(i, 0.5 * i) for i in range(1, 6)],
        )

    def test_fit_publishes_rates(self):
        times = iter(range(10_000))
        callback = throughput(samples=8, every=2)
        result = fx.fit(
            problem.start(),
            problem.step(),
            problem.data(),
            steps=4,
            callbacks=callback,
            clock=lambda: float(next(times)),
        )
        rates = result.history["throughput/samples_per_second"]
        assert rates.steps.tolist() == [2, 4]
        assert all(0 < rate <= 8 for rate in rates.values)


def test_throughput_excludes_evaluation_time():
    callback = fx.compose(throughput(samples=8, every=3))
    state = fx.attach(problem.start(), callback)
    events = [
        fx.StepEnd(step=1, metrics={}, time=1.0),
        fx.StepEnd(step=2, metrics={}, time=1.5, previous_time=1.0),
        fx.EvalBegin(step=2, time=1.5),
        fx.EvalEnd(step=2, metrics={}, time=9.5),
        fx.StepEnd(step=3, metrics={}, time=10.0, previous_time=1.5),
    ]
    for event in events:
        state, control = callback(state, event)
    assert float(control.log["throughput/samples_per_second"].value) == 16.0
