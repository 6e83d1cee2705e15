"""Fields of events: indices of epochs and batches, durations, and the batches of an evaluation."""

import itertools
import os
import signal

import problem
import pytest
import torch
from problem import fit, recorder

import fxtrain as fx


def fired(*kinds, **options):
    """Returns the events of a run that have one of the types."""
    seen = []
    result = fit(observers=[recorder(seen)], **options)
    return result, [event for event in seen if isinstance(event, kinds)]


class TestIndices:
    def test_epoch_index_and_batch_index_count_from_zero(self):
        _, events = fired(fx.EpochBegin, fx.StepBegin, fx.StepEnd, fx.EpochEnd)
        seen = [(event.epoch_index, getattr(event, "batch_index", type(event).__name__)) for event in events]
        steps = [0, 0, 1, 1, 2, 2]
        assert seen == [(epoch, at) for epoch in (0, 1) for at in ("EpochBegin", *steps, "EpochEnd")]

    def test_batch_index_counts_skipped_batches_and_survives_resume(self, tmp_path):
        def skip(state, event: fx.StepBegin):
            return state, fx.Control(skip_batch=event.batch_index == 1, reason="the second batch")

        options = {"callbacks": skip, "checkpointer": fx.checkpointer(tmp_path), "resume": True}
        _, first = fired(fx.StepEnd, steps=3, **options)
        _, second = fired(fx.StepEnd, steps=5, **options)
        where = [(event.epoch_index, event.batch_index) for event in (*first, *second)]
        assert where == [(0, 0), (0, 2), (1, 0), (1, 2), (2, 0)]


class TestDurations:
    def test_durations_are_seconds_on_the_clock_of_the_loop(self):
        clock = itertools.count()
        _, events = fired(
            *(fx.EpochBegin, fx.EvalBegin, fx.StepEnd, fx.EvalEnd, fx.EpochEnd),
            clock=lambda: float(next(clock)),
            eval_step=problem.eval_step,
            eval_data=problem.data(2),
        )
        began = {}
        for event in events:
            if isinstance(event, fx.EpochBegin | fx.EvalBegin):
                began[type(event)] = event.time
            elif isinstance(event, fx.StepEnd):
                assert 0 < event.duration < event.time - event.previous_time
            else:
                since = event.time - began[fx.EpochBegin if isinstance(event, fx.EpochEnd) else fx.EvalBegin]
                assert event.duration == pytest.approx(since, abs=3)

    def test_steps_of_one_dispatch_share_its_duration(self):
        clock = itertools.count()
        _, ends = fired(fx.StepEnd, step=problem.Together(problem.step(), 3), steps=3, clock=lambda: float(next(clock)))
        assert len({event.duration for event in ends}) == 1

    def test_duration_of_resumed_epoch_counts_this_session(self, tmp_path):
        clock = itertools.count(1000)
        options = {"checkpointer": fx.checkpointer(tmp_path), "resume": True, "clock": lambda: float(next(clock))}
        fit(steps=2, **options)
        _, (end,) = fired(fx.EpochEnd, steps=4, **options)
        assert 0 < end.duration <= end.time < 1000

    def test_durations_are_logged_only_by_their_callback(self):
        options = {"eval_step": problem.eval_step, "eval_data": problem.data(2), "epochs": 2}
        assert not [name for name in fit(**options).history if "duration" in name]
        history = fit(callbacks=fx.callbacks.durations(steps=4), **options).history
        steps = {name: history[name].steps.tolist() for name in history if name.startswith("duration/")}
        assert steps == {"duration/epoch": [3, 6], "duration/evaluation": [3, 6], "duration/step": [4]}
        assert fx.StepEnd not in fx.compose(fx.callbacks.durations()).table


class TestEvalStepBegin:
    def test_event_before_each_evaluation_batch_has_that_batch(self):
        batches = problem.data(2, seed=1)
        _, events = fired(
            *(fx.EvalBegin, fx.EvalStepBegin, fx.EvalStep, fx.EvalEnd),
            steps=3,
            eval_step=problem.eval_step,
            eval_data=batches,
        )
        assert [type(event).__name__ for event in events] == [
            *("EvalBegin", "EvalStepBegin", "EvalStep", "EvalStepBegin", "EvalStep", "EvalEnd")
        ]
        begins = [event for event in events if isinstance(event, fx.EvalStepBegin)]
        assert [event.index for event in begins] == [0, 1]
        for event, batch in zip(begins, batches, strict=True):
            torch.testing.assert_close(event.batch["x"], batch["x"], rtol=0, atol=0)

    def test_signal_at_event_before_batch_repeats_the_evaluation(self, tmp_path):
        def interrupt(state, event: fx.EvalStepBegin, control):
            if event.index == 1:
                os.kill(os.getpid(), signal.SIGINT)

        options = {"eval_step": problem.eval_step, "eval_data": problem.data(2), "steps": 3}
        whole = fit(**options)
        first = fit(checkpointer=fx.checkpointer(tmp_path), observers=[interrupt], **options)
        assert "SIGINT" in first.reason
        again = fit(checkpointer=fx.checkpointer(tmp_path), resume=True, **options)
        fx.testing.assert_equal(again.continue_from, whole.continue_from, "after an interrupted evaluation")

    def test_request_at_event_inside_an_evaluation_is_refused(self):
        def again(state, event: fx.EvalStepBegin):
            return state, fx.Control(evaluate=True, reason="again")

        with pytest.raises(ValueError, match="expected requests that are possible at EvalStepBegin, got evaluate"):
            fit(callbacks=again, steps=3, eval_step=problem.eval_step, eval_data=problem.data(2))
