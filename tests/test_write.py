"""Write observer: intervals between writes."""

import math

import problem
import pytest
import torch

import fxtrain as fx
from fxtrain import observers
from fxtrain.values import Image, Text


class Recorder:
    """A writer that records its points."""

    def __init__(self):
        self.points = []

    def write(self, step, values, event):
        self.points += [(step, name, value) for name, value in values.items()]

    def purge(self, step):
        self.points = [point for point in self.points if point[0] <= step]

    def flush(self):
        pass

    def close(self):
        pass


def end(step, loss=0.0, **log):
    return fx.StepEnd(step=step, metrics={"loss": loss}), fx.Control(log=log)


def written(events, **options):
    recorder = Recorder()
    observer = observers.write(recorder, **options)
    for event, control in events:
        observer(None, event, control)
    observer.close()
    return recorder.points


@pytest.mark.parametrize(("reduce", "value"), [("mean", 3.0), ("last", 2.0), ("min", 1.0), ("max", 6.0)])
def test_interval_is_reduced_to_one_value(reduce, value):
    steps = [end(1, 6.0), end(2, 1.0), end(3, 2.0)]
    assert written(steps, every=3, reduce=reduce) == [(3, "train/loss", value)]


@pytest.mark.parametrize("reduce", ["mean", "min", "max"])
def test_nan_within_an_interval_is_written(reduce):
    ((_, _, value),) = written([end(1, 1.0), end(2, math.nan), end(3, 2.0)], every=3, reduce=reduce)
    assert math.isnan(value)


def test_logged_values_between_writes_are_kept_in_step_order():
    steps = [end(step, 1.0, count=step, note=Text(str(step))) for step in range(1, 6)]
    points = written([*steps, (fx.EvalEnd(step=5, metrics={"loss": 9.0}), fx.Control())], every=4)
    assert [step for step, name, _ in points if name == "count"] == [1, 2, 3, 4, 5]
    assert [step for step, name, _ in points if name == "note"] == [1, 2, 3, 4, 5]
    assert [(step, value) for step, name, value in points if name == "train/loss"] == [(4, 1.0), (5, 1.0)]
    before = [step for step, name, _ in points if not name.startswith("train/")]
    assert before == sorted(before)


def test_each_kind_is_written_at_its_period_with_its_latest_value():
    def picture(step):
        return Image(torch.full((2, 2), step / 10))

    steps = [end(step, float(step), picture=picture(step), note=Text(str(step))) for step in range(1, 8)]
    points = written(steps, every={"images": 3, "metrics": 2})
    shown = [(step, value.frames[0, 0, 0, 0]) for step, name, value in points if name == "picture"]
    assert shown == [(3, 77), (6, 153), (7, 178)]  # the last one is written by close
    assert [step for step, name, _ in points if name == "note"] == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, name, _ in points if name == "train/loss"] == [2, 4, 6, 7]


def test_pending_images_are_copies():
    pixels = torch.zeros(2, 2)
    recorder = Recorder()
    observer = observers.write(recorder, every={"images": 10})
    observer(None, *end(1, picture=Image(pixels)))
    pixels.fill_(1)
    observer.close()
    ((_, _, loss), (_, _, image)) = recorder.points
    assert (loss, image.frames.max()) == (0.0, 0)


def at(step, time, **log):
    return fx.StepEnd(step=step, time=time, metrics={"loss": 0.0}), fx.Control(log=log)


def steps_of(recorder):
    return [step for step, name, _ in recorder.points if name == "train/loss"]


def test_points_are_written_at_64_or_after_a_second():
    recorder = Recorder()
    observer = observers.write(recorder, every=2)
    seen = []
    for step in range(1, 141):
        observer(None, *at(step, time=step / 1000 if step < 135 else 1.2))
        seen.append(len(steps_of(recorder)))
    assert [(step + 1, n) for step, n in enumerate(seen) if step and n != seen[step - 1]] == [(128, 64), (135, 67)]


@pytest.mark.parametrize(
    "follows",
    [
        lambda observer: observer(None, *at(4, 0.0, picture=Image(torch.zeros(2, 2)))),
        lambda observer: observer(None, fx.EvalEnd(step=3, metrics={}), fx.Control()),
        lambda observer: observer(None, fx.EpochEnd(step=3), fx.Control(log={"n": 1})),
        lambda observer: observer.flush(),
        lambda observer: observer.close(),
    ],
    ids=["something large", "an evaluation", "something logged elsewhere", "a save", "the end"],
)
def test_pending_points_are_written_before_other_events(follows):
    recorder = Recorder()
    observer = observers.write(recorder)
    for step in (1, 2, 3):
        observer(None, *at(step, 0.0, lr=0.1))
    assert recorder.points == []
    follows(observer)
    assert steps_of(recorder)[:3] == [1, 2, 3]
    steps = [step for step, _, _ in recorder.points]
    assert steps == sorted(steps)


def test_points_are_written_before_a_checkpoint_is_saved(tmp_path, monkeypatch):
    """A run that is killed after a save and resumed from it has all points."""
    recorder, found = Recorder(), []
    checkpointer = fx.checkpointer(tmp_path)
    save = checkpointer.save

    def watched(state, *given, **named):
        found.append((int(state.step), [step for step, name, _ in recorder.points if name == "train/loss"]))
        return save(state, *given, **named)

    monkeypatch.setattr(checkpointer, "save", watched)
    fx.fit(
        problem.start(),
        problem.step(),
        problem.data(),
        steps=10,
        callbacks=fx.when(fx.every(4), fx.callbacks.save()),
        checkpointer=checkpointer,
        observers=[fx.observers.required(observers.write(recorder, every=3))],
    )
    assert found == [(4, [3, 4]), (8, [3, 4, 6, 8]), (10, [3, 4, 6, 8, 9, 10])]


@pytest.mark.parametrize(
    ("every", "says"),
    [
        ({"pictures": 3}, "expected a key of every to be one of 'metrics', 'texts', 'images', .* got 'pictures'"),
        ({"images": 0}, r"expected every\['images'\] to be a positive int or a trigger, got 0"),
    ],
)
def test_invalid_periods_are_refused(every, says):
    with pytest.raises(ValueError, match=says):
        observers.write(Recorder(), every=every)
