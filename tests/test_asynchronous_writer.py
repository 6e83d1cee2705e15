"""The asynchronous writer keeps the order and values of its calls, and reports every error of its thread."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
import types
import warnings

import numpy as np
import problem
import pytest
import torch

import fxtrain as fx
from fxtrain.core import StepEnd
from fxtrain.values import KINDS, Audio, ConfusionMatrix, Histogram, HParams, Image, PointCloud, Table, Text, Video
from fxtrain.writers import Backend, asynchronous, jsonl, multi


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Keeping(Backend):
    """Records calls, each after ``go`` is set, and fails at the steps in ``fail``."""

    kinds = frozenset((float, *KINDS))

    def __init__(self, fail=()):
        self.asked, self.go, self.fail, self.threads = [], threading.Event(), fail, set()
        self.go.set()

    def note(self, *what):
        self.go.wait(30)
        self.threads.add(threading.current_thread())
        self.asked.append(what)

    def put(self, step, values, event):
        self.note("put", step, values, event)
        if step in self.fail:
            try:
                raise KeyError("inner")
            except KeyError as error:
                raise OSError(f"full at {step}") from error

    def purge(self, step):
        self.note("purge", step)

    def flush(self):
        self.note("flush")

    def close(self):
        self.note("close")

    def steps(self):
        return [what[1] for what in self.asked if what[0] == "put"]


def test_calls_run_in_order_on_one_thread():
    inner = Keeping()
    writer = asynchronous(inner)
    inner.go.clear()
    event = StepEnd(step=1, metrics={})
    writer.write(1, {"a": 1.0}, event)
    writer.purge(0)
    for step in range(1, 50):
        writer.write_scalars(step, {"a": step})
    writer.purge(40)
    writer.write_texts(41, {"t": "x"})
    assert inner.asked == []
    inner.go.set()
    writer.close()
    assert inner.asked[:2] == [("put", 1, {"a": 1.0}, event), ("purge", 0)]
    assert inner.steps() == [1, *range(1, 50), 41]
    assert [what[0] for what in inner.asked[-3:]] == ["purge", "put", "close"]
    assert len(inner.threads - {threading.current_thread()}) == 1


def test_values_are_copied_when_written():
    inner = Keeping()
    writer = asynchronous(inner)
    inner.go.clear()
    tensors = [torch.full(shape, 0.5) for shape in [(), (3,), (4, 4), (2, 4, 4, 3), (9,), (5, 3), (3,), (2, 4, 4, 1)]]
    number, values, image, video, sound, points, column, looks = tensors
    counts, array, zero = torch.ones(2, 2), np.full((4, 4), 0.5), np.array(0.5)
    nested, cells = {"lr": 0.5, "optim": {"name": "adamw"}}, ["a", "b", "c"]
    writer.write(
        1,
        {
            "number": number,
            "zero": zero,
            "histogram": Histogram(values),
            "image": Image(image),
            "array": Image(array),
            "video": Video(video),
            "sound": Audio(sound, 8000),
            "points": PointCloud(points),
            "confusion": ConfusionMatrix(counts),
            "hparams": HParams(nested),
            "table": Table({"x": column, "cells": cells}),
            "looks": Table({"look": Image(looks)}),
        },
    )
    for tensor in (*tensors, counts):
        tensor.fill_(0.25)
    array[:], zero[...], nested["lr"], nested["optim"]["name"], cells[0] = 0.25, 0.25, 1.0, "sgd", "z"
    inner.go.set()
    writer.close()
    ((_, _, written, _), _) = inner.asked
    assert (written["number"], written["zero"]) == (0.5, 0.5)
    assert (written["histogram"].values == 0.5).all()
    for name in ("image", "array", "video"):
        assert (written[name].frames == 128).all()
    assert (written["sound"].waves == 16384).all()
    assert (written["points"].points == 0.5).all()
    assert (written["confusion"].counts == 1).all()
    assert written["hparams"].flat() == {"lr": 0.5, "optim/name": "adamw"}
    assert written["table"].cells() == {"x": [0.5, 0.5, 0.5], "cells": ["a", "b", "c"]}
    assert all((look.frames == 128).all() for look in written["looks"].cells()["look"])


def test_range_check_runs_in_writer_thread():
    inner = Keeping()
    writer = asynchronous(inner)
    inner.go.clear()
    writer.purge(0)  # blocks the thread until ``go`` is set
    writer.write_images(1, {"bad": torch.full((4, 4), 7.0), "good": torch.zeros(4, 4)})
    inner.flush = lambda: None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inner.go.set()
        writer.flush()
    assert any("'bad' of step 1 is not written" in str(warning.message) for warning in caught)
    assert list(inner.asked[1][2]) == ["good"]


def test_full_queue_blocks_caller():
    inner = Keeping()
    writer = asynchronous(inner, size=2)
    inner.go.clear()
    for step in (1, 2):
        writer.write_scalars(step, {"a": 1.0})
    before = writer.blocked
    assert before < 0.2
    late = threading.Thread(target=writer.write_scalars, args=(3, {"a": 1.0}))
    late.start()
    late.join(0.2)
    assert late.is_alive()
    inner.go.set()
    late.join(30)
    assert not late.is_alive()
    writer.close()
    assert inner.steps() == [1, 2, 3]
    assert writer.blocked - before > 0.15


def test_flush_waits_for_pending_writes(tmp_path):
    class Slow(Keeping):
        def put(self, step, values, event):
            time.sleep(0.02)
            super().put(step, values, event)

    inner = Slow()
    writer = asynchronous(inner)
    for step in range(5):
        writer.write_scalars(step, {"a": 1.0})
    writer.flush()
    assert inner.steps() == [0, 1, 2, 3, 4]
    assert inner.asked[-1] == ("flush",)
    assert writer.blocked > 0.05
    writer.close()
    writer.write_scalars(5, {"a": 1.0})
    writer.close()
    assert inner.steps() == [0, 1, 2, 3, 4, 5]


NOTE = "Raised in the thread of an asynchronous writer, after the call that caused it."


def settled(writer):
    """Waits until the queue is empty, without the writer's own methods, which would raise."""
    deadline = time.monotonic() + 30
    while writer._pool.queue_length and time.monotonic() < deadline:
        time.sleep(0.001)


