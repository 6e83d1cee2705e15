"""The training loop: order of events, ownership of the state, observers and errors."""

import itertools
import os
import signal
import warnings

import problem
import pytest
import torch
from problem import fit, recorder

import fxtrain as fx
from fxtrain import testing, tree
from fxtrain.core import EVENTS, TRACED


def kinds(moments):
    return [type(event).__name__ for _, event, _ in moments]


class TestOrder:
    def test_events_fire_in_documented_order(self, tmp_path):
        fired = []

        def traced(state, event: fx.Microbatch | fx.Gradients | fx.Updated):
            fired.append(type(event).__name__)
            return state, fx.Control()

        def loop(state, event: fx.LoopEvent):
            fired.append(type(event).__name__)
            return state, fx.Control()

        # The evaluation loss only grows, so the second evaluation without improvement, at step 6, stops.
        growing = itertools.count()
        worse = fx.eval_step(lambda model, batch: {"loss": torch.tensor(float(next(growing)))})
        callbacks = fx.compose(
            traced,
            loop,
            fx.callbacks.early_stopping("loss", patience=2),
            fx.when(fx.every(3), fx.callbacks.save()),
        )
        result = fx.fit(
            problem.start(),
            problem.step(accumulate=2, callbacks=callbacks),
            problem.data(),
            callbacks=callbacks,
            epochs=2,
            eval_step=worse,
            eval_data=problem.data(2),
            eval_when=fx.every(2),
            checkpointer=fx.checkpointer(tmp_path, background=False),
        )
        step = ["StepBegin", "Microbatch", "Microbatch", "Gradients", "Updated", "StepEnd"]
        evaluation = ["EvalBegin", *2 * ("EvalStepBegin", "EvalStep"), "EvalEnd"]
        assert fired == [
            "FitBegin",
            *("EpochBegin", *step, *step, *evaluation, *step, "EpochEnd", "SaveBegin", "Saved"),
            *("EpochBegin", *step, *evaluation, *step, *step, *evaluation, "EpochEnd", "SaveBegin", "Saved"),
            "FitEnd",
        ]
        assert result.reason == "loss has not improved for 2 evaluations"

    def test_loop_docstring_lists_every_event(self):
        from fxtrain import loop

        for kind in EVENTS:
            assert kind.__name__ in loop.__doc__

    def test_every_event_fires(self, tmp_path):
        seen = []

        def asks(state, event: fx.StepEnd):
            return state, fx.Control(rewind=1 if event.step == 4 and not seen.count(fx.Rewound) else 0)

        def traced(state, event: fx.Microbatch | fx.Gradients | fx.Updated):
            seen.append(type(event))
            return state, fx.Control()

        def observe(state, event, control):
            seen.append(type(event))
            if isinstance(event, fx.StepEnd) and event.step == 5:
                os.kill(os.getpid(), signal.SIGINT)

        checkpoints = fx.checkpointer(tmp_path)
        options = {"eval_step": problem.eval_step, "eval_data": problem.data(1), "checkpointer": checkpoints}
        step = problem.step(callbacks=traced)
        fit(step=step, callbacks=[asks, traced], observers=[observe], snapshot_every=1, **options)
        fit(step=step, callbacks=[traced], observers=[recorder([]), observe], resume=True, **options)
        assert set(seen) == set(EVENTS) - {fx.Published}

    def test_events_of_step_share_step_number(self):
        numbers = {}

        def note(state, event: fx.StepBegin | fx.Gradients | fx.Updated | fx.StepEnd):
            numbers.setdefault(type(event), []).append(int(event.step))
            return state, fx.Control()

        fit(step=problem.step(callbacks=note), callbacks=note, steps=4)
        assert set(map(tuple, numbers.values())) == {(1, 2, 3, 4)}


class TestOwnership:
    def test_fit_leaves_given_state_unchanged(self):
        state = problem.start()
        before = state.copy()
        first, second = fit(state), fit(state)
        testing.assert_equal(state, before, "the state given to fit")
        testing.assert_equal(first.state, second.state, "the second run")

    def test_steps_yields_all_events_and_can_be_left_early(self):
        moments = fx.steps(problem.start(), problem.step(), problem.data(), epochs=1)
        assert kinds(moments) == ["FitBegin", "EpochBegin", *["StepBegin", "StepEnd"] * 3, "EpochEnd", "FitEnd"]
        losses = []
        run = fx.steps(problem.start(), problem.step(), problem.data(), steps=100)
        for state, event, _ in run:  # noqa: B007 - used after the loop
            if isinstance(event, fx.StepEnd):
                losses.append(event.metrics["loss"])
                if event.step == 2:
                    break
        assert len(losses) == 2
        assert int(state.step) == 2

    def test_continued_run_equals_single_run(self):
        whole = fit(steps=6)
        part = fit(fit(steps=2).state, steps=6)
        testing.assert_equal(part.state, whole.state, "two runs in a row")
        assert part.state is part.continue_from

    def test_global_generator_is_not_used(self):
        before = torch.random.get_rng_state()
        first = fit()
        assert torch.equal(before, torch.random.get_rng_state())
        torch.manual_seed(99)
        testing.assert_equal(fit().state, first.state, "another global seed")

    def test_slots_persist_if_callbacks_change_between_runs(self):
        def counter(name):
            return fx.stateful(
                name, lambda state: torch.tensor(0), lambda state, event, memory: (memory + 1, fx.Control())
            )

        first = fit(callbacks=[fx.on(fx.StepEnd, counter("a")), fx.on(fx.StepEnd, counter("b"))], steps=2).state
        second = fit(first, callbacks=[fx.on(fx.StepEnd, counter("c")), fx.on(fx.StepEnd, counter("a"))], steps=5).state
        assert {name: int(second.slots[name]) for name in "abc"} == {"a": 5, "b": 2, "c": 3}


