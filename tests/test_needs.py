"""Requirements declared by callbacks are checked before the first step."""

import problem
import pytest
import torch

import fxtrain as fx
from fxtrain import writers

TAKEN = []


def counted(state, event: fx.StepBegin, control):
    TAKEN.append(event.step)


def watch(state, event: fx.EvalEnd):
    return state, fx.Control()


def fit(callbacks, **options):
    given = {"eval_step": problem.eval_step, "eval_data": problem.data(1), "epochs": 1} | options
    return fx.fit(problem.start(), given.pop("step", problem.step()), problem.data(), callbacks=callbacks, **given)


@pytest.mark.parametrize(
    ("callback", "options", "message"),
    [
        (
            fx.needs(watch, eval_metrics=["accuracy"]),
            {},
            "the metric 'accuracy' at EvalEnd for watch, got 'loss', 'mae'. Return it from eval_step",
        ),
        (
            fx.callbacks.early_stopping("accuracy", mode="max", patience=1),
            {},
            "the metric 'accuracy' at EvalEnd for early_stopping, got 'loss', 'mae'",
        ),
        (fx.callbacks.reduce_on_plateau("f1"), {}, "the metric 'f1' at EvalEnd for reduce_on_plateau"),
        (fx.callbacks.stop_at("f1", 0.9), {}, "the metric 'f1' at EvalEnd for stop_at f1"),
        (
            fx.when(fx.every(2), fx.callbacks.stop_at("f1", 0.9)),
            {},
            r"the metric 'f1' at EvalEnd for stop_at f1 when every\(2\)",
        ),
        (
            fx.callbacks.stop_at("loss", 0.9),
            {"eval_step": None, "eval_data": None},
            "the metric 'loss' at EvalEnd for stop_at loss, got no evaluation. Give fit an eval_step",
        ),
        (
            fx.needs(watch, slots=["ema"]),
            {},
            "expected the slot 'ema' in the state for watch, got none. Give fit",
        ),
        (
            fx.needs(watch, events=[fx.Gradients]),
            {"step": fx.Step(problem.step().function)},
            "a step that fires Gradients for watch, got one that fires none. Declare the events of a hand-written",
        ),
    ],
)
def test_missing_requirement_is_named(callback, options, message):
    TAKEN.clear()
    with pytest.raises(ValueError, match=message):
        fit(callback, observers=[counted], **options)
    assert not TAKEN


def test_run_with_all_requirements_finishes():
    average = fx.callbacks.ema(0.9)
    callback = fx.compose(average, fx.needs(watch, eval_metrics=["loss"], slots=["ema"], events=[fx.Updated]))
    assert fit(callback, step=problem.step(callbacks=average)).reason == "finished 1 epoch"


def test_needs_accumulate_and_callback_is_unchanged():
    once = fx.needs(watch, slots=["a"])
    twice = fx.needs(once, slots=["b"], eval_metrics=["loss"])
    assert (once.needs.slots, twice.needs.slots) == (("a",), ("a", "b"))
    state = fx.init({"w": torch.tensor(1.0)})
    assert twice(state, fx.EvalEnd(step=1, metrics={})) == (state, fx.Control())


def test_failed_check_of_the_state_stops_the_run_at_the_start():
    def check(state):
        raise ValueError(f"expected another state, got one at step {int(state.step)}.")

    TAKEN.clear()
    with pytest.raises(ValueError, match=r"expected another state, got one at step 0\."):
        fit(fx.when(100, fx.needs(watch, check=check)), observers=[counted])
    assert not TAKEN


def test_eval_stream_is_not_consumed_by_the_check():
    batches = iter(problem.data(2))
    with pytest.raises(KeyError, match="the metric 'accuracy' at EvalEnd for early_stopping, got 'loss', 'mae'"):
        fit(fx.callbacks.early_stopping("accuracy", patience=1), eval_data=(batch for batch in batches))


def test_data_dependent_evaluation_is_checked_when_it_ends():
    def looking(model, batch):
        loss, metrics = problem.loss_fn(model, batch)
        return {"loss": loss, "seen": torch.tensor(float(loss.item() > 0)), **metrics}

    assert (
        fit(fx.callbacks.early_stopping("seen", patience=1), eval_step=fx.eval_step(looking)).reason
        == "finished 1 epoch"
    )


class Images:
    """A writer of clu's kind, which says what it keeps by its methods."""

    def write_scalars(self, step, scalars):
        pass

    def write_images(self, step, images):
        pass

    def flush(self):
        pass

    close = flush


def folder(make):
    return lambda tmp_path: make(tmp_path / "written")


@pytest.mark.parametrize(
    ("written", "make", "keeps"),
    [
        ("images", folder(writers.tensorboard), True),
        ("images", folder(writers.csv), False),
        ("images", lambda tmp_path: writers.multi(writers.console(), writers.csv(tmp_path / "a")), False),
        ("images", lambda tmp_path: writers.multi(writers.console(), writers.media(tmp_path / "a")), True),
        ("images", lambda tmp_path: writers.asynchronous(writers.csv(tmp_path / "a")), False),
        ("images", lambda tmp_path: Images(), True),
        ("sounds", lambda tmp_path: Images(), False),
        ("tables", folder(writers.tensorboard), True),
        ("tables", folder(writers.csv), False),
        ("figures", folder(writers.media), True),
        ("scalars", folder(writers.csv), True),
        ("scalars", folder(writers.media), False),
    ],
)
@pytest.mark.parametrize("wrap", [lambda observer: observer, fx.observers.required])
def test_kind_that_no_writer_keeps_is_named(written, make, keeps, wrap, tmp_path):
    callback = fx.needs(watch, written=[written])
    observers = wrap(fx.observers.write(make(tmp_path)))
    if keeps:
        fit(callback, observers=observers)
        return
    with pytest.raises(ValueError, match=rf"expected a writer of {written} for watch, got writers of "):
        fit(callback, observers=observers)


def test_run_without_writers_is_told_which_keep_the_kind():
    with pytest.raises(ValueError, match="expected a writer of images for watch, got none") as caught:
        fit(fx.needs(watch, written=["images"]))
    assert str(caught.value).endswith(
        "Give fxtrain.observers.write one that keeps them: fxtrain.writers.media, fxtrain.writers.mlflow, "
        "fxtrain.writers.tensorboard, fxtrain.writers.wandb."
    )


def test_observer_declares_what_it_keeps():
    def show(state, event: fx.EvalEnd, control):
        pass

    show.keeps = {fx.values.Image}
    fit(fx.needs(watch, written=["images"]), observers=show)
    with pytest.raises(ValueError, match="got writers of images, figures, confusion matrices"):
        fit(fx.needs(watch, written=["videos"]), observers=show)


def test_writers_of_other_ranks_are_not_required(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    fit(fx.needs(watch, written=["images"]))


def test_unknown_kind_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"a kind in written to be one of .*, got 'image'\. Did you mean 'images'\?"):
        fx.needs(watch, written=["image"])


def test_only_traced_events_are_accepted():
    with pytest.raises(
        TypeError, match=r"traced event types \(Microbatch, Gradients, Updated\), got the class EvalEnd"
    ):
        fx.needs(watch, events=[fx.EvalEnd])
