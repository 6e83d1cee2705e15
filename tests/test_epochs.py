"""Epochs of data with known and unknown length: boundaries, resume, early ends and changes of the batch size."""

import itertools
import os
import signal

import problem
import pytest
import torch

import fxtrain as fx
from fxtrain import testing
from fxtrain.data import batches, prefetch


class Stream:
    """A source without a length that yields the same batches in each iteration."""

    def __init__(self, count=3):
        self.count = count

    def __iter__(self):
        yield from itertools.islice(itertools.cycle(problem.data()), self.count)


def moments_of(fired):
    def record(state, event, control):
        if isinstance(event, fx.EpochBegin | fx.StepEnd | fx.EpochEnd | fx.EvalEnd):
            fired.append((type(event).__name__, event.step, event.position))

    return fx.observers.required(record)


def fit(data=None, *, state=None, step=None, fired=None, **options):
    observers = [moments_of([] if fired is None else fired), *options.pop("observers", ())]
    return fx.fit(state or problem.start(), step or problem.step(), data or Stream(), observers=observers, **options)


@pytest.mark.parametrize("data", [Stream, lambda: prefetch(Stream())], ids=["stream", "prefetched"])
@pytest.mark.parametrize("steps_per_call", [1, 2, 4, 5])
def test_resumed_stream_equals_whole_run_for_every_cut(tmp_path, steps_per_call, data):
    step = problem.Together(problem.step(), steps_per_call)
    whole_fired = []
    whole = fit(data(), step=step, epochs=3, fired=whole_fired)
    for cut in range(1, 10):
        fired, options = [], {"checkpointer": fx.checkpointer(tmp_path / str(cut)), "resume": True, "fired": None}
        options["fired"] = fired
        fit(data(), step=step, steps=cut, **options)
        resumed = fit(data(), step=step, epochs=3, **options)
        testing.assert_equal(resumed.state, whole.state, f"cut at step {cut}")
        assert fired == whole_fired


def test_resume_of_finished_stream_run_takes_no_step(tmp_path):
    options = {"checkpointer": fx.checkpointer(tmp_path), "resume": True, "epochs": 2}
    steps = [int(fit(**options).state.step) for _ in range(4)]
    assert steps == [6, 6, 6, 6]


@pytest.mark.parametrize("kind", [fx.StepEnd, fx.EpochEnd, fx.EpochBegin])
def test_run_interrupted_at_end_of_stream_resumes(tmp_path, kind):
    whole = fit(epochs=3).state

    def interrupt(state, event, control):
        if isinstance(event, kind) and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    options = {"checkpointer": fx.checkpointer(tmp_path), "epochs": 3}
    fit(observers=[interrupt], **options)
    testing.assert_equal(fit(resume=True, **options).state, whole, f"interrupted at {kind.__name__}")


def test_first_epoch_of_stream_ends_with_evaluation():
    fired = []
    fit(epochs=2, fired=fired, eval_step=problem.eval_step, eval_data=problem.data(1))
    assert [step for kind, step, _ in fired if kind == "EvalEnd"] == [3, 6]


def test_epoch_with_skipped_last_batch_ends_with_evaluation():
    def skip(state, event: fx.StepBegin):
        return state, fx.Control(skip_batch=event.position == 2)

    fired = []
    evaluation = {"eval_step": problem.eval_step, "eval_data": problem.data(1)}
    fit(problem.data(), epochs=2, callbacks=skip, fired=fired, **evaluation)
    assert [step for kind, step, _ in fired if kind == "EvalEnd"] == [2, 5]


def test_generator_object_is_rejected_for_second_epoch(tmp_path):
    options = {"checkpointer": fx.checkpointer(tmp_path), "resume": True}
    assert int(fit(iter(Stream()), epochs=1, **options).state.step) == 3
    assert int(fit(iter(Stream()), epochs=1, **options).state.step) == 3
    with pytest.raises(ValueError, match="expected data for 2 epochs, got 3 batches"):
        fit(iter(Stream()), epochs=2, **options)


