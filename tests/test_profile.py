"""The profile observer: recorded steps, written files, and cleanup of the profiler."""

import json
import re

import problem
import pytest
import torch

import fxtrain as fx
from fxtrain import observers


def fit(*seeing, steps=9, **options):
    return fx.fit(problem.start(), problem.step(), problem.data(), steps=steps, observers=seeing, **options)


def ranges(path, name):
    events = json.loads(path.read_text())["traceEvents"]
    return [event for event in events if event.get("name") == name and event.get("ph") == "X"]


def is_running():
    return torch._C._autograd._profiler_enabled()


def test_only_active_steps_are_recorded(tmp_path):
    seen = observers.profile(tmp_path / "new" / "folder", wait=2, warmup=1, active=3)
    fit(seen)
    trace, table = seen.files
    assert [path.name for path in seen.files] == ["steps-4-to-6.trace.json", "steps-4-to-6.operations.txt"]
    assert len(ranges(trace, "train step")) == 3
    assert "aten::addmm" in table.read_text()
    assert "train step" in table.read_text()


def test_profiler_stops_after_active_steps(tmp_path):
    running = {}

    def watch(state, event: fx.StepEnd, control):
        running[event.step] = is_running()

    fit(observers.profile(tmp_path, wait=1, warmup=1, active=2), watch, steps=7)
    assert running == {1: False, 2: True, 3: True, 4: False, 5: False, 6: False, 7: False}


def test_operations_are_sorted_by_cost(tmp_path):
    seen = observers.profile(tmp_path, wait=0, warmup=1, active=2)
    fit(seen, steps=3)
    shares = [float(share) for share in re.findall(r"^\s*aten::\S+\s+([\d.]+)%", seen.files[1].read_text(), re.M)]
    assert len(shares) > 5
    assert shares == sorted(shares, reverse=True)


def test_memory_option_adds_a_table_column(tmp_path):
    for memory in (False, True):
        seen = observers.profile(tmp_path / str(memory), wait=0, warmup=1, active=1, memory=memory)
        fit(seen, steps=2)
        assert ("CPU Mem" in seen.files[1].read_text()) is memory


@pytest.mark.parametrize("how", ["stop", "error", "abandoned"])
def test_early_end_writes_recorded_steps(tmp_path, how):
    seen = observers.profile(tmp_path, wait=1, warmup=1, active=50)

    def end(state, event: fx.StepEnd):
        if event.step == 5 and how == "error":
            raise ValueError("boom")
        return state, fx.Control(stop=event.step == 5, reason="early")

    if how == "abandoned":
        moments = fx.steps(problem.start(), problem.step(), problem.data(), steps=9, observers=[seen])
        for _, event, _ in moments:
            if isinstance(event, fx.StepEnd) and event.step == 5:
                break
        moments.close()
    elif how == "error":
        with pytest.raises(ValueError, match="boom"):
            fit(seen, callbacks=end)
    else:
        fit(seen, callbacks=end)
    last = 4 if how == "error" else 5  # an event whose callback fails is not sent to observers
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        f"steps-3-to-{last}.operations.txt",
        f"steps-3-to-{last}.trace.json",
    ]
    assert len(ranges(seen.files[0], "train step")) >= last - 2
    assert not is_running()


@pytest.mark.parametrize("steps", [1, 3])
def test_too_short_run_warns(tmp_path, steps):
    seen = observers.profile(tmp_path, wait=2, warmup=1, active=1)
    with pytest.warns(RuntimeWarning, match=f"expected a session of more than 3 steps to profile, got {steps}"):
        fit(seen, steps=steps)
    assert seen.files == ()
    assert not is_running()


def test_second_run_records_again(tmp_path):
    seen = observers.profile(tmp_path, wait=1, warmup=1, active=2)
    first = fit(seen, steps=5)
    assert [path.name for path in seen.files] == ["steps-3-to-4.trace.json", "steps-3-to-4.operations.txt"]
    fx.fit(first.state, problem.step(), problem.data(), steps=10, observers=[seen])
    assert [path.name for path in seen.files] == ["steps-8-to-9.trace.json", "steps-8-to-9.operations.txt"]
    assert len(list(tmp_path.iterdir())) == 4


def test_second_run_records_again_without_close(tmp_path):
    seen = observers.profile(tmp_path, wait=0, warmup=1, active=2)
    seen(None, fx.FitBegin(step=0), fx.Control())
    for step in (1, 2):
        seen(None, fx.StepBegin(step=step, batch=None), fx.Control())
        if step == 1:
            seen(None, fx.StepEnd(step=step, metrics={}), fx.Control())
    assert is_running()
    fit(seen, steps=3)
    assert len(ranges(seen.files[0], "train step")) == 2


def test_skipped_batches_are_not_counted(tmp_path):
    def skip(state, event: fx.StepBegin):
        return state, fx.Control(skip_batch=event.position % 2 == 0, reason="even")

    seen = observers.profile(tmp_path, wait=1, warmup=1, active=2)
    fit(seen, steps=6, callbacks=skip)
    assert seen.files[0].name == "steps-3-to-4.trace.json"
    assert not is_running()


def test_failure_stops_the_profiler(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="Profile failed at FitBegin"):
        fit(observers.profile(tmp_path / "file"), steps=1)
    folder = tmp_path / "folder"
    seen = observers.profile(folder, wait=0, warmup=1, active=1)

    def take_away(state, event: fx.StepBegin, control):
        if folder.is_dir():
            folder.rmdir()

    with pytest.warns(RuntimeWarning, match=r"Profile failed at StepEnd of step 2(?s:.*)is missing or empty"):
        fit(seen, take_away, steps=3)
    assert not is_running()


def test_invalid_options_are_rejected(tmp_path):
    with pytest.raises(ValueError, match="expected warmup to be a positive int, got 0"):
        observers.profile(tmp_path, warmup=0)
    with pytest.raises(ValueError, match="expected active to be a positive int"):
        observers.profile(tmp_path, active=0)
    with pytest.raises(ValueError, match="expected wait to be an int of at least 0, got -1"):
        observers.profile(tmp_path, wait=-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_memory_snapshot_is_written(tmp_path):
    seen = observers.profile(tmp_path, wait=1, warmup=1, active=2, memory=True)
    state = fx.init(problem.module().cuda(), problem.transform())
    fx.fit(state, problem.step(), problem.data(), steps=6, observers=[seen])
    assert [path.name for path in seen.files][2] == "steps-3-to-4.memory.pickle"
    assert seen.files[2].stat().st_size > 0
