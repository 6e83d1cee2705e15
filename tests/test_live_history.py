"""The history that events carry during a run."""

import problem
import pytest

import fxtrain as fx


def live(kinds, notes, read):
    """Returns an observer that reads the history of FitBegin at events of the given types."""
    kept = []

    def observe(state, event, control):
        if isinstance(event, fx.FitBegin):
            kept.append(event.history)
        if isinstance(event, kinds):
            notes.append(read(kept[0]))

    return fx.observers.required(observe)


def test_observer_reads_history_during_the_run():
    seen = []

    def read(history):
        return len(history["train/loss"].steps), history["train/loss"].values[-1]

    result = problem.fit(observers=[live(fx.StepEnd, seen, read)])
    assert [count for count, _ in seen] == list(range(1, 7))
    assert [value for _, value in seen] == result.history["train/loss"].values.tolist()


def test_callback_reads_history_up_to_the_event_before():
    kept, seen = [], []

    def note(state, event: fx.FitBegin | fx.StepEnd):
        if isinstance(event, fx.FitBegin):
            kept.append(event.history)
        else:
            seen.append(len(kept[0]["train/loss"].steps) if "train/loss" in kept[0] else 0)
        return state, fx.Control()

    problem.fit(callbacks=note)
    assert seen == list(range(6))


def test_history_of_events_is_read_only():
    history = []
    problem.fit(observers=[fx.observers.required(lambda state, event, control: history.append(event))])
    with pytest.raises(TypeError, match="does not support item assignment"):
        history[0].history["train/loss"] = 1
    assert not hasattr(history[0].history, "add")


def test_rewind_removes_points_from_live_history():
    def go_back(state, event: fx.StepEnd):
        is_due = event.step == 5 and "loop/rewinds" not in state.slots
        return state, fx.Control(rewind=2 if is_due else 0, reason="once")

    seen = []
    observer = live(fx.StepEnd | fx.Rewound, seen, lambda history: history["train/loss"].steps.tolist()[-1])
    problem.fit(callbacks=go_back, observers=[observer], snapshot_every=1)
    assert seen == [1, 2, 3, 4, 5, 3, 4, 5, 6]


def test_callback_logs_loss_curve_at_the_end_of_the_run():
    figures = []

    def curve(state, event: fx.FitEnd):
        return state, fx.Control(log={"curves": fx.values.Figure(event.history.plot("*/loss"))})

    def observe(state, event: fx.FitEnd, control):
        figures.append(control.log["curves"].value)

    options = {"eval_step": problem.eval_step, "eval_data": problem.data(2)}
    problem.fit(callbacks=curve, observers=[fx.observers.required(observe)], **options)
    assert figures[0].pixels.ndim == 3


def test_fit_end_carries_the_facts_of_the_session(tmp_path):
    ends = []

    def observe(state, event: fx.FitEnd, control):
        ends.append(event)

    options = {"checkpointer": fx.checkpointer(tmp_path), "resume": True, "observers": [observe]}
    options |= {"eval_step": problem.eval_step, "eval_data": problem.data(2)}
    problem.fit(steps=2, **options)
    result = problem.fit(steps=6, **options)
    assert [end.steps_taken for end in ends] == [2, 4]
    assert ends[1].evaluation["loss"] == result.history["eval/loss"].values[-1]
    assert list(ends[1].history) == list(result.history)
    assert ends[1].duration == ends[1].time > 0
    again = []
    problem.fit(observers=[lambda state, event, control: again.append(event)], steps=1)
    assert again[-1].evaluation is None


def test_after_an_exception_observers_close_without_fit_end(tmp_path):
    told = []

    class Observe:
        required = True

        def __call__(self, state, event, control):
            if isinstance(event, fx.Interrupted | fx.Saved | fx.FitEnd):
                told.append((type(event).__name__, event.step))
            if isinstance(event, fx.Interrupted):
                told.append(len(event.history["train/loss"].steps))

        def close(self):
            told.append("close")

    def fail(state, event: fx.StepEnd):
        if event.step == 4:
            raise RuntimeError("a bug")
        return state, fx.Control()

    with pytest.raises(RuntimeError, match="a bug"):
        problem.fit(callbacks=fail, observers=[Observe()], checkpointer=fx.checkpointer(tmp_path))
    assert told == [("Interrupted", 3), 3, ("Saved", 3), "close"]
