"""The event Published: what all callbacks logged at an event, whatever their order, without reading it twice."""

import pytest
import torch
from problem import data, eval_step, fit, recorder, start, step

import fxtrain as fx
from fxtrain import testing


def squares(state, event: fx.StepEnd):
    return state, fx.Control(log={"square": float(event.step**2)})


def stop_at_nine(state, event: fx.Published):
    return state, fx.Control(stop=event.log.get("square", 0.0) >= 9, reason="9 is enough")


def total(state, event: fx.Published, sum_):
    return sum_ + event.log.get("square", 0.0) + event.log.get("eval/loss", 0.0), fx.Control()


summed = fx.stateful("total", lambda state: torch.tensor(0.0, dtype=torch.float64), total)


@pytest.mark.parametrize("callbacks", [[squares, stop_at_nine], [stop_at_nine, squares]])
def test_value_of_another_callback_stops_the_run_in_either_order(callbacks):
    assert fit(callbacks=callbacks).reason == "9 is enough"
    assert int(fit(callbacks=callbacks).state.step) == 3


@pytest.mark.parametrize("lag", [0, 1])
def test_value_logged_inside_the_step_stops_the_run(lag):
    def moves(state, event: fx.Published):
        return state, fx.Control(stop=event.log["grad_norm/total"] > 0.0, reason="it moves")

    result = fit(callbacks=[moves, fx.callbacks.grad_norms(), summed], lag=lag)
    assert result.reason == "it moves"
    assert int(result.state.step) == 1


def test_event_is_not_made_without_a_subscriber(monkeypatch):
    monkeypatch.delattr("fxtrain.loop._emitter.published_after")
    monkeypatch.delattr("fxtrain.loop._publisher.published_after")
    assert int(fit(callbacks=squares, observers=recorder([]), steps=2).state.step) == 2


def test_slot_written_after_a_rewind_survives_it():
    def back(state, event: fx.StepEnd):
        return state, fx.Control(rewind=1 if event.step == 3 else 0)

    def at_rewind(state, event: fx.Rewound):
        return state, fx.Control(stop=event.times > 1, log={"back": 1})

    def count(state, event: fx.Published, rewinds):
        return rewinds + ("back" in event.log), fx.Control()

    callbacks = [fx.stateful("rewinds", lambda state: torch.tensor(0), count), back, at_rewind]
    assert int(fit(callbacks=callbacks, snapshot_every=1).state.slots["rewinds"]) == 2


def test_log_has_metrics_and_values_by_the_names_of_writers():
    seen = []

    def keep(state, event: fx.Published):
        seen.append((type(event.event).__name__, event.step, sorted(event.log)))
        return state, fx.Control()

    def at_epoch_end(state, event: fx.EpochEnd):
        return state, fx.Control(log={"epochs": event.epochs_done})

    fit(callbacks=[keep, at_epoch_end], steps=3, eval_step=eval_step, eval_data=data(1))
    steps = [("StepEnd", number, ["train/learning_rate", "train/loss", "train/mae"]) for number in (1, 2, 3)]
    assert seen == [*steps, ("EvalEnd", 3, ["eval/loss", "eval/mae"]), ("EpochEnd", 3, ["epochs"])]


def test_values_are_those_of_the_history():
    seen = {}

    def keep(state, event: fx.Published):
        seen.update({(name, event.step): float(event.log[name]) for name in event.log})
        return state, fx.Control()

    history = fit(callbacks=[keep, squares]).history
    for name in ("train/loss", "square"):
        series = history[name]
        assert [seen[name, number] for number in series.steps] == series.values.tolist()


def test_value_whose_flag_is_false_is_left_out():
    def gated(state, event: fx.StepEnd):
        return state, fx.Control(log={"odd": fx.Logged(event.step, when=torch.tensor(event.step % 2 == 1))})

    seen = []

    def keep(state, event: fx.Published):
        seen.append("odd" in event.log and event.log["odd"])
        assert len(event.log) == 3 + event.step % 2
        return state, fx.Control()

    fit(callbacks=[keep, gated], steps=3)
    assert seen == [1, False, 3]


