"""Checks of sharded states with several ranks. ``shared_checks`` runs them."""

import warnings
from random import Random as Rng

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxtrain as fx
from fxtrain import testing, tree
from fxtrain.compiler.check._rounding_noise import RoundingNoise
from fxtrain.compiler.lowering._trace import trace_step
from fxtrain.compiler.passes import _transfer_buckets
from fxtrain.distributed import Shard

ROWS, BATCH, LEAST = 48, 12, 30
SCHEDULES = ("off", "after_backward", "after_forward")


# What the checks share.


def network(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.GELU(), norm(16), nn.Dropout(0.2), nn.Linear(16, 11), nn.Linear(11, 3)]
    return nn.Sequential(*layers).double()


def loss_fn(model, batch):
    logits = model(batch["x"])
    accuracy = fx.metrics.Accuracy.from_model_output(logits=logits, labels=batch["y"])
    return F.cross_entropy(logits, batch["y"]), {"accuracy": accuracy}


def cast_loss(model, batch):
    return loss_fn(model, {**batch, "x": batch["x"].float()})


def examples(rows=ROWS):
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(rows, 6, dtype=torch.float64, generator=generator),
        "y": torch.randint(0, 3, (rows,), generator=generator),
    }


def optimizer():
    rate = fx.schedules.warmup_cosine_decay(0.0, 0.02, warmup_steps=5, decay_steps=20)
    return fx.optim.chain(fx.optim.clip_by_global_norm(0.5), fx.optim.adamw(rate))


def sharded(state, mesh):
    return fx.distributed.shard(state, mesh, least=LEAST)


def parts(mesh, tx=None, dtype=torch.float64, norm=nn.BatchNorm1d):
    tx = optimizer() if tx is None else tx
    return fx.init(network(norm).to(dtype), tx, seed=0), tx


def batch_of(mesh, batch):
    return {name: leaf[mesh.rank :: mesh.size] for name, leaf in batch.items()}


def take(mesh, state, tx, *, steps=4, is_traced=False, reshard="after_forward", bad=None, loss=loss_fn, **options):
    """Returns the state and the output after some steps of a step that is not in a run."""
    step = fx.train_step(loss, tx, mesh=mesh, **options)
    state = state.copy()
    if is_traced:
        state = step.attached(state)
        step = traced(step, state, batch_of(mesh, examples(BATCH)), reshard)
    for index in range(steps):
        batch = batch_of(mesh, examples(BATCH))
        if index == bad:
            batch = {**batch, "x": batch["x"] * float("nan")}
        state, output = step(state, batch)
    return state, output


def traced(step, state, batch, reshard="after_forward", **options):
    """Returns the step as one graph that runs operation by operation."""
    run = trace_step(step, state, batch, mode=None, in_place=False, backend="eager", reshard=reshard, **options)().run
    structure = tree.flatten(state)[1]

    def taken(state, batch):
        leaves, output = run(tree.leaves(state), tree.leaves(batch))
        return tree.unflatten(structure, leaves), output

    return taken


def assert_close(found, expected, tolerance):
    found = fx.distributed.gathered(found)
    for path, one, other in zip(tree.paths(expected), tree.leaves(found), tree.leaves(expected), strict=True):
        limit = max(tolerance, 1e-6) if one.dtype == torch.float32 else tolerance
        torch.testing.assert_close(one, other, rtol=0, atol=limit, msg=lambda text, path=path: f"{path}: {text}")


def placement(state):
    leaves = tree.leaves(state, is_leaf=lambda node: isinstance(node, Shard))
    return [leaf.axis if isinstance(leaf, Shard) else None for leaf in leaves]


def assert_as_replicated(mesh, tx, *, tolerance=1e-10, is_traced=False, dtype=torch.float64, **options):
    """Checks the state and the metrics against those of a replicated run, and that the placement is kept."""
    state, tx = parts(mesh, tx, dtype)
    expected, output = take(mesh, state, tx, **options)
    found, found_output = take(mesh, sharded(state, mesh), tx, is_traced=is_traced, **options)
    assert_close(found, expected, tolerance)
    for one, other in zip(tree.leaves(found_output), tree.leaves(output), strict=True):
        assert type(one) is torch.Tensor
        limit = max(tolerance, 1e-6) if one.dtype == torch.float32 else tolerance
        torch.testing.assert_close(one, other, rtol=0, atol=limit)
    return found


# Checks of states and steps.


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


def memory_at_rest(mesh, folder):
    state = fx.init(nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256)), fx.optim.adamw(1e-3))
    found = fx.distributed.shard(state, mesh)
    own = sum(leaf.untyped_storage().nbytes() for leaf in tree.leaves(found))
    assert own < 0.51 * tree.nbytes(state), own / tree.nbytes(state)


