"""System observer: utilization of the machine, written at intervals during a run."""

import json
import os
import time
import types
import warnings

import problem
import pytest
import torch

import fxtrain as fx
from fxtrain import observers, writers
from fxtrain.core import Control, StepEnd

NOTHING = Control()


def lines(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_utilization_is_written_at_intervals_and_at_the_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    step, data = problem.step(), problem.data()
    observing = lambda: {"observers": [observers.required(observers.system(writers.jsonl(path), every=3))]}  # noqa: E731
    result = fx.fit(problem.start(), step, data, steps=7, **observing())
    assert [line["step"] for line in lines(path)] == [3, 6, 7]
    fx.fit(result.state, step, data, steps=9, **observing())
    assert [line["step"] for line in lines(path)] == [3, 6, 7, 9]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fx.fit(problem.start(), step, data, steps=3, **observing())  # a new run in the same folder
    assert [record["step"] for record in writers.read_jsonl(path)] == [3]


def test_values_are_plausible(tmp_path):
    path = tmp_path / "metrics.jsonl"
    observer = observers.system(writers.jsonl(path), every=1)
    for step in (1, 2):
        end = time.monotonic() + 0.2  # CPU time has a resolution of 10 ms
        while time.monotonic() < end:
            torch.ones(300, 300) @ torch.ones(300, 300)
        observer(problem.start(), StepEnd(step=step, metrics={}), NOTHING)
    observer.close()
    for line in lines(path):
        found = {name.removeprefix("system/"): value for name, value in line["metrics"].items()}
        assert 0 <= found["cpu_percent"] <= 100
        assert 0 < found["process_cpu_percent"] <= 150 * os.cpu_count()
        assert 0 < found["memory_percent"] <= 100
        assert 0 <= found.get("disk_read_gib", 0.0) < 1e6
        assert 0 <= found.get("disk_written_gib", 0.0) < 1e6
        assert not [name for name in found if name.startswith("gpu")]


def test_unavailable_values_are_omitted(tmp_path, monkeypatch):
    import psutil

    path = tmp_path / "metrics.jsonl"
    monkeypatch.delattr(psutil.Process, "io_counters", raising=False)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: (_ for _ in ()).throw(ModuleNotFoundError("pynvml")))
    observer = observers.system(writers.jsonl(path), every=1)
    on_gpu = types.SimpleNamespace(step=types.SimpleNamespace(is_cuda=True, device="cuda:0"))
    observer(on_gpu, StepEnd(step=1, metrics={}), NOTHING)
    observer.close()
    assert set(lines(path)[0]["metrics"]) == {
        f"system/{name}" for name in ("cpu_percent", "process_cpu_percent", "memory_percent")
    }


def test_gpu_values_are_in_percent_watts_and_celsius(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    for name, value in {"utilization": 80, "memory_usage": 40, "power_draw": 350_000, "temperature": 60}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    observer = observers.system(writers.jsonl(path), every=1)
    on_gpu = types.SimpleNamespace(step=types.SimpleNamespace(is_cuda=True, device="cuda:0"))
    observer(on_gpu, StepEnd(step=1, metrics={}), NOTHING)
    observer.close()
    found = lines(path)[0]["metrics"]
    assert [found[f"system/gpu_{name}"] for name in ("percent", "memory_percent", "watts", "celsius")] == [
        80, 40, 350, 60,
    ]  # fmt: skip


def test_missing_writer_and_invalid_period_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected at least one writer for system\(\), got none"):
        observers.system()
    with pytest.raises(ValueError, match="expected every to be a positive int or a trigger, got 0"):
        observers.system(writers.jsonl(tmp_path / "x"), every=0)
