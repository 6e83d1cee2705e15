"""Checks of whole runs with several ranks. ``shared_checks`` runs them."""

import pathlib
import shutil
import warnings

import torch
from torch import nn

import fxtrain as fx
from fxtrain import tree

ROWS, BATCH = 26, 6


# What the checks share.


def loss_fn(model, batch):
    return (model(batch["x"]).squeeze(1) - batch["y"]).square().mean()


def examples():
    x = torch.randn(ROWS, 3, dtype=torch.float64, generator=torch.Generator(torch.get_default_device()).manual_seed(1))
    return {"x": x, "y": x.sum(1)}


def parts(mesh, **options):
    """Returns state, step, data and options of a run. Without a mesh, it is that of one process."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.Linear(4, 1)).double()
    tx = fx.optim.adam(1e-2)
    evaluation = {
        "eval_step": fx.eval_step(loss_fn, mesh=mesh),
        "eval_data": fx.data.batches(examples(), BATCH, shuffle=False),
    }
    state, step = fx.init(network, tx, seed=0), fx.train_step(loss_fn, tx, mesh=mesh)
    data = fx.data.batches(examples(), BATCH, seed=3, drop_last=False)
    return state, step, data, {"mesh": mesh, **evaluation, **options}


def fit(mesh, **options):
    state, step, data, given = parts(mesh, **options)
    return fx.fit(state, given.pop("step", step), given.pop("data", data), **given)


def at(step, act):
    """Returns a callback that calls ``act`` at a step."""

    def callback(state, event: fx.StepEnd):
        if event.step == step:
            act()
        return state, fx.Control()

    return callback


def stop_at(*steps):
    def stop(state, event: fx.StepEnd):
        return state, fx.Control(stop=event.step in steps)

    return stop


class Seen:
    """A callback that records the trajectory events of its rank."""

    def __init__(self, *fields):
        self.fields, self.events = fields, []

    def __call__(self, state, event):
        values = {name: getattr(event, name) for name in self.fields if hasattr(event, name)}
        metrics = {name: float(value) for name, value in (getattr(event, "metrics", None) or {}).items()}
        self.events.append((type(event).__name__, int(event.step), values, metrics))
        return state, fx.Control()


def assert_same(mesh, value, what):
    others = mesh.gather(value, what)
    assert all(other == others[0] for other in others), f"{what} differ: {others}"


def assert_close(one, other):
    for a, b in zip(tree.leaves(one.params), tree.leaves(other.params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def values_of(state):
    return [leaf.tolist() for leaf in tree.leaves(state)]


def error_of(function):
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("expected an error, got none")


def fail():
    raise ValueError("a bad value")


# Checks.


def equals_one_process(mesh, folder):
    seen, drawn, logged, now = Seen("time", "previous_time", "data_wait", "duration", "position"), [], [], [0.0]

    def draw(state, event, control):
        drawn.append(event)

    def log(state, event: fx.StepEnd, control):
        logged.append(event.step)

    def clock():
        now[0] += 1.0 + mesh.rank
        return now[0]

    options = {"epochs": 2, "clock": clock, "observers": [draw, fx.observers.every_rank(log)]}
    callbacks = [fx.callbacks.save(every=3), seen]
    result = fit(mesh, callbacks=callbacks, checkpointer=fx.checkpointer(folder), **options)
    alone = fit(None, epochs=2)
    assert_close(result.state, alone.state)
    assert_same(mesh, seen.events, "events")
    assert_same(mesh, values_of(result.state), "states")
    assert_same(mesh, {name: list(map(float, curve.values)) for name, curve in result.history.items()}, "histories")
    assert abs(result.history["eval/loss"].values[-1] - alone.history["eval/loss"].values[-1]) < 1e-9
    assert bool(drawn) == mesh.is_main
    assert logged == list(range(1, 11))
    assert fx.checkpointer(folder).steps()[-1] == 10


def each_row_is_read_once(mesh, folder):
    read = []

    def look(state, event: fx.StepBegin):
        read.append((event.position, event.batch["y"].tolist()))
        return state, fx.Control()

    fit(mesh, epochs=1, callbacks=look)
    assert [position for position, _ in read] == [0, 1, 2, 3, 4]
    found = sorted(value for part in mesh.gather(read) for _, values in part for value in values)
    assert found == sorted(examples()["y"].tolist())


def other_numbers_of_ranks_continue(mesh, folder):
    whole = fit(None, steps=11)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(mesh, steps=3, checkpointer=fx.checkpointer(folder), resume=True)
        if mesh.is_main:
            middle = fit(None, steps=7, checkpointer=fx.checkpointer(folder), resume=True)
            assert int(middle.state.step) == 7
            assert sum("ranks: 2 at the save, 1 now" in str(each.message) for each in caught) == 1
            assert not any("as before the checkpoint" in str(each.message) for each in caught)
        mesh.gather(None)
        last = fit(mesh, steps=11, checkpointer=fx.checkpointer(folder), resume=True)
    assert int(last.state.step) == 11
    assert_close(last.state, whole.state)
    assert_same(mesh, values_of(last.state), "states")
    assert mesh.is_main or not caught


def another_batch_on_any_rank_is_noticed(mesh, folder):
    def data(changed=None):
        def change(batch):
            return {**batch, "x": batch["x"] + 1} if mesh.rank == changed else batch

        return fx.data.batches(examples(), BATCH, seed=3).map(change)

    for changed in (None, 0, 1):
        for steps in (3, 4):  # within an epoch and at its end
            place = folder / f"{changed}-{steps}"
            fit(mesh, steps=steps, data=data(), checkpointer=fx.checkpointer(place))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                fit(mesh, steps=steps + 2, data=data(changed), checkpointer=fx.checkpointer(place), resume=True)
            found = [str(each.message) for each in caught if "as before the checkpoint" in str(each.message)]
            wanted = changed is not None and mesh.is_main
            assert len(found) == wanted, (changed, steps, found)
            assert all(f"expected batch {steps - 1} of the data" in message for message in found), found


def data_of_unknown_length(mesh, folder):
    rows = examples()

    def batches():
        for start in range(0, ROWS, BATCH):
            yield {name: leaf[start : start + BATCH] for name, leaf in rows.items()}

    seen = Seen("position", "epochs_done", "epoch_length")
    result = fit(mesh, data=batches, epochs=2, callbacks=seen)
    assert int(result.state.step) == 10
    assert_close(result.state, fit(None, data=batches, epochs=2).state)
    assert_same(mesh, seen.events, "events")


def data_that_ends_on_one_rank(mesh, folder):
    rows = examples()

    def batches():
        for start in range(0, ROWS - mesh.rank * 2 * BATCH, BATCH):
            yield {name: leaf[start : start + BATCH] for name, leaf in rows.items()}

    error = error_of(lambda: fit(mesh, data=batches, epochs=2))
    assert "same point of the run" in str(error), error
    assert "the end of the data at step 4" in str(error), error


def rewinds_in_memory_and_from_checkpoints(mesh, folder):
    def rewind(state, event: fx.StepEnd):
        is_first = "rewinds" not in str(sorted(state.slots)) and event.step == 8
        return state, fx.Control(rewind=2 if is_first and not done else 0)

    for options in ({"snapshot_every": 3}, {"callbacks": [fx.callbacks.save(every=3)]}):
        done, seen = [], []

        def once(state, event: fx.Rewound, seen=seen, done=done):
            done.append(event.step)
            seen.append((event.from_step, event.to_step, event.times))
            return state, fx.Control()

        callbacks = [*options.pop("callbacks", []), once, rewind]
        path = folder / str(len(options))
        result = fit(mesh, steps=11, callbacks=callbacks, checkpointer=fx.checkpointer(path), **options)
        assert seen == [(8, 6, 1)]
        assert_same(mesh, values_of(result.state), "states")


def rank_zero_keeps_the_time(mesh, folder):
    now = [0.0]

    def clock():
        now[0] += 0.1 if mesh.is_main else 50.0
        return now[0]

    seen = Seen("time")
    result = fit(mesh, steps=1000, clock=clock, callbacks=[fx.callbacks.time_limit(seconds=10), seen])
    assert 5 < int(result.state.step) < 1000
    assert_same(mesh, (int(result.state.step), result.reason, seen.events), "events")


def different_states_are_refused(mesh, folder):
    state, step, data, options = parts(mesh, steps=3)
    weight = state.params["2.bias"] + mesh.rank
    state = state.replace(params={**state.params, "2.bias": weight})
    error = error_of(lambda: fx.fit(state, step, data, **options))
    assert "another state.params['2.bias'] on rank 1 than on rank 0" in str(error), error


def forgotten_mesh_of_the_step_is_found(mesh, folder):
    tx = fx.optim.adam(1e-2)
    error = error_of(lambda: fit(mesh, step=fx.train_step(loss_fn, tx), steps=3))
    assert "after the first step" in str(error), error
    assert "fxtrain.train_step(loss_fn, tx, mesh=mesh)" in str(error), error


def error_of_a_callback_ends_all_ranks(mesh, folder):
    for failing in (0, 1):
        path = folder / str(failing)
        callback = at(4, fail if mesh.rank == failing else lambda: None)
        error = error_of(lambda p=path, c=callback: fit(mesh, steps=9, callbacks=c, checkpointer=fx.checkpointer(p)))
        if mesh.rank == failing:
            assert isinstance(error, ValueError), error
        else:
            assert isinstance(error, fx.distributed.FailedRankError), error
            assert f"rank {failing} at step" in str(error), error
            assert "ValueError: a bad value" in str(error), error
        mesh.gather(None)
        # Rank 0 saves: the state before the failed event, or that in which the error of rank 1 reached it.
        assert fx.checkpointer(path).steps() == [3 if failing == 0 else 4]


def error_of_all_ranks_is_that_of_each(mesh, folder):
    error = error_of(lambda: fit(mesh, steps=9, callbacks=at(4, fail), checkpointer=fx.checkpointer(folder)))
    assert isinstance(error, ValueError), error


def error_of_the_data_ends_all_ranks(mesh, folder):
    rows = examples()

    def convert(batch, position):
        if position == 3 and mesh.rank == 1:
            raise OSError("the disk is gone")
        return batch

    data = fx.data.batches(rows, BATCH, seed=3).map(convert, with_position=True)
    error = error_of(lambda: fit(mesh, data=data, steps=9))
    expected = "the disk is gone" if mesh.rank == 1 else "rank 1 at step 3: OSError: the disk is gone"
    assert expected in str(error), error


def error_in_an_evaluation_ends_all_ranks(mesh, folder):
    def callback(state, event: fx.EvalStep):
        if mesh.rank == 1 and event.index == 2:
            fail()
        return state, fx.Control()

    error = error_of(lambda: fit(mesh, epochs=2, callbacks=callback))
    assert "a bad value" in str(error), error


def error_of_a_save_ends_all_ranks(mesh, folder):
    checkpointer = fx.checkpointer(folder)

    def block(state, event: fx.StepEnd):
        if event.step == 2 and mesh.is_main:
            shutil.rmtree(folder)
            folder.write_text("a file in place of the folder")
        return state, fx.Control(save=event.step == 3)

    error = error_of(lambda: fit(mesh, steps=30, callbacks=block, checkpointer=checkpointer))
    expected = fx.checkpoint.CheckpointError if mesh.is_main else fx.distributed.FailedRankError
    assert isinstance(error, expected), repr(error)


def callbacks_that_depend_on_the_rank_are_found(mesh, folder):
    error = error_of(lambda: fit(mesh, steps=9, callbacks=stop_at(4 if mesh.is_main else 5)))
    assert "expected all ranks to be at the same point of the run" in str(error), error


def saves_are_seen_at_the_same_step(mesh, folder):
    seen = []

    def saved(state, event: fx.Saved):
        seen.append((event.step, pathlib.Path(event.path).name, dict(event.metrics)))
        return state, fx.Control()

    fit(mesh, steps=20, callbacks=[fx.callbacks.save(every=2), saved], checkpointer=fx.checkpointer(folder))
    assert [step for step, *_ in seen] == list(range(2, 21, 2))
    assert_same(mesh, seen, "saves")


def steps_yield_the_same_events(mesh, folder):
    state, step, data, options = parts(mesh, steps=7)
    events = [type(event).__name__ for _, event, _ in fx.steps(state, step, data, **options)]
    assert_same(mesh, events, "events")
    alone, step, data, options = parts(None, steps=7)
    assert events == [type(event).__name__ for _, event, _ in fx.steps(alone, step, data, **options)]


def warnings_are_those_of_rank_zero(mesh, folder):
    def save(state, event: fx.StepEnd):
        return state, fx.Control(save=event.step == 2)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(mesh, steps=3, callbacks=save)
    assert bool(caught) == mesh.is_main, caught


def evaluate_is_that_of_all_rows(mesh, folder):
    state, _, _, options = parts(mesh)
    ours = fx.evaluate(state, options["eval_step"], options["eval_data"], mesh=mesh)
    alone = fx.evaluate(state, fx.eval_step(loss_fn), options["eval_data"])
    assert abs(ours["loss"] - alone["loss"]) < 1e-12
    assert_same(mesh, ours, "metrics")
