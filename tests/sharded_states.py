"""States and steps for checks of sharded training."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxtrain as fx
from fxtrain import tree
from fxtrain.compiler.lowering import _trace as tracing
from fxtrain.distributed import Shard

ROWS, BATCH, LEAST = 48, 12, 30
SCHEDULES = ("off", "after_backward", "after_forward")


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
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    return {
        "x": torch.randn(rows, 6, dtype=torch.float64, generator=generator),
        "y": torch.randint(0, 3, (rows,), generator=generator),
    }


def optimizer():
    rate = fx.schedules.warmup_cosine_decay(0.0, 0.02, warmup_steps=5, decay_steps=20)
    return fx.optim.chain(fx.optim.clip_by_global_norm(0.5), fx.optim.adamw(rate))


def sharded(state, mesh):
    return fx.shard(state, mesh, fx.distributed.fsdp("data", least=LEAST))


def parts(mesh, tx=None, dtype=torch.float64, norm=nn.BatchNorm1d):
    tx = optimizer() if tx is None else tx
    return fx.init(network(norm).to(dtype), tx, seed=0), tx


def batch_of(mesh, batch):
    return {name: leaf[mesh.rank :: mesh.size] for name, leaf in batch.items()}


def take(mesh, state, tx, *, steps=4, reshard=None, bad=None, loss=loss_fn, **options):
    """Returns the state and the output after some steps of a step that is not in a run, traced if it has a schedule."""
    step = fx.train_step(loss, tx, mesh=mesh, **options)
    state = state.copy()
    if reshard is not None:
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
    given = {"mode": None, "in_place": False, "backend": "eager", "reshard": reshard, **options}
    run = tracing.trace_step(step, state, batch, **given)().run
    structure = tree.flatten(state)[1]

    def taken(state, batch):
        leaves, output = run(tree.leaves(state), tree.leaves(batch))
        return tree.unflatten(structure, leaves), output

    return taken


@contextlib.contextmanager
def one_trace():
    """A context in which one step is traced once, because its trace is the same for all schedules of its transfers."""
    made, make_fx = [], tracing.make_fx

    def traced_once(function, **options):
        def trace(*tensors):
            if made:
                function(*(tensor.clone() for tensor in tensors))  # records the structure of the results
            else:
                made.append(make_fx(function, **options)(*tensors))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.fx.GraphModule, "recompile", lambda graph: None)  # done again after all passes
                return copy.deepcopy(made[0])

        return trace

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "make_fx", traced_once)
        yield


def assert_close(found, expected, tolerance):
    found = fx.distributed.gathered(found)
    for path, one, other in zip(tree.paths(expected), tree.leaves(found), tree.leaves(expected), strict=True):
        limit = max(tolerance, 1e-6) if one.dtype == torch.float32 else tolerance
        torch.testing.assert_close(one, other, rtol=0, atol=limit, msg=lambda text, path=path: f"{path}: {text}")


def placement(state):
    leaves = tree.leaves(state, is_leaf=lambda node: isinstance(node, Shard))
    return [leaf.axis if isinstance(leaf, Shard) else None for leaf in leaves]


def assert_as_replicated(mesh, tx, *, tolerance=1e-10, schedules=(None,), dtype=torch.float64, **options):
    """Checks the state and the metrics of each schedule against a replicated run. Returns the states.

    Args:
        schedules: Schedules of transfers for ``take``.
    """
    state, tx = parts(mesh, tx, dtype)
    expected, output = take(mesh, state, tx, **options)
    with one_trace():
        results = [take(mesh, sharded(state, mesh), tx, reshard=reshard, **options) for reshard in schedules]
    for found, found_output in results:
        assert_close(found, expected, tolerance)
        for one, other in zip(tree.leaves(found_output), tree.leaves(output), strict=True):
            assert type(one) is torch.Tensor
            limit = max(tolerance, 1e-6) if one.dtype == torch.float32 else tolerance
            torch.testing.assert_close(one, other, rtol=0, atol=limit)
    return [found for found, _ in results]
