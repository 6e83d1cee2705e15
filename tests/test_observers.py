"""Observers: the points they write, the events they subscribe to, and the modules they import."""

import functools
import io
import math
import re
import subprocess
import sys
from collections.abc import Mapping

import problem
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from progress_events import NOTHING, ended, see

import fxtrain as fx
from fxtrain import observers, writers
from fxtrain.core import (
    Control,
    EpochBegin,
    EvalEnd,
    EvalStep,
    FitBegin,
    FitEnd,
    Interrupted,
    Logged,
    Restored,
    Rewound,
    StepEnd,
    name_of,
)
from fxtrain.fold._subscription import subscription
from fxtrain.values import HParams, Text

# write


class Recorder:
    """A writer that stores its points and calls in lists."""

    def __init__(self):
        self.points, self.verbs = [], []

    def write(self, step, values, event):
        self.points += [(type(event).__name__, event.step, name, value) for name, value in values.items()]

    def purge(self, step):
        self.verbs.append(f"purge {step}")

    def flush(self):
        self.verbs.append("flush")

    def close(self):
        self.verbs.append("close")


def written(*events, **options):
    recorder = Recorder()
    observer = observers.write(recorder, **options)
    see(observer, *events)
    observer.close()
    return [(event, step, value) for event, step, _, value in recorder.points]


@pytest.mark.parametrize(
    ("options", "points"),
    [
        ({}, [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]),
        ({"every": 2}, [(2, 1.5), (4, 3.5), (5, 5)]),
        ({"every": fx.every(2) & fx.after(3)}, [(4, 2.5), (5, 5)]),
        ({"every": 2, "reduce": "last"}, [(2, 2), (4, 4), (5, 5)]),
        ({"every": 9}, [(5, 3)]),
    ],
)
def test_each_step_contributes_to_one_point(options, points):
    assert written(*map(ended, range(1, 6)), **options) == [("StepEnd", *point) for point in points]


@pytest.mark.parametrize(
    "event",
    [Interrupted(step=3, cause="SIGTERM"), FitEnd(step=3, reason="done"), None],
    ids=lambda event: type(event).__name__ if event else "before a save",
)
def test_interval_ends_early_before_an_interruption_or_save(event):
    recorder = Recorder()
    observer = observers.write(recorder, every=5)
    see(observer, *map(ended, (1, 2, 3)))
    if event:
        see(observer, event)
    else:
        observer.flush()
    assert recorder.points == [("StepEnd", 3, "train/loss", 2)]
    see(observer, *map(ended, (4, 5)))
    observer.close()
    assert recorder.points[1:] == [("StepEnd", 5, "train/loss", 4.5)]


def test_mean_covers_only_steps_with_the_metric():
    recorder = Recorder()
    see(observers.write(recorder, every=3), ended(1, a=1.0), ended(2, a=2.0, b=5.0), ended(3, a=6.0, c=math.nan))
    a, b, c = recorder.points
    assert (a, b, c[:3]) == (
        ("StepEnd", 3, "train/a", 3.0),
        ("StepEnd", 3, "train/b", 5.0),
        ("StepEnd", 3, "train/c"),
    )
    assert math.isnan(c[3])


def test_logged_values_are_written_at_their_event():
    recorder = Recorder()
    observer = observers.write(recorder, every=2, hparams={"optim": {"lr": 0.1}})
    observer(None, FitBegin(step=0), NOTHING)
    observer(None, ended(1), Control(log={"lr": 0.1}))
    observer(None, EpochBegin(step=1), Control(log={"note": Text("hello")}))
    observer(None, EvalStep(step=1, index=0, batch=None, metrics={"loss": 1.0}), Control(log={"n": 1}))
    observer(None, ended(2), Control(log={"lr": 0.2}))
    observer(None, EvalEnd(step=2, metrics={"loss": 3.0}), Control(log={"best": True}))
    assert recorder.points == [
        ("FitBegin", 0, "hparams", HParams({"optim": {"lr": 0.1}})),
        ("StepEnd", 1, "lr", 0.1),
        ("EpochBegin", 1, "note", Text("hello")),
        ("EvalStep", 1, "n", 1),
        ("StepEnd", 2, "train/loss", 1.5),
        ("StepEnd", 2, "lr", 0.2),
        ("EvalEnd", 2, "eval/loss", 3.0),
        ("EvalEnd", 2, "best", True),
    ]


def test_duplicate_name_is_rejected_when_written():
    observer = observers.write(Recorder(), every=2)
    with pytest.raises(ValueError, match=r"expected watcher to log .* got 'train/loss'"):
        observer(None, ended(2), Control(log={"train/loss": Logged(1.0, owner="watcher")}))