@pytest.mark.parametrize(
    "act",
    [
        lambda writer: writer.write_scalars(3, {"a": 1.0}),
        lambda writer: writer.purge(3),
        lambda writer: writer.flush(),
        lambda writer: writer.close(),
    ],
    ids=["write", "purge", "flush", "close"],
)
def test_thread_error_is_raised_once_by_next_call(act):
    inner = Keeping(fail=(1,))
    writer = asynchronous(inner)
    writer.write_scalars(1, {"a": 1.0})
    settled(writer)
    with pytest.raises(OSError, match="full at 1") as caught:
        act(writer)
    assert caught.value.__notes__ == [NOTE]
    assert isinstance(caught.value.__cause__, KeyError)
    assert "put" in [frame.name for frame in caught.traceback]
    writer.write_scalars(4, {"a": 1.0})
    writer.close()
    # Step 3 is excluded, because only the first of the calls writes it.
    assert [step for step in inner.steps() if step != 3] == [1, 4]
    assert inner.asked[-1] == ("close",)


def test_multiple_errors_are_raised_in_order_and_logged(caplog):
    inner = Keeping(fail=(1, 2))
    writer = asynchronous(inner)
    inner.go.clear()
    for step in (1, 2, 3):
        writer.write_scalars(step, {"a": 1.0})
    inner.go.set()
    with pytest.raises(OSError, match="full at 1"):
        writer.close()
    assert (inner.steps(), inner.asked[-1]) == ([1, 2, 3], ("close",))
    assert "full at 1" in caplog.text
    assert "full at 2" in caplog.text
    with pytest.raises(OSError, match="full at 2"):
        writer.flush()
    writer.close()


def test_write_error_is_raised_before_close_error():
    class Unclosable(Keeping):
        def close(self):
            raise ValueError("stuck")

    writer = asynchronous(Unclosable(fail=(1,)))
    writer.write_scalars(1, {"a": 1.0})
    with pytest.raises(OSError, match="full at 1"):
        writer.close()
    with pytest.raises(ValueError, match="stuck"):
        writer.close()


@pytest.mark.parametrize("size", [0, -1, 2.5, True, None])
def test_invalid_queue_size_is_rejected(size):
    with pytest.raises((TypeError, ValueError), match="expected size to be a positive int"):
        asynchronous(Keeping(), size=size)


class Reluctant(Keeping):
    """A backend that is slower than the run."""

    def __init__(self, path):
        super().__init__()
        self.inner = jsonl(path)

    def put(self, step, values, event):
        time.sleep(0.005)
        self.inner.put(step, values, event)

    def purge(self, step):
        self.inner.purge(step)

    def flush(self):
        self.inner.flush()

    def close(self):
        self.inner.close()


def fit(*writers, **options):
    observer = fx.observers.write(*writers)
    return fx.fit(problem.start(), problem.step(), problem.data(), steps=20, observers=[observer], **options)


def losses(path):
    return [(line["step"], line["metrics"]["train/loss"]) for line in lines(path) if line["event"] == "StepEnd"]


