"""Checks of programs of several ranks. ``shared_checks`` runs them."""

import importlib

import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain.compiler.passes import _repeats as repeats
from fxtrain.compiler.passes import _splitting as splitting
from tests.sharded_states import BATCH, assert_close, batch_of, examples, loss_fn, optimizer

lowering = importlib.import_module("fxtrain.compiler.lowering._inductor")

LAYERS = 6


def network():
    torch.manual_seed(0)
    layers = [part for _ in range(LAYERS) for part in (nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU())]
    return nn.Sequential(nn.Linear(6, 16), *layers, nn.Linear(16, 3)).double()


def compiled(mesh, state, folder, steps=5):
    """Trains with small parts. Returns the last state, the program, and the parts that this rank has compiled."""
    found, made = [], []
    split, compile_part = lowering.split, lowering._compiled

    def recorded(graph):
        found.append(split(graph))
        return found[-1]

    def counted(graph, *args, **options):
        made.append(graph)
        return compile_part(graph, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        patch.setattr(splitting, "_MIN_ELEMENTS", 1)
        patch.setattr(repeats, "_MIN_SAVED", 8)
        patch.setattr(lowering, "split", recorded)
        patch.setattr(lowering, "_compiled", counted)
        tx = optimizer()
        step = fx.compile(fx.train_step(loss_fn, tx, mesh=mesh), donate=True)
        for _ in range(steps):
            state, _ = step(state, batch_of(mesh, examples(BATCH)))
    (program,) = found
    parts = (
        [] if program is None else [next(i for i, each in enumerate(program.graphs) if each is part) for part in made]
    )
    return state, program, parts


def expected(mesh, state, steps=5):
    step = fx.train_step(loss_fn, optimizer(), mesh=mesh)
    for _ in range(steps):
        state, _ = step(state, batch_of(mesh, examples(BATCH)))
    return state


def calls(program):
    """Returns how often each graph of a program is called."""
    numbers = [call.graph for call in program.calls]
    return {index: numbers.count(index) for index in range(len(program.graphs))}


def sharded_steps_are_whole(mesh, folder):
    """A part that starts a transfer and does not wait for it would reuse the memory that is sent."""
    state = fx.init(network(), optimizer(), seed=0)
    found, program, _ = compiled(mesh, fx.distributed.shard(state, mesh, least=30), folder)
    assert_close(found, expected(mesh, state), 1e-10)
    assert program is None


def replicated_updates(mesh, folder):
    """Updates from one bucket of averaged gradients are compiled once."""
    state = fx.init(network(), optimizer(), seed=0)
    found, program, _ = compiled(mesh, state.copy(), folder)
    assert_close(found, expected(mesh, state), 1e-10)
    repeated = [program.graphs[index] for index, count in calls(program).items() if count > 1]
    assert any(any("copy_" in str(node.target) for node in part.graph.nodes) for part in repeated)


def parts_are_compiled_by_all_ranks(mesh, folder):
    state = fx.init(network(), optimizer(), seed=0)
    _, program, parts = compiled(mesh, state, folder)
    # The rank that compiles the whole graph takes all parts in order, some of them from the cache.
    helped, whole = sorted(mesh.gather(parts, "parts"), key=lambda taken: taken == sorted(taken))
    assert whole == list(range(len(program.graphs)))
    assert helped[0] == len(program.graphs) - 1
    assert helped == sorted(helped, reverse=True)
    assert not list(folder.rglob("*.lease"))
