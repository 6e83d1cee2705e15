"""The events of a run: which ``record_run`` writes, when, and with which configuration and clock."""

import datetime

import problem
import pytest
import torch
from disk_syncs import before_sync
from run_records import NOTHING
from run_records import story as story  # a fixture

import fxtrain as fx
from fxtrain import observers
from fxtrain.core import Control, EvalEnd, FitBegin, FitEnd, Interrupted, Restored, Rewound, Saved, StepEnd


def test_requests_on_a_device_are_read_lazily_and_keep_their_order(story):
    class OnDevice(torch.Tensor):
        is_cpu = False
        reads = 0

        def __bool__(self):
            OnDevice.reads += 1
            return bool(self.as_subclass(torch.Tensor))

    def flag(value):
        return torch.tensor(value).as_subclass(OnDevice)

    observer = observers.record_run(story.folder)
    observer(None, FitBegin(step=0), NOTHING)
    for step in range(1, 100):
        asked = Control(skip_update=flag(step % 2 == 1), reason="odd")
        observer(None, StepEnd(step=step, metrics={}), asked)
    assert OnDevice.reads == 0
    observer(None, StepEnd(step=100, metrics={}), Control(skip_update=flag(False), reason="odd"))
    assert OnDevice.reads == 100
    observer(None, StepEnd(step=101, metrics={}), Control(skip_update=flag(True), reason="odd"))
    observer(None, Saved(step=101, path="p", metrics={"loss": float("nan"), "top": float("-inf")}), NOTHING)
    assert [line["step"] for line in story.events] == [0, *range(1, 100, 2), 101, 101]
    assert story.events[-1]["metrics"] == {"loss": "NaN", "top": "-Infinity"}
    observer(None, StepEnd(step=102, metrics={}), Control(skip_update=flag(True), reason="odd"))
    observer.close()
    assert story.events[-1]["step"] == 102


def test_each_event_is_written_once(story):
    observer = observers.record_run(story.folder)
    seen = (
        FitBegin(step=0),
        Restored(step=0, path="p", missing=("ema",)),
        StepEnd(step=1, metrics={}),
        EvalEnd(step=1, metrics={}),
        Saved(step=1, path="p", metrics={}),
        Rewound(step=1, from_step=1, to_step=0, abandoned=range(1), times=1),
        Interrupted(step=1, cause="SIGINT"),
        FitEnd(step=1, reason="interrupted by SIGINT"),
    )
    for event in seen:
        observer(None, event, Control(stop=True, reason="why not"))
    observer.close()
    observer.close()
    assert story.names == [type(event).__name__ for event in seen]
    assert all(line["asked"] == {"stop": ["why not"]} for line in story.events)
    assert not list(story.folder.glob("*.tmp"))


def recorded_epochs(story, **options):
    """Records two epochs, each with an evaluation; returns the events at which nothing was requested."""
    fx.fit(
        problem.start(),
        problem.step(),
        problem.data(),
        epochs=2,
        eval_step=problem.eval_step,
        eval_data=problem.data(2),
        observers=[observers.record_run(story.folder, **options)],
    )
    return [line["event"] for line in story.events if "asked" not in line]


def test_epochs_and_evaluations_are_recorded_by_default(story):
    epoch = ["EpochBegin", "EvalBegin", "EvalEnd", "EpochEnd"]
    assert recorded_epochs(story) == ["FitBegin", *epoch, *epoch, "FitEnd"]
    assert [line["step"] for line in story.events if line["event"] == "EpochEnd"] == [3, 6]


@pytest.mark.parametrize(
    ("events", "others"),
    [("StepB*", ["StepBegin"] * 6), (("EvalStep", "EpochEnd"), ["EvalStep", "EvalStep", "EpochEnd"] * 2)],
)
def test_chosen_events_are_recorded_in_order(story, events, others):
    assert recorded_epochs(story, events=events) == ["FitBegin", *others, "FitEnd"]


def test_every_event_can_be_recorded(story):
    recorded_epochs(story, events="*")
    seen = [name for name in story.names if name != "EvalStepBegin"]
    step, evaluation = ["StepBegin", "StepEnd"], ["EvalBegin", "EvalStep", "EvalStep", "EvalEnd"]
    assert seen == ["FitBegin", *(["EpochBegin", *step * 3, *evaluation, "EpochEnd"] * 2), "FitEnd"]
    assert [line["index"] for line in story.events if line["event"] == "EvalStep"] == [0, 1, 0, 1]