class TestObservers:
    def test_failing_observer_is_reported_and_dropped(self):
        calls = []

        def broken(state, event, control):
            calls.append(event)
            raise OSError("the disk is gone")

        with pytest.warns(RuntimeWarning, match="broken failed at FitBegin of step 0 and is dropped"):
            result = fit(observers=[broken])
        assert len(calls) == 1
        assert int(result.state.step) == 6

    def test_failing_required_observer_ends_run(self):
        def broken(state, event, control):
            raise OSError("the disk is gone")

        with pytest.raises(OSError, match="the disk is gone"):
            fit(observers=[fx.observers.required(broken)])

    def test_observer_receives_published_scalars_only(self):
        def logs(state, event: fx.StepEnd):
            even = torch.tensor(event.step % 2 == 0)
            return state, fx.Control(log={"even": fx.Logged(torch.tensor(float(event.step)), when=even)})

        seen = []

        def observe(state, event: fx.StepEnd, control):
            seen.append((event.step, type(event.metrics["loss"]), {k: v.value for k, v in control.log.items()}))

        fit(callbacks=logs, observers=[observe], steps=2)
        assert seen == [(1, float, {}), (2, float, {"even": 2.0})]

    def test_observer_is_closed_after_error(self):
        closed = []

        class Closing:
            def __call__(self, state, event, control):
                pass

            def close(self):
                closed.append(True)

        def fails(state, event: fx.StepEnd):
            raise RuntimeError("no")

        with pytest.raises(RuntimeError, match="no"):
            fit(callbacks=fails, observers=[Closing()])
        assert closed == [True]


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"steps": None}, "expected epochs, steps or both, got neither"),
            ({"steps": -1}, "expected steps to be an int of at least 0, got -1"),
            ({"eval_step": problem.eval_step}, "got no eval_data"),
            ({"eval_data": []}, "got no eval_step"),
            ({"eval_when": fx.every(2)}, "expected eval_step and eval_data with eval_when, got neither"),
            ({"resume": True}, "expected a checkpointer with resume=True, got None"),
        ],
    )
    def test_invalid_arguments_are_rejected_before_first_step(self, options, message):
        with pytest.raises(ValueError, match=message):
            fit(**options)

    def test_step_without_subscribed_events_is_rejected(self):
        def plain_step(state, batch):
            return state, fx.StepOutput({})

        with pytest.raises(ValueError, match="fires Gradients for nan_guard, got one that fires none"):
            fit(step=plain_step, callbacks=fx.callbacks.nan_guard())

    @pytest.mark.parametrize(
        "option",
        [{"snapshots": 0}, {"snapshot_every": 0}, {"snapshot_every": 1.5}, {"rewind_limit": -1}, {"lag": 2}],
        ids=str,
    )
    def test_option_out_of_range_is_rejected(self, option):
        (name,) = option
        with pytest.raises((TypeError, ValueError), match=name):
            fit(**option)

    def test_data_with_too_few_batches_is_rejected(self):
        with pytest.raises(ValueError, match="expected data for 6 steps, got 3 batches"):
            fx.fit(problem.start(), problem.step(), iter(problem.data()), steps=6)
        with pytest.raises(ValueError, match="data is empty"):
            fx.fit(problem.start(), problem.step(), iter([]), steps=6)

    def test_evaluation_request_at_eval_end_is_rejected(self):
        with pytest.raises(ValueError, match="expected requests that are possible at EvalEnd, got evaluate"):
            fit(
                callbacks=fx.on(fx.EvalEnd, fx.callbacks.evaluate()),
                eval_step=problem.eval_step,
                eval_data=problem.data(1),
            )


def test_evaluate_weights_batches_by_size():
    mean = fx.eval_step(lambda model, batch: {"mean": batch.mean()})
    state = fx.init(torch.nn.ReLU())
    batches = [torch.zeros(6, 2), torch.full((2, 2), 4.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fx.evaluate(state, mean, batches) == {"mean": 1.0}


def test_evaluate_excludes_padding_rows():
    data = fx.data.batches({"x": torch.tensor([1.0, 1.0, 4.0])}, 2, shuffle=False, drop_last="pad")
    mean = fx.eval_step(lambda model, batch: {"x": (batch["x"] * batch["mask"]).sum() / batch["mask"].sum()})
    assert fx.evaluate(fx.init(torch.nn.ReLU()), mean, data) == {"x": 2.0}


def test_evaluate_uses_weights_of_state_and_leaves_it_unchanged():
    state = problem.start()
    before = state.copy()
    first = fx.evaluate(state, problem.eval_step, problem.data())
    assert first == fx.evaluate(state, problem.eval_step, problem.data())
    testing.assert_equal(state, before, "the state given to evaluate")
    zero = state.replace(params=tree.zeros_like(state.params))
    assert fx.evaluate(zero, problem.eval_step, problem.data()) != first


def test_train_step_fires_all_traced_events():
    assert problem.step().fires == set(TRACED)
