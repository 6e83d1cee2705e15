"""Checks of when sharded steps gather and sum: bits, peaks and graphs. ``shared_checks`` runs them."""

import functools
from random import Random as Rng

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fxtrain as fx
from fxtrain import tree
from fxtrain.compiler.lowering._trace import trace_step
from fxtrain.compiler.passes import _transfer_buckets
from tests.sharded_states import (
    BATCH,
    SCHEDULES,
    assert_as_replicated,
    assert_close,
    batch_of,
    cast_loss,
    examples,
    loss_fn,
    one_trace,
    optimizer,
    parts,
    sharded,
    traced,
)


def schedules(mesh, folder):
    """A step has the same bits with each schedule of its transfers, and the result of replicated ones."""
    callbacks = [fx.callbacks.nan_guard(), fx.callbacks.ema(0.9), fx.callbacks.grad_norms()]
    found = assert_as_replicated(mesh, None, steps=8, accumulate=3, callbacks=callbacks, schedules=SCHEDULES)
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
            patch.setattr(dist, "get_backend", lambda group, seed=seed: ("gloo", "nccl")[seed % 2])
            patch.setattr(_transfer_buckets, "_MIN_BYTES", random.choice([1, 1000, 5000]))
            with one_trace():
                steps = [
                    traced(step, state, batch, reshard, memory=memory if reshard != "off" else "save")
                    for reshard in SCHEDULES
                ]
                found = [taken(state, batch) for taken in steps]
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


@functools.cache
def peaks_by_schedule(mesh, schedules=SCHEDULES, **options):
    """Returns the peak of a step whose parameters dominate, as a part of their bytes, with each schedule."""
    torch.manual_seed(0)
    tx = fx.optim.sgd(0.1)
    layers = [part for _ in range(12) for part in (nn.Linear(512, 512), nn.Tanh())]
    state = sharded(fx.init(nn.Sequential(nn.Linear(6, 512), *layers, nn.Linear(512, 3)), tx), mesh)
    step = fx.train_step(cast_loss, tx, mesh=mesh, **options)
    batch = batch_of(mesh, examples(BATCH))
    made = []

    def backend(graph, inputs):
        # As Inductor does. The DTensors of torch 2.11 leave operations on empty tensors in the trace.
        graph.graph.eliminate_dead_code()
        graph.recompile()
        made.append(Live(graph))
        return made[-1].run

    with one_trace():
        for reshard in schedules:
            run = trace_step(step, state, batch, mode=None, in_place=True, backend=backend, reshard=reshard)().run
            run(tree.leaves(state.copy()), tree.leaves(batch))
    return {reshard: each.peak / (12 * 512 * 512 * 4) for reshard, each in zip(schedules, made, strict=True)}


def peaks(mesh, folder):
    """Where parameters dominate, a step takes least memory if it gathers them again, and most without a schedule."""
    found = peaks_by_schedule(mesh)
    # Parts of gradients take 0.5. The rest is that of whole parameters and gradients.
    assert found["after_backward"] < 0.8 * found["off"], found
    assert found["after_forward"] < 0.7 * found["after_backward"], found


def peaks_of_microbatches(mesh, folder):
    """Microbatches add the parts of their gradients, and no whole ones."""
    whole, several = peaks_by_schedule(mesh), peaks_by_schedule(mesh, ("after_forward",), accumulate=3)
    # 0.5 for the parts of the sum.
    assert several["after_forward"] < whole["after_forward"] + 0.6, (several, whole)


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
    with one_trace():
        for reshard in SCHEDULES:
            trace_step(step, attached, batch, mode=None, in_place=True, backend=backend, reshard=reshard)()
    gathers = [text.count("_c10d_functional.all_gather_into_tensor") for text in texts]
    # One of loss and metrics for each microbatch, and a bucket: for all, or for each microbatch. The backward pass does
    # not need the first layer's weight, and begins with the last one, which is kept.
    assert gathers == [3, 4, 4], gathers
    used, unused = "all_to_all_single", "reduce_scatter"
    if dist.get_backend(mesh.group) != "gloo":
        used, unused = unused, used
    assert [text.count(f"_c10d_functional.{used}") for text in texts] == [2, 2, 2]
    assert not any(unused in text for text in texts)
    assert len(set(mesh.gather(tuple(texts), "graphs"))) == 1