class TestEndEpoch:
    @pytest.mark.parametrize("kind", [fx.EpochBegin, fx.StepBegin])
    @pytest.mark.parametrize("limit", [{"epochs": 3}, {"epochs": 3, "steps": 5}])
    def test_end_epoch_at_first_event_skips_the_epoch(self, kind, limit):
        def end(state, event):
            return state, fx.Control(end_epoch=event.position == 3)

        fired = []
        result = fit(problem.data(), callbacks=fx.on(kind, end), fired=fired, **limit)
        assert result.reason == ("reached 5 steps" if "steps" in limit else "finished 3 epochs")
        ends = [position for name, _, position in fired if name == "EpochEnd"]
        assert ends == ([3, 6] if "steps" in limit else [3, 6, 9])
        taken = [position for name, _, position in fired if name == "StepEnd"]
        assert taken == [1, 2, 3, 7, 8, 9][: 5 if "steps" in limit else 6]

    @pytest.mark.parametrize("request_", ["end_epoch", "skip_batch"])
    def test_endless_skipping_is_rejected(self, request_):
        def never(state, event: fx.StepBegin):
            return state, fx.Control(**{request_: True})

        with pytest.raises(ValueError, match="expected a step within 100 epochs, got none"):
            fit(problem.data(), callbacks=never, steps=5)
        assert fit(problem.data(), callbacks=never, epochs=5).reason == "finished 5 epochs"

    def test_end_epoch_is_rejected_in_first_epoch_of_stream(self):
        def end(state, event: fx.StepEnd):
            return state, fx.Control(end_epoch=True)

        with pytest.raises(ValueError, match="expected data with a known epoch length"):
            fit(callbacks=end, epochs=2)

    def test_end_epoch_ends_later_epoch_of_stream(self):
        def end(state, event: fx.StepEnd):
            return state, fx.Control(end_epoch=event.step == 4)

        assert int(fit(callbacks=end, epochs=3).state.step) == 7


class TestBatchSizeChange:
    def rows(self, batch_size):
        inputs = torch.arange(24.0)[:, None] / 24
        return batches({"x": inputs, "y": inputs * 2}, batch_size, shuffle=False)

    def fit(self, data, state=None, **options):
        tx = fx.optim.sgd(0.1)
        step = fx.train_step(lambda model, batch: (model(batch["x"]) - batch["y"]).square().mean(), tx)
        return fit(data, state=state or fx.init(torch.nn.Linear(1, 1), tx), step=step, **options)

    @pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4), (4, 5)])
    def test_new_batch_size_starts_with_next_epoch(self, tmp_path, before, after):
        options = {"checkpointer": fx.checkpointer(tmp_path), "resume": True}
        first = self.fit(self.rows(before), epochs=2, **options)
        seen, fired = [], []

        def watch(state, event: fx.StepBegin, control):
            seen.append((event.epoch, event.batch["x"].flatten().tolist()))

        again = self.fit(self.rows(after), epochs=3, observers=[watch], fired=fired, **options)
        assert again.reason == "finished 3 epochs"
        assert int(again.state.step) == 2 * 24 // before + 24 // after
        assert [batch for _, batch in seen] == [self.rows(after)[i]["x"].flatten().tolist() for i in range(24 // after)]
        assert seen[0][0] == 2.0
        in_memory = self.fit(self.rows(after), state=first.state, epochs=3)
        testing.assert_equal(in_memory.state, again.state, "continued in memory")

    def test_new_batch_size_is_rejected_within_epoch(self):
        first = self.fit(self.rows(4), steps=8)
        with pytest.raises(ValueError, match="because 2 of the current epoch are consumed, got 3"):
            self.fit(self.rows(8), state=first.state, epochs=3)

    def test_patience_in_epochs_continues_across_batch_sizes(self):
        worse = fx.eval_step(lambda model, batch: {"loss": batch["x"].sum() * 0 + 1.0})
        stopping = fx.callbacks.early_stopping("loss", patience=3, unit="epochs")
        options = {"eval_step": worse, "eval_data": self.rows(24), "callbacks": stopping}
        first = self.fit(self.rows(4), epochs=2, **options)
        second = self.fit(self.rows(8), state=first.state, epochs=9, **options)
        assert second.reason == "loss has not improved for 3 epochs"
        assert int(second.state.step) == 2 * 6 + 2 * 3


def test_event_epoch_accounts_for_changed_epoch_length():
    event = fx.StepEnd(step=9, position=15, epochs_done=2, epoch_start=12, epoch_length=6, metrics={})
    assert event.epoch == 2.5
    assert fx.every(epochs=0.5)(event)
    assert not fx.every(epochs=1)(event)
    assert fx.after(epochs=2)(event)


def test_slot_names_with_loop_prefix_are_reserved():
    with pytest.raises(ValueError, match="expected a slot name without the prefix 'loop/'"):
        fx.stateful("loop/epoch", lambda state: torch.tensor(0), lambda state, event, epoch: (epoch, fx.Control()))
