"""Checks of the steps of sharded states with several ranks. ``shared_checks`` runs them."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fxtrain as fx
from fxtrain import testing, tree
from fxtrain.compiler.check._rounding_noise import RoundingNoise
from fxtrain.distributed import Shard
from tests.sharded_states import (
    BATCH,
    assert_as_replicated,
    assert_close,
    batch_of,
    cast_loss,
    examples,
    loss_fn,
    optimizer,
    parts,
    placement,
    sharded,
    take,
)


def placements(mesh, folder):
    state, _ = parts(mesh)
    found = sharded(state, mesh)
    axes = {name: leaf.axis for name, leaf in found.params.items() if isinstance(leaf, Shard)}
    # The first axis that two ranks divide: of [11, 16] it is the second. [3, 11] has none.
    assert axes == {"0.weight": 0, "4.weight": 1}, axes
    assert found.params["0.weight"].shape == (16, 6)
    assert not any(isinstance(leaf, Shard) for leaf in found.buffers.values())
    for name in axes:
        own, whole = found.params[name].local, state.params[name]
        assert own.numel() * 2 == whole.numel()
        assert own.untyped_storage().nbytes() * 2 == whole.nbytes
    assert state.diff(fx.distributed.gathered(found)).__bool__() is False
    assert placement(found.copy()) == placement(found)
    assert placement(sharded(found, mesh)) == placement(found)


def states_that_differ(mesh, folder):
    """Ranks that make a module with other parameters each take those of rank 0."""

    def made(seed):
        torch.manual_seed(seed)
        return fx.init(nn.Linear(8, 16), optimizer(), seed=seed)

    found = sharded(made(mesh.rank), mesh)
    assert placement(found) != placement(made(0))
    assert not fx.distributed.gathered(found).diff(made(0))


def memory_at_rest(mesh, folder):
    state = fx.init(nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256)), fx.optim.adamw(1e-3))
    found = fx.shard(state, mesh, fx.distributed.fsdp())
    own = sum(leaf.untyped_storage().nbytes() for leaf in tree.leaves(found))
    assert own < 0.51 * tree.nbytes(state), own / tree.nbytes(state)


def twenty_steps(mesh, folder):
    callbacks = [fx.callbacks.nan_guard(), fx.callbacks.ema(0.9), fx.callbacks.grad_norms()]
    options = {"steps": 20, "accumulate": 3, "callbacks": callbacks}
    (last,) = assert_as_replicated(mesh, None, **options)
    state, tx = parts(mesh)
    state = fx.attach(state, fx.train_step(loss_fn, tx, callbacks=callbacks))
    found = sharded(state, mesh)
    new, _ = take(mesh, found, tx, **{**options, "steps": 2})
    assert placement(new) == placement(last) == placement(found)
    assert sum(axis is not None for axis in placement(new)) == 8  # parameters, two moments and an average of two


def compiled_by_inductor(mesh, folder):
    callbacks = [fx.callbacks.nan_guard(), fx.callbacks.ema(0.9)]
    state, tx = parts(mesh)
    expected, _ = take(mesh, state, tx, steps=20, accumulate=3, callbacks=callbacks)
    step = fx.compile(fx.train_step(loss_fn, tx, mesh=mesh, accumulate=3, callbacks=callbacks), donate=True)
    new = sharded(state, mesh)
    for _ in range(20):
        old, (new, _) = new, step(new, batch_of(mesh, examples(BATCH)))
    assert step.graphs == 1
    assert "traced" in step.route
    with pytest.raises(fx.DonatedError):
        old.params  # noqa: B018
    assert_close(new, expected, 1e-10)


def steps_with_rounding_noise(mesh, folder):
    state, tx = parts(mesh)
    step, batch = fx.train_step(loss_fn, tx, mesh=mesh), batch_of(mesh, examples(BATCH))
    state = step.attached(sharded(state, mesh))
    expected = fx.distributed.gathered(step(state, batch)[0])
    found = []
    for sign in (1.0, -1.0):
        with RoundingNoise(seed=0, sign=sign):
            found.append(step(state, batch)[0])
        assert_close(found[-1], expected, 1e-10)
    one, other = ([leaf for leaf in tree.leaves(new.opt_state) if leaf.is_floating_point()] for new in found)
    assert not any(map(torch.equal, one, other))


def nan_on_one_rank(mesh, folder):
    state, tx = parts(mesh)
    bad = 2 if mesh.rank == 1 else None
    found, _ = take(mesh, sharded(state, mesh), tx, steps=4, bad=bad, callbacks=[fx.callbacks.nan_guard()])
    expected, _ = take(mesh, state, tx, steps=4, bad=bad, callbacks=[fx.callbacks.nan_guard()])
    assert_close(found, expected, 1e-10)
    assert bool(fx.distributed.gathered(found).params["0.weight"].isfinite().all())


OPTIMIZERS = {
    "sgd": lambda: fx.optim.sgd(0.1, momentum=0.9),
    "lamb": lambda: fx.optim.lamb(0.01),
    "lion": lambda: fx.optim.lion(0.01),
    "muon": lambda: fx.optim.muon(0.01),
    "adafactor": lambda: fx.optim.adafactor(0.01),
    "apply_if_finite": lambda: fx.optim.apply_if_finite(fx.optim.adam(0.01), max_consecutive=3),
    "every_k": lambda: fx.optim.every_k(fx.optim.adam(0.01), 2),
    "inject": lambda: fx.optim.inject_hyperparams(fx.optim.adam)(learning_rate=0.01),
    "masked": lambda: fx.optim.masked(fx.optim.adam(0.01), lambda path, leaf: leaf.ndim == 2),
}


def optimizers(mesh, folder):
    for name, make in OPTIMIZERS.items():
        try:
            assert_as_replicated(mesh, make())
        except Exception as error:
            raise AssertionError(name) from error


CALLBACKS = {
    "weight_stats": lambda: fx.callbacks.weight_stats(),
    "histograms": lambda: fx.callbacks.watch("all", every=1),
    "updates": lambda: fx.callbacks.watch("updates", every=2),
    "grad_norms": lambda: fx.callbacks.grad_norms(norm="l1"),
    "grad_flow": lambda: fx.callbacks.grad_flow(every=2),
    "update_ratios": lambda: fx.callbacks.update_ratios(),
    "spike_guard": lambda: fx.callbacks.spike_guard(watch="grad_norm"),
    "nan_guard": lambda: fx.callbacks.nan_guard(),
    "swa": lambda: fx.callbacks.swa(start=1),
}


def callbacks_in_the_step(mesh, folder):
    made = [make() for make in CALLBACKS.values()]
    assert_as_replicated(mesh, None, callbacks=made, schedules=(None, "after_forward"))


def microbatches_and_policies(mesh, folder):
    def logs(state, event: fx.Microbatch):
        return state, fx.Control(log={"norm": tree.global_norm(event.grads)})

    assert_as_replicated(mesh, None, accumulate=2, callbacks=[logs])
    for precision in ("bf16", "fp16"):
        assert_as_replicated(mesh, None, tolerance=1e-5, precision=precision, dtype=torch.float32, loss=cast_loss)


def explained(mesh, folder):
    """``fx.explain`` counts what a rank has and sends, and leaves the state as it is."""
    state, tx = parts(mesh)
    whole, state = state, sharded(state, mesh)
    before = tree.map(torch.clone, state)
    found = fx.explain(fx.train_step(loss_fn, tx, mesh=mesh), state, batch_of(mesh, examples(BATCH)), calls=2)
    assert (found.graphs, found.breaks) == (1, ()), found
    assert found.seconds["graph"] > 0
    assert found.state_bytes["params"] == tree.nbytes(state.params) < tree.nbytes(whole.params)
    leaves = tree.leaves(state.params, is_leaf=lambda node: isinstance(node, Shard))
    split = sum(leaf.shape.numel() * 8 for leaf in leaves if isinstance(leaf, Shard))
    # gloo's own reduce-scatter transfers twice as much.
    scatter = "all_to_all_single" if dist.get_backend(mesh.group) == "gloo" else "reduce_scatter_tensor"
    assert found.transfers[scatter] == split, found
    assert split < found.transfers["all_gather_into_tensor"] < split + 200, found  # with metrics
    assert found.transfers["all_reduce"] > 0
    measured = fx.explain(fx.eval_step(loss_fn, mesh=mesh), state, batch_of(mesh, examples(BATCH)), calls=0)
    assert split < measured.transfers["all_gather_into_tensor"] < split + 200, measured
    assert scatter not in measured.transfers
    testing.assert_equal(state, before, "the state")


def refused(mesh, folder):
    state, tx = parts(mesh)
    found = sharded(state, mesh)
    for call in (
        lambda: fx.view(found),
        lambda: fx.state_dict(found),
        lambda: fx.to_module(found),
        lambda: fx.save_weights(folder / "weights.pt", found),
        lambda: fx.attach(found, fx.callbacks.ema(0.9)),
        lambda: fx.train_step(loss_fn, tx)(found, examples(4)),
        lambda: fx.eval_step(loss_fn)(found, examples(4)),
        lambda: fx.Step(lambda state, batch: (state, fx.StepOutput({})))(found, examples(4)),
        lambda: fx.fit(found, fx.train_step(loss_fn, tx), [examples(4)], steps=1),
        lambda: fx.save(folder / "state", found),
        lambda: fx.gradients(loss_fn)(found, examples(4)),
    ):
        with pytest.raises((TypeError, ValueError, fx.CheckpointError), match="shard"):
            call()
    with pytest.raises(AttributeError, match="gathered"):
        found.params["0.weight"].norm()
    other = fx.distributed.mesh()
    with pytest.raises(ValueError, match="backend"):
        fx.compile(fx.train_step(loss_fn, tx, mesh=mesh), backend="eager")(found, examples(4))
    with pytest.raises(ValueError, match="another mesh"):
        fx.train_step(loss_fn, tx, mesh=other)(found, examples(4))


def refused_operations_say_why(mesh, folder):
    """A callback or an optimizer that mixes DTensors with other tensors raises, compiled or not."""
    state, tx = parts(mesh)

    def mixes(state, event: fx.Gradients):
        log = {"sum": (event.grads["0.weight"] * torch.ones(16, 6, dtype=torch.float64)).sum()}
        return state, fx.Control(log=log)

    for reshard in (None, "after_forward"):
        with pytest.raises(RuntimeError, match="mixed") as caught:
            take(mesh, sharded(state, mesh), tx, callbacks=[mixes], reshard=reshard)
        assert any("full_tensor()" in note for note in caught.value.__notes__)