def test_writers_are_purged_and_flushed_at_the_right_events():
    recorder = Recorder()
    observer = observers.write(recorder, flush_seconds=2.0)
    see(observer, FitBegin(step=0), *map(ended, (1, 2, 3)))  # each step takes one second
    assert recorder.verbs == ["purge 0", "flush"]
    for event in (
        EvalEnd(step=3, metrics={}),
        Rewound(step=3, from_step=3, to_step=1, abandoned=range(1, 3), times=1),
        Interrupted(step=1, cause="x"),
        FitEnd(step=1, reason="x"),
        FitBegin(step=1, resumed=True),
        Restored(step=1, path="p"),
    ):
        see(observer, event)
    assert recorder.verbs[2:] == ["flush", "purge 1", "flush", "flush", "purge 1"]
    observer.flush()  # before a save
    assert recorder.verbs[-1] == "flush"


def test_rewind_drops_pending_points():
    recorder = Recorder()
    observer = observers.write(recorder, every=4)
    rewound = Rewound(step=7, from_step=7, to_step=5, abandoned=range(5, 7), times=1)
    see(observer, *map(ended, range(1, 8)))
    observer(None, rewound, Control(log={"why": Text("a spike")}))
    see(observer, ended(6, loss=60.0), ended(7, loss=70.0), ended(8, loss=80.0))
    assert recorder.points == [
        ("StepEnd", 4, "train/loss", 2.5),
        ("Rewound", 5, "why", Text("a spike")),  # at the step rewound to
        ("StepEnd", 8, "train/loss", (5 + 60 + 70 + 80) / 4),
    ]


def test_metrics_are_read_lazily():
    class Device(Mapping):
        reads = 0

        def __getitem__(self, name):
            Device.reads += 1
            return {"loss": 1.0}[name]

        def __iter__(self):
            return iter(("loss",))

        def __len__(self):
            return 1

    observer = observers.write(Recorder(), every=3)
    shown = observers.progress(file=io.StringIO())
    shown(None, ended(0, loss=1.0), NOTHING)
    for step, reads in ((1, 0), (2, 0), (3, 3)):
        event = StepEnd(step=step, time=step / 3, metrics=Device())
        observer(None, event, NOTHING)
        shown(None, event, NOTHING)
        assert Device.reads == reads


def test_close_writes_pending_points_and_closes_all_writers():
    class Failing(Recorder):
        def close(self):
            raise OSError("disk full")

    last = Recorder()
    observer = observers.write(Failing(), last, every=10)
    see(observer, ended(1))
    with pytest.raises(OSError, match="disk full"):
        observer.close()
    assert (last.points, last.verbs) == ([("StepEnd", 1, "train/loss", 1.0)], ["close"])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: observers.write(), "expected at least one writer for write(), got none"),
        (lambda: observers.write(Recorder(), every=0), "expected every to be a positive int or a trigger, got 0"),
        (lambda: observers.write(Recorder(), every=2.5), "expected every to be a positive int or a trigger, got 2.5"),
        (
            lambda: observers.write(Recorder(), reduce="median"),
            "expected reduce to be one of 'mean'",
        ),
        (lambda: observers.write(Recorder(), flush_seconds=-1), "expected flush_seconds to be at least 0, got -1"),
        (lambda: observers.progress(mode="lower"), "expected mode to be one of 'min', 'max', got 'lower'"),
        (lambda: observers.progress(seconds=0), "expected seconds to be above 0, got 0"),
        (lambda: observers.progress(rate=("tokens", 0)), "expected rate to be a unit and a positive number"),
        (lambda: observers.summary(rows=0), "expected rows to be a positive int, got 0"),
        (lambda: observers.summary(depth=0), "expected depth to be a positive int, got 0"),
    ],
)
def test_invalid_options_are_rejected(make, says):
    with pytest.raises((TypeError, ValueError), match=re.escape(says)):
        make()


ENDINGS = st.sampled_from(["end", "crash", "rewind"])


@settings(deadline=None, max_examples=40)
@given(parts=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6), ENDINGS), min_size=1, max_size=6))
def test_file_has_one_point_per_step_after_crashes_and_rewinds(tmp_path_factory, parts):
    """After any mix of crashes, resumes and rewinds, the file matches that of an uninterrupted run."""
    path = tmp_path_factory.mktemp("law") / "metrics.jsonl"
    last, observer, expected, previous, saves = 0, None, {}, "end", [0]
    for number, (back, steps, ending) in enumerate(parts):
        begin = last
        if previous == "rewind":
            begin = max(last - back, 0)
            see(observer, Rewound(step=last, from_step=last, to_step=begin, abandoned=range(0), times=1))
        else:
            if previous == "crash":
                begin = max(step for step in saves if step <= max(last - back, 0))
            observer = None  # the end of a process closes its file
            observer = observers.write(writers.jsonl(path))
            see(observer, FitBegin(step=begin, resumed=begin > 0))
        expected = {step: value for step, value in expected.items() if step <= begin}
        saves = [step for step in saves if step <= begin]
        last, previous = begin + steps, ending
        for step in range(begin + 1, last + 1):
            see(observer, StepEnd(step=step, time=step / 3, metrics={"loss": float(number)}))
            expected[step] = float(number)
            if step % 3 == 0 or (step == last and ending == "end"):
                observer.flush()  # a save follows
                saves.append(step)
        if ending == "end":
            see(observer, FitEnd(step=last, reason="x"))
            observer.close()
    if previous == "rewind":
        observer.close()
    points = [(record["step"], record["metrics"]["train/loss"]) for record in writers.read_jsonl(path)]
    assert points == list(expected.items())[: len(points)]
    assert (points[-1][0] if points else 0) >= (saves[-1] if previous == "crash" else last)


