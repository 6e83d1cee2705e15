"""Long compilations are shown by the progress display, with the time of the last one."""

import io
import re
import threading

import problem
import pytest

import fxtrain as fx
from fxtrain import observers
from fxtrain.core import Control, EvalEnd, FitBegin


class File(io.StringIO):
    """A file that signals when a compilation is shown in it."""

    def __init__(self, is_terminal=False):
        super().__init__()
        self.is_terminal, self.is_compiling = is_terminal, threading.Event()

    def isatty(self):
        return self.is_terminal

    def write(self, text):
        written = super().write(text)
        if "compiling" in text:
            self.is_compiling.set()
        return written


class Recorder:
    """An observer that records compilations."""

    def __init__(self):
        self.began, self.ended = [], []

    def __call__(self, state, event: EvalEnd, control):
        pass

    def compile_began(self, name, last_seconds):
        self.began.append((name, last_seconds))

    def compile_ended(self, name, seconds):
        self.ended.append((name, seconds))


def compiled():
    return fx.compile(problem.step(), backend="eager"), fx.compile(evaluation(), backend="eager")


def evaluation():
    return fx.eval_step(lambda model, batch: {"loss": model(batch["x"]).square().mean()})


def fit(step, eval_step, observers):
    return fx.fit(
        problem.start(), step, problem.data(4), steps=3, eval_step=eval_step, eval_data=problem.data(2),
        observers=observers,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("last", "shown"), [(31.0, "compiling train_step (last time: 0:31)"), (None, "compiling train_step")]
)
def test_long_compilation_leaves_lines_in_a_log(monkeypatch, last, shown):
    monkeypatch.setattr("fxtrain.observers._compile_notice._SILENT_SECONDS", 0)
    file = File()
    observer = observers.progress(file=file)
    observer(None, FitBegin(step=0), Control())
    observer.compile_began("train_step", last)
    assert file.is_compiling.wait(60)
    observer.compile_ended("train_step", 12.3)
    assert file.getvalue() == f"{shown}\ncompiled train_step in 0:12\n"


def test_long_compilation_is_counted_on_a_terminal(monkeypatch):
    monkeypatch.setattr("fxtrain.observers._compile_notice._SILENT_SECONDS", 0)
    monkeypatch.setenv("TERM", "xterm")
    file = File(is_terminal=True)
    observer = observers.progress(file=file)
    observer(None, FitBegin(step=0), Control())
    observer.compile_began("train_step", 31.0)
    assert file.is_compiling.wait(60)
    observer.compile_ended("train_step", None)  # it failed
    observer.close()
    text = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", file.getvalue())
    assert re.search(r"compiling train_step: \d\.\d s \(last time: 0:31\)", text)
    assert "compiled" not in text


def test_short_compilation_is_silent(monkeypatch):
    monkeypatch.setattr("fxtrain.observers._compile_notice._SILENT_SECONDS", 1e6)
    file = File()
    observer = observers.progress(file=file)
    observer(None, FitBegin(step=0), Control())
    observer.compile_began("train_step", 31.0)
    observer.compile_ended("train_step", 1.9)
    assert file.getvalue() == ""


def test_observers_see_compilations_of_their_session_alone():
    steps, recorder, failing = compiled(), Recorder(), Recorder()
    failing.compile_began = [].index  # of a name that is not in the list
    with pytest.warns(RuntimeWarning, match=r"Recorder failed at the compilation of train_step and is dropped"):
        fit(*steps, [failing, observers.required(recorder)])
    assert recorder.began == [("train_step", None), ("eval_step", None)]
    assert [name for name, seconds in recorder.ended if seconds > 0] == ["train_step", "eval_step"]
    later = Recorder()
    fit(*steps, later)
    steps[0](problem.start(), {name: leaf[:2] for name, leaf in problem.data(1)[0].items()})
    assert (later.began, len(recorder.began)) == ([], 2)


def test_failed_compilation_has_no_duration():
    recorder = Recorder()
    step = fx.compile(fx.train_step(lambda model, batch: 1 / 0, problem.transform()), backend="eager")
    with pytest.raises(ZeroDivisionError):
        fx.fit(problem.start(), step, problem.data(), steps=1, observers=recorder)
    assert recorder.ended == [("train_step", None)]


@pytest.mark.slow
def test_time_of_the_last_compilation_is_kept_in_the_cache_folder(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("fxtrain.compiler._compile_times._MIN_SECONDS", 0)
    caplog.set_level("INFO", "fxtrain.compiler")
    state, batch, watcher = problem.start(), problem.data()[0], Recorder()
    for _ in range(2):
        step = fx.compile(evaluation())
        step.watchers.append(watcher)
        step(state, batch)
    (_, first), (_, last) = watcher.began
    assert first is None
    assert last == pytest.approx(watcher.ended[0][1], abs=0.06)
    assert f"It took {last:.1f} s the last time." in caplog.text
