"""The progress observer: output on a terminal, in a notebook and in a file, and the running averages."""

import contextlib
import functools
import io
import math
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Mapping

import notebook
import problem
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fxtrain as fx
from fxtrain import observers
from fxtrain.core import (
    Control,
    EpochEnd,
    EvalBegin,
    EvalEnd,
    EvalStep,
    FitBegin,
    FitEnd,
    Interrupted,
    Restored,
    Rewound,
    StepEnd,
)
from fxtrain.observers._running_averages import RunningAverages

NOTHING = Control()


def see(observer, *events):
    for event in events:
        observer(None, event, NOTHING)


def ended(step, **metrics):
    return StepEnd(step=step, time=float(step), metrics=metrics or {"loss": float(step)})


class Terminal(io.StringIO):
    """A terminal that interprets escape sequences and returns its screen."""

    def isatty(self):
        return True

    @property
    def screen(self):
        rows, row, column = [""], 0, 0
        for code, kind, character in re.findall(r"\x1b\[([?\d;]*)([A-Za-z])|([^\x1b])", self.getvalue()):
            if kind == "A":
                row -= int(code or 1)
            elif kind == "K":
                rows[row] = ""
            elif character == "\r":
                column = 0
            elif character == "\n":
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            elif character:
                rows[row] = rows[row].ljust(column)[:column] + character + rows[row][column + 1 :]
                column += 1
        return [line.rstrip() for line in rows]

    @property
    def cursor_is_shown(self):
        text = self.getvalue()
        return text.rfind("\x1b[?25h") >= text.rfind("\x1b[?25l")


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def attached(terminal):
    """Redirects standard output and error to this terminal."""
    stack = contextlib.ExitStack()
    stack.enter_context(contextlib.redirect_stdout(terminal))
    stack.enter_context(contextlib.redirect_stderr(terminal))
    return stack


def run(*, evaluated=True, reason="reached 20 steps"):
    """Yields the events of 20 steps.

    Compilation takes 30 s, a step 2 s (0.5 s of them waiting for data), and each of two evaluations 3 s.
    """
    time = 30.0

    def at(kind, step, **fields):
        epochs = step // 10 if kind in (FitBegin, EpochEnd, FitEnd) else (step - 1) // 10
        fields |= {"epochs_done": epochs, "epoch_start": 10 * epochs, "epoch_length": 10}
        return kind(step=step, position=step, total_steps=20, total_epochs=2, time=time, **fields)

    yield at(FitBegin, 0)
    for step in range(1, 21):
        yield at(StepEnd, step, data_wait=0.5, metrics={"loss": 4.0 - step / 10, "norm": 1.0})
        if step % 10 == 0 and evaluated:
            yield at(EvalBegin, step)
            for index in range(3):
                time += 1
                yield at(EvalStep, step, index=index, batch=None, metrics={})
            yield at(EvalEnd, step, metrics={"loss": step / 5, "accuracy": 0.25})
        if step % 10 == 0:
            yield at(EpochEnd, step, metrics={"loss": step / 4, "norm": 1.0}, duration=20.0 + 3 * evaluated)
        time += 2
    yield at(FitEnd, 20, reason=reason)


def bits(metrics):
    return metrics["loss"] / math.log(2)