# required, subscription, laziness


def test_required_marks_the_observer_and_forwards_calls():
    seen = []

    class Watch:
        closed = False

        def __call__(self, state, event: EvalEnd, control):
            seen.append((state, event, control))

        def close(self):
            self.closed = True

    watch = Watch()
    needed = observers.required(watch)
    needed("state", "event", "control")
    needed.close()
    assert (seen, watch.closed) == ([("state", "event", "control")], True)
    assert (needed.required, getattr(watch, "required", False)) == (True, False)
    assert (name_of(needed), tuple(subscription(needed))) == ("Watch", (EvalEnd,))

    def fails(state, event: EvalEnd, control):
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        observers.required(fails)(None, None, None)
    observers.required(fails).close()


def test_observers_subscribe_only_to_needed_events():
    assert tuple(subscription(observers.summary())) == (FitBegin,)
    assert StepEnd in subscription(observers.progress())
    assert {StepEnd, Rewound, FitBegin, EvalEnd} <= set(subscription(observers.write(Recorder())))


def test_only_rank_zero_observer_runs(monkeypatch):
    seen = []

    def watch(state, event: fx.StepEnd, control):
        seen.append(event.step)

    monkeypatch.setenv("RANK", "1")
    other = fx.observers.rank_zero(watch)
    monkeypatch.setenv("RANK", "0")
    first = fx.observers.rank_zero(watch)
    for observer, wanted in ((other, []), (first, [1, 2])):
        fx.fit(problem.start(), problem.step(), problem.data(), steps=2, observers=[observer])
        assert seen == wanted


@pytest.mark.parametrize("wrap", [lambda observer: observer, observers.required])
def test_values_logged_at_unsubscribed_events_are_written(wrap):
    def note(state, event: fx.StepBegin):
        return state, Control(log={"begun": event.step} if event.step == 2 else None)

    recorder = Recorder()
    tx = fx.optim.sgd(0.1)
    step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
    state = fx.init(torch.nn.Linear(1, 1), tx)
    fx.fit(state, step, [torch.ones(4, 1)], steps=3, callbacks=note, observers=[wrap(observers.write(recorder))])
    assert [point for point in recorder.points if point[2] == "begun"] == [("StepBegin", 2, "begun", 2)]


def test_heavy_imports_are_lazy_and_summary_starts_no_jax_backend():
    code = """if True:
        import sys
        from fxtrain import observers, writers, values
        assert not {"jax", "rich", "clu", "tensorboardX"} & set(sys.modules)
        import torch, fxtrain as fx
        observers.summary()(fx.init(torch.nn.Linear(1, 1)), fx.FitBegin(step=0), fx.Control())
        from jax._src import xla_bridge
        assert "clu" in sys.modules and not xla_bridge.backends_are_initialized()
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, stdout=subprocess.DEVNULL)


def run_with(**options):
    return fx.fit(problem.start(), problem.step(), problem.data(), steps=1, **options)


def callback_on_step_ends(state, event: StepEnd):
    return state, NOTHING


class CallbackObject:
    def __call__(self, state, event: StepEnd):
        return state, NOTHING


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (callback_on_step_ends, "callback_on_step_ends"),
        (CallbackObject(), "CallbackObject"),
        (fx.callbacks.early_stopping("loss", patience=1), "early_stopping"),
        (fx.compose(fx.callbacks.save()), "save"),
        (fx.on(StepEnd, callback_on_step_ends), "callback_on_step_ends"),
        (functools.partial(callback_on_step_ends), "callback_on_step_ends"),
    ],
)
def test_callback_among_observers_is_rejected(given, name):
    with pytest.raises(TypeError, match=rf"observers: expected .*, got {name}, .* Pass it in callbacks="):
        run_with(observers=[lambda state, event, control: None, given])


def test_non_observer_is_rejected():
    with pytest.raises(TypeError, match=r"got <lambda>, .* Give it these three parameters"):
        run_with(observers=[lambda event: None])
    run_with(observers=[lambda state, event, control=None: None, lambda *given: None][:1])


def observer_of_step_ends(state, event: StepEnd, control):
    pass


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda folder: observer_of_step_ends, "observer_of_step_ends"),
        (lambda folder: observers.write(writers.jsonl(folder / "a.jsonl")), "Write"),
        (lambda folder: observers.required(observers.record_run(folder)), "RecordRun"),
        (lambda folder: fx.on(StepEnd, observer_of_step_ends), "observer_of_step_ends"),
    ],
)
def test_observer_among_callbacks_is_rejected(tmp_path, make, name):
    with pytest.raises(TypeError, match=rf"callbacks: expected .*, got {name}, .* Pass it in observers="):
        run_with(callbacks=[make(tmp_path)])
