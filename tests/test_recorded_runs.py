"""The sessions of whole runs, as ``record_run`` records them in the run's folder."""

import pathlib
import sys

import problem
import pytest
import torch
from run_records import story as story  # a fixture

import fxtrain as fx
from fxtrain import observers, report, writers
from fxtrain.core import Control, StepEnd


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