def test_plain_file_gets_lines():
    file, rate = io.StringIO(), "500 tokens/s | data wait 25%"
    shown = observers.progress(rate=("tokens", 1000), extra={"bits": bits}, seconds=100, file=file)
    see(shown, *run())
    shown.close()
    assert file.getvalue() == (
        "step  1/20 | epoch 0.10/2 | loss 3.9000 | bits 5.6265 | 0:30 elapsed\n"
        f"step  2/20 | epoch 0.20/2 | loss 3.8450 | bits 5.5472 | {rate} | 0:20 per epoch | 0:32 elapsed | 0:36 left\n"
        f"step  4/20 | epoch 0.40/2 | loss 3.7253 | bits 5.3744 | {rate} | 0:20 per epoch | 0:36 elapsed | 0:32 left\n"
        f"step  6/20 | epoch 0.60/2 | loss 3.5931 | bits 5.1837 | {rate} | 0:20 per epoch | 0:40 elapsed | 0:28 left\n"
        f"step  8/20 | epoch 0.80/2 | loss 3.4493 | bits 4.9763 | {rate} | 0:20 per epoch | 0:44 elapsed | 0:24 left\n"
        "epoch 1/2 | loss 2.5000 | bits 3.6067 | eval loss 2.0000 | eval bits 2.8854 | eval accuracy 0.2500 | 0:23 | "
        "best loss\n"
        f"step 12/20 | epoch 1.20/2 | loss 3.1319 | bits 4.5184 | {rate} | 0:23 per epoch | 0:55 elapsed | 0:18 left\n"
        f"step 14/20 | epoch 1.40/2 | loss 2.9610 | bits 4.2718 | {rate} | 0:22 per epoch | 0:59 elapsed | 0:13 left\n"
        f"step 16/20 | epoch 1.60/2 | loss 2.7837 | bits 4.0160 | {rate} | 0:22 per epoch | 1:03 elapsed | 8.8 s left\n"
        f"step 18/20 | epoch 1.80/2 | loss 2.6011 | bits 3.7526 | {rate} | 0:22 per epoch | 1:07 elapsed | 4.4 s left\n"
        "epoch 2/2 | loss 5.0000 | bits 7.2135 | eval loss 4.0000 | eval bits 5.7708 | eval accuracy 0.2500 | 0:23\n"
        "ended: reached 20 steps, in 1:16; best loss 2.0000 at step 10\n"
    )


def test_lines_are_written_every_n_seconds():
    file = io.StringIO()
    shown = observers.progress(seconds=3.0, file=file)
    see(shown, *(StepEnd(step=step, time=float(step), metrics={"loss": 1.0}) for step in range(1, 9)))
    assert re.findall(r"step (\d)", file.getvalue()) == ["1", "4", "7"]


FIRST_EPOCH = (
    "epoch 1/2   loss 2.5000   bits 3.6067   eval loss 2.0000   eval bits 2.8854   eval accuracy 0.2500   0:23   "
    "best loss"
)
SECOND_EPOCH = (
    "epoch 2/2   loss 5.0000   bits 7.2135   eval loss 4.0000   eval bits 5.7708   eval accuracy 0.2500   0:23"
)


def test_terminal_panel_updates_in_place(terminal):
    shown = observers.progress(rate=("tokens", 1000), extra={"bits": bits}, file=terminal)
    screens = {}
    for event in run():
        see(shown, event)
        screens[type(event).__name__, event.step, getattr(event, "index", 0)] = terminal.screen
    shown.close()
    bar = "━" * 40
    assert screens["FitBegin", 0, 0] == [
        f"train  {bar}   0/20   0:30 elapsed",
        f"epoch  {bar}    0/2",
        "       running the first step",
    ]
    assert screens["StepEnd", 7, 0] == [
        f"train  {bar[:14]}╺{bar[:25]}   7/20   0:42 elapsed   0:26 left",
        f"epoch  {bar[:28]}╺{bar[:11]}    0/2   0:20 per epoch   6.0 s left",
        "       loss 3.5225   bits 5.0820   500 tokens/s   data wait 25%",
    ]
    assert screens["StepEnd", 10, 0][:2] == [
        f"train  {bar[:20]}╺{bar[:19]}  10/20   0:48 elapsed   0:20 left",
        f"epoch  {bar}    1/2   0:20 per epoch",
    ]
    assert screens["EvalBegin", 10, 0][2] == "       evaluating"
    assert screens["EvalStep", 10, 1][2:] == [
        "       loss 3.2951   bits 4.7539   500 tokens/s   data wait 25%",
        f"eval   {bar}  batch 2   1.00 batches/s",
    ]
    assert screens["EvalStep", 20, 1] == [
        FIRST_EPOCH,
        f"train  {bar}  20/20   1:13 elapsed",
        f"epoch  {bar}    2/2   0:23 per epoch",
        "       loss 2.4144   bits 3.4832   500 tokens/s   data wait 25%",
        f"eval   {bar[:26]}╸{bar[:13]}  batch 2/3   1.00 batches/s   1.0 s left",
    ]
    shown = [line for line in terminal.screen if line]
    assert shown == [
        FIRST_EPOCH,
        SECOND_EPOCH,
        "end  step 20/20: reached 20 steps, in 1:16; best loss 2.0000 at step 10",
    ]
    assert terminal.cursor_is_shown


