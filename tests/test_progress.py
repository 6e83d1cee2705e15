"""The progress observer: lines in a file, their values, and which process writes them."""

import io
import math
import re
import subprocess
import sys
from collections.abc import Mapping

import problem
import pytest
from hypothesis import given
from hypothesis import strategies as st
from progress_events import bits, ended, evaluation, run, see

import fxtrain as fx
from fxtrain import observers
from fxtrain.core import EpochEnd, EvalBegin, EvalEnd, FitBegin, FitEnd, Interrupted, Restored, Rewound, StepEnd
from fxtrain.observers._running_averages import RunningAverages


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


def test_characters_outside_the_file_encoding_are_escaped():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    see(observers.progress(("wörld",), file=file), ended(1, wörld=1.0))
    file.flush()
    assert file.buffer.getvalue() == b"step 1 | w\\xf6rld 1.0000 | 1.0 s elapsed\n"


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
