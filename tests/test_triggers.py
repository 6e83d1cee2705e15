"""Triggers: when, in steps, epochs and seconds, a callback acts."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problem import adder, events, state_with

import fxtrain as fx


def steps_where(trigger, count=12, **fields):
    return [n for n in range(1, count + 1) if trigger(fx.StepEnd(step=n, metrics={}, position=n, **fields))]


class Writes:
    """A writer that drops everything."""

    kinds = frozenset({float})

    def __getattr__(self, name):
        return lambda *_: None


class TestTriggers:
    @pytest.mark.parametrize(
        ("trigger", "steps"),
        [
            (fx.every(4), [4, 8, 12]),
            (fx.every(epochs=1), [5, 10]),
            (fx.every(epochs=0.5), [3, 5, 8, 10]),
            (fx.every(epochs=2), [10]),
            (fx.at(2, 7), [2, 7]),
            (fx.after(9), [10, 11, 12]),
            (fx.after(epochs=2), [11, 12]),
            (fx.every(2) & fx.every(3), [6, 12]),
            (fx.every(4) | fx.at(1), [1, 4, 8, 12]),
            (fx.every(2) & ~fx.every(4), [2, 6, 10]),
            (fx.every(3) & (lambda event: event.step > 5), [6, 9, 12]),
        ],
    )
    def test_triggers_fire_at_expected_steps(self, trigger, steps):
        assert steps_where(trigger, epoch_length=5) == steps

    def test_every_seconds_fires_when_period_is_crossed(self):
        times = [0.0, 4.0, 9.9, 10.0, 10.5, 31.0, 39.0]
        held = [
            now
            for before, now in itertools.pairwise(times)
            if fx.every(seconds=10)(fx.StepEnd(step=1, metrics={}, time=now, previous_time=before))
        ]
        assert held == [10.0, 31.0]

    @given(st.integers(1, 7), st.integers(1, 60))
    def test_every_fires_once_per_period(self, period, count):
        assert len(steps_where(fx.every(period), count)) == count // period

    @pytest.mark.parametrize("arguments", [{}, {"steps": 1, "seconds": 2.0}])
    def test_every_requires_exactly_one_period(self, arguments):
        with pytest.raises(ValueError, match="every: expected exactly one of steps, seconds and epochs"):
            fx.every(**arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"steps": 0}, "expected steps to be a positive int, got 0"),
            ({"steps": 2.5}, r"expected steps to be a positive int, got 2\.5"),
            ({"seconds": -1.0}, "every: expected seconds to be positive"),
        ],
    )
    def test_period_must_be_positive_and_whole_in_steps(self, arguments, message):
        with pytest.raises((TypeError, ValueError), match=message):
            fx.every(**arguments)

    @pytest.mark.parametrize("trigger", [fx.at, fx.after])
    def test_steps_of_at_and_after_are_ints(self, trigger):
        with pytest.raises(TypeError, match=r"to be an int of at least 0, got 2\.5"):
            trigger(2.5)

    @pytest.mark.parametrize("bad", [0, 2.5, "epoch", True, None])
    @pytest.mark.parametrize(
        "accepts",
        [
            lambda every: fx.when(every, fx.callbacks.save()),
            fx.callbacks.save,
            lambda every: fx.callbacks.grad_norms(every=every),
            lambda every: fx.callbacks.ema(0.9, every=every),
            lambda every: fx.callbacks.throughput(every=every),
            lambda every: fx.observers.write(Writes(), every=every),
            lambda every: fx.observers.memory(Writes(), every=every),
        ],
    )
    def test_every_argument_takes_an_int_or_a_trigger(self, accepts, bad):
        accepts(3), accepts(fx.every(3)), accepts(fx.after(3) & fx.every(2))
        with pytest.raises((TypeError, ValueError), match=r"expected \w+ to be a positive int or a trigger, got "):
            accepts(bad)

    def test_trigger_rejects_event_without_clock_or_epoch_length(self):
        gradients = fx.Gradients(step=torch.tensor(1), loss=torch.tensor(0.0), metrics={}, grads={})
        with pytest.raises(TypeError, match="expected an event with a clock, got Gradients"):
            fx.every(seconds=1)(gradients)
        with pytest.raises(TypeError, match="expected an event with a known epoch length, got StepEnd"):
            fx.every(epochs=1)(fx.StepEnd(step=1, metrics={}))

    def test_when_gates_traced_callback_by_tensor(self):
        def update(state, event: fx.Gradients, memory):
            return memory + 1, fx.Control(stop=True, reason="r", log={"x": memory})

        counted = fx.when(fx.every(2), fx.stateful("n", lambda state: torch.tensor(0), update))
        state, reasons = state_with(counted), []
        for step in range(1, 6):
            event = fx.Gradients(step=torch.tensor(step), loss=torch.tensor(0.0), metrics={}, grads={})
            state, control = fx.compose(counted)(state, event)
            reasons.append(control.reasons("stop"))
            assert bool(control.log["x"].when) == (step % 2 == 0)
        assert int(state.slots["n"]) == 2
        assert reasons == [[], ["r"], [], ["r"], []]

    def test_when_gates_whole_composition(self):
        both = fx.when(fx.at(2), fx.compose(adder("a", 1), fx.callbacks.save()))
        state = state_with(both)
        assert both(state, events[0])[0] is state
        assert both(state, events[1])[1].reasons("save")
