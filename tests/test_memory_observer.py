"""The memory observer: readings match this process, one point per step, and later points are purged on a rewind."""

import importlib.util
import pathlib
import types

import problem
import pytest
import torch

import fxtrain as fx
from fxtrain import observers, writers

NOTHING = fx.Control()


class Recorder:
    def __init__(self):
        self.points, self.verbs = [], []

    def write(self, step, values, event):
        self.points.append((step, dict(values)))

    def purge(self, step):
        self.verbs.append(("purge", step))

    def flush(self):
        self.verbs.append("flush")

    def close(self):
        self.verbs.append("close")


def fit(*seeing, steps=9, **options):
    return fx.fit(problem.start(), problem.step(), problem.data(), steps=steps, observers=seeing, **options)


def test_memory_is_read_every_n_steps_and_at_the_end():
    kept = Recorder()
    fit(observers.memory(kept, every=4))
    assert [step for step, _ in kept.points] == [4, 8, 9]
    fit(observers.memory(kept := Recorder(), every=3))
    assert [step for step, _ in kept.points] == [3, 6, 9]
    assert kept.verbs == [("purge", 0), "close"]


def test_host_memory_follows_process_allocations():
    kept = Recorder()
    seen = observers.memory(kept, every=1)
    size = 256 * 2**20
    seen(None, fx.StepEnd(step=1, metrics={}), NOTHING)
    block = torch.ones(size, dtype=torch.uint8)
    seen(None, fx.StepEnd(step=2, metrics={}), NOTHING)
    del block
    seen(None, fx.StepEnd(step=3, metrics={}), NOTHING)
    before, during, after = (values for _, values in kept.points)
    grown = during["memory/host_resident_mib"] - before["memory/host_resident_mib"]
    assert grown == pytest.approx(256, rel=0.1)
    freed = during["memory/host_resident_mib"] - after["memory/host_resident_mib"]
    assert freed == pytest.approx(256, rel=0.1)
    assert after["memory/host_peak_mib"] == during["memory/host_peak_mib"]
    assert during["memory/host_peak_mib"] >= 0.95 * during["memory/host_resident_mib"]


def test_memory_and_write_share_a_writer(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = writers.jsonl(path)
    fit(observers.write(writer), observers.memory(writer, every=2), steps=5)
    records = writers.read_jsonl(path)
    steps = [record for record in records if record["event"] == "StepEnd"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5]
    assert ["memory/host_peak_mib" in record["metrics"] for record in steps] == [False, True, False, True, False]
    assert all("train/loss" in record["metrics"] for record in steps)
    (end,) = [record for record in records if record["event"] == "FitEnd"]
    assert "memory/host_peak_mib" in end["metrics"]


def test_rewind_purges_later_readings():
    kept = Recorder()
    seen = observers.memory(kept, every=2)
    seen(None, fx.FitBegin(step=6), NOTHING)
    seen(None, fx.StepEnd(step=8, metrics={}), NOTHING)
    seen(None, fx.Rewound(step=8, from_step=8, to_step=4, abandoned=range(4, 8), times=1), NOTHING)
    seen(None, fx.FitEnd(step=4, reason="done"), NOTHING)  # no step ran since the rewind
    seen(None, fx.FitEnd(step=5, reason="done"), NOTHING)
    assert kept.verbs == [("purge", 6), ("purge", 4)]
    assert [step for step, _ in kept.points] == [8, 5]


def test_failed_run_is_read_once_at_its_end():
    kept = Recorder()

    def fail(state, event: fx.StepBegin):
        if event.step == 4:
            raise ValueError("boom")
        return state, NOTHING

    with pytest.raises(ValueError, match="boom"):
        fit(observers.memory(kept, every=2), callbacks=fail)
    assert [step for step, _ in kept.points] == [2, 3]
    assert kept.verbs[-1] == "close"


def test_device_memory_is_read_from_allocator(monkeypatch):
    counts = {"allocated_bytes.all.current": 3 * 2**20, "allocated_bytes.all.peak": 5 * 2**20}
    asked = []
    monkeypatch.setattr(torch.accelerator, "memory_stats", lambda device: asked.append(device) or counts)
    kept = Recorder()
    observer = observers.memory(kept, every=1)
    for step, device in enumerate(("cuda:1", "cpu"), start=1):
        state = types.SimpleNamespace(step=types.SimpleNamespace(device=torch.device(device)))
        observer(state, fx.StepEnd(step=step, metrics={}), fx.Control())
    assert asked == [torch.device("cuda:1")]
    read = [{name: value for name, value in values.items() if "device" in name} for _, values in kept.points]
    assert read == [{"memory/device_allocated_mib": 3.0, "memory/device_peak_mib": 5.0}, {}]


def test_all_writers_are_closed_even_if_one_fails():
    class Failing(Recorder):
        def close(self):
            raise OSError("disk full")

    kept = Recorder()
    with pytest.raises(OSError, match="disk full"):
        observers.memory(Failing(), kept).close()
    assert kept.verbs == ["close"]


def test_missing_writers_bad_interval_and_unsupported_platform_are_rejected(monkeypatch):
    with pytest.raises(ValueError, match=r"expected at least one writer for memory\(\), got none"):
        observers.memory()
    with pytest.raises(ValueError, match="expected every to be a positive int or a trigger, got 0"):
        observers.memory(Recorder(), every=0)
    monkeypatch.setattr(pathlib.Path, "exists", lambda path: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match="expected a platform that reports the memory use of processes, got "):
        observers.memory(Recorder())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peak_is_between_allocated_and_reserved():
    kept = Recorder()
    state = fx.init(problem.module().cuda(), problem.transform())
    fx.fit(state, problem.step(), problem.data(), steps=2, observers=[observers.memory(kept, every=1)])
    (_, values), *_ = kept.points
    assert values["memory/device_peak_mib"] >= values["memory/device_allocated_mib"] > 0
    assert values["memory/device_reserved_mib"] >= values["memory/device_peak_mib"]
