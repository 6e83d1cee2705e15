"""Runs interrupted by signals, errors or step limits at any event: a resume ends with the uninterrupted run's state."""

import itertools
import os
import signal
import warnings

import problem
import pytest
import torch
from problem import fit, recorder

import fxtrain as fx
from fxtrain import testing
from fxtrain.core import TRAJECTORY


def traced_counter():
    def update(state, event: fx.Updated, memory):
        return memory + 1, fx.Control(log={"updates": memory})

    return fx.stateful("updates", lambda state: torch.tensor(0), update)


def loop_counter():
    def update(state, event: fx.StepBegin | fx.StepEnd, memory):
        return memory + 1, fx.Control()

    return fx.stateful("moments", lambda state: torch.tensor(0), update)


def everything(tmp_path, **options):
    """Options of a run over almost three epochs with requests of many kinds."""
    callbacks = fx.compose(
        fx.callbacks.early_stopping("loss", patience=50),
        fx.callbacks.restore_best("loss"),
        fx.callbacks.epoch_mean("loss", "mae"),
        fx.callbacks.nan_guard(),
        traced_counter(),
        loop_counter(),
        fx.when(fx.every(3), fx.callbacks.save()),
    )
    return {
        "step": problem.step(accumulate=2, callbacks=callbacks),
        "callbacks": callbacks,
        "eval_step": problem.eval_step,
        "eval_data": problem.data(2, seed=1),
        "eval_when": fx.every(2),
        "checkpointer": fx.checkpointer(tmp_path, keep=None),
        "steps": 8,
        "resume": True,
        **options,
    }


