"""Checks of whole tensor parallel runs with several ranks. ``shared_checks`` runs them."""

import warnings

import pytest
import torch

import fxtrain as fx
from fxtrain import tree
from fxtrain.distributed import Shard
from tests.tensor_parallel_models import (
    BATCH,
    TRANSFORMER_PLAN,
    assert_close,
    optimizer,
    text_loss,
    texts,
    transformer,
)


def fit(mesh, plan=None, state=None, **options):
    """Trains the transformer. Without a mesh, in one process."""
    tx = optimizer()
    state = fx.init(transformer(), tx, seed=3) if state is None else state
    if plan is not None:
        state = fx.shard(state, mesh, fx.distributed.tensor_parallel(plan))
    given = {
        "eval_step": fx.eval_step(text_loss, mesh=mesh),
        "eval_data": fx.data.batches(texts(24), BATCH, shuffle=False),
        "epochs": 2,
        "mesh": mesh,
        **options,
    }
    step = fx.train_step(text_loss, tx, mesh=mesh)
    return fx.fit(state, step, fx.data.batches(texts(30), BATCH, seed=3, drop_last=False), **given)


def runs(mesh, folder):
    """A run with evaluations, averages, monitors and generated texts is that of one process."""
    tokenizer = Bytes()

    def options():
        generated = fx.callbacks.textgen(["def "], tokenizer, length=8, max_tokens=6)
        averages = [fx.callbacks.ema(0.9), fx.callbacks.grad_norms(), fx.callbacks.weight_stats()]
        return {
            "callbacks": [*averages, generated, fx.callbacks.restore_best("loss")],
            "eval_view": fx.callbacks.averaged,
            "observers": [fx.observers.summary(file=folder / "summary.txt")],
        }

    expected, found = fit(None, **options()), fit(mesh, TRANSFORMER_PLAN, **options())
    assert any(isinstance(leaf, Shard) for leaf in found.state.params.values())
    assert_close(found.state, expected.state)
    assert found.history.keys() == expected.history.keys()
    for name in expected.history:
        ours, theirs = (result.history[name].values for result in (found, expected))
        if name.startswith("textgen"):
            assert [each.markdown for each in ours] == [each.markdown for each in theirs]
        elif not name.startswith("throughput"):
            assert [float(y) for y in ours] == pytest.approx([float(y) for y in theirs], rel=1e-5), name


class Bytes:
    """A tokenizer of bytes."""

    def encode(self, text):
        return list(text.encode())

    def decode(self, tokens):
        return bytes(tokens).decode(errors="replace")


def callbacks_of_the_loop(mesh, folder):
    """Callbacks see values of all ranks, may view the model, and return states with the same placement."""
    seen = []

    def look(state, event: fx.StepEnd):
        output = fx.view(state)(texts()["x"])
        seen.append((float(state.params["blocks.0.attention.out.weight"].norm()), float(output.sum())))
        return state.replace(params=tree.map(lambda leaf: leaf * 0.9, state.params)), fx.Control()

    expected = fit(None, callbacks=[look])
    one, seen = seen[:], []
    found = fit(mesh, TRANSFORMER_PLAN, callbacks=[look])
    assert_close(found.state, expected.state)
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(one))


def checkpoints(mesh, folder):
    """Split, one process, replicated, split: each continues the run of the one before, bitwise."""
    data = fx.distributed.mesh(timeout=mesh.timeout)  # all ranks are data ranks
    callbacks = [fx.callbacks.ema(0.9)]
    blank = fx.attach(fx.init(transformer(), optimizer(), seed=3), callbacks)

    def run(mesh, plan, epochs):
        store = fx.checkpointer(folder / "run", keep=None)
        return fit(mesh, plan, callbacks=callbacks, epochs=epochs, checkpointer=store, resume=True)

    def assert_restored(last):
        """Checks the values of the newest checkpoint, and of each placement that is restored from it."""
        last, epochs = fx.distributed.gathered(last), int(last.step) // 3
        if mesh.is_main:
            with fx.checkpointer(folder / "run") as store:
                restored = store.restore(blank)
            slots = {name: restored.slots[name] for name in last.slots}
            assert not last.diff(restored.replace(slots=slots))
        mesh.gather(None, "the restore of one process")
        # A run that takes no step returns what it restores.
        for ranks, plan in ((mesh, TRANSFORMER_PLAN), (data, None)):
            assert not fx.distributed.gathered(run(ranks, plan, epochs).continue_from).diff(last)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the number of ranks differs
        assert_restored(run(mesh, TRANSFORMER_PLAN, 1).continue_from)
        if mesh.is_main:
            run(None, None, 2)
        mesh.gather(None, "the run of one process")
        assert_restored(run(data, None, 3).continue_from)
        last = run(mesh, TRANSFORMER_PLAN, 4)
        assert_restored(last.continue_from)
    assert int(last.state.step) == 12
    undisturbed = fit(None, callbacks=callbacks, epochs=4)
    assert_close(last.state.replace(slots={}), undisturbed.state.replace(slots={}), 1e-9)