def test_printed_text_appears_above_the_panel(terminal):
    with attached(terminal):
        shown = observers.progress(file=terminal)
        for event in run(evaluated=False):
            see(shown, event)
            if isinstance(event, StepEnd) and event.step in (3, 7):
                print(f"a message at step {event.step}")
                print("and an error", file=sys.stderr)
        shown.close()
        print("after the end")
    assert [line for line in terminal.screen if line] == [
        "a message at step 3",
        "and an error",
        "a message at step 7",
        "and an error",
        "epoch 1/2   loss 2.5000   0:20",
        "epoch 2/2   loss 5.0000   0:20",
        "end  step 20/20: reached 20 steps, in 1:10",
        "after the end",
    ]


def test_redirected_output_is_not_captured(terminal):
    output = io.StringIO()
    with attached(terminal), contextlib.redirect_stdout(output):
        shown = observers.progress(file=terminal)
        see(shown, FitBegin(step=0))
        print("a result")
        shown.close()
    assert output.getvalue() == "a result\n"


@pytest.mark.parametrize("how", ["close", "failure"])
def test_terminal_is_restored_after_an_exception(terminal, how):
    with attached(terminal):
        shown = observers.progress(file=terminal)
        see(shown, FitBegin(step=0), ended(1))
        assert not terminal.cursor_is_shown
        assert sys.stdout is not terminal
        if how == "failure":
            with pytest.raises(TypeError):
                see(shown, EvalEnd(step=1, metrics=None))
        else:
            shown.close()
        assert terminal.cursor_is_shown
        assert (sys.stdout, sys.stderr) == (terminal, terminal)
        shown.close()


def test_dumb_terminal_gets_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    shown = observers.progress(file=terminal)
    see(shown, *run(evaluated=False))
    assert "\x1b" not in terminal.getvalue()
    assert terminal.screen[-2] == "ended: reached 20 steps, in 1:10"


class Cell:
    """A notebook cell behind ``IPython.display``: stores the displayed data and counts the updates."""

    def __init__(self, monkeypatch):
        import rich
        import rich.console

        self.shown, self.count = [], 0
        monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
        monkeypatch.setattr(rich, "_console", rich.console.Console())
        module = types.SimpleNamespace(display=self.display)
        monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=module))
        monkeypatch.setitem(sys.modules, "IPython.display", module)
        monkeypatch.setitem(sys.modules, "ipywidgets", None)

    def display(self, data, *, raw, display_id):
        assert raw
        assert display_id
        self.shown.append(data)
        return types.SimpleNamespace(update=functools.partial(self.update, len(self.shown) - 1))

    def update(self, index, data, *, raw):
        assert raw
        self.shown[index], self.count = data, self.count + 1


