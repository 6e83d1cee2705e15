"""Tracking of the best values of metrics: lines, state, laws, and where the lines are shown."""

import io

import problem
import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import observers, testing, writers
from fxtrain.callbacks import track_best

NAN = float("nan")


def evaluations(values, name="loss"):
    return [fx.EvalEnd(step=10 * i, metrics={name: torch.tensor(v)}) for i, v in enumerate(values, start=1)]


def folded(callback, events):
    """Returns the state after the events, and what each of them logged."""
    callback = fx.compose(callback)
    state = fx.attach(fx.init(nn.Linear(1, 1)), callback)
    logs = []
    for event in events:
        state, control = callback(state.replace(step=torch.tensor(event.step)), event)
        logs.append({name: entry.value for name, entry in control.log.items() if bool(entry.when)})
    return state, logs


@pytest.mark.parametrize(
    ("options", "values", "lines"),
    [
        (
            {},
            [1.5, 1.25, 1.25, 2.0, 1.0],
            [
                "new best loss: 1.5000 at step 10",
                "new best loss: 1.2500 at step 20 (was 1.5000)",
                "no improvement of loss for 1 evaluation (best 1.2500 at step 20)",
                "no improvement of loss for 2 evaluations (best 1.2500 at step 20)",
                "new best loss: 1.0000 at step 50 (was 1.2500)",
            ],
        ),
        (
            {"mode": "max", "min_delta": 0.5},
            [1.0, 1.25, 1.75],
            [
                "new best loss: 1.0000 at step 10",
                "no improvement of loss for 1 evaluation (best 1.0000 at step 10)",
                "new best loss: 1.7500 at step 30 (was 1.0000)",
            ],
        ),
        ({}, [NAN, 2.0], ["no improvement of loss for 1 evaluation", "new best loss: 2.0000 at step 20"]),
    ],
)
def test_line_says_whether_an_evaluation_is_the_best(options, values, lines):
    _, logs = folded(track_best("loss", **options), evaluations(values))
    assert [log["best/loss/line"].markdown for log in logs] == lines


def test_best_value_and_evaluations_since_are_logged_and_kept():
    state, logs = folded(track_best("loss"), evaluations([2.0, 1.0, 3.0]))
    assert [(float(log["best/loss"]), int(log["best/loss/since"])) for log in logs] == [(2, 0), (1, 0), (1, 1)]
    slot = state.slots["best"]["loss"]
    assert (float(slot.best), int(slot.step), int(slot.since)) == (1.0, 20, 1)


def test_nothing_is_the_best_before_a_finite_value():
    _, logs = folded(track_best("loss"), [*evaluations([NAN]), fx.FitEnd(step=10, reason="")])
    assert "best/loss" not in logs[0]
    assert not logs[1]


def test_metrics_are_tracked_independently():
    def half(metrics):
        return -metrics["a"] / 2

    events = [fx.EvalEnd(step=i, metrics={"a": torch.tensor(a)}) for i, a in enumerate([1.0, 2.0], start=1)]
    _, logs = folded(track_best("a", half), events)
    assert logs[1]["best/a/line"].markdown == "no improvement of a for 1 evaluation (best 1.0000 at step 1)"
    assert logs[1]["best/half/line"].markdown == "new best half: -1.0000 at step 2 (was -0.5000)"


def test_best_values_obey_the_callback_laws():
    callback = track_best("loss", mode=lambda value, best: best.isnan() | (value < best))
    testing.check_laws(callback, fx.init(nn.Linear(1, 1)), evaluations([2.0, NAN, 1.0, 3.0]))


@pytest.mark.parametrize("metrics", [(), ("loss", "loss"), (lambda m: m["a"], lambda m: m["b"])])
def test_no_metric_or_one_twice_is_refused(metrics):
    with pytest.raises(ValueError, match=r"expected metrics with distinct names, got .*\. Pass track_best\('loss'\)"):
        track_best(*metrics)


def test_missing_metric_is_refused_before_the_first_step():
    eval_step = fx.eval_step(problem.loss_fn)
    with pytest.raises(ValueError, match="expected the metric 'accuracy' at EvalEnd for best, got 'loss'"):
        problem.fit(
            callbacks=[track_best("accuracy")], steps=1, eval_step=eval_step, eval_data=problem.data(), eval_when=1
        )


def test_lines_are_shown_by_the_console_and_the_progress():
    console, shown = io.StringIO(), io.StringIO()
    fx.fit(
        problem.start(),
        problem.step(),
        problem.data(),
        steps=4,
        callbacks=[track_best("loss")],
        eval_step=fx.eval_step(problem.loss_fn),
        eval_data=problem.data(),
        eval_when=2,
        observers=[
            observers.required(observers.write(writers.console(console))),
            observers.required(observers.progress(file=shown)),
        ],
    )
    written = console.getvalue().splitlines()
    assert sum("best/loss/line: new best loss: " in line for line in written) == 2
    assert written[-1].startswith("step 4 | best/loss/line: best loss: ")
    assert written[-1].endswith(" at step 4")
    lines = shown.getvalue().splitlines()
    assert sum(line.startswith("new best loss: ") for line in lines) == 2
    assert lines[-2].startswith("best loss: ")
    assert lines[-1].startswith("ended: ")


class LateLog(dict):
    """A log as on a device: its kinds are known, and ``reads`` counts the reads of its values."""

    kinds = frozenset((fx.values.Text,))
    reads = 0

    def values(self):
        self.reads += 1
        return super().values()


def test_texts_of_steps_on_a_device_are_read_once_a_second():
    shown = observers.progress(file=io.StringIO())
    logs = [LateLog({"a": fx.Logged(fx.values.Text(f"warning {i}"))}) for i in range(3)]
    reads = []
    for i, log in enumerate(logs):
        event = fx.StepEnd(step=i, time=0.6 * i, previous_time=0.0, metrics={"loss": 1.0})
        shown(None, event, fx.Control().with_log(log))
        reads.append(sum(each.reads for each in logs))
    assert reads == [0, 0, 3]
    assert shown.file.getvalue().splitlines()[-3:] == [f"step {i}: warning {i}" for i in range(3)]


def test_texts_of_several_lines_are_not_shown_by_the_progress():
    shown = observers.progress(file=io.StringIO())
    event = fx.StepEnd(step=1, time=1.0, previous_time=0.0, metrics={"loss": 1.0})
    shown(None, event, fx.Control(log={"poem": fx.values.Text("roses\nviolets")}))
    assert "roses" not in shown.file.getvalue()


def test_text_of_numbers_is_written_when_it_is_read():
    calls = []

    def write(*numbers):
        calls.append(numbers)
        return "a is {}, b is {}".format(*numbers)

    text = fx.values.Text.written(write, torch.tensor(1), torch.tensor(0.5))
    assert not calls
    assert text == fx.values.Text("a is 1, b is 0.5")
    assert (text.markdown, len(calls)) == ("a is 1, b is 0.5", 1)
    with pytest.raises(AttributeError, match="expected an attribute of Text, got 'html'"):
        text.html  # noqa: B018
