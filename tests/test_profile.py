"""The profile observer: recorded steps, written files, and cleanup of the profiler."""

import contextlib
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
    assert [path.name for path in seen.files] == ["rank0.4.pt.trace.json", "rank0.4.operations.txt"]
    assert len(ranges(trace, "train step")) == 3
    assert "aten::addmm" in table.read_text()
    assert "train step" in table.read_text()
    assert table.read_text().startswith("Steps 4 to 6\n")


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
        "rank0.3.operations.txt",
        "rank0.3.pt.trace.json",
    ]
    assert seen.files[1].read_text().startswith(f"Steps 3 to {last}\n")
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
    assert [path.name for path in seen.files] == ["rank0.3.pt.trace.json", "rank0.3.operations.txt"]
    fx.fit(first.state, problem.step(), problem.data(), steps=10, observers=[seen])
    assert [path.name for path in seen.files] == ["rank0.8.pt.trace.json", "rank0.8.operations.txt"]
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
    assert seen.files[0].name == "rank0.3.pt.trace.json"
    assert not is_running()


def test_steps_of_one_dispatch_are_recorded_together(tmp_path):
    seen = observers.profile(tmp_path, wait=2, warmup=1, active=2)
    fx.fit(problem.start(), problem.Together(problem.step(), 2), problem.data(), steps=8, observers=[seen])
    assert firsts(seen) == [4]
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


def firsts(seen):
    """The first steps of the recordings, and whether each has a trace and a table."""
    names = [path.name.split(".", 2) for path in seen.files]
    assert [end for _, _, end in names] == ["pt.trace.json", "operations.txt"] * (len(names) // 2)
    return [int(step) for _, step, _ in names[::2]]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"repeat": 2}, [3, 6]),
        ({"repeat": 0}, [3, 6, 9, 12]),
        ({"repeat": 2, "skip_first": 4}, [7, 10]),
        ({"at": (4, 9)}, [4, 9]),
        ({"at": (4, 5, 90)}, [4]),  # a recording is not interrupted by another
        ({"at": 5}, [7, 12]),
        ({"at": lambda event: event.step == 3}, [5]),
    ],
)
def test_recordings_begin_on_the_schedule_or_at_the_given_steps(tmp_path, options, steps):
    schedule = {} if "at" in options else {"wait": 1}
    seen = observers.profile(tmp_path, warmup=1, active=1, **schedule, **options)
    fit(seen, steps=12)
    assert firsts(seen) == steps
    for path in seen.files[::2]:
        assert len(ranges(path, "train step")) == 1
    assert not is_running()


def resumed(tmp_path, step):
    state = fit(steps=step).continue_from
    seen = observers.profile(tmp_path, at=(7,), warmup=2, active=1)
    fx.fit(state, problem.step(), problem.data(), steps=9, observers=[seen])
    return seen


@pytest.mark.parametrize("step", [4, 5])
def test_resumed_session_warms_up_before_a_given_step(tmp_path, step):
    assert firsts(resumed(tmp_path, step)) == [7]


def test_session_without_given_steps_warns(tmp_path):
    says = "expected a session with one of the steps 7 and a step before it to profile, got the steps 7 to 9, so"
    with pytest.warns(RuntimeWarning, match=says):
        assert resumed(tmp_path, 6).files == ()


def test_tensorboard_plugin_finds_workers_and_spans(tmp_path, monkeypatch):
    # The pattern of torch_tb_profiler 0.4.3: <worker>.<span>.pt.trace.json
    worker_pattern = re.compile(r"^(.*?)(\.\d+)?\.pt\.trace\.json(?:\.gz)?$")
    monkeypatch.setenv("RANK", "3")
    seen = observers.profile(tmp_path, wait=0, warmup=1, active=1, repeat=2)
    fit(seen, steps=4)
    found = [worker_pattern.match(path.name) for path in sorted(tmp_path.iterdir())]
    assert [match.groups() for match in found if match] == [("rank3", ".2"), ("rank3", ".4")]


class Steps:
    """A profiler that counts its steps."""

    def __init__(self):
        self.verbs = []

    def __enter__(self):
        self.verbs.append("enter")
        return self

    def __exit__(self, *error):
        self.verbs.append("exit")

    def step(self):
        self.verbs.append("step")


@pytest.mark.parametrize("fails", [False, True])
def test_custom_profiler_steps_with_the_run_and_is_exited(fails):
    made = []

    def make():
        made.append(Steps())
        return made[-1]

    def fail(state, event: fx.StepEnd):
        if event.step == 3 and fails:
            raise ValueError("boom")
        return state, fx.Control()

    seen = observers.profile(profiler=make)
    for _ in range(2):
        with pytest.raises(ValueError, match="boom") if fails else contextlib.nullcontext():
            fit(seen, steps=3, callbacks=fail)
    assert [profiler.verbs for profiler in made] == [["enter", *["step"] * (2 if fails else 3), "exit"]] * 2


def test_custom_profiler_of_torch_records_on_its_own_schedule(tmp_path):
    handler = torch.profiler.tensorboard_trace_handler(str(tmp_path))
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=1)
    fit(observers.profile(profiler=lambda: torch.profiler.profile(schedule=schedule, on_trace_ready=handler)), steps=5)
    assert len(list(tmp_path.glob("*.pt.trace.json"))) == 1
    assert not is_running()


def test_custom_profiler_without_step_is_refused():
    says = r"expected profiler to return a context manager with step\(\), got (?s:.*) without step\. Return a profiler"
    with pytest.warns(RuntimeWarning, match=says):
        fit(observers.profile(profiler=contextlib.nullcontext), steps=1)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({}, ValueError, "expected either a folder or a profiler, got neither. Pass"),
        ({"folder": "x", "profiler": Steps}, ValueError, "expected either a folder or a profiler, got both. Pass"),
        ({"profiler": Steps()}, TypeError, "expected profiler to be a function that returns a profiler, got .* Pass"),
        ({"folder": "x", "repeat": -1}, ValueError, "expected repeat to be an int of at least 0, got -1"),
        ({"folder": "x", "at": (1,)}, ValueError, "expected a step of at to be an int of at least 2, got 1"),
        ({"folder": "x", "at": 0}, ValueError, "expected at to be a positive int or a trigger, got 0"),
        ({"folder": "x", "at": 5, "repeat": 2}, ValueError, "expected either at or a schedule of .* got both. Remove"),
    ],
)
def test_contradicting_options_are_refused(options, error, says):
    with pytest.raises(error, match=says):
        observers.profile(**options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_memory_snapshot_is_written(tmp_path):
    seen = observers.profile(tmp_path, wait=1, warmup=1, active=2, memory=True)
    state = fx.init(problem.module().cuda(), problem.transform())
    fx.fit(state, problem.step(), problem.data(), steps=6, observers=[seen])
    assert [path.name for path in seen.files][2] == "rank0.3.memory.pickle"
    assert seen.files[2].stat().st_size > 0
