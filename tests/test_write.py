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


def test_trigger_on_metrics_ends_the_interval_at_this_step():
    spike = fx.every(4) | (lambda event: event.metrics["loss"] > 10)
    steps = [end(step, 20.0 if step == 3 else 1.0) for step in range(1, 9)]
    assert written(steps, every=spike, reduce="last") == [
        (3, "train/loss", 20.0),
        (4, "train/loss", 1.0),
        (8, "train/loss", 1.0),
    ]


def test_callback_asks_for_a_point_at_this_step_by_logging_it():
    def spike(state, event: fx.StepEnd):
        loss = event.metrics["loss"]
        return state, fx.Control(log={"spike/loss": fx.Logged(loss, when=torch.tensor(event.step == 3))})

    recorder = Recorder()
    history = problem.fit(steps=6, callbacks=spike, observers=observers.write(recorder, every=10)).history
    assert [(step, name) for step, name, _ in recorder.points if "loss" in name] == [
        (3, "spike/loss"),
        (6, "train/loss"),
    ]
    assert recorder.points[0][2] == history["train/loss"].values[2]


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


@pytest.mark.parametrize(
    ("reduce", "point"),
    [
        ("std", {"train/loss": 2.0}),
        (("mean", "std"), {"train/loss": 3.0, "train/loss_std": 2.0}),
        (("last", "min", "max"), {"train/loss": 5.0, "train/loss_min": 1.0, "train/loss_max": 5.0}),
    ],
)
def test_interval_is_reduced_in_several_ways(reduce, point):
    points = written([end(1, 1.0), end(2, 5.0)], every=2, reduce=reduce)
    assert {name: value for _, name, value in points} == point


def test_std_of_one_step_is_zero_and_of_infinities_is_nan(recwarn):
    points = written([end(1, 3.0), end(2, math.inf)], every=1, reduce=("mean", "std"))
    assert points[:3] == [(1, "train/loss", 3.0), (1, "train/loss_std", 0.0), (2, "train/loss", math.inf)]
    assert math.isnan(points[3][2])
    assert not recwarn


def evaluated(step, losses, **log):
    """The events of an evaluation with these losses of batches."""
    yield fx.EvalBegin(step=step), fx.Control()
    for index, loss in enumerate(losses):
        yield fx.EvalStep(step=step, index=index, batch=None, metrics={"loss": loss}), fx.Control(log=log)
    yield fx.EvalEnd(step=step, metrics={"loss": sum(losses) / len(losses)}), fx.Control()


@pytest.mark.parametrize("eval_every", [2, lambda event: event.index % 2 == 1], ids=["every 2", "a trigger"])
def test_every_nth_evaluation_batch_has_its_own_curve(eval_every):
    points = written([*evaluated(10, [1.0, 2.0, 3.0, 4.0]), *evaluated(20, [5.0, 6.0])], eval_every=eval_every)
    assert points == [
        (10, "eval/loss", 2.5),
        (10, "eval_batch/loss/2", 2.0),
        (10, "eval_batch/loss/4", 4.0),
        (20, "eval/loss", 5.5),
        (20, "eval_batch/loss/2", 6.0),
    ]


def test_aborted_evaluation_writes_no_batches():
    aborted = list(evaluated(10, [1.0, 2.0]))[:-1]
    points = written([*aborted, *evaluated(10, [7.0])], eval_every=1)
    assert points == [(10, "eval/loss", 7.0), (10, "eval_batch/loss/1", 7.0)]


def test_values_logged_at_evaluation_batches_keep_their_event():
    points = written(evaluated(10, [1.0], note=3), eval_every=1)
    assert points == [(10, "note", 3), (10, "eval/loss", 1.0), (10, "eval_batch/loss/1", 1.0)]