def test_asynchronous_run_writes_same_points(tmp_path):
    fit(jsonl(tmp_path / "a.jsonl"), asynchronous(Reluctant(tmp_path / "b.jsonl"), size=3))
    assert len(losses(tmp_path / "a.jsonl")) == 20
    assert losses(tmp_path / "a.jsonl") == losses(tmp_path / "b.jsonl")


def test_exception_in_run_loses_no_points(tmp_path):
    def failing(batches):
        yield from batches * 4
        raise RuntimeError("no more")

    observer = fx.observers.write(jsonl(tmp_path / "a.jsonl"), asynchronous(Reluctant(tmp_path / "b.jsonl")))
    with pytest.raises(RuntimeError, match="no more"):
        fx.fit(problem.start(), problem.step(), failing(problem.data()), steps=20, observers=[observer])
    assert len(losses(tmp_path / "a.jsonl")) == 12
    assert losses(tmp_path / "a.jsonl") == losses(tmp_path / "b.jsonl")


def test_failed_point_is_reported_and_retried():
    inner = Keeping(fail=(3,))
    put = inner.put

    def once(step, values, event):
        try:
            put(step, values, event)
        finally:
            inner.fail = () if step in inner.fail else inner.fail

    inner.put = once
    with pytest.warns(RuntimeWarning) as said:
        assert fit(asynchronous(inner)).reason == "reached 20 steps"
    first, second = (str(warning.message) for warning in said)
    assert first.startswith("Keeping failed at step 3 and will be retried")
    assert second == "Keeping works again. Queued points were written."
    assert inner.steps()[:5] == [1, 2, 3, 3, 4]
    assert inner.steps()[3:] == list(range(3, 21))


def test_thread_error_ends_run_of_required_writer():
    observer = fx.observers.required(fx.observers.write(asynchronous(Keeping(fail=(3,)))))
    with pytest.warns(RuntimeWarning), pytest.raises(OSError, match="full at 3"):
        fx.fit(problem.start(), problem.step(), problem.data(), steps=20, observers=[observer])


SCRIPT = """
    import os, signal, sys, time
    sys.path.insert(0, sys.argv[3])
    import problem
    import fxtrain as fx
    from fxtrain.writers import asynchronous, jsonl

    class Slow:
        def __init__(self, inner):
            self.inner = inner
        def __getattr__(self, name):
            return getattr(self.inner, name)
        def write(self, *args):
            time.sleep(0.01)
            self.inner.write(*args)

    path, how = sys.argv[1:3]
    writer = asynchronous(Slow(jsonl(path)))
    if how == "left":
        for step in range(1, 31):
            writer.write_scalars(step, {"loss": 1.0})
        sys.exit(5)  # without close

    def observe(state, event, control):
        if isinstance(event, fx.StepEnd) and event.step == 30:
            os.kill(os.getpid(), signal.SIGTERM)

    write = fx.observers.write(writer)
    result = fx.fit(problem.start(), problem.step(), problem.data() * 20, steps=50, observers=[write, observe])
    sys.exit(result.exit_code)
"""


@pytest.mark.parametrize(("how", "code"), [("terminated", 143), ("left", 5)])
def test_signal_and_program_exit_lose_no_points(tmp_path, how, code):
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path / "a.jsonl"), how, os.path.dirname(__file__)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == code, ended.stderr
    assert {line["step"] for line in lines(tmp_path / "a.jsonl") if "metrics" in line} == set(range(1, 31))


@pytest.fixture
def logging_writer(monkeypatch):
    """clu's ``LoggingWriter``, loaded without its package, which imports TensorFlow."""
    package = types.ModuleType("clu.metric_writers")
    package.__path__ = [f"{importlib.util.find_spec('clu').submodule_search_locations[0]}/metric_writers"]
    for name in [name for name in sys.modules if name.startswith("clu.metric_writers")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "clu.metric_writers", package)
    yield importlib.import_module("clu.metric_writers.logging_writer").LoggingWriter()
    for name in [name for name in sys.modules if name.startswith("clu.metric_writers.")]:
        monkeypatch.delitem(sys.modules, name)


def test_clu_writer_is_accepted(tmp_path, logging_writer, caplog):
    writer = asynchronous(multi(logging_writer, jsonl(tmp_path / "a.jsonl")))
    alone = asynchronous(logging_writer)
    with caplog.at_level("INFO", logger="absl"):
        writer.write(3, {"loss": torch.tensor(0.5), "note": Text("hello"), "h": Histogram(torch.arange(4.0))})
        writer.close()
        alone.write_scalars(4, {"loss": 0.25})
        alone.close()
    assert "loss=0.5" in caplog.text
    assert "loss=0.25" in caplog.text
    (line,) = lines(tmp_path / "a.jsonl")
    assert (line["metrics"], line["texts"]) == ({"loss": 0.5}, {"note": "hello"})