def test_notebook_panel_updates_in_place_without_widgets(monkeypatch, capsys):
    cell = Cell(monkeypatch)
    shown = observers.progress()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            see(shown, *run())
            shown.close()
    first, second = cell.shown
    assert first == second
    assert 20 < cell.count < 100
    assert first["text/plain"].splitlines() == [
        FIRST_EPOCH.replace("bits 3.6067   ", "").replace("eval bits 2.8854   ", ""),
        SECOND_EPOCH.replace("bits 7.2135   ", "").replace("eval bits 5.7708   ", ""),
        "end  step 20/20: reached 20 steps, in 1:16; best loss 2.0000 at step 10",
    ]
    assert first["text/html"].startswith("<pre style=")
    assert "reached 20 steps" in first["text/html"]
    assert capsys.readouterr().out == ""


def test_notebook_shows_notes_and_file_gets_lines(monkeypatch, capsys):
    cell, file = Cell(monkeypatch), io.StringIO()
    rewound = Rewound(step=3, from_step=3, to_step=1, abandoned=range(1, 3), times=1)
    see(observers.progress(), FitBegin(step=0), ended(1), rewound, Interrupted(step=1, cause="ValueError: <b>"))
    lines = cell.shown[0]["text/plain"].splitlines()
    assert lines == ["rewound from step 3 to step 1", "end  interrupted at step 1: ValueError: <b>"]
    assert "&lt;b&gt;" in cell.shown[0]["text/html"]
    assert "<b>" not in cell.shown[0]["text/html"]
    assert capsys.readouterr().out == ""
    see(observers.progress(file=file), *run(evaluated=False))
    assert file.getvalue().endswith("ended: reached 20 steps, in 1:10\n")
    assert len(cell.shown) == 1


def evaluation(batches, time=0.0, **begin):
    yield EvalBegin(step=5, time=time, **begin)
    for index in range(batches):
        yield EvalStep(step=5, time=time + 4.0 * (index + 1), index=index, batch=None, metrics={})


def test_first_evaluation_shows_the_number_of_batches_of_its_data(terminal):
    shown = observers.progress(file=terminal)
    see(shown, *evaluation(3, num_batches=10))
    # The first batch may include the compilation, so the speed is that of the two others.
    assert terminal.screen[-1] == f"eval   {'━' * 12}╺{'━' * 27}  batch 3/10   0.25 batches/s   0:28 left"
    shown.close()


def test_number_of_batches_is_that_of_the_evaluation_data():
    counts = []

    def watch(state, event: EvalBegin, control):
        counts.append(event.num_batches)

    options = {"steps": 1, "eval_step": problem.eval_step, "eval_when": 1, "observers": observers.required(watch)}
    for data in (problem.data(2), iter(problem.data(2))):
        fx.fit(problem.start(), problem.step(), problem.data(), eval_data=data, **options)
    assert counts == [2, None]


def test_long_evaluation_writes_lines():
    file = io.StringIO()
    see(observers.progress(seconds=10.0, file=file), *evaluation(9, num_batches=12))
    assert file.getvalue().splitlines() == [
        "evaluation at step 5 | batch 4/12 | 0.25 batches/s | 0:32 left",
        "evaluation at step 5 | batch 7/12 | 0.25 batches/s | 0:20 left",
    ]


@pytest.mark.parametrize(
    ("smoothing", "rate"), [(0.0, 3 / 7), (1.0, 0.25), (0.5, 1.75 / (0.25 + 1 + 4)), (None, 0.3768)]
)
def test_smoothing_weights_the_newest_speed(smoothing, rate):
    averages = RunningAverages(10.0, smoothing)
    for step, time in enumerate([0.0, 1.0, 3.0, 7.0], start=1):  # 1, 2 and 4 seconds
        averages.step(StepEnd(step=step, time=time, metrics={}))
    assert averages.rate == pytest.approx(rate, rel=1e-2)


def test_smoothing_is_an_option_of_the_display():
    def shown(**options):
        file = io.StringIO()
        observer = observers.progress(file=file, seconds=1, **options)
        see(observer, *(StepEnd(step=n, time=t, metrics={"loss": 1.0}) for n, t in enumerate([0.0, 1.0, 3.0], 1)))
        return re.search(r"([\d.]+) steps/s", file.getvalue().splitlines()[-1])[1]

    assert (shown(smoothing=0), shown(smoothing=1), shown()) == ("0.67", "0.50", "0.65")