def twenty_steps(mesh, folder):
    callbacks = [fx.callbacks.nan_guard(), fx.callbacks.ema(0.9), fx.callbacks.grad_norms()]
    options = {"steps": 20, "accumulate": 3, "callbacks": callbacks}
    assert_as_replicated(mesh, None, **options)
    state, tx = parts(mesh)
    state = fx.attach(state, fx.train_step(loss_fn, tx, callbacks=callbacks))
    found = sharded(state, mesh)
    new, _ = take(mesh, found, tx, **options)
    assert placement(new) == placement(found)
    assert sum(axis is not None for axis in placement(new)) == 8  # parameters, two moments and an average of two


def schedules(mesh, folder):
    """A step has the same bits with each schedule of its transfers, and the result of replicated ones."""
    callbacks = [fx.callbacks.nan_guard(), fx.callbacks.ema(0.9), fx.callbacks.grad_norms()]
    options = {"steps": 8, "accumulate": 3, "callbacks": callbacks, "is_traced": True}
    found = [assert_as_replicated(mesh, None, reshard=reshard, **options) for reshard in SCHEDULES]
    assert not found[0].diff(found[1])
    assert not found[0].diff(found[2])


class Random(nn.Module):
    """Linear layers of random sizes, some of which share a weight, take its transpose, or use it as another dtype."""

    def __init__(self, random):
        super().__init__()
        width = random.choice([8, 16, 24])
        sizes = [6, *(random.choice([7, width, width, width]) for _ in range(random.randint(3, 8))), 3]
        self.layers = nn.ModuleList(map(nn.Linear, sizes, sizes[1:]))
        self.unused = nn.Linear(8, 8)
        self.kinds = [random.choice(["plain", "again", "cast", "remat"]) for _ in self.layers]

    def forward(self, x):
        for layer, kind in zip(self.layers, self.kinds, strict=True):
            x = x.tanh()
            if kind == "again" and layer.in_features == layer.out_features:
                x = layer(layer(x)) @ layer.weight + layer.weight.sum()
            elif kind == "cast":
                x = F.linear(x.float(), layer.weight.float()).double()
            elif kind == "remat":
                x = fx.remat(layer)(x)
            else:
                x = layer(x)
        return x


def random_schedules(mesh, folder):
    """Random modules, bucket sizes and microbatches give the same bits with each schedule, recomputed or not."""
    for seed in range(8):
        random = Rng(seed)
        torch.manual_seed(seed)
        tx = random.choice([fx.optim.sgd(0.1), fx.optim.adamw(0.01), optimizer()])
        state = sharded(fx.init(Random(random).double(), tx), mesh)
        step = fx.train_step(loss_fn, tx, mesh=mesh, accumulate=random.choice([1, 2]))
        batch = batch_of(mesh, examples(BATCH))
        expected = step(state, batch)
        memory = random.choice(["save", "recompute"])
        with pytest.MonkeyPatch.context() as patch:
            # Gradients are exchanged by gloo, and reduced and scattered by other backends.
            patch.setattr(torch.distributed, "get_backend", lambda group, seed=seed: ("gloo", "nccl")[seed % 2])
            patch.setattr(_transfer_buckets, "_MIN_BYTES", random.choice([1, 1000, 5000]))
            found = [
                traced(step, state, batch, reshard, memory=memory if reshard != "off" else "save")(state, batch)
                for reshard in SCHEDULES
            ]
        for one in found:
            assert_close(one[0], fx.distributed.gathered(expected[0]), 1e-12)
            assert not one[0].diff(found[0][0]), (seed, one[0].diff(found[0][0]))
            torch.testing.assert_close(one[1].metrics["loss"], found[0][1].metrics["loss"], rtol=0, atol=0)


class Live(torch.fx.Interpreter):
    """Runs a graph, and measures the largest total of the memory that its values take, without its inputs."""

    def __init__(self, graph):
        super().__init__(graph)
        self.peak = 0

    def run_node(self, node):
        value = super().run_node(node)
        leaves = [leaf for leaf in tree.leaves([*self.env.values(), value]) if type(leaf) is torch.Tensor]
        storages = [leaf.untyped_storage() for leaf in leaves if not leaf.is_meta]
        given = {leaf.untyped_storage().data_ptr() for each, leaf in self.env.items() if each.op == "placeholder"}
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.peak = max(self.peak, sum(size for address, size in sizes.items() if address not in given))
        return value


