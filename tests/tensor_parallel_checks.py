"""Checks of tensor parallel steps and runs with several ranks. ``shared_checks`` runs them."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxtrain as fx
from fxtrain import tree
from fxtrain._torch_internals import collectives
from fxtrain.cli._transformer import Config, Transformer
from fxtrain.compiler.lowering._trace import trace_step
from fxtrain.distributed import Shard
from tests.sharded_checks import batch_of, placement, traced

ROWS, BATCH = 48, 12
GATED_PLAN = {"0.up": "column", "0.gate": "column", "*.out": "row", "2": "column", "4": "row"}
TRANSFORMER_PLAN = {"blocks.*.qkv": "column", "blocks.*.up": "column", "blocks.*.out": "row"}


# What the checks share.


class Gated(nn.Module):
    """A gated perceptron, whose two column modules have one input."""

    def __init__(self, width):
        super().__init__()
        self.up, self.gate = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width, bias=False)
        self.out = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        return x + self.dropout(self.out(F.silu(self.gate(x)) * self.up(x)))


def network():
    torch.manual_seed(0)
    layers = [Gated(6), nn.LayerNorm(6), nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3), nn.Dropout(0.1)]
    return nn.Sequential(*layers).double()


def loss_fn(model, batch):
    logits = model(batch["x"])
    accuracy = fx.metrics.Accuracy.from_model_output(logits=logits, labels=batch["y"])
    return F.cross_entropy(logits, batch["y"]), {"accuracy": accuracy, "size": logits.square().mean()}


def examples(rows=ROWS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(rows, 6, dtype=torch.float64, generator=generator),
        "y": torch.randint(0, 3, (rows,), generator=generator),
    }


def transformer(**options):
    shape = Config(**{"layers": 1, "width": 16, "heads": 2, "length": 8, "dropout": 0.2, **options})
    return Transformer(shape, torch.Generator().manual_seed(0)).double()


def text_loss(model, batch):
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())


def texts(rows=BATCH, seed=1):
    tokens = torch.randint(0, 256, (rows, 9), generator=torch.Generator().manual_seed(seed))
    return {"x": tokens[:, :-1], "y": tokens[:, 1:]}


def optimizer():
    rate = fx.schedules.warmup_cosine_decay(0.0, 0.02, warmup_steps=5, decay_steps=20)
    return fx.optim.chain(fx.optim.clip_by_global_norm(0.5), fx.optim.adamw(rate))


MODELS = {
    "perceptron": (network, GATED_PLAN, loss_fn, examples),
    "transformer": (transformer, TRANSFORMER_PLAN, text_loss, texts),
}


def callbacks():
    return [fx.callbacks.grad_norms(), fx.callbacks.ema(0.9), fx.callbacks.nan_guard()]


def train(mesh, name, tx, *, steps=20, is_traced=False, is_split=True, compiled=None, dtype=None, **options):
    """Returns the last state and output of a model. Without a mesh, those of one process."""
    make, plan, loss, make_batch = MODELS[name]
    options = {"callbacks": callbacks(), "accumulate": 2, **options}
    step = fx.train_step(loss, tx, mesh=mesh, **options)
    state = step.attached(fx.init(make().to(dtype), tx, seed=3))

    def batch(seed):
        whole = make_batch(BATCH, seed=seed)
        whole["x"] = whole["x"] if dtype is None else whole["x"].to(dtype)
        return whole if mesh is None else batch_of(mesh, whole)

    if mesh is not None and is_split:
        state = fx.distributed.shard(state, mesh, plan=plan)
        before = placement(state)
        assert any(axis == 1 for axis in before)
    if is_traced:
        step = traced(step, state, batch(0))
    step = step if compiled is None else compiled(step)
    for seed in range(steps):
        state, output = step(state, batch(seed))
    if mesh is not None and is_split:
        assert placement(state) == before
    return state, output


def assert_close(found, expected, tolerance=1e-10):
    found, expected = map(whole, (found, expected))
    for path, one, other in zip(tree.paths(expected), tree.leaves(found), tree.leaves(expected), strict=True):
        assert type(one) is torch.Tensor, path
        limit = max(tolerance, 1e-6) if other.dtype == torch.float32 else tolerance
        torch.testing.assert_close(one, other, rtol=0, atol=limit, msg=lambda text, path=path: f"{path}: {text}")


def whole(value):
    return fx.distributed.gathered(value) if isinstance(value, fx.TrainState) else value


def assert_as_alone(mesh, name, tx=None, **options):
    tx = optimizer() if tx is None else tx
    alone = {key: value for key, value in options.items() if key not in ("is_traced", "compiled", "is_split")}
    expected, expected_output = train(None, name, tx, **alone)
    state, output = train(mesh, name, tx, **options)
    assert_close(state, expected)
    assert_close(output, expected_output)
    assert_same_bits(mesh, whole(state))
    return state


def assert_same_bits(mesh, value):
    leaves = [leaf.tolist() for leaf in tree.leaves(value)]
    assert all(other == leaves for other in mesh.gather(leaves, "values"))


# Checks of steps.


def placements(mesh, folder):
    state = fx.attach(fx.init(transformer(layers=2), optimizer()), callbacks())
    found = fx.distributed.shard(state, mesh, plan=TRANSFORMER_PLAN)
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
    assert placement(fx.distributed.shard(found, mesh, plan=TRANSFORMER_PLAN)) == placement(found)


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
        state = fx.distributed.shard(state, mesh, plan=TRANSFORMER_PLAN)
        found = step(state, batch_of(mesh, texts()))[0]
        assert_close(traced(step, state, batch_of(mesh, texts()))(state, batch_of(mesh, texts()))[0], whole(found))
        return found

    assert_close(taken(mesh), taken(None))


def replicated_state_on_two_axes(mesh, folder):
    assert_as_alone(mesh, "transformer", is_split=False, steps=3)


def evaluations(mesh, folder):
    state = fx.init(transformer(), optimizer(), seed=3)
    expected = fx.eval_step(text_loss)(state, texts()).metrics
    found = fx.distributed.shard(state, mesh, plan=TRANSFORMER_PLAN)
    step = fx.eval_step(text_loss, mesh=mesh)
    assert_close(step(found, batch_of(mesh, texts())).metrics, expected)
    assert_close(fx.compile(step)(found, batch_of(mesh, texts())).metrics, expected)


def handwritten_gradients(mesh, folder):
    state = fx.init(network(), optimizer(), seed=3)
    expected = fx.gradients(loss_fn)(state, examples(BATCH))
    found = fx.distributed.shard(state, mesh, plan=GATED_PLAN)
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
    found = fx.distributed.shard(expected, mesh, plan=plan)
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
    state = fx.distributed.shard(fx.init(transformer(), tx, seed=3), mesh, plan=TRANSFORMER_PLAN)
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
    part = fx.distributed.shard(state, mesh, plan=TRANSFORMER_PLAN)
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
        (network(), None, ValueError, "expected a plan for a mesh with 2 ranks per model, got none"),
    ):
        with pytest.raises(error, match=text):
            fx.distributed.shard(fx.init(module), mesh, plan=plan)


def refused_passes(mesh, folder):
    def run(plan, *layers):
        state = fx.init(nn.Sequential(nn.Linear(6, 8), *layers, nn.Linear(8, 4)).double(), fx.optim.sgd(0.1))
        state = fx.distributed.shard(state, mesh, plan=plan)
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
    found = fx.distributed.shard(fx.init(network(), tx), mesh, plan=GATED_PLAN)
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
    state = step.attached(fx.distributed.shard(fx.init(network(), tx), mesh, plan=GATED_PLAN))
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
    found = fx.distributed.shard(found, mesh, plan={"0": "column", "2": "row"})
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


# Checks of runs.


def fit(mesh, plan=None, state=None, **options):
    """Trains the transformer. Without a mesh, in one process."""
    tx = optimizer()
    state = fx.init(transformer(), tx, seed=3) if state is None else state
    if plan is not None:
        state = fx.distributed.shard(state, mesh, plan=plan)
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