def test_unpublished_name_is_refused_with_the_nearest():
    def misspelt(state, event: fx.Published):
        return state, fx.Control(stop=event.log["train/los"] < 1)

    with pytest.raises(KeyError, match=r"a name that StepEnd published, got 'train/los'\. Did you mean 'train/loss'\?"):
        fit(callbacks=misspelt)


def test_values_logged_there_are_published_once_and_nothing_fires_again():
    fired = []

    def derived(state, event: fx.Published):
        fired.append(event.step)
        return state, fx.Control(log={"root": event.log["square"] ** 0.5})

    seen = []

    def watch(state, event: fx.Published, control):
        seen.append((event.step, event.log["root"], event.log["square"], type(event.log["train/loss"])))

    history = fit(callbacks=[derived, squares], observers=watch, steps=3).history
    assert fired == [1, 2, 3]
    assert history["root"].values.tolist() == [1, 2, 3]
    assert seen == [(1, 1.0, 1.0, float), (2, 2.0, 4.0, float), (3, 3.0, 9.0, float)]


def test_name_logged_before_is_refused_with_both_callbacks():
    def again(state, event: fx.Published):
        return state, fx.Control(log={"square": 1.0})

    with pytest.raises(ValueError, match=r"got 'square' from squares and from again"):
        fit(callbacks=[again, squares])


def test_requests_count_as_those_of_the_event():
    def place(state, event: fx.StepBegin):
        return state, fx.Control(log={"place": event.position})

    def decide(state, event: fx.Published):
        return state, fx.Control(skip_batch=event.log.get("place", 2) < 2)

    events = []
    fit(callbacks=[decide, place], observers=recorder(events), steps=1)
    assert [event.position for event in events if isinstance(event, fx.StepBegin)] == [0, 1, 2]

    def too_late(state, event: fx.Published):
        return state, fx.Control(skip_batch=True)

    with pytest.raises(ValueError, match="too_late: expected requests that are possible at StepEnd, got skip_batch"):
        fit(callbacks=too_late)


def test_state_is_read_only_after_a_session_event():
    def logs(state, event: fx.FitBegin):
        return state, fx.Control(log={"began": 1})

    def writes(state, event: fx.Published):
        return state.with_slot("total", state.slots["total"] + 1), fx.Control()

    callback = fx.slotted("total", lambda state: torch.tensor(0), writes)
    with pytest.raises(ValueError, match=r"total changed state.slots at FitBegin: expected no changes"):
        fit(callbacks=[callback, logs])


def test_only_who_names_it_sees_it():
    def every(state, event):
        assert not isinstance(event, fx.Published)
        return state, fx.Control(log={type(event).__name__: 1})

    def base(state, event: fx.LoopEvent):
        assert not isinstance(event, fx.Published)
        return state, fx.Control()

    assert fx.Published not in fx.compose(every, base).table
    seen = []
    fit(callbacks=[every, base, stop_at_nine], observers=recorder(seen), steps=2)
    assert not [event for event in seen if isinstance(event, fx.Published)]
    events = [event for _, event, _ in fx.steps(start(), step(), data(), steps=2, callbacks=[squares, stop_at_nine])]
    assert not [event for event in events if isinstance(event, fx.Published)]


def test_trigger_gates_it_by_the_step_of_the_event():
    seen = []

    def keep(state, event: fx.Published):
        seen.append((event.step, event.previous_time))
        return state, fx.Control()

    clock = iter(range(1000))
    fit(callbacks=fx.when(fx.every(2), keep), clock=lambda: float(next(clock)), steps=4)
    assert [number for number, _ in seen] == [2, 4]
    assert 0 < seen[0][1] < seen[1][1]


def test_interrupted_run_sees_the_same_values(tmp_path):
    def run(folder, steps):
        options = {"eval_step": eval_step, "eval_data": data(1), "eval_when": 2, "resume": True}
        return fit(
            steps=steps, callbacks=[summed, squares], checkpointer=fx.checkpointer(tmp_path / folder), **options
        ).state

    run("cut", 3)
    testing.assert_equal(run("cut", 6), run("whole", 6), "the resumed run")


def test_callback_obeys_the_laws():
    given = [
        fx.Published(step=number, event=fx.StepEnd(step=number, metrics={}), log={"square": torch.tensor(2.0 * number)})
        for number in (1, 2, 3)
    ]
    testing.check_laws(summed, start(), given)
