"""Checkpoints, results, histories and views of a batch of runs, and training that continues from them."""

import json

import pytest
import torch
from batched_runs import COUNT, assert_same, data, evaluation, starts, step

import fxtrain as fx
from fxtrain import ensemble

# Checkpoints


def options_with_stops(**more):
    callbacks = [fx.callbacks.early_stopping("loss", patience=1), fx.callbacks.ema(0.9), fx.callbacks.save(2)]
    return {"callbacks": callbacks, "epochs": 4, **evaluation(), **more}


@pytest.fixture(scope="module")
def whole():
    result = fx.fit(ensemble.stack(starts()), step(), data(), **options_with_stops())
    assert result.state.step.tolist() == [8, 12, 16]
    return result


@pytest.mark.filterwarnings("ignore:expected a checkpointer")
@pytest.mark.parametrize("interrupted_at", [1, 9])
def test_resumed_batch_is_bitwise_the_uninterrupted_one(tmp_path, whole, interrupted_at):

    def interrupts(state, event: fx.StepEnd, control):
        if event.step == interrupted_at:
            raise KeyboardInterrupt

    path = fx.checkpointer(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        fx.fit(
            ensemble.stack(starts()),
            step(),
            data(),
            observers=required(interrupts),
            checkpointer=path,
            **options_with_stops(),
        )
    resumed = fx.fit(
        ensemble.stack(starts()),
        step(),
        data(),
        checkpointer=fx.checkpointer(tmp_path / "run"),
        resume=True,
        **options_with_stops(),
    )
    assert not whole.state.diff(resumed.state)
    assert resumed.reason == whole.reason


def required(observer):
    observer.required = True
    return observer


def test_member_of_a_restored_batch_continues_alone(tmp_path):
    folder = fx.checkpointer(tmp_path / "run")
    together = fx.fit(ensemble.stack(starts()), step(), data(), steps=5, checkpointer=folder)
    restored = fx.checkpointer(tmp_path / "run").restore(ensemble.stack(starts()))
    assert_same(restored, together.state, ignore=("loop/batch",))
    for index, state in enumerate(starts()):
        taken = fx.fit(ensemble.member(restored, index), step(), data(), steps=9)
        whole = fx.fit(state, step(), data(), steps=9)
        assert_same(taken.state, whole.state)


def test_batch_continues_from_its_result():
    first = fx.fit(ensemble.stack(starts()), step(), data(), steps=3)
    second = fx.fit(first.continue_from, step(), data(), steps=8)
    whole = fx.fit(ensemble.stack(starts()), step(), data(), steps=8)
    assert not second.state.diff(whole.state)


# Results


def test_best_is_a_state_that_the_single_step_continues():
    together = fx.fit(ensemble.stack(starts()), step(), data(), epochs=3, **evaluation())
    losses = together.state.slots["loop/evaluated"]["metrics"]["loss"]
    best = ensemble.best(together, "loss")
    assert not best.diff(ensemble.member(together.state, int(losses.argmin())))
    worst = ensemble.best(together, "loss", mode="max")
    assert not worst.diff(ensemble.member(together.state, int(losses.argmax())))
    assert int(step()(best, data()[0])[0].step) == 13
    assert int(fx.fit(best, step(), data(), steps=14).state.step) == 14
    by_history = ensemble.best(together, "train/mae")
    last = [together.history[f"train/mae/member_{i}"].values[-1] for i in range(COUNT)]
    assert int(by_history.seed) == last.index(min(last))
    with pytest.raises(KeyError, match="expected a metric of the members, got 'losses'"):
        ensemble.best(together, "losses")


def test_history_has_each_member_and_a_summary():
    together = fx.fit(ensemble.stack(starts()), step(), data(), steps=4)
    each = torch.stack([torch.tensor(together.history[f"train/loss/member_{i}"].values) for i in range(COUNT)])
    summary = {"": each.mean(0), "/min": each.amin(0), "/max": each.amax(0)}
    for key, values in summary.items():
        torch.testing.assert_close(torch.tensor(together.history[f"train/loss{key}"].values), values)


def test_stopped_members_are_compacted_and_put_back():
    stop = fx.when(1, fx.callbacks.early_stopping("loss", patience=torch.tensor([1, 2, 1])))
    whole = fx.fit(ensemble.stack(starts()), step(), data(), epochs=8, callbacks=stop, **evaluation())
    runs = ensemble.stack(starts())
    for epochs in (2, 4, 8):
        live = ~runs.due.stop
        if not live.any():
            break
        options = {"callbacks": ensemble.select(stop, live), "epochs": epochs, **evaluation()}
        few = fx.fit(ensemble.select(runs, live), step(), data(), **options).continue_from
        runs = few if live.all() else ensemble.put(runs, live, few)
    assert runs.step.tolist() == whole.state.step.tolist()
    for index in range(COUNT):
        assert_same(ensemble.member(runs, index), ensemble.member(whole.state, index))


# Writers and views


def test_writers_and_views_show_a_batch(tmp_path, capsys):
    writer = fx.writers.jsonl(tmp_path / "log.jsonl")
    observer = fx.observers.write(writer)
    options = {"steps": 3, "observers": observer, "progress": True, **evaluation()}
    together = fx.fit(ensemble.stack(starts()), step(), data(), **options)
    shown = "".join(capsys.readouterr())
    assert "eval loss/max" in shown
    assert "member_0" not in shown
    assert "runs         3" in str(fx.summary(together.state))
    figure = together.history.plot()
    assert {"loss", "loss/max", "loss/min"} <= {axes.get_title(loc="left") for axes in figure.axes}
    assert len(figure.axes) == len({name.partition("/")[2] for name in together.history if "member_" not in name})
    assert len(together.history.plot("train/loss/member_*").axes) == COUNT
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert any("train/loss/member_2" in json.dumps(row) for row in rows)
    assert "3" in repr(together)
    assert not together.state.diff(together.state.copy())