def test_evaluation_batches_are_written_only_on_request():
    """Without eval_every, evaluation batches cost no event."""

    def run(**options):
        recorder = Recorder()
        fx.fit(
            problem.start(),
            problem.step(),
            problem.data(),
            steps=2,
            eval_step=problem.eval_step,
            eval_data=problem.data(),
            eval_when=2,
            observers=fx.observers.required(observers.write(recorder, **options)),
        )
        return {name for _, name, _ in recorder.points if name.startswith("eval_batch")}

    assert run() == set()
    assert len(run(eval_every=1)) == 3 * len(run(eval_every=3)) > 0


def test_chosen_prefixes_rename_published_and_logged_values():
    events = [end(1, 2.0, **{"eval/confusion": 1, "lr": 0.1, "evaluated/n": 2}), *evaluated(1, [4.0])]
    points = written(events, eval_every=1, prefixes={"train": "", "eval": "val", "eval_batch": "val_batch/"})
    assert points == [
        (1, "loss", 2.0),
        (1, "val/confusion", 1),
        (1, "lr", 0.1),
        (1, "evaluated/n", 2),
        (1, "val/loss", 4.0),
        (1, "val_batch/loss/1", 4.0),
    ]


def test_chosen_prefixes_leave_the_history_unchanged():
    recorder = Recorder()
    result = fx.fit(
        problem.start(),
        problem.step(),
        problem.data(),
        steps=2,
        observers=observers.write(recorder, prefixes={"train": "training"}),
    )
    assert {name for _, name, _ in recorder.points} == {"training/loss", "training/mae", "training/learning_rate"}
    assert "train/loss" in result.history


@pytest.mark.parametrize(
    ("events", "options", "name"),
    [
        ([end(1, 1.0, a=2, **{"train/a": 3})], {"prefixes": {"train": ""}}, "a"),
        (
            [(fx.StepEnd(step=1, metrics={"a": 1.0, "a_std": 1.0}), fx.Control())],
            {"reduce": ("mean", "std")},
            "a_std",
        ),
    ],
)
def test_two_values_of_one_name_are_refused(events, options, name):
    with pytest.raises(ValueError, match=f"expected one value for each name, got two values named '{name}'. Rename"):
        written(events, **options)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"reduce": "median"}, ValueError, "expected reduce to be one of 'mean', .* got 'median'"),
        ({"reduce": ()}, ValueError, 'expected reduce to be at least one reduction, got none. Pass "mean".'),
        ({"prefixes": {"val": "eval"}}, ValueError, "expected a key of prefixes to be one of 'train', .* got 'val'"),
        ({"prefixes": {"eval": "train"}}, ValueError, "expected prefixes that differ from each other, got 'train', 't"),
        ({"prefixes": {"eval": None}}, TypeError, r"expected prefixes\['eval'\] to be a string, got None"),
        ({"eval_every": 0}, ValueError, "expected eval_every to be a positive int or a trigger, got 0"),
    ],
)
def test_invalid_options_are_refused(options, error, says):
    with pytest.raises(error, match=says):
        observers.write(Recorder(), **options)


def test_only_rank_0_writes(monkeypatch, tmp_path):
    class Unread(dict):
        def read(self, *_):
            raise AssertionError("metrics were read")

        items = __iter__ = __getitem__ = read

    def run(observer):
        unread = fx.StepEnd(step=1, metrics=Unread(loss=1.0))
        for event in (fx.FitBegin(step=0), unread, fx.FitEnd(step=1, reason="done")):
            observer(None, event, fx.Control())
        observer.close()

    recorder = Recorder()
    made_before = observers.write(recorder, hparams={"lr": 0.1}, eval_every=1)
    monkeypatch.setenv("RANK", "1")
    run(made_before)
    run(observers.write(recorder))
    run(observers.memory(recorder, every=1))
    run(observers.record_run(tmp_path))
    observers.record_code(tmp_path, source=tmp_path)(None, fx.FitBegin(step=0), fx.Control())
    assert recorder.points == []
    assert not list(tmp_path.iterdir())
    with pytest.raises(AssertionError, match="metrics were read"):
        run(observers.write(recorder, every_rank=True))
    run(observers.memory(recorder, every=1, every_rank=True))
    assert recorder.points
