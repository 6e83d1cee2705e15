"""Records in a run's folder: its source, by ``record_code``, and its sessions and events, by ``record_run``."""

import datetime
import json
import os
import pathlib
import subprocess
import sys
import zipfile

import problem
import pytest
import torch
from disk_syncs import before_sync

import fxtrain as fx
from fxtrain import observers, report, writers
from fxtrain.core import Control, EvalEnd, FitBegin, FitEnd, Interrupted, Restored, Rewound, Saved, StepEnd

NOTHING = Control()


def lines(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


# record_code


def git(folder, *arguments):
    names = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", folder, *names, *arguments], check=True, capture_output=True)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    for name, content in {
        "train.py": "print(1)\n",
        "pack/model.py": "x = 1\n",
        "pack/config.yaml": "lr: 0.1\n",
        "data.bin": "\0\1",
        ".env": "secret\n",
        ".hidden/a.py": "",
        "big.py": "#" * (2**20 + 1),
        "just.py": "#" * 2**20,
        "venv/pyvenv.cfg": "",
        "venv/lib/site.py": "",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def recorded(folder, source, step=0):
    """Records the source in one session; returns its line and the archived files."""
    observers.record_code(folder, source=source)(None, FitBegin(step=step), NOTHING)
    line = lines(folder / "code" / "sessions.jsonl")[-1]
    with zipfile.ZipFile(folder / "code" / line["archive"]) as archive:
        return line, {name: archive.read(name).decode() for name in archive.namelist()}


def test_source_outside_a_repository_is_selected_by_suffix(tmp_path, source):
    line, files = recorded(tmp_path / "run", source)
    assert list(files) == ["just.py", "pack/config.yaml", "pack/model.py", "train.py"]
    assert files["pack/model.py"] == "x = 1\n"
    assert set(line) == {"step", "archive"}


def test_source_in_a_repository_is_tracked_files_and_unignored_source(tmp_path, source):
    git(source, "init", "-q")
    (source / ".gitignore").write_text("venv\nignored.py\n")
    (source / "ignored.py").write_text("")
    (source / "gone.py").write_text("")
    git(source, "add", "train.py", "data.bin", ".gitignore", ".hidden", "gone.py", "big.py")
    line, files = recorded(tmp_path / "run", source)
    assert set(line) == {"step", "archive"}  # no commit yet
    git(source, "commit", "-qm", "first")
    (source / "gone.py").unlink()
    (source / "train.py").write_text("print(2)\n")
    line, files = recorded(tmp_path / "run", source)
    assert list(files) == [
        ".gitignore", ".hidden/a.py", "data.bin", "just.py", "pack/config.yaml", "pack/model.py", "train.py",
    ]  # fmt: skip
    assert files["train.py"] == "print(2)\n"
    assert files["data.bin"] == "\0\1"
    assert len(line["commit"]) == 40
    assert line["changed"] is True
    git(source, "add", "--all")
    git(source, "commit", "-qm", "second")
    assert recorded(tmp_path / "run", source)[0]["changed"] is False


def test_subfolder_of_a_repository_is_recorded_alone(tmp_path, source):
    git(source, "init", "-q")
    git(source, "add", "pack", "train.py")
    git(source, "commit", "-qm", "first")
    (source / "train.py").write_text("print(2)\n")
    line, files = recorded(tmp_path / "run", source / "pack")
    assert list(files) == ["config.yaml", "model.py"]
    assert line["changed"] is False


def test_unchanged_source_is_archived_once_with_a_line_per_session(tmp_path, source):
    run = tmp_path / "run"
    first, _ = recorded(run, source)
    os.utime(source / "train.py", (0, 0))
    resumed, _ = recorded(run, source, step=7)
    assert (first["step"], resumed["step"]) == (0, 7)
    assert first["archive"] == resumed["archive"]
    (source / "train.py").write_text("print(2)\n")
    changed, files = recorded(run, source, step=9)
    assert changed["archive"] != first["archive"]
    assert files["train.py"] == "print(2)\n"
    assert len(list((run / "code").glob("*.zip"))) == 2
    assert len(lines(run / "code" / "sessions.jsonl")) == 3


def test_moved_file_changes_the_archive(tmp_path, source):
    before, _ = recorded(tmp_path / "run", source)
    (source / "train.py").rename(source / "main.py")
    assert recorded(tmp_path / "run", source)[0]["archive"] != before["archive"]


@pytest.mark.parametrize("with_git", [False, True])
def test_run_folder_inside_the_source_is_excluded(source, with_git):
    if with_git:
        git(source, "init", "-q")
        git(source, "add", "train.py", "pack", "just.py", "big.py", ".env", ".hidden", "venv", "data.bin")
        git(source, "commit", "-qm", "first")
    run = source / "runs" / "1"
    first, files = recorded(run, source)
    (run / "run.json").write_text("{}")
    second, _ = recorded(run, source, step=1)
    assert first["archive"] == second["archive"]
    assert not [name for name in files if name.startswith("runs")]
    assert second.get("changed", False) is False


def test_archives_are_excluded_if_the_run_folder_contains_the_source(source):
    for run in (source, source.parent):
        first, files = recorded(run, source)
        assert "train.py" in files
        assert recorded(run, source, step=1)[0]["archive"] == first["archive"]


def test_archive_is_compressed_and_keeps_file_modes(tmp_path, source):
    (source / "train.py").chmod(0o755)
    line, _ = recorded(tmp_path / "run", source)
    path = tmp_path / "run" / "code" / line["archive"]
    assert path.stat().st_size < 10_000  # from over a megabyte of source
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("train.py").external_attr >> 16 & 0o777 == 0o755
    assert not list(path.parent.glob("*.tmp"))


def test_source_is_recorded_without_git(tmp_path, source, monkeypatch):
    git(source, "init", "-q")
    monkeypatch.setenv("PATH", "")
    assert "train.py" in recorded(tmp_path / "run", source)[1]


def test_missing_source_folder_is_refused(tmp_path):
    with pytest.raises(NotADirectoryError, match=r"expected source to be a folder, got .* Give the one with the code"):
        observers.record_code(tmp_path, source=tmp_path / "missing")


# record_run


class Story:
    """The records in a run's folder."""

    def __init__(self, folder):
        self.folder = folder

    @property
    def run(self):
        return json.loads((self.folder / "run.json").read_text(), parse_constant=pytest.fail)

    @property
    def sessions(self):
        return self.run["sessions"]

    @property
    def events(self):
        return lines(self.folder / "events.jsonl")

    @property
    def names(self):
        return [line["event"] for line in self.events]

    def asked(self):
        return [(line["event"], line["step"], line["asked"]) for line in self.events if "asked" in line]

    def observer(self, config=None, events=(), **options):
        return observers.required(observers.record_run(self.folder, config, events=events, **options))


@pytest.fixture
def story(tmp_path):
    return Story(tmp_path / "deep" / "run")


def fit(story, state=None, *, callbacks=(), steps=4, also=(), **options):
    folded = fx.compose(*callbacks)
    step = problem.step(callbacks=folded)
    state = problem.start() if state is None else state
    return fx.fit(
        state,
        step,
        problem.data(),
        callbacks=folded,
        steps=steps,
        observers=[story.observer(), *also],
        lag=0,
        **options,
    )


def test_plain_run_records_its_session_and_environment(story):
    fit(story)
    (session,) = story.sessions
    environment = session["environment"]
    assert (session["from_step"], session["to_step"], session["reason"]) == (0, 4, "reached 4 steps")
    assert session["began"] <= session["ended"]
    assert session["seconds"] > 0
    assert environment["torch"] == torch.__version__
    assert (environment["device"], environment["gpu"]) == ("cpu", None)
    assert environment["threads"] == torch.get_num_threads()
    assert environment["command"] == sys.argv
    assert environment["host"]
    assert story.run["config"] is None
    assert story.names == ["FitBegin", "FitEnd"]
    assert (story.events[0]["total_steps"], story.events[0]["resumed"]) == (4, False)


def test_callback_requests_are_recorded_with_reasons(story, tmp_path):
    def skip(state, event: fx.Gradients):
        return state, Control(skip_update=event.step == 2, reason="a bad gradient")

    def ask(state, event: fx.StepEnd):
        save = {"a milestone": event.step == 3, "never": False}
        return state, Control(save=save, stop=event.step == 5, reason="good enough")

    fit(story, callbacks=(skip, ask), steps=9, checkpointer=fx.checkpointer(tmp_path / "checkpoints"))
    assert story.asked() == [
        ("StepEnd", 2, {"skip_update": ["a bad gradient"]}),
        ("StepEnd", 3, {"save": ["a milestone"]}),
        ("StepEnd", 5, {"stop": ["good enough"]}),
    ]
    assert story.sessions[-1]["reason"] == "good enough"
    saved = [(line["step"], pathlib.Path(line["path"]).exists()) for line in story.events if line["event"] == "Saved"]
    assert saved == [(3, True), (5, True)]


def test_rewind_is_recorded_once_with_its_requests(story):
    def back(state, event: fx.StepEnd | fx.Rewound):
        if isinstance(event, fx.Rewound):
            return state, Control(stop=event.times == 2, reason="again")
        return state, Control(rewind=2 * (event.step == 5), reason="a spike")

    fit(story, callbacks=(back,), steps=8, snapshot_every=1, snapshots=9)
    rewound = [line for line in story.events if line["event"] == "Rewound"]
    assert [(line["from_step"], line["to_step"], line["times"]) for line in rewound] == [(5, 3, 1), (5, 3, 2)]
    assert "asked" not in rewound[0]
    assert rewound[1]["asked"] == {"stop": ["again"]}
    assert story.asked()[0] == ("StepEnd", 5, {"rewind": ["a spike"]})


def test_exception_is_recorded_as_the_reason_of_the_end(story):
    def boom(state, event: fx.StepEnd):
        if event.step == 3:
            raise ValueError("boom")
        return state, Control()

    with pytest.raises(ValueError, match="boom"):
        fit(story, callbacks=(boom,))
    (session,) = story.sessions
    assert (session["to_step"], session["reason"]) == (2, "interrupted by ValueError: boom")
    assert story.names == ["FitBegin", "Interrupted"]


def test_signal_is_recorded_once_as_the_reason_of_the_end(story):
    import signal

    def interrupt(state, event: fx.StepEnd):
        if event.step == 2:
            signal.raise_signal(signal.SIGTERM)
        return state, Control()

    assert fit(story, callbacks=(interrupt,)).exit_code == 143
    assert [session["reason"] for session in story.sessions] == ["interrupted by SIGTERM"]
    assert story.names == ["FitBegin", "Interrupted", "FitEnd"]


def test_resumed_run_adds_a_session(story, tmp_path):
    made = {"callbacks": (), "checkpointer": fx.checkpointer(tmp_path / "checkpoints")}
    fit(story, steps=2, **made)
    fit(story, steps=5, resume=True, **made)
    assert [(session["from_step"], session["to_step"]) for session in story.sessions] == [(0, 2), (2, 5)]
    assert story.names == ["FitBegin", "Saved", "FitEnd", "FitBegin", "Restored", "Saved", "FitEnd"]
    assert story.events[3]["resumed"] is True
    assert story.events[4]["missing"] == []


def test_killed_session_has_no_end_and_the_next_is_appended(story):
    observing = [story.observer({"lr": 0.1})]
    for _, event, _ in fx.steps(problem.start(), problem.step(), problem.data(), steps=5, observers=observing):
        if isinstance(event, StepEnd) and event.step == 3:
            break  # before FitEnd, as a killed process does
    (killed,) = story.sessions
    assert set(killed) == {"began", "from_step", "environment"}
    with open(story.folder / "events.jsonl", "a") as file:
        file.write('{"event": "StepEnd", "st')  # torn by the crash
    with pytest.warns(RuntimeWarning, match="ended in the middle of a line"):
        fit(story)
    assert story.sessions[0] == killed
    assert story.sessions[1]["reason"] == "reached 4 steps"
    assert story.run["config"] == {"lr": 0.1}
    assert (story.folder / "events.jsonl.damaged").read_text() == '{"event": "StepEnd", "st'
    assert story.names == ["FitBegin", "FitBegin", "FitEnd"]


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


@pytest.mark.parametrize("content", ["", "{torn", "\0" * 50, '{"config": 1, "sessions": 3}', "[]"])
def test_damaged_record_is_set_aside_and_replaced(story, content):
    story.folder.mkdir(parents=True)
    (story.folder / "run.json").write_text(content)
    with pytest.warns(RuntimeWarning, match=r"run.json is not a valid record of a run, so a new one is started"):
        fit(story)
    assert [session["reason"] for session in story.sessions] == ["reached 4 steps"]
    assert (story.folder / "run.json.damaged").read_text() == content


def test_trailing_zeros_of_events_are_set_aside(story):
    story.folder.mkdir(parents=True)
    (story.folder / "events.jsonl").write_bytes(b'{"event": "FitEnd"}\n' + b"\0" * 100)
    with pytest.warns(RuntimeWarning, match="ended in the middle of a line"):
        fit(story)
    assert story.names == ["FitEnd", "FitBegin", "FitEnd"]


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


def test_archive_emptied_by_a_power_cut_is_rewritten(tmp_path, source):
    run = tmp_path / "run"
    line, files = recorded(run, source)
    (run / "code" / line["archive"]).write_bytes(b"")
    with open(run / "code" / "sessions.jsonl", "ab") as file:
        file.write(b"\0" * 30)
    with pytest.warns(RuntimeWarning, match="ended in the middle of a line"):
        again, found = recorded(run, source, step=1)
    assert (again["archive"], found) == (line["archive"], files)
    assert len(lines(run / "code" / "sessions.jsonl")) == 2


def test_report_reads_the_recorded_run(story):
    def back(state, event: fx.StepEnd | fx.Rewound):
        if isinstance(event, fx.Rewound):
            return state, Control(stop=event.times == 3, reason="enough")
        return state, Control(rewind=2 * (event.step == 5), reason="a spike")

    writing = observers.write(writers.jsonl(story.folder / "metrics.jsonl"))
    fit(story, callbacks=(back,), steps=6, snapshot_every=1, snapshots=9, also=(writing,))
    run = report.read_run(story.folder)
    assert [mark.step for mark in run.marks if mark.kind == "rewound"] == [5, 5, 5]
    assert run.sessions[0]["reason"] == "enough"