def test_requests_of_each_step_do_not_wait_for_the_disk(story, monkeypatch):
    observer, syncs = observers.record_run(story.folder), []
    observer(None, FitBegin(step=0), NOTHING)
    before_sync(monkeypatch, syncs.append)
    flag = torch.tensor(True)
    for step in range(1, 31):
        observer(None, StepEnd(step=step, time=0.01 * step, metrics={}), Control(evaluate=flag, reason="often"))
    flag.fill_(False)  # as a donating step does
    observer(None, Saved(step=30, time=0.3, path="p", metrics={}), NOTHING)
    assert not syncs
    assert [line["event"] for line in story.events] == ["FitBegin", *["StepEnd"] * 30, "Saved"]
    observer.flush()  # before the next save
    assert len(syncs) == 1
    observer.flush()
    assert len(syncs) == 1


def test_recorded_steps_are_written_in_batches(story):
    observer = observers.record_run(story.folder, events="StepEnd")
    observer(None, FitBegin(step=0), NOTHING)
    written = [0]
    for step in range(1, 121):
        observer(None, StepEnd(step=step, time=0.001 * step if step < 110 else 1.2, metrics={}), NOTHING)
        written.append(len(story.events) - 1)
    assert [(step, n) for step, n in enumerate(written) if step and n != written[step - 1]] == [(100, 100), (110, 110)]
    observer.close()
    assert len(story.events) == 121


def test_lines_and_sessions_have_the_date_and_time_of_the_clock(story):
    now = datetime.datetime(2024, 1, 1, 12, tzinfo=datetime.UTC)
    observer = observers.record_run(story.folder, clock=lambda: now)
    observer(None, FitBegin(step=0), NOTHING)
    now += datetime.timedelta(seconds=90)
    observer(None, FitEnd(step=1, reason="done"), NOTHING)
    first, last = "2024-01-01T12:00:00.000+00:00", "2024-01-01T12:01:30.000+00:00"
    assert [line["timestamp"] for line in story.events] == [first, last]
    assert (story.sessions[0]["began"], story.sessions[0]["ended"]) == (first, last)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"events": "Step"}, "expected 'Step' to match a event|expected 'Step' to match an event"),
        ({"clock": datetime.datetime.now}, "expected clock to return a datetime with a time zone, got"),
    ],
)
def test_wrong_patterns_and_clocks_are_refused(tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        observers.record_run(tmp_path / "run", **options)
    assert not list(tmp_path.iterdir())


def test_config_is_copied_and_the_latest_one_is_kept(story):
    config = {"lr": 0.1, "layers": [1, 2]}
    observer = observers.record_run(story.folder, config)
    config["layers"].append(object())
    observer(None, FitBegin(step=0), NOTHING)
    assert story.run["config"] == {"lr": 0.1, "layers": [1, 2]}
    observers.record_run(story.folder)(None, FitBegin(step=1), NOTHING)
    assert story.run["config"] == {"lr": 0.1, "layers": [1, 2]}
    observers.record_run(story.folder, {"lr": 0.2})(None, FitBegin(step=2), NOTHING)
    assert story.run["config"] == {"lr": 0.2}
    assert len(story.sessions) == 3


def circular():
    config = {}
    config["self"] = config
    return config


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"optim": {"init": torch.ones(2)}}, "expected optim/init to be .* got a float32 tensor of shape .* leave it"),
        ({"optim": {3: "x"}}, "expected string keys in optim, got 3"),
        ([1, 2], "expected config to be a mapping or a dataclass, got a list of length 2"),
        (circular(), "expected self to be a value, got a container that it is part of. Leave it out"),
    ],
)
def test_config_that_json_cannot_represent_is_refused(tmp_path, config, says):
    with pytest.raises(TypeError, match=says):
        observers.record_run(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_temporarily_full_disk_loses_no_event(story):
    from test_failing_writers import full_disk

    observer = observers.record_run(story.folder)
    observer(None, FitBegin(step=0), NOTHING)
    with pytest.warns(RuntimeWarning, match="record_run failed to write to .* and will retry") as said:  # noqa: PT031
        with full_disk((story.folder / "events.jsonl").stat().st_size + 20):
            for step in (1, 2, 3):
                observer(None, Saved(step=step, path="p", metrics={}), NOTHING)
                observer.flush()
        observer(None, FitEnd(step=3, reason="done"), NOTHING)
        observer.close()
    assert story.names == ["FitBegin", "Saved", "Saved", "Saved", "FitEnd"]
    assert story.sessions[0]["reason"] == "done"
    assert len(said) == 1


def test_full_disk_counts_lost_events_and_fails_a_required_observer(story):
    from test_failing_writers import full_disk

    with full_disk(5):
        observer = observers.record_run(story.folder)
        with pytest.warns(RuntimeWarning, match="2 lines of .*events.jsonl could not be written and were lost"):  # noqa: PT031
            observer(None, FitBegin(step=0), NOTHING)
            observer(None, FitEnd(step=0, reason="done"), NOTHING)
            observer.close()
        with pytest.warns(RuntimeWarning), pytest.raises(OSError, match="File too large"):
            story.observer()(None, FitBegin(step=0), NOTHING)
