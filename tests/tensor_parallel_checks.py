"""Checks of tensor parallel steps with several ranks. ``shared_checks`` runs them."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxtrain as fx
from fxtrain import tree
from fxtrain._torch_internals import collectives
from fxtrain.compiler.lowering._trace import trace_step
from fxtrain.distributed import Shard
from tests.sharded_states import batch_of, placement, traced
from tests.tensor_parallel_models import (
    BATCH,
    GATED_PLAN,
    MODELS,
    TRANSFORMER_PLAN,
    assert_as_alone,
    assert_close,
    assert_same_bits,
    callbacks,
    examples,
    loss_fn,
    network,
    optimizer,
    text_loss,
    texts,
    train,
    transformer,
    whole,
)


def placements(mesh, folder):
    state = fx.attach(fx.init(transformer(layers=2), optimizer()), callbacks())
    found = fx.shard(state, mesh, fx.distributed.tensor_parallel(TRANSFORMER_PLAN))
    names = {name: leaf.axis for name, leaf in found.params.items() if isinstance(leaf, Shard)}
    parts = {"attention.qkv": 0, "attention.out": 1, "perceptron.up": 0, "perceptron.out": 1}
    assert names == {f"blocks.{index}.{part}.weight": axis for index in (0, 1) for part, axis in parts.items()}
    # Parameters, two moments and an average of each.
    assert sum(axis is not None for axis in placement(found)) == 4 * len(names)
    own = found.params["blocks.0.attention.qkv.weight"].local
    start = 48 // mesh.model.size * mesh.model.rank
    assert torch.equal(own, state.params["blocks.0.attention.qkv.weight"][start : start + len(own)])
    assert own.untyped_storage().nbytes() == own.nbytes
    assert not state.diff(fx.distributed.gathered(found))
    again = fx.shard(found, mesh, fx.distributed.tensor_parallel(TRANSFORMER_PLAN))
    assert placement(again) == placement(found)


def twenty_steps(mesh, folder):
    for name in MODELS:
        assert_as_alone(mesh, name)


def twenty_steps_traced(mesh, folder):
    assert_as_alone(mesh, "transformer", is_traced=True)


def other_derivatives_and_precisions(mesh, folder):
    assert_as_alone(mesh, "perceptron", differentiate="autograd", steps=4)
    for precision in (
        fx.Policy(compute=torch.bfloat16, keep=("*.out", "2")),
        fx.Policy(param=torch.bfloat16, output=None, keep=("*.out", "2")),
    ):
        options = {"precision": precision, "steps": 2, "dtype": precision.param, "callbacks": []}
        state, _ = train(mesh, "perceptron", optimizer(), **options)
        expected, _ = train(None, "perceptron", optimizer(), **options)
        assert_close(state, expected, 1e-2)
        assert_same_bits(mesh, whole(state))


def optimizers(mesh, folder):
    for tx in (fx.optim.muon(0.01), fx.optim.adafactor(0.01)):
        assert_as_alone(mesh, "transformer", tx, steps=2, callbacks=[])


def recomputed_blocks(mesh, folder):
    """Recomputed modules repeat their collectives in the backward pass."""
    tx = fx.optim.adam(0.01)

    def taken(mesh):
        step = fx.train_step(text_loss, tx, mesh=mesh)
        module = transformer(layers=2)
        module.blocks[0], module.blocks[1].perceptron = (
            fx.remat(module.blocks[0]),
            fx.remat(module.blocks[1].perceptron),
        )
        state = fx.init(module, tx, seed=3)
        if mesh is None:
            return step(state, texts())[0]
        state = fx.shard(state, mesh, fx.distributed.tensor_parallel(TRANSFORMER_PLAN))
        found = step(state, batch_of(mesh, texts()))[0]
        assert_close(traced(step, state, batch_of(mesh, texts()))(state, batch_of(mesh, texts()))[0], whole(found))
        return found

    assert_close(taken(mesh), taken(None))


def replicated_state_on_two_axes(mesh, folder):
    assert_as_alone(mesh, "transformer", is_split=False, steps=3)


def evaluations(mesh, folder):
    state = fx.init(transformer(), optimizer(), seed=3)
    expected = fx.eval_step(text_loss)(state, texts()).metrics
    found = fx.shard(state, mesh, fx.distributed.tensor_parallel(TRANSFORMER_PLAN))
    step = fx.eval_step(text_loss, mesh=mesh)
    assert_close(step(found, batch_of(mesh, texts())).metrics, expected)
    assert_close(fx.compile(step)(found, batch_of(mesh, texts())).metrics, expected)


def handwritten_gradients(mesh, folder):
    state = fx.init(network(), optimizer(), seed=3)
    expected = fx.gradients(loss_fn)(state, examples(BATCH))
    found = fx.shard(state, mesh, fx.distributed.tensor_parallel(GATED_PLAN))
    found = fx.distributed.averaged(fx.gradients(loss_fn, mesh=mesh)(found, batch_of(mesh, examples(BATCH))), mesh)
    grads = fx.distributed.gathered(state.replace(params=found.grads)).params
    assert_close(grads, expected.grads)
    assert tree.leaves(found.used) == tree.leaves(expected.used)


def dict_of_models_with_frozen_parts(mesh, folder):
    def loss(model, batch):
        return F.cross_entropy(model["head"](model["body"](batch["x"])), batch["y"])

    torch.manual_seed(0)
    tx, modules = optimizer(), {"body": network(), "head": nn.Linear(3, 3).double()}
    expected = fx.with_trainable(fx.init(modules, tx, seed=3), tx, ["body.0.*", "body.4.bias", "head.*"])
    plan = {"body.0.[ug]*": "column", "*.out": "row", "body.2": "column", "body.4": "row"}
    found = fx.shard(expected, mesh, fx.distributed.tensor_parallel(plan))
    assert isinstance(found.params["body"]["2.weight"], Shard)
    alone, step = fx.train_step(loss, tx), fx.train_step(loss, tx, mesh=mesh)
    for seed in range(3):
        batch = examples(BATCH, seed=seed)
        expected, found = alone(expected, batch)[0], step(found, batch_of(mesh, batch))[0]
    assert_close(found, expected)


def graph_text(mesh, folder):
    """All ranks trace the same graph, with two sums per block and direction, and one or two buckets of gradients."""
    tx = fx.optim.sgd(0.1)
    step = fx.train_step(text_loss, tx, mesh=mesh)
    state = fx.shard(fx.init(transformer(), tx, seed=3), mesh, fx.distributed.tensor_parallel(TRANSFORMER_PLAN))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    trace_step(step, state, batch_of(mesh, texts()), mode=None, in_place=True, backend=backend)()
    (text,) = graphs
    assert text.count("_c10d_functional.all_reduce") == 2 * 2 + 1 + (mesh.size > 1)
    assert text.count("_c10d_functional.all_gather_into_tensor") == 1  # of the loss
    if mesh.size > 1:  # groups of other ranks have other names
        text = re.sub(r"'\d+'", "group", text)
    assert len(set(mesh.gather(text, "graphs"))) == 1


def explained(mesh, folder):
    tx = fx.optim.sgd(0.1)
    step = fx.train_step(text_loss, tx, mesh=mesh, callbacks=[fx.callbacks.ema(0.9)])
    state = fx.init(transformer(), tx, seed=3)
    part = fx.shard(state, mesh, fx.distributed.tensor_parallel(TRANSFORMER_PLAN))
    found = fx.explain(step, part, batch_of(mesh, texts()), calls=0)
    assert found.graphs == 1, found
    assert found.state_bytes["params"] == tree.nbytes(part.params) < tree.nbytes(state.params)
    assert found.transfers["all_reduce"] >= 4 * BATCH * 8 * 16 * 8, found  # two sums per direction of [rows, 8, 16]


def compiled_by_inductor(mesh, folder):
    steps = []

    def compiled(step):
        steps.append(fx.compile(step, donate=True, check=True))
        return steps[0]

    tx = fx.optim.chain(fx.optim.clip_by_global_norm(0.5), fx.optim.sgd(0.1))
    assert_as_alone(mesh, "perceptron", tx, compiled=compiled, steps=3, accumulate=1, callbacks=[])
    assert steps[0].graphs == 1
    assert "traced" in steps[0].route


def refused_plans(mesh, folder):
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    for module, plan, error, text in (
        (network(), {"5": "column"}, TypeError, r"class Linear in the plan, got a Dropout as column module '5'\."),
        (
            network(),
            {"tail.*": "row"},
            ValueError,
            r"expected 'tail\.\*' to match a module, got no match among 0, 0\.up",
        ),
        (
            network(),
            {"2": "columns"},
            ValueError,
            r"expected plan\['2'\] to be one of 'column', 'row', got 'columns'\.",
        ),
        (network(), {"2": "column", "?": "row"}, ValueError, "got both for '2'"),
        (
            network(),
            {"4": "column"},
            ValueError,
            r"4\.weight along axis 0 to be a multiple of the 2 ranks of a model, got 3",
        ),
        (network(), ["2"], TypeError, "expected plan to be a dict"),
        (
            tied,
            {"0": "column"},
            ValueError,
            r"expected 0\.weight, which the plan splits, to be the parameter of one module",
        ),
        (nn.TransformerEncoderLayer(4, 2), {"linear1": "column"}, TypeError, "'linear1' of a TransformerEncoderLayer"),
    ):
        with pytest.raises(error, match=text):
            fx.shard(fx.init(module), mesh, fx.distributed.tensor_parallel(plan))
    with pytest.raises(
        ValueError, match="expected the layout tensor_parallel for a mesh with 2 ranks per model, got fsdp"
    ):
        fx.shard(fx.init(network()), mesh, fx.distributed.fsdp())


def refused_passes(mesh, folder):
    def run(plan, *layers):
        state = fx.init(nn.Sequential(nn.Linear(6, 8), *layers, nn.Linear(8, 4)).double(), fx.optim.sgd(0.1))
        state = fx.shard(state, mesh, fx.distributed.tensor_parallel(plan))
        step = fx.train_step(lambda model, batch: model(batch["x"]).square().mean(), fx.optim.sgd(0.1), mesh=mesh)
        step(state, batch_of(mesh, examples(BATCH)))

    pair = {"0": "column", "[12]": "row"}
    run(pair)
    with pytest.raises(
        ValueError, match=r"expected no random samples between the column module '0' and the row module"
    ):
        run({"0": "column", "2": "row"}, nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"expected the call of a row module after that of the column module '1'"):
        run({"1": "column"})
    with pytest.raises(ValueError, match=r"expected 4 of 8 features as the input of the row module '1', got 8"):
        run({"1": "row"})
    with pytest.raises(
        ValueError, match=r"after the column module '0' and before a row module, got a use of 1\.weight,"
    ):
        run({"0": "column", "2": "row"}, nn.PReLU().double())
    tx = fx.optim.sgd(0.1)
    found = fx.shard(fx.init(network(), tx), mesh, fx.distributed.tensor_parallel(GATED_PLAN))
    batch = batch_of(mesh, examples(BATCH))
    gradient = fx.gradients(loss_fn, mesh=mesh)(found, batch)
    for call in (
        lambda: fx.train_step(loss_fn, tx)(found, batch),
        lambda: fx.eval_step(loss_fn)(found, batch),
        lambda: fx.gradients(loss_fn)(found, batch),
        lambda: fx.step.apply_gradients(found, gradient.grads, tx),
        lambda: fx.view(found),
    ):
        with pytest.raises((TypeError, ValueError), match="shard"):
            call()
    with pytest.raises(ValueError, match="another mesh"):
        fx.train_step(loss_fn, tx, mesh=fx.distributed.mesh(model=2))(found, batch)


def nan_on_one_data_rank(mesh, folder):
    tx = optimizer()
    step = fx.train_step(loss_fn, tx, mesh=mesh, callbacks=[fx.callbacks.nan_guard()])
    state = step.attached(fx.shard(fx.init(network(), tx), mesh, fx.distributed.tensor_parallel(GATED_PLAN)))
    bad = examples(BATCH)
    bad["x"][mesh.size - 1] = torch.nan
    new, output = step(state, batch_of(mesh, bad))
    assert output.metrics["loss"].isnan()
    assert_close(fx.distributed.gathered(new).params, fx.distributed.gathered(state).params, 0)


def synced_batch_norm(mesh, folder):
    def make(mesh):
        torch.manual_seed(0)
        layers = [nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 3)]
        module = nn.Sequential(*layers).double()
        return module if mesh is None else fx.distributed.sync_batch_norm(module, mesh)

    tx = optimizer()
    expected, found = fx.init(make(None), tx), fx.init(make(mesh), tx)
    found = fx.shard(found, mesh, fx.distributed.tensor_parallel({"0": "column", "2": "row"}))
    alone, step = fx.train_step(loss_fn, tx), fx.train_step(loss_fn, tx, mesh=mesh)
    for seed in range(5):
        batch = examples(BATCH, seed=seed)
        expected, found = alone(expected, batch)[0], step(found, batch_of(mesh, batch))[0]
    assert_close(found, expected)


def groups_without_operators(mesh, folder):
    own = torch.tensor([float(mesh.world_rank)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "_has_operators", lambda: False)
        for group, size in ((mesh.group, 2), (mesh.model.group, 2), (mesh.world_group, 4)):
            ranks = torch.distributed.get_process_group_ranks(group)
            assert collectives.all_gather(own, group.group_name, size).flatten().tolist() == ranks
            assert float(collectives.all_reduce([own], group.group_name)[0]) == sum(ranks)
    assert mesh.model.gather(mesh.world_rank) == torch.distributed.get_process_group_ranks(mesh.model.group)
    assert mesh.model.broadcast(mesh.world_rank) == mesh.rank * 2
    assert mesh.gather((mesh.rank, mesh.model.rank)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert int(collectives.rank(own, mesh.ranks_per_model)) == mesh.rank
