"""Failing writers: isolation from other writers, recovery without missing points, and counts of lost points."""

# ruff: noqa: PT012, PT031 -- warnings of a whole run
import contextlib
import json
import math
import resource

import problem
import pytest
import torch
from test_writers import curve

import fxtrain as fx
from fxtrain import observers, values, writers
from fxtrain.core import Control, FitBegin, FitEnd, Rewound, StepEnd
from fxtrain.values import HParams, Image, Text
from fxtrain.writers import _backlog as backlog
from fxtrain.writers import _channel as channel

NOTHING = Control()
LONG = "x" * 50


class Recorder:
    """A writer that records its points. It raises ``error`` while that is set."""

    def __init__(self):
        self.points, self.error, self.calls = [], None, 0

    def write(self, step, values, event):
        self.calls += 1
        if self.error is not None:
            raise self.error
        self.points += [(step, name) for name in values]

    def purge(self, step):
        if self.error is not None:
            raise self.error
        self.points = [point for point in self.points if point[0] <= step]

    def flush(self):
        pass

    def close(self):
        pass

    @property
    def steps(self):
        return [step for step, _ in self.points]


def ended(step, **log):
    return StepEnd(step=step, time=0.0, metrics={"loss": float(step)}), Control(log=log)


def see(observer, *steps):
    for step in steps:
        observer(None, *ended(step))
        observer.flush()