@pytest.mark.parametrize("smoothing", [-0.1, 1.5])
def test_smoothing_outside_its_range_is_refused(smoothing):
    with pytest.raises(ValueError, match=rf"expected smoothing to be in \[0, 1\], got {smoothing}\. Pass a weight"):
        observers.progress(smoothing=smoothing)


def test_memory_of_the_process_or_the_accelerator_is_shown(monkeypatch):
    def shown(**options):
        file = io.StringIO()
        see(observers.progress(file=file, **options), ended(1))
        return file.getvalue()

    assert "memory" not in shown()
    assert re.search(r"\| memory [\d.]+ [MG]iB, peak [\d.]+ [MG]iB \|", shown(memory=True))
    readings = {"device_allocated": 3 * 2**20, "device_peak": 5 * 2**30, "device_reserved": 1}
    monkeypatch.setattr("fxtrain.observers._progress_texts.device_memory", lambda device: readings)
    assert "| memory 3.0 MiB, peak 5.0 GiB |" in shown(memory=True)
    monkeypatch.setattr("fxtrain.observers._machine.host_memory", dict)
    with pytest.raises(OSError, match=r"expected a platform that reports the memory .* Remove memory=True\."):
        observers.progress(memory=True)


class Untouched(Mapping):
    """Metrics that raise an error when read."""

    def __getitem__(self, name):
        raise AssertionError("looked at")

    __iter__ = __len__ = None


def test_only_rank_0_shows_progress(monkeypatch):
    file = io.StringIO()
    made_before = observers.progress(file=file)
    monkeypatch.setenv("RANK", "1")
    for shown in (made_before, observers.progress(file=file)):
        see(shown, FitBegin(step=0), StepEnd(step=1, metrics=Untouched()), FitEnd(step=1, reason="done"))
        shown.close()
    assert file.getvalue() == ""
    see(observers.progress(file=file, every_rank=True), *run())
    assert file.getvalue().count("\n") == 12
    monkeypatch.setenv("RANK", "0")
    see(made_before, *run())
    assert file.getvalue().count("\n") == 24


def test_rank_is_read_from_the_process_group(monkeypatch):
    from torch import distributed

    observer = print  # any function is an observer
    monkeypatch.setenv("RANK", "")  # some launchers set an empty RANK
    assert observers.rank_zero(observer) is observer
    monkeypatch.setenv("RANK", "3")
    assert observers.rank_zero(observer) is not observer
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert observers.rank_zero(observer) is observer
    finally:
        distributed.destroy_process_group()
    assert observers.rank_zero(observer) is not observer


TWO = """if True:
    import datetime, torch, torch.distributed as dist, fxtrain as fx
    shown = fx.observers.progress(), fx.observers.summary()
    wait = datetime.timedelta(seconds=100)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=2, timeout=wait)
    tx = fx.optim.sgd(0.1)
    step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
    fx.fit(fx.init(torch.nn.Linear(1, 1), tx), step, [torch.ones(4, 1)], steps=3, observers=shown)
    dist.destroy_process_group()
"""


