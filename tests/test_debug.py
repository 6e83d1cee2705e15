"""The observer that prints what each callback did."""

import io

import problem
import pytest
import torch
from problem import fit

import fxtrain as fx
from fxtrain import testing


def printed(*patterns, callbacks, steps=1, wrap=lambda observer: observer, every=1, **options):
    file = io.StringIO()
    fit(
        steps=steps,
        callbacks=callbacks,
        observers=wrap(fx.observers.debug(*patterns, every=every, file=file)),
        **options,
    )
    return file.getvalue().splitlines()


def count(state, event: fx.StepEnd, seen):
    return seen + 1, fx.Control(stop=event.step == 2, reason="two", log={"seen": seen + 1})


counter = fx.stateful("count", lambda state: torch.tensor(0), count)


def idle(state, event: fx.StepEnd):
    return state, fx.Control()


def test_each_callback_is_printed_with_changes_requests_and_values():
    assert printed("StepEnd", callbacks=[counter, idle], steps=5) == [
        "StepEnd of step 1, epoch 0.33",
        "  count: changes slots['count'] 0 -> 1, logs seen=1",
        "  idle: nothing",
        "StepEnd of step 2, epoch 0.67",
        "  count: changes slots['count'] 1 -> 2, requests stop (two), logs seen=2",
        "  idle: nothing",
    ]


def test_events_without_callbacks_are_printed():
    lines = printed(callbacks=idle)
    assert [line.split()[0] for line in lines if line[0] != " "] == [
        *("FitBegin", "EpochBegin", "StepBegin", "StepEnd", "FitEnd")
    ]


def test_pattern_selects_callbacks_and_their_events():
    assert printed("*", "cou*", callbacks=[counter, idle]) == [
        "StepEnd of step 1, epoch 0.33",
        "  count: changes slots['count'] 0 -> 1, logs seen=1",
    ]


def test_pattern_without_a_callback_is_named_at_the_end():
    assert printed("StepEnd", ["coun", "idle"], callbacks=[counter, idle])[-1] == (
        "debug: expected 'coun' to match a callback that ran, got no match among count, idle."
    )


def test_pattern_without_an_event_is_refused():
    with pytest.raises(ValueError, match=r"expected 'Gradients' to match a loop event, got no match among Epoch"):
        fx.observers.debug("Gradients")


def test_trigger_selects_events():
    lines = printed("StepEnd", callbacks=idle, steps=4, every=fx.at(3))
    assert lines == ["StepEnd of step 3, epoch 1.00", "  idle: nothing"]


def test_error_is_printed_before_it_ends_the_run():
    def failing(state, event: fx.StepEnd):
        raise ValueError("broken")

    file = io.StringIO()
    with pytest.raises(ValueError, match="broken"):
        fit(callbacks=[failing, idle], observers=fx.observers.debug("StepEnd", file=file))
    assert file.getvalue().splitlines() == ["StepEnd of step 1, epoch 0.33", "  failing: raises ValueError: broken"]


def test_tolerant_callback_shows_its_count():
    def failing(state, event: fx.StepEnd):
        raise ValueError("broken")

    with pytest.warns(RuntimeWarning, match="broken"):
        lines = printed("StepEnd", callbacks=fx.tolerant(failing))
    assert lines[1] == "  failing: changes slots['errors/failing'] 0 -> 1, logs errors/failing=1"


def test_values_and_requests_of_the_compiled_step_are_printed():
    def alarm(state, event: fx.Gradients):
        return state, fx.Control(stop=event.step == 1, reason="alarm", log={"alarm": event.loss * 0})

    assert printed("StepEnd", callbacks=[alarm, idle])[1:] == [
        "  idle: nothing",
        "  alarm, inside the step: logs alarm=0",
        "  callbacks, inside the step: requests stop (alarm)",
    ]


def test_published_names_the_event_that_it_follows():
    def reader(state, event: fx.Published):
        return state, fx.Control(log={"twice": event.log["seen"] * 2})

    assert printed("Published", callbacks=[counter, reader]) == [
        "Published of step 1, epoch 0.33, after StepEnd",
        "  reader: logs twice=2",
    ]


def test_large_values_are_described_and_many_are_counted():
    def write(state, event: fx.StepEnd):
        params = {name: value + 1 for name, value in state.params.items()}
        return state.replace(params=params), fx.Control(log={"text": fx.values.Text("long")})

    (line,) = printed("StepEnd", callbacks=write)[1:]
    assert line.startswith("  write: changes params['0.bias'] (float32 [8])") or "float32 [8, 4]" in line
    assert line.endswith("logs text=a Text")


def test_control_characters_are_escaped():
    def colored(state, event: fx.StepEnd):
        return state, fx.Control(save=True, reason="\x1b[31mred")

    checkpointer_warning = pytest.warns(UserWarning, match="expected a checkpointer")
    with checkpointer_warning:
        lines = printed("StepEnd", callbacks=colored)
    assert lines[1] == "  colored: requests save (\\x1b[31mred)"


def test_required_observer_watches_too():
    assert printed("StepEnd", callbacks=counter, wrap=fx.observers.required)[1].startswith("  count: changes")


def test_failing_stream_drops_the_observer_and_not_the_run():
    file = io.StringIO()
    file.close()
    with pytest.warns(RuntimeWarning, match="dropped"):
        assert int(fit(steps=2, callbacks=counter, observers=fx.observers.debug(file=file)).state.step) == 2


def test_watched_run_equals_the_unwatched_one():
    options = {"callbacks": [counter, fx.callbacks.grad_norms()], "steps": 2}
    watched = fit(observers=fx.observers.debug(file=io.StringIO()), **options)
    testing.assert_equal(watched.state, fit(**options).state, "the watched run")


def test_callbacks_are_not_watched_without_it():
    run = fx.loop._run.Run(problem.start(), problem.step(), problem.data(), fx.loop._plan.Plan(steps=1))
    assert type(run._callbacks) is fx.Composed
