"""Tolerant callbacks: errors undo the call, are counted and reported once, and training goes on."""

import warnings

import pytest
import torch
from problem import adder, events, fit, state_with

import fxtrain as fx
from fxtrain import testing


def test_error_of_a_callback_is_undone_counted_and_reported_once():
    def half_written(state, event: fx.StepEnd, count):
        if event.step % 2:
            raise ValueError("odd step")
        return count + 1, fx.Control(log={"even": event.step})

    callback = fx.tolerant(fx.stateful("half", lambda state: torch.tensor(0), half_written))
    with pytest.warns(RuntimeWarning) as caught:
        result = fit(steps=5, callbacks=callback)
    slots = result.state.slots
    assert (int(slots["half"]), int(slots["errors/half"])) == (2, 3)
    assert [str(each.message).split(". Training")[0] for each in caught] == [
        "The callback half failed at StepEnd of step 1 and is undone: ValueError: odd step "
        f"({__file__}:{half_written.__code__.co_firstlineno + 2})"
    ]
    assert "Later errors are only counted, in state.slots['errors/half']." in str(caught[0].message)
    assert result.history["even"].values.tolist() == [2, 4]
    assert result.history["errors/half"].steps.tolist() == [1, 3, 5]
    assert result.history["errors/half"].values.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (lambda state: None, "expected it to return"),
        (lambda state: (state, fx.Control(skip_batch=True)), "expected requests that are possible at StepEnd"),
        (lambda state: (state.with_slot("x", state.step), fx.Control()), "added state.slots"),
        (lambda state: (state, fx.Control(log={"x": "text"})), "expected wrong to log a scalar .* Wrap it in Text"),
    ],
)
def test_results_that_the_run_refuses_are_errors_of_the_callback(returned, says):
    def wrong(state, event: fx.StepEnd):
        return returned(state)

    with pytest.warns(RuntimeWarning, match=says):
        result = fit(steps=2, callbacks=fx.tolerant(wrong))
    assert int(result.state.slots["errors/wrong"]) == 2


def test_count_survives_a_resume(tmp_path):
    def failing(state, event: fx.StepEnd):
        raise ValueError

    def run(folder, steps):
        checkpointer = fx.checkpointer(tmp_path / folder)
        return fit(steps=steps, callbacks=fx.tolerant(failing), checkpointer=checkpointer, resume=True)

    with pytest.warns(RuntimeWarning, match="failing failed"):
        run("cut", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cut = run("cut", 4).state
    with pytest.warns(RuntimeWarning, match="failing failed"):
        whole = run("whole", 4).state
    testing.assert_equal(cut, whole, "the resumed run")


def test_errors_at_session_events_are_reported_and_change_nothing():
    def failing(state, event: fx.FitBegin | fx.FitEnd):
        raise RuntimeError("no network")

    with pytest.warns(RuntimeWarning, match="not counted") as caught:
        result = fit(steps=1, callbacks=fx.tolerant(failing))
    assert len(caught) == 2
    assert result.state is result.continue_from


def test_keyboard_interrupt_is_raised():
    def interrupted(state, event: fx.StepEnd):
        raise KeyboardInterrupt

    callback = fx.compose(fx.tolerant(interrupted))
    with pytest.raises(KeyboardInterrupt):
        callback(state_with(callback), events[0])


def test_others_in_the_composition_are_called():
    def failing(state, event: fx.StepEnd):
        raise ValueError

    both = fx.tolerant(fx.compose(failing, adder("a", 1)))
    assert [each.name for each in both] == ["failing", "a"]
    with pytest.warns(RuntimeWarning, match="failing"):
        state, _ = both(state_with(both), events[0])
    assert int(state.slots["a"]) != int(state_with(both).slots["a"])
    assert int(state.slots["errors/failing"]) == 1
    assert "errors/a" in state.slots


def test_tolerant_callback_that_never_fails_changes_nothing():
    testing.check_laws(fx.tolerant(adder("a", 1)), fx.init(torch.nn.Linear(1, 1)), events)
    again = fx.tolerant(fx.tolerant(adder("a", 1)))
    assert list(fx.compose(again).slots) == ["a", "errors/a"]


def test_traced_callback_is_refused():
    with pytest.raises(ValueError, match=r"got nan_guard, which subscribes to \w+ inside the compiled step"):
        fx.tolerant(fx.callbacks.nan_guard())