def test_only_rank_0_of_two_processes_writes(tmp_path, capsys):
    where = f"file://{tmp_path}/meeting"
    command = [sys.executable, "-c", f"rank, where = 1, {where!r}\n{TWO}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        exec(TWO, {"rank": 0, "where": where})
        assert other.communicate(timeout=100) == ("", None)
        assert other.returncode == 0
    shown = capsys.readouterr().out
    assert "processes    2, this is rank 0; gloo\n" in shown
    assert re.search(r"epoch 3 \| loss .*\nended: reached 3 steps", shown)


def test_resume_rewind_and_interruption_are_shown():
    file = io.StringIO()
    shown = observers.progress(file=file)
    see(
        shown,
        FitBegin(step=7, resumed=True),
        Restored(
            step=7, path="x", missing=("ema",), extra=("old",), environment_changes=("threads: 2 at the save, 1 now",)
        ),
        EvalEnd(step=8, metrics={"loss": 1.0}),
        Rewound(step=8, from_step=8, to_step=4, abandoned=range(4, 8), times=1),
        EvalEnd(step=5, metrics={"loss": 2.0}),
        Interrupted(step=5, cause="ValueError: boom"),
    )
    assert file.getvalue() == (
        "resuming from step 7\n"
        "slot 'ema' is initialized; slot 'old' belongs to no callback; results may differ in the last bits: "
        "threads: 2 at the save, 1 now\n"
        "step 8 | eval loss 1.0000 | evaluated in 0.0 s | best loss\n"
        "rewound from step 8 to step 4\n"
        "step 5 | eval loss 2.0000 | evaluated in 0.0 s | best loss\n"
        "interrupted at step 5: ValueError: boom\n"
    )


def test_observer_is_reusable_for_another_run(terminal):
    with attached(terminal):
        shown = observers.progress(file=terminal)
        for _ in range(2):
            see(shown, *run(reason="done"))
            shown.close()
        assert sys.stdout is terminal
    assert [line for line in terminal.screen if line.startswith("end")] == [
        "end  step 20/20: done, in 1:16; best loss 2.0000 at step 10"
    ] * 2


@pytest.mark.parametrize(("mode", "best"), [("min", "0.2500 at step 3"), ("max", "0.9000 at step 2")])
def test_first_of_equal_best_values_is_shown(mode, best):
    file = io.StringIO()
    shown = observers.progress(metrics=(), best="score", mode=mode, file=file)
    see(shown, *(EvalEnd(step=i, metrics={"score": s}) for i, s in enumerate([0.5, math.nan, 0.9, 0.25, 0.9, 0.25])))
    see(shown, FitEnd(step=6, reason="done"))
    assert file.getvalue().endswith(f"; best score {best}\n")


def test_missing_metric_is_rejected_at_the_first_step():
    with pytest.raises(
        KeyError, match=r"expected the metrics of the step to include 'acc', got a dict with keys 'loss'"
    ):
        see(observers.progress(metrics=("loss", "acc"), file=io.StringIO()), ended(1))
    with pytest.raises(KeyError, match="typo"):
        see(observers.progress(extra={"x": lambda m: m["typo"]}, file=io.StringIO()), ended(1))
    with pytest.raises(TypeError, match=r"got the string 'loss'\. Pass \('loss',\)"):
        observers.progress(metrics="loss")


def test_running_averages_exclude_compilation_evaluations_and_saves():
    averages, time = RunningAverages(10.0), 100.0
    for step in range(1, 50):
        averages.step(StepEnd(step=step, time=time, data_wait=0.05, metrics={"loss": 3.0}, total_steps=100))
        time += 0.5
        if step % 5 == 0:
            averages.pause(7.0)
            time += 7.0
    assert averages.rate == pytest.approx(2.0)
    assert averages.waiting == pytest.approx(0.1)
    assert averages.metrics == {"loss": pytest.approx(3.0)}
    # 51 steps are left, and 9 of 48 intervals contain an evaluation.
    now = StepEnd(step=49, time=time - 0.5, metrics={}, total_steps=100)
    assert averages.remaining(now) == pytest.approx(51 * (48 * 0.5 + 9 * 7) / 48)


@given(st.lists(st.tuples(st.floats(0.001, 100), st.floats(-1e3, 1e3)), min_size=1, max_size=400))
def test_averages_of_metrics_are_exponentially_weighted_means(steps):
    averages, time, weights = RunningAverages(10.0), 0.0, []
    for number, (seconds, value) in enumerate(steps):
        time += seconds
        weights = [weight * min(math.exp(-seconds / 10.0), 0.95) for weight in weights] + [1.0]
        averages.step(StepEnd(step=number, time=time, metrics={"x": value}))
    mean = sum(w * value for w, (_, value) in zip(weights, steps, strict=True)) / sum(weights)
    assert averages.metrics["x"] == pytest.approx(mean, rel=1e-6, abs=1e-6)


def test_running_averages_show_non_finite_values_only_once():
    averages = RunningAverages(10.0)
    averages.step(ended(1, loss=2.0))
    averages.step(ended(2, loss=math.nan))
    assert math.isnan(averages.metrics["loss"])
    averages.step(ended(3, loss=2.0))
    assert averages.metrics["loss"] == pytest.approx(2.0)


def test_running_averages_are_unknown_without_elapsed_time():
    averages = RunningAverages(10.0)
    averages.step(StepEnd(step=1, metrics={}, total_steps=3))
    averages.step(StepEnd(step=2, metrics={}, total_steps=3))  # no time elapsed
    remaining = averages.remaining(StepEnd(step=2, metrics={}, total_steps=3))
    assert (averages.rate, averages.waiting, remaining) == (None, None, None)


HOSTILE = "a[red]\x1b[2J\x07\x9b\x7f\n\u202eb\ud800\u2028[/]:smile:"
SHOWN = "a[red]\\x1b[2J\\x07\\x9b\\x7f\\n\\u202eb\\ud800\\u2028[/]:smile:"


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_names_and_reasons_are_escaped(kind, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")
    file = kind()
    shown = observers.progress((HOSTILE,), best=HOSTILE, rate=(HOSTILE, 1), extra={HOSTILE: lambda m: 1.0}, file=file)
    see(
        shown,
        FitBegin(step=0, total_steps=3),
        Restored(step=0, path="p", missing=(HOSTILE,), environment_changes=(HOSTILE,)),
        ended(1, **{HOSTILE: 1.0}),
        ended(2, **{HOSTILE: 1.0}),
        EvalBegin(step=2),
        EvalEnd(step=2, metrics={HOSTILE: 2.0}),
        Interrupted(step=2, cause=HOSTILE),
        FitEnd(step=2, reason=HOSTILE),
    )
    text = file.getvalue()
    assert SHOWN in text
    assert not re.findall(r"[\x07\x7f-\x9f\u2028\u202e\ud800]", text)
    assert "\x1b[2J" not in text
    assert "\x1b[31m" not in text  # red
    assert f"best {SHOWN}" in text


def test_characters_outside_the_file_encoding_are_escaped():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    see(observers.progress(("wörld",), file=file), ended(1, wörld=1.0))
    file.flush()
    assert file.buffer.getvalue() == b"step 1 | w\\xf6rld 1.0000 | 1.0 s elapsed\n"


@pytest.mark.slow
def test_fit_shows_progress_in_a_notebook_unless_it_is_shown_already(tmp_path):
    train = "result = fx.fit(state, step, [torch.ones(4, 1)] * 10, epochs=3, {})"
    alone, again, switched_off, shown, required, by_hand, interrupted, continued = notebook.outputs(
        tmp_path,
        f"{notebook.MODEL}\n    {train.format('')}",
        train.format(""),
        train.format("progress=False"),
        train.format("observers=fx.observers.progress()"),
        train.format("observers=[fx.observers.required(fx.observers.progress())], progress=True"),
        "for _ in fx.steps(state, step, [torch.ones(4, 1)] * 10, epochs=3): pass",
        """
        def interrupt(state, event: fx.StepEnd, control):
            if event.step == 15:
                signal.raise_signal(signal.SIGINT)
        result = fx.fit(state, step, [torch.ones(4, 1)] * 10, epochs=3, observers=interrupt)
        result.reason, int(result.state.step)
        """,
        "fx.fit(result.continue_from, step, [torch.ones(4, 1)] * 10, epochs=3).reason",
    )
    assert (switched_off, by_hand) == ([], [])
    for panels in (alone, again, shown, required):
        assert [output.output_type for output in panels] == ["display_data"]  # no streams and no widgets
        assert sorted(panels[0].data) == ["text/html", "text/plain"]
        lines = panels[0].data["text/plain"].splitlines()
        assert [line.split("   ")[0] for line in lines[:-1]] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
        assert re.fullmatch(r"end  step 30: finished 3 epochs, in [\d.]+ s", lines[-1])
        assert "\x1b" not in panels[0].data["text/html"] + panels[0].data["text/plain"]
    panel, value = interrupted
    first, last = panel.data["text/plain"].splitlines()
    assert first.startswith("epoch 1/3   loss ")
    assert last.startswith("end  step 15: interrupted by SIGINT, in ")
    assert value.data["text/plain"] == "('interrupted by SIGINT', 15)"
    assert [line.split("   ")[0] for line in continued[0].data["text/plain"].splitlines()[:-1]] == [
        "resuming from step 15",
        "epoch 2/3",
        "epoch 3/3",
    ]
    assert continued[1].data["text/plain"] == "'finished 3 epochs'"


def test_fit_shows_progress_outside_of_notebooks_only_if_asked(capsys):
    fx.fit(problem.start(), problem.step(), problem.data(), steps=2)
    assert capsys.readouterr().out == ""
    for _ in fx.steps(problem.start(), problem.step(), problem.data(), steps=2, progress=True):
        pass
    assert capsys.readouterr().out.count("ended: reached 2 steps") == 1
    with pytest.raises(ValueError, match=r"expected progress to be one of None, True, False, got 'no'"):
        fx.fit(problem.start(), problem.step(), problem.data(), steps=2, progress="no")


def test_runs_of_many_short_epochs_leave_twenty_lines():
    def lines(total, count, seconds):
        file = io.StringIO()
        shown = observers.progress(seconds=10, file=file)
        see(shown, *(EpochEnd(step=n, epochs_done=n, total_epochs=total, epoch_length=1, position=n, epoch_start=n,
                              time=n * seconds) for n in range(1, count + 1)))  # fmt: skip
        see(shown, FitEnd(step=count, reason="done"))
        return re.findall(r"^epoch +(\d+)", file.getvalue(), flags=re.MULTILINE)

    assert len(lines(1000, 1000, 0.001)) == 21  # the first one, and one at each twentieth
    assert lines(1000, 333, 0.001)[-1] == "333"  # the last one, when it stops early
    assert len(lines(1000, 100, 11.0)) == 100
    assert len(lines(None, 1000, 0.001)) == 21  # the first ones, and the last one


def test_default_metrics_are_the_loss_or_the_first_ones():
    def shown(**metrics):
        file = io.StringIO()
        see(observers.progress(file=file), ended(1, **metrics))
        return file.getvalue()

    assert shown(accuracy=0.5, loss=1.0) == "step 1 | loss 1.0000 | 1.0 s elapsed\n"
    assert shown(d=1.0, g=2.0, x=3.0, y=4.0, z=5.0) == (
        "step 1 | d 1.0000 | g 2.0000 | x 3.0000 | y 4.0000 | 1.0 s elapsed\n"
    )


def test_epoch_without_an_evaluation_at_its_end_shows_no_old_one():
    file = io.StringIO()
    evaluated = EvalEnd(step=5, epoch_length=10, position=5, metrics={"loss": 2.0}, duration=1.5, time=5.0)
    see(observers.progress(file=file), evaluated, EpochEnd(step=10, epochs_done=1, metrics={"loss": 3.0}, duration=9.0))
    assert file.getvalue().splitlines() == [
        "step 5 | eval loss 2.0000 | evaluated in 1.5 s | best loss",
        "epoch 1 | 9.0 s",
    ]