def signature(events):
    """Returns the parts of events on which two runs must agree: everything except times."""
    told = []
    for event, control in events:
        if isinstance(event, TRAJECTORY):
            metrics = dict(getattr(event, "metrics", {}))
            place = event.step, event.position, getattr(event, "index", None)
            told.append((type(event).__name__, *place, metrics, dict(control.log)))
    return told


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The result and the event signature of an uninterrupted run."""
    events = []
    observe = fx.observers.required(lambda state, event, control: events.append((event, control)))
    result = fit(**everything(tmp_path_factory.mktemp("whole"), observers=[observe]))
    return result, signature(events)


def test_run_resumed_after_signal_at_any_event_equals_whole_run(tmp_path, whole):
    result, told = whole
    for cut in range(len(told)):
        folder, seen = tmp_path / str(cut), []

        def observe(state, event, control, seen=seen, cut=cut):
            if not isinstance(event, TRAJECTORY):
                return
            seen.append((event, control))
            if len(seen) == cut + 1:
                os.kill(os.getpid(), signal.SIGINT)

        first = fit(**everything(folder, observers=[fx.observers.required(observe)]))
        assert "SIGINT" in first.reason or cut >= len(told) - 2
        resumed = fit(**everything(folder, observers=[fx.observers.required(observe)]))
        testing.assert_equal(
            resumed.continue_from, result.continue_from, f"interrupted at moment {cut}, {told[cut][0]}"
        )
        testing.assert_equal(resumed.state, result.state, f"harvest after an interrupt at {cut}")
        # A resume repeats an interrupted evaluation from its first event. No other event is repeated.
        unique = [moment for moment, _ in itertools.groupby(sorted(map(repr, signature(seen))))]
        assert unique == sorted(map(repr, told))


def test_run_resumed_after_error_at_any_event_equals_whole_run(tmp_path, whole):
    result, told = whole
    for cut in range(len(told)):
        folder, count = tmp_path / str(cut), itertools.count()

        def fail(state, event, count=count, cut=cut):
            if next(count) == cut:
                raise RuntimeError("a bug in a callback")
            return state, fx.Control()

        options = everything(folder)
        with pytest.raises(RuntimeError, match="a bug in a callback"):
            fit(**{**options, "callbacks": fx.compose(options["callbacks"], fail)})
        testing.assert_equal(
            fit(**options).continue_from, result.continue_from, f"failed at moment {cut}, {told[cut][0]}"
        )


def test_epoch_of_unknown_length_ends_once_for_every_cut(tmp_path):
    def batches():
        yield from problem.data()

    class Stream:
        def __iter__(self):
            return batches()

    def told(folder, *limits):
        fired = []
        for steps in limits:
            checkpoints = fx.checkpointer(folder)
            options = {"checkpointer": checkpoints, "resume": True, "observers": [recorder(fired)]}
            last = fx.fit(problem.start(), problem.step(), Stream(), steps=steps, **options).continue_from
        return last, [(type(e).__name__, e.step) for e in fired if isinstance(e, fx.EpochBegin | fx.EpochEnd)]

    last, epochs = told(tmp_path / "whole", 8)
    assert epochs == [
        *[("EpochBegin", 0), ("EpochEnd", 3)],
        *[("EpochBegin", 3), ("EpochEnd", 6)],
        ("EpochBegin", 6),
    ]
    for cut in range(1, 8):
        assert told(tmp_path / str(cut), cut, 8)[1] == epochs
        testing.assert_equal(told(tmp_path / f"{cut}-again", cut, 8)[0], last, f"cut at step {cut}")

    def interrupt(state, event: fx.EpochEnd, control):
        os.kill(os.getpid(), signal.SIGINT)

    options = {"checkpointer": fx.checkpointer(tmp_path / "end"), "steps": 8}
    fx.fit(problem.start(), problem.step(), Stream(), observers=[interrupt], **options)
    assert told(tmp_path / "end", 8)[1] == epochs[2:]


def test_second_signal_raises_keyboard_interrupt():
    def twice(state, event, control):
        if isinstance(event, fx.StepEnd):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(observers=[twice])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resume_of_finished_run_takes_no_step(tmp_path):
    def stop(state, event: fx.StepEnd):
        return state, fx.Control(stop=event.step == 2, reason="two")

    checkpoints = fx.checkpointer(tmp_path)
    first = fit(callbacks=stop, checkpointer=checkpoints)
    fired = []
    again = fit(callbacks=stop, checkpointer=checkpoints, resume=True, observers=[recorder(fired)])
    assert [type(event).__name__ for event in fired] == ["FitBegin", "Restored", "FitEnd"]
    assert again.reason == "two"
    testing.assert_equal(again.continue_from, first.continue_from, "a finished run, resumed")
    assert (
        int(fit(first.continue_from, steps=4).continue_from.step) == 4
    )  # a run continued in memory takes the requested steps


def test_save_waiting_for_interrupted_evaluation_is_made_on_resume(tmp_path):
    def interrupt(state, event, control):
        if isinstance(event, fx.EvalStep):
            os.kill(os.getpid(), signal.SIGINT)

    options = {
        "callbacks": fx.when(fx.every(2), fx.callbacks.save()),
        "eval_step": problem.eval_step,
        "eval_data": problem.data(2),
        "eval_when": fx.every(2),
        "checkpointer": fx.checkpointer(tmp_path, best="loss"),
        "steps": 3,
    }
    fit(observers=[interrupt], **options)
    assert options["checkpointer"].best() is None
    fit(resume=True, **options)
    assert options["checkpointer"].best() == 2


def test_slot_added_on_resume_starts_from_restored_state(tmp_path):
    checkpoints = fx.checkpointer(tmp_path)
    counter = traced_counter()
    first = fit(steps=2, callbacks=counter, step=problem.step(callbacks=counter), checkpointer=checkpoints)
    fired = []
    late = fx.stateful("late", lambda state: state.params, lambda state, event, memory: (memory, fx.Control()))
    with pytest.warns(UserWarning, match="'late' is not in the checkpoint.*'updates' is only in the checkpoint"):
        result = fit(callbacks=late, checkpointer=checkpoints, resume=True, steps=3, observers=[recorder(fired)])
    testing.assert_equal(result.continue_from.slots["late"], first.continue_from.params, "the slot that was added")
    (restored,) = [event for event in fired if isinstance(event, fx.Restored)]
    assert (restored.missing, restored.extra) == (("late",), ("updates",))
    assert int(result.continue_from.slots["updates"]) == 2


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        ({"accumulate": 4}, "accumulate: 2 at the save, 4 now"),
        ({"precision": "bf16"}, "precision: .* compute unchanged, .* at the save, .* compute bfloat16, .* now"),
    ],
)
def test_resume_with_different_step_options_warns(tmp_path, change, warned):
    options = {"checkpointer": fx.checkpointer(tmp_path), "resume": True}
    fit(step=problem.step(accumulate=2), steps=2, **options)
    with pytest.warns(UserWarning, match=warned):
        fit(step=problem.step(**{"accumulate": 2, **change}), steps=3, **options)


@pytest.mark.parametrize("steps", [2, 4])
def test_error_of_a_callback_at_save_begin_loses_no_save(tmp_path, steps):
    def fails(state, event: fx.SaveBegin):
        raise RuntimeError("no values for this save")

    checkpointer = fx.checkpointer(tmp_path)
    run = {
        "callbacks": fx.compose(fails, fx.when(3, fx.callbacks.save())),
        "checkpointer": checkpointer,
        "steps": steps,
    }
    warnings.simplefilter("ignore", RuntimeWarning)  # the callback fails again at the final save
    with pytest.raises(RuntimeError, match="no values for this save"):
        fx.fit(problem.start(), problem.step(), problem.data(), **run)
    assert checkpointer.latest() == min(steps, 3)