def peak(mesh, reshard, **options):
    """Returns the peak of a step whose parameters dominate, as a part of their bytes."""
    torch.manual_seed(0)
    tx = fx.optim.sgd(0.1)
    layers = [part for _ in range(12) for part in (nn.Linear(512, 512), nn.Tanh())]
    state = sharded(fx.init(nn.Sequential(nn.Linear(6, 512), *layers, nn.Linear(512, 3)), tx), mesh)
    step = fx.train_step(cast_loss, tx, mesh=mesh, **options)
    batch = batch_of(mesh, examples(BATCH))
    made = []

    def backend(graph, inputs):
        made.append(Live(graph))
        return made[0].run

    run = trace_step(step, state, batch, mode=None, in_place=True, backend=backend, reshard=reshard)().run
    run(tree.leaves(state.copy()), tree.leaves(batch))
    return made[0].peak / (12 * 512 * 512 * 4)


def peaks(mesh, folder):
    """Where parameters dominate, a step takes least memory if it gathers them again, and most without a schedule."""
    found = {reshard: peak(mesh, reshard) for reshard in SCHEDULES}
    # Parts of gradients take 0.5. The rest is that of whole parameters and gradients.
    assert found["after_backward"] < 0.8 * found["off"], found
    assert found["after_forward"] < 0.7 * found["after_backward"], found


def peaks_of_microbatches(mesh, folder):
    """Microbatches add the parts of their gradients, and no whole ones."""
    found = {accumulate: peak(mesh, "after_forward", accumulate=accumulate) for accumulate in (1, 2, 3)}
    assert found[3] < found[1] + 0.6, found  # 0.5 for the parts of the sum


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
    for is_traced in (False, True):
        made = [make() for make in CALLBACKS.values()]
        assert_as_replicated(mesh, None, callbacks=made, is_traced=is_traced)


def microbatches_and_policies(mesh, folder):
    def logs(state, event: fx.Microbatch):
        return state, fx.Control(log={"norm": tree.global_norm(event.grads)})

    assert_as_replicated(mesh, None, accumulate=2, callbacks=[logs])
    for precision in ("bf16", "fp16"):
        assert_as_replicated(mesh, None, tolerance=1e-5, precision=precision, dtype=torch.float32, loss=cast_loss)


def graph_text(mesh, folder):
    """All ranks trace the same graph, with buckets of gathered parameters and of scattered gradients."""
    state, tx = parts(mesh)
    step = fx.train_step(loss_fn, tx, mesh=mesh, accumulate=2, callbacks=[fx.callbacks.ema(0.9)])
    texts = []

    def backend(graph, inputs):
        assert all(type(value) is torch.Tensor or "Fake" in type(value).__name__ for value in inputs)
        texts.append(graph.code)
        return graph

    batch = batch_of(mesh, examples(BATCH))
    attached = step.attached(sharded(state, mesh))
    for reshard in SCHEDULES:
        trace_step(step, attached, batch, mode=None, in_place=True, backend=backend, reshard=reshard)()
    gathers = [text.count("_c10d_functional.all_gather_into_tensor") for text in texts]
    # One of loss and metrics for each microbatch, and a bucket: for all, or for each microbatch. The backward pass does
    # not need the first layer's weight, and begins with the last one, which is kept.
    assert gathers == [3, 4, 4], gathers
    assert [text.count("_c10d_functional.all_to_all_single") for text in texts] == [2, 2, 2]
    assert not any("reduce_scatter" in text for text in texts)
    assert len(set(mesh.gather(tuple(texts), "graphs"))) == 1


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
    assert found.transfers["all_to_all_single"] == split, found
    assert split < found.transfers["all_gather_into_tensor"] < split + 200, found  # with metrics
    assert found.transfers["all_reduce"] > 0
    measured = fx.explain(fx.eval_step(loss_fn, mesh=mesh), state, batch_of(mesh, examples(BATCH)), calls=0)
    assert split < measured.transfers["all_gather_into_tensor"] < split + 200, measured
    assert "all_to_all_single" not in measured.transfers
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


# Checks of runs.


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


def refused_operations_say_why(mesh, folder):
    """A callback or an optimizer that mixes DTensors with other tensors raises, compiled or not."""
    state, tx = parts(mesh)

    def mixes(state, event: fx.Gradients):
        log = {"sum": (event.grads["0.weight"] * torch.ones(16, 6, dtype=torch.float64)).sum()}
        return state, fx.Control(log=log)

    for is_traced in (False, True):
        with pytest.raises(RuntimeError, match="mixed") as caught:
            take(mesh, sharded(state, mesh), tx, callbacks=[mixes], is_traced=is_traced)
        assert any("full_tensor()" in note for note in caught.value.__notes__)
