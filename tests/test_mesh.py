"""The ranks of a run: launching, errors of lost and hung ranks, collectives, and the rows of each rank."""

import copy
import os
import re
import time

import numpy as np
import pytest
import torch

import fxtrain as fx
from fxtrain._torch_internals import collectives
from fxtrain.compiler.lowering._trace import trace_step
from fxtrain.distributed import Mesh
from tests import processes, ranks


def failure(code, **env):
    result = processes.run(["-c", code], env={**os.environ, **env})
    assert result.returncode == 1
    return result.stderr.strip().splitlines()[-1]


def test_data_must_be_the_number_of_ranks():
    code = "import fxtrain as fx; fx.distributed.mesh(data=2)"
    assert failure(code) == (
        "ValueError: expected data to be the number of ranks, 1, or -1, got 2. Launch the script with torchrun "
        "--nproc-per-node <processes> script.py, with --nproc-per-node 2 on one machine."
    )


def test_ranks_must_fill_both_axes():
    code = "import fxtrain as fx; fx.distributed.mesh(data=2, model=2)"
    assert failure(code) == (
        "ValueError: expected data * model to be the number of ranks, 1, got data=2 and model=2. Launch the script "
        "with torchrun --nproc-per-node <processes> script.py, with --nproc-per-node 4 on one machine."
    )


def test_incomplete_environment_names_what_is_missing():
    code = "import fxtrain as fx; fx.distributed.mesh()"
    assert failure(code, RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost") == (
        "ValueError: expected the environment variables RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, got none named "
        "MASTER_PORT. Launch the script with torchrun --nproc-per-node <processes> script.py, which sets them."
    )


def test_ranks_use_a_process_group_that_is_there():
    code = """
import torch.distributed as dist, fxtrain as fx
dist.init_process_group("gloo")
meshes = [fx.distributed.mesh(2, timeout=60), fx.distributed.mesh(timeout=60)]
print([(mesh.rank, mesh.size, mesh.gather("x")) for mesh in meshes])
"""
    for rank, done in enumerate(ranks.run(code, 2)):
        assert done.stdout == f"{[(rank, 2, ['x', 'x'])] * 2}\n"
        assert not done.stderr


