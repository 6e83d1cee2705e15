"""Write observer: intervals between writes, and batched transfers of scalars to the host."""

import math

import problem
import pytest
import torch

import fxtrain as fx
from fxtrain import observers
from fxtrain.core import Logged
from fxtrain.loop import _transfer as transfers_of_run
from fxtrain.loop._history import History
from fxtrain.loop._publisher import Publisher
from fxtrain.loop._transfer import HostTransfer, start_copy
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


# Transfers from a device


@pytest.fixture
def transfers(monkeypatch):
    """The number of scalars in each transfer to the host."""
    counts = []
    real = transfers_of_run.start_copy

    def counted(values):
        if values:
            counts.append(len(values))
        return real(values)

    monkeypatch.setattr(transfers_of_run, "start_copy", counted)
    return counts


def average(value):
    return fx.metrics.Average.from_model_output(values=torch.tensor([value]))


def test_first_read_transfers_all_pending_values(transfers):
    transfer = HostTransfer()
    several = [transfer.metrics({"loss": average(float(i)), "n": torch.tensor(i)}) for i in range(5)]
    log = transfer.log({"on": Logged(torch.tensor(7.0)), "off": Logged(torch.tensor(8.0), when=torch.tensor(False))})
    assert transfers == []
    assert dict(several[2]) == {"loss": 2.0, "n": 2}
    assert [dict(each)["loss"] for each in several] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert list(log) == ["on"]
    assert transfers == [5 * 2 + 4]


def test_released_values_are_not_transferred(transfers):
    transfer = HostTransfer()
    for i in range(1000):
        kept = transfer.metrics({"n": torch.tensor(i)})
    assert dict(kept) == {"n": 999}
    assert transfers == [1]


def test_invalid_metric_raises_only_when_read():
    transfer = HostTransfer()
    good, bad = transfer.metrics({"n": torch.tensor(1)}), transfer.metrics({"n": torch.zeros(3)})
    assert dict(good) == {"n": 1}
    with pytest.raises(TypeError, match=r"shape \[3\]"):
        dict(bad)


def test_points_of_many_steps_use_one_transfer(transfers):
    recorder, history = Recorder(), History()
    publish = Publisher([observers.write(recorder, every=10)], history, torch.device("cuda"))
    for step in range(1, 21):
        # Like a scalar on a device, an average is read later.
        mean = fx.metrics.Average.from_model_output(values=torch.tensor([float(step)]))
        publish(None, fx.StepEnd(step=step, time=0.0, metrics={"loss": mean, "mean": mean}), fx.Control())
    assert transfers == []
    publish.close()
    assert [step for step, name, _ in recorder.points if name == "train/mean"] == [10, 20]
    assert history["train/mean"].values.tolist() == list(range(1, 21))
    assert transfers == [20 * 2]  # two scalars per step, shared by the writer and the history


def test_transfer_overlaps_with_the_next_points(monkeypatch):
    acts = []
    real = transfers_of_run.start_copy

    def told(values):
        if not values:
            return real(values)
        acts.append("sent")
        arrived = real(values)
        return lambda: (acts.append("waited"), arrived())[1]

    monkeypatch.setattr(transfers_of_run, "start_copy", told)
    transfer, recorder = HostTransfer(), Recorder()
    observer = observers.write(recorder)
    for step in range(1, 65 + 128):
        log = transfer.log({"half": Logged(torch.tensor(step / 2), when=torch.tensor(step % 2 == 0))})
        event = fx.StepEnd(step=step, time=0.0, metrics=transfer.metrics({"loss": torch.tensor(float(step))}))
        observer(None, event, fx.Control().with_log(log))
        if step in (63, 64, 128, 192):
            acts.append(step)
    assert acts == [63, "sent", 64, "sent", "waited", 128, "sent", "waited", 192]
    assert steps_of(recorder) == list(range(1, 129))
    observer.close()
    assert [(step, value) for step, name, value in recorder.points if name == "train/loss"] == [
        (step, float(step)) for step in range(1, 193)
    ]
    assert [step for step, name, _ in recorder.points if name == "half"] == list(range(2, 193, 2))


class OnDevice(torch.Tensor):
    """A host tensor that claims to be on a device."""

    is_cpu = False

    def to(self, *given):
        return self.as_subclass(torch.Tensor)


def test_scalars_of_a_device_keep_their_types():
    given = [torch.tensor(value).as_subclass(OnDevice) for value in (True, 0.5, 3, 2**60, False)]
    found = start_copy([given[0], "text", torch.zeros(3), *given[1:], torch.tensor(7)])()
    assert [value for value in found if not isinstance(value, torch.Tensor)] == [True, "text", 0.5, 3, 2**60, False, 7]
    assert [type(value) for value in found if type(value) is not torch.Tensor] == [
        *(bool, str, float, int, int, bool, int)
    ]


def test_history_has_every_step_with_and_without_observers():
    def watched(state, event: fx.StepEnd, control):
        pass

    def logging(state, event: fx.StepEnd):
        return state, fx.Control(log={"half": event.step / 2} if event.step % 2 else {})

    runs = [
        fx.fit(problem.start(), problem.step(), problem.data(), steps=150, observers=seen, callbacks=logged)
        for seen, logged in [([], []), ([watched], []), ([], [logging]), ([watched], [logging])]
    ]
    for run in runs:
        assert run.history["train/loss"].steps.tolist() == list(range(1, 151))
        assert run.history["train/loss"].values.tolist() == runs[0].history["train/loss"].values.tolist()
    assert runs[2].history["half"].values.tolist() == [step / 2 for step in range(1, 151, 2)]