@contextlib.contextmanager
def full_disk(room):
    """Limits every file to ``room`` bytes. A write beyond that is cut short and fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def messages(said):
    return [str(warning.message) for warning in said if issubclass(warning.category, RuntimeWarning)]


def rows(path):
    _, *found = path.read_text().splitlines()
    return [(int(step), float(row[-1])) for step, *row in (line.split(",") for line in found)]


LOCAL = {
    "jsonl": (
        lambda folder: writers.jsonl(folder / "a.jsonl"),
        lambda folder: [
            (line["step"], line["metrics"]["train/loss"])
            for line in map(json.loads, (folder / "a.jsonl").read_text().splitlines())
        ],
    ),
    "csv": (lambda folder: writers.csv(folder / "a.csv"), lambda folder: rows(folder / "a.csv")),
    "tensorboard": (lambda folder: writers.tensorboard(folder), lambda folder: curve(folder, "train/loss")),
}


@pytest.mark.parametrize("together", [False, True], ids=["write", "multi"])
@pytest.mark.parametrize("extra", range(0, 60, 13))
@pytest.mark.parametrize("kind", LOCAL)
def test_temporarily_full_disk_loses_no_points(tmp_path, kind, extra, together):
    make, read = LOCAL[kind]
    (tmp_path / kind).mkdir()
    healthy, writer = Recorder(), make(tmp_path / kind)
    observer = observers.write(writers.multi(writer, healthy)) if together else observers.write(writer, healthy)
    observer(None, FitBegin(step=0, time=0.0), NOTHING)
    see(observer, 1, 2)
    size = max(path.stat().st_size for path in (tmp_path / kind).iterdir())
    with pytest.warns(RuntimeWarning) as said:
        with full_disk(size + extra):
            see(observer, *range(3, 9))
        assert healthy.steps == list(range(1, 9))
        see(observer, 9)
        observer.close()
    assert [(step, value) for step, value in read(tmp_path / kind)] == [(step, float(step)) for step in range(1, 10)]
    first, second = messages(said)
    assert "failed at step" in first
    assert "File too large" in first
    assert second.endswith("works again. Queued points were written.")


def test_failed_start_of_event_file_is_retried(tmp_path):
    writer = writers.tensorboard(tmp_path)
    observer = observers.write(writer)
    with pytest.warns(RuntimeWarning, match="TensorBoardWriter works again"):
        for room in (0, 10):
            with full_disk(room):
                see(observer, 1 + (room > 0))
        assert list(tmp_path.iterdir()) == []
        see(observer, 3)
        observer.close()
    assert curve(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_failed_media_write_is_retried(tmp_path):
    writer = writers.media(tmp_path / "media")
    observer = observers.write(writer)
    pixels = torch.rand(8, 8)
    expected = values.Image(pixels.clone()).frames
    with pytest.warns(RuntimeWarning, match="MediaWriter works again"):
        with full_disk(10):
            observer(None, *ended(1, picture=Image(pixels)))
            pixels.zero_()  # a run may reuse the buffer in place
        observer.close()
    import numpy as np
    import PIL.Image

    (path,) = (tmp_path / "media").rglob("*.png")
    assert (np.array(PIL.Image.open(path)) == expected[0, ..., 0]).all()


def test_full_backlog_drops_and_counts_oldest_points(monkeypatch):
    monkeypatch.setattr(backlog, "MOST_POINTS", 10)
    broken, healthy = Recorder(), Recorder()
    observer = observers.write(broken, healthy, hparams={"lr": 0.1})
    broken.error = OSError("gone")
    with pytest.warns(RuntimeWarning) as said:
        observer(None, FitBegin(step=0, time=0.0), NOTHING)
        see(observer, *range(1, 101))
        broken.error = None
        see(observer, 101)
        observer.close()
    assert broken.points == [(0, "hparams"), *((step, "train/loss") for step in range(93, 102))]
    assert healthy.steps == list(range(102))
    first, second = messages(said)
    assert first.startswith("Recorder failed at step 0 and will be retried")
    assert second == "Recorder works again. Queued points were written, but 92 points of steps 1 to 92 were lost."


def test_lost_points_are_reported_at_end_of_run():
    broken, healthy = Recorder(), Recorder()
    broken.error = OSError("gone")
    observer = observers.write(broken, healthy)
    with pytest.warns(RuntimeWarning) as said:
        see(observer, 1, 2, 3)
        observer(None, FitEnd(step=3, reason="done"), NOTHING)
        observer.close()
    assert messages(said)[1:] == ["Recorder: 3 points of steps 1 to 3 could not be written and were lost."]
    assert healthy.steps == [1, 2, 3]


def test_backlog_is_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(backlog, "MOST_BYTES", 10_000)
    broken = Recorder()
    observer = observers.write(broken)
    broken.error = OSError("gone")
    with pytest.warns(RuntimeWarning):
        for step in range(1, 21):
            observer(None, *ended(step, note=Text("x" * 1000)))
            observer.flush()
        broken.error = None
        observer.close()
    assert 5 <= len([name for _, name in broken.points if name == "note"]) <= 10
    assert broken.points[-1] == (20, "note")


def test_invalid_point_is_lost_alone():
    class Picky(Recorder):
        def write(self, step, values, event):
            if step in (2, 4):
                raise ValueError(f"not {step}\x1b[2J")
            super().write(step, values, event)

    picky, healthy = Picky(), Recorder()
    observer = observers.write(picky, healthy)
    with pytest.warns(RuntimeWarning) as said:
        see(observer, *range(1, 7))
        observer.close()
    assert (picky.steps, healthy.steps) == ([1, 3, 5, 6], [1, 2, 3, 4, 5, 6])
    first, second = messages(said)
    assert "Picky failed at step 2, whose points are lost" in first
    assert "ValueError: not 2\\x1b[2J" in first
    assert second == "Picky: 2 points of steps 2 to 4 could not be written and were lost."


def test_broken_writer_is_not_retried_at_every_point(monkeypatch):
    monkeypatch.setattr(channel, "_RETRY_SECONDS", math.inf)
    broken = Recorder()
    broken.error = OSError("gone")
    observer = observers.write(broken)
    with pytest.warns(RuntimeWarning):
        for step in range(1, 1001):
            observer(None, *ended(step))
        assert broken.calls <= 5
        observer.close()


def test_rewind_truncates_backlog_and_is_queued():
    broken = Recorder()
    observer = observers.write(broken)
    see(observer, 1, 2, 3)
    broken.error = OSError("gone")
    with pytest.warns(RuntimeWarning) as said:
        see(observer, 4, 5)
        observer(None, Rewound(step=5, from_step=5, to_step=2, abandoned=range(2, 5), times=1), NOTHING)
        see(observer, 3)
        broken.error = None
        see(observer, 4)
        observer.close()
    assert broken.steps == [1, 2, 3, 4]
    assert messages(said)[-1] == "Recorder works again. Queued points were written."


@pytest.mark.parametrize("error", [OSError("gone"), ValueError("bad")])
@pytest.mark.parametrize("wrap", [lambda writer: writer, writers.multi, writers.asynchronous])
def test_required_observer_raises_writer_errors(error, wrap):
    broken, healthy = Recorder(), Recorder()
    observer = observers.required(observers.write(healthy, wrap(broken)))
    broken.error = error
    with pytest.warns(RuntimeWarning), pytest.raises(type(error), match=str(error)):
        see(observer, 1, 2)
        observer.close()
    assert healthy.steps[0] == 1


def test_shared_writer_receives_points_in_step_order():
    broken = Recorder()
    write, gauge = observers.write(broken), observers.memory(broken, every=1)
    with pytest.warns(RuntimeWarning) as said:
        for step in range(1, 8):
            broken.error = OSError("gone") if 3 <= step <= 5 else None
            for observer in (write, gauge):
                observer(None, *ended(step))
        write.close()
        gauge.close()
    assert broken.steps == sorted(broken.steps)
    assert {step for step, name in broken.points if name == "train/loss"} == set(range(1, 8))
    assert {step for step, name in broken.points if name.startswith("memory/")} == set(range(1, 8))
    assert len(messages(said)) == 2


def test_repeated_flush_failure_warns_once():
    broken = Recorder()
    observer = observers.write(broken)

    def flush():
        if len(broken.points) < 4:
            raise OSError("no space")

    broken.flush = flush
    with pytest.warns(RuntimeWarning) as said:
        see(observer, 1, 2, 3, 4, 5)
    first, second = messages(said)
    assert first.startswith("Recorder failed at a flush")
    assert second.startswith("Recorder works again")
    assert broken.steps == [1, 2, 3, 4, 5]


def test_hparams_are_written_after_recovery(tmp_path):
    path = tmp_path / "a.jsonl"
    writer = writers.jsonl(path)
    observer = observers.write(writer, hparams={"lr": LONG})
    with pytest.warns(RuntimeWarning, match="works again"):
        with full_disk(10):
            observer(None, FitBegin(step=0, time=0.0), NOTHING)
        see(observer, 1)
        observer.close()
    assert json.loads(path.read_text().splitlines()[0])["hparams"] == HParams({"lr": LONG}).flat()


def test_run_ended_by_required_writer_saves_last_state(tmp_path):
    broken = Recorder()

    def breaks(state, event: fx.StepEnd, control):
        if event.step == 4:
            broken.error = OSError("gone")

    with pytest.warns(RuntimeWarning) as said, pytest.raises(OSError, match="gone"):
        fx.fit(
            problem.start(),
            problem.step(),
            problem.data(),
            steps=9,
            observers=[breaks, observers.required(observers.write(broken, flush_seconds=0.0))],
            checkpointer=fx.checkpointer(tmp_path / "run"),
        )
    assert not any("Ending the run after an error" in message for message in messages(said))
    restored = fx.checkpointer(tmp_path / "run").restore(problem.start())
    assert int(restored.step) == 3


def test_failure_in_close_does_not_lose_result():
    class Unclosable(Recorder):
        def close(self):
            raise OSError("stuck")

    healthy = Recorder()
    with pytest.warns(RuntimeWarning, match=r"The observer Write failed in close\(\)"):
        result = fx.fit(
            problem.start(),
            problem.step(),
            problem.data(),
            steps=3,
            observers=[observers.write(Unclosable(), healthy)],
        )
    assert result.reason == "reached 3 steps"
    assert healthy.steps[-1] == 3
