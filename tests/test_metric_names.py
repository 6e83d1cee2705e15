"""Metric names: ``loss`` in events, ``train/loss`` and ``eval/loss`` where published. Errors name the right one."""

import io

import problem
import pytest
import torch

import fxtrain as fx
from fxtrain import observers


def fit(**options):
    given = {"eval_step": problem.eval_step, "eval_data": problem.data(1), "epochs": 1} | options
    return fx.fit(problem.start(), problem.step(), problem.data(), **given)


class Recorder:
    """A writer that records the names it is given."""

    def __init__(self):
        self.names = set()

    def write(self, step, values, event):
        self.names |= set(values)

    def purge(self, step): ...

    def flush(self): ...

    def close(self): ...


def test_writers_and_history_have_the_same_names():
    recorder = Recorder()
    history = fit(observers=[observers.write(recorder)]).history
    assert recorder.names == set(history)
    assert {"train/loss", "eval/loss"} <= set(history)


@pytest.mark.parametrize("name", ["train/loss", "eval/loss"])
@pytest.mark.parametrize(
    "callback",
    [
        lambda name: fx.callbacks.early_stopping(name, patience=1),
        lambda name: fx.callbacks.stop_at(name, 0.0),
        lambda name: fx.callbacks.stop_on_divergence(name),
        lambda name: fx.callbacks.stop_on_overfitting(name, patience=1),
        fx.callbacks.restore_best,
        fx.callbacks.save_best,
        fx.callbacks.reduce_on_plateau,
    ],
)
def test_published_name_in_a_callback_is_refused_before_the_first_step(callback, name):
    with pytest.raises(ValueError, match=rf"expected the metric '{name}' at EvalEnd .* Did you mean 'loss'\?"):
        fit(callbacks=callback(name))


def test_published_name_is_refused_at_the_event():
    callback = fx.compose(fx.callbacks.stop_at("train/loss", 0.0, on=fx.StepEnd))
    with pytest.raises(KeyError, match=r"'train/loss' at StepEnd for stop_at, got 'loss'\. Did you mean 'loss'\?"):
        callback(fx.init(torch.nn.Linear(1, 1)), fx.StepEnd(step=1, metrics={"loss": torch.tensor(1.0)}))
    with pytest.raises(KeyError, match=r"expected the step metric 'train/loss' .* Did you mean 'loss'\?"):
        fit(callbacks=fx.callbacks.epoch_mean("train/loss"))


def test_event_name_in_the_history_is_refused():
    with pytest.raises(KeyError, match=r"got 'loss'\. Did you mean 'eval/loss' or 'train/loss'\?"):
        fit().history["loss"]


@pytest.mark.parametrize("name", ["train/loss", "eval/loss"])
def test_published_name_as_best_of_a_checkpointer_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"'{name}' at EvalEnd for checkpointer\(best=\.\.\.\), .* mean 'loss'\?"):
        fit(checkpointer=fx.checkpointer(tmp_path / "fit", best=name))
    with (
        fx.checkpointer(tmp_path / "save", best=name) as checkpoints,
        pytest.raises(KeyError, match=rf"expected the metric '{name}' for checkpointer.*, got 'loss'\. Did you mean"),
    ):
        checkpoints.save(problem.start(), {"loss": 1.0})


def test_published_name_in_progress_is_refused():
    with pytest.raises(KeyError, match=r"to include 'train/loss', .* Did you mean 'loss'\?"):
        fit(observers=[observers.required(observers.progress(["train/loss"], file=io.StringIO()))])
    with pytest.raises(KeyError, match=r"the evaluation to include 'eval/loss', .* Did you mean 'loss'\?"):
        fit(observers=[observers.required(observers.progress(best="eval/loss", file=io.StringIO()))])


def test_complex_metrics_are_refused():
    value = torch.tensor(1 + 2j)
    step = fx.train_step(lambda model, batch: (problem.loss_fn(model, batch)[0], {"phase": value}), problem.transform())
    with pytest.raises(TypeError, match=r"the metric 'phase' .* got .*complex.*real part or its absolute value"):
        step(problem.start(), problem.data(1)[0])
    with pytest.raises(TypeError, match=r"the metric 'phase' .*take the real part of a complex one"):
        fx.metrics.lift({"phase": value}, 1)
