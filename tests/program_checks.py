"""Checks of programs of several ranks: repeated parts with transfers. ``shared_checks`` runs them."""

import contextlib
import functools
import importlib
import itertools
import operator
import time

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxtrain as fx
from fxtrain.compiler.passes import _repeats as repeats
from fxtrain.compiler.passes import _splitting as splitting
from fxtrain.compiler.passes import _transfer_buckets
from tests.sharded_states import BATCH, assert_close, batch_of, examples, loss_fn, optimizer

lowering = importlib.import_module("fxtrain.compiler.lowering._inductor")
light_files = lowering.light_files

LAYERS = 6
WIDTH = 128

transfers = torch.ops._c10d_functional


def network():
    torch.manual_seed(0)
    layers = [part for _ in range(LAYERS) for part in (nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU())]
    return nn.Sequential(nn.Linear(6, 16), *layers, nn.Linear(16, 3)).double()


def compiled(mesh, state, folder, steps=5):
    """Trains with small parts. Returns the last state, the program, and the parts that this rank has compiled first.

    Where code cannot be stored, as on GPUs, a rank that has helped another one then compiles all parts for itself.
    """
    found, made = [], []
    split, compile_part = lowering.split, lowering._compiled

    def recorded(graph):
        program = split(graph)
        transfers_between_calls(program, len(graph.graph.find_nodes(op="placeholder")))
        found.append(program)
        made.append([])
        return program

    def counted(graph, *args, **options):
        made[-1].append(next(index for index, part in enumerate(found[-1].graphs) if part is graph))
        return compile_part(graph, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        patch.setattr(splitting, "_MIN_ELEMENTS", 1)
        patch.setattr(repeats, "_MIN_SAVED", 8)
        # One bucket per layer.
        patch.setattr(_transfer_buckets, "_MIN_BYTES", 1000)
        patch.setattr(lowering, "split", recorded)
        patch.setattr(lowering, "_compiled", counted)
        tx = optimizer()
        step = fx.compile(fx.train_step(loss_fn, tx, mesh=mesh), donate=True)
        for _ in range(steps):
            state, _ = step(state, batch_of(mesh, examples(BATCH)))
    is_stored = mesh.device.type == "cpu" and lowering.light_files is light_files
    assert len(found) == 1 or (not is_stored and len(found) == 2)
    return state, found[-1], made[0]


def expected(mesh, state, steps=5):
    step = fx.train_step(loss_fn, optimizer(), mesh=mesh)
    for _ in range(steps):
        state, _ = step(state, batch_of(mesh, examples(BATCH)))
    return state


def collectives(graph):
    return sum(getattr(node.target, "namespace", "") == "_c10d_functional" for node in graph.graph.nodes)


def transfers_between_calls(program, inputs):
    """Returns how many transfers one call starts and another waits for. Both must have what these send.

    Args:
        program: The program.
        inputs: The number of its inputs.
    """
    slots, count = [None] * inputs, 0
    for number, call in enumerate(program.calls):
        part = program.graphs[call.graph].graph
        given = dict(zip(part.find_nodes(op="placeholder"), [slots[slot] for slot in call.reads], strict=True))
        for wait in part.nodes:
            if "wait_tensor" in str(wait.target):
                assert wait.args[0] not in given or "all_reduce" in str(given[wait.args[0]][1].target)
            elif "arrived" in str(wait.target) and wait.args[0] in given:
                (starter, received), sent = (given[node] for node in wait.args)
                is_one_of_many = received.target is operator.getitem
                started = received.args[0].args[0][received.args[1]] if is_one_of_many else received.args[0]
                assert sent == (starter, started)
                count += 1
        for slot in call.frees:
            slots[slot] = None
        slots += [(number, node) for node in part.output_node().args[0]]
    return count


def calls(program):
    """Returns how often each graph of a program is called."""
    numbers = [call.graph for call in program.calls]
    return {index: numbers.count(index) for index in range(len(program.graphs))}


@functools.cache
def compiled_layers(mesh, folder):
    """Compiles sharded layers once, for the checks of their program and of its parts. Arguments as for ``compiled``."""
    state = fx.init(network(), optimizer(), seed=0)
    return compiled(mesh, fx.shard(state, mesh, fx.distributed.fsdp(least=30)), folder)


def sharded_layers(mesh, folder):
    """Layers with their transfers, and updates, are compiled once."""
    state = fx.init(network(), optimizer(), seed=0)
    found, program, _ = compiled_layers(mesh, folder.parent / "layers")
    assert_close(found, expected(mesh, state), 1e-10)
    repeated = [program.graphs[index] for index, count in calls(program).items() if count > 1]
    assert any(map(collectives, repeated))
    assert any(any("copy_" in str(node.target) for node in part.graph.nodes) for part in repeated)
    assert len(set(mesh.gather(tuple(part.code for part in program.graphs), "programs"))) == 1


def sent_memory_is_not_reused(mesh, folder):
    """Parts start transfers and then compute results of the same size, while another rank has not yet received."""
    half, group = WIDTH * WIDTH // 2, mesh.group.group_name

    def exchange(x):
        rows = [part.view(2, -1) for part in (x[:half].sin(), x[half:].cos())]
        return [transfers.all_to_all_single(torch.cat(rows, 1).view(-1), [half] * 2, [half] * 2, group)]

    def gather(x):
        parts = [part.contiguous().view(-1) for part in (x.cos(), x.view(WIDTH, WIDTH).t().sin())]
        return transfers.all_gather_into_tensor_coalesced(parts, 2, group)

    def layers(start, x, y):
        started = start(x)
        for _ in range(LAYERS):
            x = sum(map(transfers.wait_tensor, started))[: WIDTH * WIDTH]
            started = start(x)
            for _ in range(3):
                y = torch.mm(y, y).sin()
        return [*map(transfers.wait_tensor, started), y]

    def between_waits(graph, *_):
        nodes = [node for node in graph.nodes if node.op == "call_function"]
        ends = [index for index, node in enumerate(nodes) if "arrived" in str(node.target)]
        bounds = ends[:: len(ends) // (LAYERS + 1)]
        return [[nodes[begin:end] for begin, end in itertools.pairwise(bounds)]]

    torch.manual_seed(mesh.rank)
    given = [torch.randn(WIDTH * WIDTH), torch.randn(WIDTH, WIDTH) / WIDTH]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
        patch.setattr(splitting, "repeated_layers", between_waits)
        patch.setattr(splitting, "_FREE_BYTES", 2**30)
        for start in (exchange, gather):
            graph = make_fx(functools.partial(layers, start), tracing_mode="fake")(*given)
            program = splitting.split(graph)
            assert transfers_between_calls(program, len(given)) >= LAYERS
            fakes = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
            compiled = lowering.compile_by_inductor(graph, fakes, {}, False, lambda *_, **__: contextlib.nullcontext())
            mesh.gather(None, "before the call")
            time.sleep(mesh.rank)
            for found, wanted in zip(compiled.call(given), layers(start, *given), strict=True):
                torch.testing.assert_close(found, wanted)


def code_that_cannot_be_stored(mesh, folder):
    """A rank that has helped another one then compiles all parts for itself, as on GPUs."""

    def refuse(call, source):
        raise lowering.NotStorableError("its kernels are not in C++")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowering, "light_files", refuse)
        replicated_updates(mesh, folder)


def replicated_updates(mesh, folder):
    """Updates from one bucket of averaged gradients are compiled once."""
    state = fx.init(network(), optimizer(), seed=0)
    found, program, _ = compiled(mesh, state.copy(), folder)
    assert_close(found, expected(mesh, state), 1e-10)
    repeated = [program.graphs[index] for index, count in calls(program).items() if count > 1]
    assert any(any("copy_" in str(node.target) for node in part.graph.nodes) for part in repeated)


def parts_are_compiled_by_all_ranks(mesh, folder):
    layers = folder.parent / "layers"
    _, program, parts = compiled_layers(mesh, layers)
    # The rank that compiles the whole graph takes all parts in order, some of them from the cache.
    helped, whole = sorted(mesh.gather(parts, "parts"), key=lambda taken: taken == sorted(taken))
    assert whole == list(range(len(program.graphs)))
    assert helped[0] == len(program.graphs) - 1
    assert helped == sorted(helped, reverse=True)
    assert not list(layers.rglob("*.lease"))
