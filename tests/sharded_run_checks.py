"""Checks of whole runs of sharded states with several ranks. ``shared_checks`` runs them."""

import warnings

import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import tree
from fxtrain.distributed import Shard
from tests.sharded_states import (
    BATCH,
    assert_close,
    examples,
    loss_fn,
    parts,
    sharded,
)


def fit(mesh, state, tx, **options):
    step = options.pop("step", None) or fx.train_step(loss_fn, tx, mesh=mesh, accumulate=2)
    given = {
        "eval_step": fx.eval_step(loss_fn, mesh=mesh),
        "eval_data": fx.data.batches(examples(), BATCH, shuffle=False),
        "epochs": 3,
        "mesh": mesh,
        **options,
    }
    return fx.fit(state, step, fx.data.batches(examples(), BATCH, seed=3), **given)


def runs(mesh, folder):
    """A run with evaluations, views of averages, summaries and the best weights."""
    state, tx = parts(mesh)

    def options():
        return {
            "callbacks": [
                fx.callbacks.ema(0.9),
                fx.callbacks.grad_norms(),
                fx.callbacks.weight_stats(),
                fx.callbacks.restore_best("loss"),
                fx.callbacks.early_stopping("loss", patience=5),
            ],
            "eval_view": fx.callbacks.averaged,
            "observers": [fx.observers.summary(file=folder / "summary.txt")],
        }

    expected = fit(mesh, state, tx, **options())
    found = fit(mesh, sharded(state, mesh), tx, **options())
    assert any(isinstance(leaf, Shard) for leaf in found.state.params.values())
    assert_close(found.state, expected.state, 1e-10)
    for name in expected.history:
        ours, theirs = (torch.tensor([float(y) for y in result.history[name].values]) for result in (found, expected))
        if not name.startswith("throughput"):
            torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")
    evaluation = (fx.eval_step(loss_fn, mesh=mesh), fx.data.batches(examples(), BATCH, shuffle=False))
    ours = fx.evaluate(found.state, *evaluation, mesh=mesh)
    assert ours == pytest.approx(fx.evaluate(expected.state, *evaluation, mesh=mesh))
    if mesh.is_main:
        assert "(16, 6)" in (folder / "summary.txt").read_text()


def compiled_runs(mesh, folder):
    state, tx = parts(mesh)
    expected = fit(mesh, state, tx)
    step = fx.compile(fx.train_step(loss_fn, tx, mesh=mesh, accumulate=2))
    eval_step = fx.compile(fx.eval_step(loss_fn, mesh=mesh))
    found = fit(mesh, sharded(state, mesh), tx, step=step, eval_step=eval_step)
    assert step.with_donation().graphs == 1
    assert_close(found.state, expected.state, 1e-10)


def callbacks_of_the_loop(mesh, folder):
    """Callbacks see values of all ranks, may view the model, and return states with the same placement."""
    state, tx = parts(mesh)
    seen = []

    def look(state, event: fx.StepEnd):
        weight = state.params["0.weight"]
        output = fx.view(state)(examples()["x"])
        seen.append((float(weight.norm()), float(output.sum()), weight.shape))
        return state.replace(params=tree.map(lambda leaf: leaf * 0.5, state.params)), fx.Control()

    expected = fit(mesh, state, tx, callbacks=[look])
    one, seen = seen[:], []
    found = fit(mesh, sharded(state, mesh), tx, callbacks=[look])
    assert_close(found.state, expected.state, 1e-10)
    assert [norm for norm, *_ in seen] == pytest.approx([norm for norm, *_ in one])
    assert [total for _, total, _ in seen] == pytest.approx([total for _, total, _ in one])


def checkpoints(mesh, folder):
    """Sharded, one process, sharded, replicated: each continues the run of the one before, bitwise."""
    state, tx = parts(mesh, norm=nn.LayerNorm)  # batch norms have other statistics in one process
    callbacks = [fx.callbacks.ema(0.9)]

    def options(name, epochs):
        return {
            "callbacks": [*callbacks, fx.callbacks.save(every=3)],
            "checkpointer": fx.checkpointer(folder / name, keep=None),
            "epochs": epochs,
            "resume": True,
        }

    def restored(name, like):
        with fx.checkpointer(folder / name) as store:
            return store.restore(like)

    whole = fx.attach(state, callbacks)
    first = fit(mesh, sharded(state, mesh), tx, **options("run", 1))
    last = fx.distributed.gathered(first.continue_from)
    if mesh.is_main:
        assert not last.diff(whole_of(restored("run", whole), last)), last.diff(whole_of(restored("run", whole), last))
        with pytest.warns(UserWarning, match="ranks: 2 at the save, 1 now"):
            fit(None, state, tx, **options("run", 2))
    mesh.gather(None, "the run of one process")
    kept = restored("run", whole)
    third = fit(mesh, sharded(state, mesh), tx, **options("run", 3))
    assert any(isinstance(leaf, Shard) for leaf in third.state.params.values())
    assert int(third.state.step) == 12
    assert int(kept.step) == 8
    # The restored values are those of the checkpoint: a run that takes no step returns them.
    again = fit(mesh, sharded(state, mesh), tx, **options("run", 3))
    assert not fx.distributed.gathered(again.state).diff(fx.distributed.gathered(third.continue_from))
    fourth = fit(mesh, state, tx, **options("run", 4))
    assert int(fourth.state.step) == 16
    undisturbed = fit(mesh, state, tx, callbacks=callbacks, epochs=4)
    assert_close(fourth.state.replace(slots={}), undisturbed.state.replace(slots={}), 1e-9)
    # A session of the same process continues the run of its folder.
    with fx.checkpointer(folder / "sessions") as store:
        session = fit(mesh, sharded(state, mesh), tx, epochs=1, checkpointer=store)
        fit(mesh, session.continue_from, tx, epochs=2, checkpointer=store)


def whole_of(restored, like):
    return restored.replace(slots={name: restored.slots[name] for name in like.slots if name in restored.slots})


def rewinds(mesh, folder):
    state, tx = parts(mesh)

    def options():
        gone = []

        def back(state, event: fx.StepEnd):
            again = event.step == 5 and not gone
            if again:
                gone.append(event.step)
            return state, fx.Control(rewind=2 if again else 0)

        return {"callbacks": [back], "snapshots": 4}

    expected = fit(mesh, state, tx, **options())
    found = fit(mesh, sharded(state, mesh), tx, **options())
    assert_close(found.state, expected.state, 1e-10)


def divergence_is_that_of_all_ranks(mesh, folder):
    state, tx = parts(mesh, fx.optim.sgd(0.1))
    weight = state.params["0.weight"].clone()
    weight[-1] = float("nan")  # on the last rank
    state = state.replace(params={**state.params, "0.weight": weight})
    result = fit(mesh, sharded(state, mesh), tx, epochs=1)
    assert "is not finite" in result.reason


def failed_ranks_do_not_save(mesh, folder):
    state, tx = parts(mesh)

    def fail(state, event: fx.StepEnd):
        if event.step == 2 and mesh.rank == 1:
            raise ValueError("on one rank")
        return state, fx.Control()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((ValueError, fx.distributed.FailedRankError), match="on one rank"):
            fit(mesh, sharded(state, mesh), tx, callbacks=[fail], checkpointer=fx.checkpointer(folder))