LOST = """
import os, time, torch, fxtrain as fx
mesh = fx.distributed.mesh(timeout=4)
tx = fx.optim.sgd(0.1)
step = fx.train_step(lambda model, batch: (model["w"] * batch).sum(), tx, mesh=mesh)
state, batch = fx.init({"w": torch.ones(())}, tx), torch.ones(2)
for number in range(1, 4):
    if number == 3 and mesh.rank == 1:
        FAIL
    began = time.monotonic()
    try:
        with mesh.collective("gradients of the step", step=number):
            state, output = step(state, batch)
    except fx.distributed.LostRankError as error:
        print(time.monotonic() - began, error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["os._exit(3)", "time.sleep(12); os._exit(3)"], ids=["killed", "hung"])
def test_lost_rank_ends_the_others_in_time(failure):
    began = time.monotonic()
    done, lost = ranks.run(LOST.replace("FAIL", failure), 2, check=False)
    assert lost.returncode == 3
    assert done.returncode == 0, done.stderr
    seconds, _, text = done.stdout.partition(" ")
    assert float(seconds) < 10
    assert time.monotonic() - began < 60
    assert text.startswith(
        "expected all 2 ranks to join the gradients of the step at step 3 within 4 s, got an error on rank 0: "
    )
    assert "Read the logs of the other ranks: one has ended, hangs, or runs other code." in text


def test_error_of_user_code_is_kept():
    mesh = fx.distributed.mesh()
    with pytest.raises(RuntimeError, match=r"^shapes differ$") as caught, mesh.collective("gradients"):
        raise RuntimeError("shapes differ")
    assert type(caught.value) is RuntimeError


def test_collectives_without_operators_of_graphs(monkeypatch):
    group = fx.distributed.mesh().group.group_name
    given = [torch.arange(3.0), torch.arange(4).reshape(2, 2)]
    expected = [collectives.all_reduce(given, group), collectives.all_gather(given[1], group, 1)]
    monkeypatch.setattr(collectives, "_has_operators", lambda: False)
    found = [collectives.all_reduce(given, group), collectives.all_gather(given[1], group, 1)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_dropout_masks_of_a_rank_are_merged():
    layers = [layer for _ in range(4) for layer in (torch.nn.Linear(8, 8), torch.nn.Dropout(0.3))]
    tx, batch = fx.optim.sgd(0.1), torch.randn(16, 8)
    state = fx.init(torch.nn.Sequential(*layers), tx)
    samplers = []

    def backend(graph, inputs):
        samplers.append(sum("bitwise_xor" in str(node.target) for node in graph.graph.nodes))
        return graph

    for mesh in (None, fx.distributed.mesh()):
        step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx, mesh=mesh)
        run = trace_step(step, state, batch, mode=None, in_place=False, backend=backend)().run
        _, output = run(fx.tree.leaves(state), [batch])
        torch.testing.assert_close(output.metrics, step(state, batch)[1].metrics)
    assert samplers[0] == samplers[1]


def test_graph_of_symbolic_sizes_holds_for_uneven_batches():
    def loss_fn(model, batch):
        return torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"])

    def batch(rows):
        return {"x": torch.randn(rows, 5), "y": torch.randint(0, 3, (rows,))}

    tx = fx.optim.adamw(0.1)
    state = fx.init(torch.nn.Sequential(torch.nn.Linear(5, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 3)), tx)
    step = fx.train_step(loss_fn, tx, mesh=fx.distributed.mesh())
    made = trace_step(step, state, batch(12), mode=None, in_place=False, backend="eager", dynamic=True)()
    for rows in (12, 7, 30):
        given = batch(rows)
        assert made.conditions(fx.tree.leaves(given))
        _, output = made.run(fx.tree.leaves(state), fx.tree.leaves(given))
        torch.testing.assert_close(output.metrics, step(state, given)[1].metrics)


# The rows of a rank. Only the size and the rank of a mesh count.


def mesh_of(rank, size):
    return Mesh(size, rank, torch.device("cpu"), 60.0, None, None, None)


def joined(parts):
    """Returns the rows of all ranks in the order of the whole batch."""
    whole = torch.zeros(sum(map(len, parts)), dtype=parts[0].dtype)
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


@pytest.mark.parametrize("drop_last", [True, False, "pad"])
@pytest.mark.parametrize("kind", ["arrays", "dataset", "list", "loader"])
def test_ranks_share_each_batch_of_an_epoch(kind, drop_last):
    items = torch.arange(103)

    def source():
        if kind == "arrays":
            return fx.data.batches({"x": items}, 10, seed=3, drop_last=drop_last)
        if kind == "dataset":
            return fx.data.batches([{"x": item} for item in items], 10, seed=3, drop_last=drop_last)
        if kind == "list":
            return fx.data.sequence([{"x": part} for part in items.split(10)])
        dataset = [{"x": item} for item in items]
        return fx.data.as_source(torch.utils.data.DataLoader(dataset, batch_size=10, drop_last=bool(drop_last)))

    if kind in ("list", "loader") and drop_last == "pad":
        pytest.skip("these sources do not pad")
    whole = source()
    length = 11 if kind == "list" else whole.epoch_length
    for size in (1, 2, 3, 4):
        parts = [fx.distributed.rows(source(), mesh_of(rank, size)) for rank in range(size)]
        for position in range(length):
            batches = [part[position] for part in parts]
            sizes = [len(batch["x"]) for batch in batches]
            assert max(sizes) - min(sizes) <= 1
            expected = whole[position]
            for name in expected:
                assert torch.equal(joined([batch[name] for batch in batches]), expected[name])


def test_order_does_not_depend_on_the_number_of_ranks():
    source = fx.data.batches(torch.arange(50), 8, seed=1, drop_last=False)
    expected = torch.cat([source[position] for position in range(14)])
    # Each step of a run has another number of ranks.
    found = []
    for position in range(14):
        size = 1 + position % 4
        found.append(joined([fx.distributed.rows(source, mesh_of(rank, size))[position] for rank in range(size)]))
    assert torch.equal(torch.cat(found), expected)


def test_rank_reads_only_its_rows():
    read = []

    class Dataset(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            read.append(index)
            return {"x": np.float32(index)}

    rows = fx.distributed.rows(fx.data.batches(Dataset(), 4, shuffle=False), mesh_of(1, 2))
    assert rows[1]["x"].tolist() == [5, 7]
    assert read == [5, 7]
    assert rows.epoch_length == 2


def test_last_example_belongs_to_one_rank():
    source = fx.data.batches({"x": torch.arange(5.0)}, 4, shuffle=False, drop_last=False)
    parts = [fx.distributed.rows(source, mesh_of(rank, 2))[1]["x"].tolist() for rank in range(2)]
    assert parts == [[4.0], []]


def test_rows_are_prefetched():
    rows = fx.distributed.rows(fx.data.batches(torch.arange(12), 4, shuffle=False), mesh_of(1, 2))
    ahead = fx.data.prefetch(rows, size=2)
    assert [ahead[position].tolist() for position in range(3)] == [[1, 3], [5, 7], [9, 11]]
    ahead.close()


def test_random_augmentations_differ_between_ranks():
    class Dataset(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return torch.rand(())

    source = fx.data.batches(Dataset(), 4)
    first, second = (fx.distributed.rows(source, mesh_of(rank, 2)) for rank in range(2))
    assert torch.equal(first[3], first[3])
    assert not torch.equal(first[3], second[3])


def test_values_without_examples_are_the_same_for_all_ranks():
    batch = {
        "positions": torch.arange(5)[None],
        "x": torch.arange(3),
        "scale": torch.tensor(2.0),
        "names": ["a", "b", "c"],
        "pair": (torch.zeros(3, 2), torch.ones(3)),
        "kind": "train",
    }
    found = fx.distributed.rows([batch], mesh_of(1, 2))[0]
    assert (found["x"].tolist(), found["names"], found["kind"]) == ([1], ["b"], "train")
    assert [len(leaf) for leaf in found["pair"]] == [1, 1]
    assert torch.equal(found["positions"], batch["positions"])
    assert found["scale"] == 2.0


def test_tensors_of_other_lengths_are_refused():
    rows = fx.distributed.rows([{"x": torch.zeros(4), "y": torch.zeros(10)}], mesh_of(0, 2))
    with pytest.raises(ValueError, match=r"same first dimension, 4, got .* at batch\['y'\]\. Keep a tensor"):
        rows[0]


def test_average_needs_a_gradient_with_its_examples():
    state = fx.init({"w": torch.ones(())})
    found = fx.gradients(lambda model, batch: model["w"] * batch)(state, torch.ones(()))
    with pytest.raises(TypeError, match=r"expected a gradient that knows its examples, got .*mesh=mesh\)\."):
        fx.distributed.averaged(found, fx.distributed.mesh())


def test_batch_of_runs_is_refused():
    tx = fx.optim.sgd(0.1)
    step = fx.train_step(lambda model, batch: model["w"] * batch.sum(), tx, mesh=fx.distributed.mesh())
    with pytest.raises(ValueError, match="expected a step without a mesh for a batch of runs"):
        step.over_members(lambda callbacks: callbacks)


@pytest.mark.parametrize(
    ("layout", "error", "text"),
    [
        (lambda: fx.distributed.fsdp("model"), ValueError, "expected axis to be 'data', got 'model'. To split modules"),
        (lambda: fx.distributed.fsdp(least=0), ValueError, "expected least to be a positive int, got 0."),
        (lambda: fx.distributed.tensor_parallel(["up"]), TypeError, "expected plan to be a dict from module names"),
        (lambda: fx.distributed.tensor_parallel({"up": "rows"}), ValueError, "Did you mean 'row'?"),
        (lambda: fx.distributed.fsdp, TypeError, "expected layout to be from fxtrain.distributed.fsdp"),
        (lambda: {"up": "column"}, TypeError, "expected layout to be from fxtrain.distributed.fsdp"),
    ],
)
def test_other_layouts_are_refused(layout, error, text):
    with pytest.raises(error, match=re.escape(text)):
        fx.shard(fx.init(torch.nn.Linear(2, 2)), mesh_of(0, 1), layout())


def test_synced_batch_norm_refuses_other_classes():
    class Other(torch.nn.BatchNorm1d):
        pass

    with pytest.raises(TypeError, match=r"expected batch norms of class BatchNorm1d, .*, got a Other"):
        fx.distributed.sync_batch_norm(torch.nn.Sequential(Other(2)), fx.distributed.mesh())


@pytest.mark.parametrize("convert", [lambda module: module, torch.nn.SyncBatchNorm.convert_sync_batchnorm])
def test_synced_batch_norm_of_one_rank_is_a_batch_norm(convert):
    plain = torch.nn.Sequential(torch.nn.BatchNorm2d(3, momentum=None), torch.nn.BatchNorm2d(3, affine=False)).double()
    synced = fx.distributed.sync_batch_norm(convert(copy.deepcopy(plain)), fx.distributed.mesh())
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64)
    for module in (plain, synced):
        module.train()
    for _ in range(3):
        torch.testing.assert_close(synced(x), plain(x), rtol=1e-12, atol=1e-12)
        x = x * 2 + 1
    torch.testing.assert_close(synced.state_dict(), plain.state_dict(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(synced.eval()(x), plain.eval()(x), rtol=1e-12, atol=1e-12)
    tied = torch.nn.Sequential(plain[0], plain[0])
    found = fx.distributed.sync_batch_norm(tied, fx.distributed.mesh())
    assert found[0] is found[1]
    assert type(tied[0]) is torch.nn.BatchNorm2d
    half = x.to(torch.bfloat16)
    assert synced.train().float()(half).dtype == torch.bfloat16
