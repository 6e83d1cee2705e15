"""Checks of data parallel steps with several ranks. Each is the name of a function. ``shared_checks`` runs them."""

import dataclasses
import hashlib
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxtrain as fx
from fxtrain._torch_internals import collectives
from fxtrain.compiler.lowering._trace import trace_step

ROWS, FEATURES, CLASSES = 24, 5, 3


# What the checks share.


def data(dtype=torch.float64, rows=ROWS, seed=1):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return {
        "x": torch.randn(rows, FEATURES, dtype=dtype, generator=generator),
        "y": torch.randint(0, CLASSES, (rows,), generator=generator),
    }


def part(batch, mesh):
    return batch if mesh is None else {name: leaf[mesh.rank :: mesh.size] for name, leaf in batch.items()}


def network(*layers, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 16), *layers, nn.GELU(), nn.Linear(16, CLASSES)).to(dtype)


def network_of(*layers):
    module = nn.Sequential(*layers).double()
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(torch.rand(parameter.shape, dtype=torch.float64, generator=generator) - 0.4)
    return module


def loss_fn(model, batch):
    logits = model(batch["x"])
    accuracy = fx.metrics.Accuracy.from_model_output(logits=logits, labels=batch["y"])
    return F.cross_entropy(logits, batch["y"]), {"accuracy": accuracy, "size": logits.square().mean()}


def optimizer():
    rate = fx.schedules.warmup_cosine_decay(0.0, 0.02, warmup_steps=5, decay_steps=20)
    return fx.optim.chain(fx.optim.clip_by_global_norm(0.5), fx.optim.adamw(rate))


def train(mesh, module, tx, batches, *, loss=loss_fn, run_step=None, same_bits=True, results=None, **options):
    """Returns the last state and output, after checking that all ranks have the same bits after each step.

    Args:
        results: A list that receives the state and the output of each step.
    """
    step = fx.train_step(loss, tx, mesh=mesh, **options)
    state = step.attached(fx.init(module, tx, seed=3))
    take = step if run_step is None else run_step(step, state, part(batches[0], mesh))
    for batch in batches:
        state, output = take(state, part(batch, mesh))
        if mesh is not None and same_bits:
            assert_same_bits(mesh, (state, output.metrics, output.control))
        if results is not None:
            results.append((state, output))
    return state, output


def traced(step, state, batch):
    """Returns the step as one graph that runs operation by operation."""
    run = trace_step(step, state, batch, mode=None, in_place=False, backend="eager")().run
    structure = fx.tree.flatten(state)[1]

    def take(state, batch):
        leaves, output = run(fx.tree.leaves(state), fx.tree.leaves(batch))
        return fx.tree.unflatten(structure, leaves), output

    return take


def assert_same_bits(mesh, values):
    digest = hashlib.sha256()
    for leaf in fx.tree.leaves(values):
        digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    assert len(set(mesh.gather(digest.hexdigest(), "bits"))) == 1


def assert_close(found, expected, tolerance):
    paths = fx.tree.paths(expected)
    for path, one, other in zip(paths, fx.tree.leaves(found), fx.tree.leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance, msg=lambda text, path=path: f"{path}: {text}")


def assert_as_alone(mesh, tolerance, *args, **options):
    """Checks the state and the metrics against those of a single process with the whole batches."""
    alone = {name: value for name, value in options.items() if name != "run_step"}
    state, output = train(mesh, *args, **options)
    expected, expected_output = train(None, *args, **alone)
    assert_close(state, expected, tolerance)
    assert_close(output.metrics, expected_output.metrics, tolerance)
    assert_close(output.weight, expected_output.weight, tolerance)
    return state


# Checks.


def twenty_steps(mesh):
    module = network(nn.Dropout(0.2), nn.LayerNorm(16))
    callbacks = [fx.callbacks.nan_guard(), fx.callbacks.grad_norms(), fx.callbacks.ema(0.9)]
    batches = [data(seed=seed) for seed in range(20)]
    assert_as_alone(mesh, 1e-12, module, optimizer(), batches, accumulate=3, callbacks=callbacks)


def twenty_steps_traced(mesh):
    module = network(nn.Dropout(0.2), nn.LayerNorm(16))
    callbacks = [fx.callbacks.nan_guard(), fx.callbacks.ema(0.9)]
    batches = [data(seed=seed) for seed in range(20)]
    options = {"accumulate": 3, "callbacks": callbacks, "run_step": traced}
    assert_as_alone(mesh, 1e-12, module, optimizer(), batches, **options)


def by_autograd(mesh):
    module = network(nn.Dropout(0.2))
    batches = [data(seed=seed) for seed in range(5)]
    assert_as_alone(mesh, 1e-12, module, optimizer(), batches, accumulate=2, differentiate="autograd")


def float32_sgd(mesh):
    module = network(nn.Dropout(0.2), dtype=torch.float32)
    batches = [data(torch.float32, seed=seed) for seed in range(20)]
    assert_as_alone(mesh, 1e-5, module, fx.optim.sgd(0.1, momentum=0.9), batches)


def uneven_batches(mesh):
    batches = [data(rows=rows, seed=rows) for rows in (2 * mesh.size + 1, 3 * mesh.size - 1, mesh.size)]
    assert_as_alone(mesh, 1e-12, network(nn.Dropout(0.2)), optimizer(), batches)


def rank_without_examples(mesh):
    batches = [data(rows=rows, seed=rows) for rows in (mesh.size + 1, mesh.size - 1)]
    assert_as_alone(mesh, 1e-12, network(nn.Dropout(0.2)), optimizer(), batches)


def weighted_losses(mesh):
    def loss(model, batch):
        kept = (batch["y"] > 0).to(torch.float64)
        losses = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        return fx.weighted((losses * kept).sum() / kept.sum(), kept.sum()), {"kept": (losses * kept).sum() / kept.sum()}

    batches = [data(seed=seed) for seed in range(3)]
    batches[1]["y"][:: mesh.size] = 0  # the first rank has weight 0
    batches[2]["y"][:] = 0  # all ranks have
    assert_as_alone(mesh, 1e-12, network(), optimizer(), batches, loss=loss, accumulate=2)


def microbatch_callbacks(mesh):
    def add(state, event: fx.Microbatch, slot):
        return slot + event.loss * event.grads["0.weight"].norm(), fx.Control()

    seen = fx.stateful("seen", lambda state: torch.zeros((), dtype=torch.float64), add)
    batches = [data(seed=seed) for seed in range(3)]
    assert_as_alone(mesh, 1e-12, network(nn.Dropout(0.2)), optimizer(), batches, accumulate=2, callbacks=[seen])


def transformed_batches(mesh):
    def noisy(state, batch):
        return {**batch, "x": batch["x"] + torch.randn_like(batch["x"]) * torch.rand(len(batch["x"]), 1)}

    batches = [data(seed=seed) for seed in range(3)]
    assert_as_alone(mesh, 1e-12, network(), optimizer(), batches, transform_batch=noisy)


def nan_on_one_rank(mesh):
    def loss(model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"])

    batches = [data(seed=seed) for seed in range(4)]
    batches[2]["x"][mesh.size - 1] = torch.nan  # an example of the last rank
    for run_step in (None, traced):
        options = {"loss": loss, "callbacks": [fx.callbacks.nan_guard()], "run_step": run_step, "results": []}
        last, _ = train(mesh, network(), optimizer(), batches, **options)
        (before, _), (after, output) = options["results"][1:3]
        assert_close(after.params, before.params, 0)
        assert output.metrics["loss"].isnan()
        assert not torch.equal(last.params["0.weight"], after.params["0.weight"])


def used_parameters(mesh):
    def loss(model, batch):
        logits = model["shared"](batch["x"])
        # The second head is used by the examples of the first rank only.
        return (model["head"](logits) if mesh.rank == 0 else logits).square().mean()

    torch.manual_seed(0)
    module = {"shared": nn.Linear(FEATURES, 2).double(), "head": nn.Linear(2, 2).double()}
    tx = fx.optim.sgd(0.1, momentum=0.9)
    state, _ = train(mesh, module, tx, [data()], loss=loss)
    head = fx.init(module, tx, seed=3).params["head"]
    assert not torch.equal(state.params["head"]["weight"], head["weight"])


def batch_norm_statistics(mesh):
    state, _ = train(mesh, network(nn.BatchNorm1d(16)), optimizer(), [data(rows=ROWS + 1)] * 3)
    assert int(state.buffers["1.num_batches_tracked"]) == 3


def synced_batch_norm(mesh):
    # Biases before a batch norm have zero gradients, whose rounding errors AdamW would amplify.
    convolution = (nn.Conv1d(1, 4, 2, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten())
    plain = network_of(*convolution, nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, CLASSES))
    synced = fx.distributed.sync_batch_norm(plain, mesh)
    assert synced.state_dict().keys() == plain.state_dict().keys()

    def mean(model, batch):
        return F.cross_entropy(model(batch["x"][:, None]), batch["y"])

    def weighted(model, batch):
        kept = (batch["y"] > 0).double()
        losses = F.cross_entropy(model(batch["x"][:, None]), batch["y"], reduction="none")
        return fx.weighted((losses * kept).sum() / kept.sum(), kept.sum())

    batches = [data(seed=seed) for seed in range(20)]
    uneven = [data(rows=rows, seed=rows) for rows in (2 * mesh.size + 1, 3 * mesh.size - 1)]
    for loss, run_steps, accumulate, given in (
        (mean, (None, traced), 3, batches),
        (mean, (None,), 1, uneven),
        (weighted, (None,), 1, uneven),
    ):
        options = {"loss": loss, "accumulate": accumulate}
        expected, expected_output = train(None, plain, optimizer(), given, **options)
        for run_step in run_steps:
            state, output = train(mesh, synced, optimizer(), given, run_step=run_step, **options)
            assert_close(state, expected, 1e-11)
            assert_close(output.metrics, expected_output.metrics, 1e-11)
    by_autograd, _ = train(mesh, synced, optimizer(), batches[:5], loss=mean, differentiate="autograd")
    expected, _ = train(None, plain, optimizer(), batches[:5], loss=mean)
    assert_close(by_autograd, expected, 1e-11)


def collectives_in_a_graph(mesh):
    """Each collective that steps use, uncompiled and compiled, on the backend of the mesh."""
    group, size = mesh.group.group_name, mesh.size
    rows = torch.arange(4.0 * size).reshape(size, 4) + mesh.rank

    def run(rows):
        many = [*gather_many([rows, 2 * rows], size, group), *scatter_many([rows, 2 * rows], "sum", size, group)]
        return (
            *collectives.all_reduce([rows, 2 * rows], group),
            *collectives.all_gather_all([rows, 2 * rows], group, size),
            *collectives.reduce_scatter([rows, 2 * rows], group, size),
            *map(torch.ops._c10d_functional.wait_tensor, many),
        )

    gather_many = collectives.of_many(torch.ops._c10d_functional.all_gather_into_tensor.default)
    scatter_many = collectives.of_many(torch.ops._c10d_functional.reduce_scatter_tensor.default)
    total = sum(rows - mesh.rank + rank for rank in range(size))
    all_rows = torch.stack([rows - mesh.rank + rank for rank in range(size)])
    expected = [
        *(total, 2 * total),
        *(all_rows, 2 * all_rows),
        *(total[mesh.rank], 2 * total[mesh.rank]),
        *(all_rows.flatten(0, 1), 2 * all_rows.flatten(0, 1)),
        *(total[mesh.rank][None], 2 * total[mesh.rank][None]),
    ]
    for taken in (run, torch.compile(run, fullgraph=True)):
        for found, value in zip(taken(rows), expected, strict=True):
            assert torch.equal(found, value)


def graph_text(mesh):
    step = fx.train_step(loss_fn, optimizer(), mesh=mesh, accumulate=2, callbacks=[fx.callbacks.nan_guard()])
    state = step.attached(fx.init(network(nn.Dropout(0.2)), optimizer(), seed=3))
    texts = []

    def backend(graph, inputs):
        texts.append(graph.code)
        return graph

    trace_step(step, state, part(data(), mesh), mode=None, in_place=True, backend=backend)()
    assert len(texts) == 1
    assert texts[0].count("_c10d_functional.all_reduce") == 1
    assert texts[0].count("_c10d_functional.all_gather_into_tensor") == 1
    assert len(set(mesh.gather(texts[0], "graphs"))) == 1


def compiled_by_inductor(mesh):
    module = network(nn.BatchNorm1d(16), nn.Dropout(0.2))
    module[0].bias = None
    synced = fx.distributed.sync_batch_norm(module, mesh)
    # The uneven batch needs a second graph, on the first rank only.
    batches, tx = [data(seed=seed) for seed in range(3)], fx.optim.sgd(0.1, momentum=0.9)
    batches.insert(2, data(rows=ROWS + 1))
    steps = []

    def compiled(step, state, batch):
        steps.append(fx.compile(step, donate=True, fullgraph=True, check=True, on_recompile="allow"))
        return steps[0]

    # The check runs the uncompiled step on all ranks.
    with_logs = Logs("fxtrain.compiler.check._first_calls")
    state, output = train(mesh, synced, tx, batches, run_step=compiled)
    expected, expected_output = train(None, module, tx, batches)
    assert_close((state, output.metrics), (expected, expected_output.metrics), 1e-11)
    assert steps[0].graphs == (2 if mesh.is_main else 1)
    assert [text.partition(" ")[0] for text in with_logs.texts] == ["Checked"]


def miscompiled_on_one_rank(mesh):
    def backend(graph, inputs):
        def run(*tensors):
            outputs = graph(*tensors)
            off = mesh.rank == mesh.size - 1
            return [out + 0.01 if off and out.is_floating_point() and out.ndim == 2 else out for out in outputs]

        return run

    step = fx.compile(fx.train_step(loss_fn, fx.optim.sgd(0.1), mesh=mesh), backend=backend, check=True)
    state = fx.init(network(), fx.optim.sgd(0.1), seed=3)
    with pytest.raises(fx.MiscompiledError, match="expected the result of the uncompiled step from the first call"):
        step(state, part(data(), mesh))


class Logs(logging.Handler):
    """The texts that a logger receives."""

    def __init__(self, name):
        super().__init__(logging.INFO)
        self.texts = []
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record):
        self.texts.append(record.getMessage())


def evaluation(mesh):
    module = network(nn.Dropout(0.2))
    state = fx.init(module, seed=3)
    everything = data(rows=6 * mesh.size + 1)
    whole = fx.data.batches(everything, 4 * mesh.size, shuffle=False, drop_last=False)
    found = fx.evaluate(state, fx.eval_step(loss_fn, mesh=mesh), fx.distributed.rows(whole, mesh))
    expected = fx.evaluate(state, fx.eval_step(loss_fn), whole)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert abs(found[name] - value) < 1e-12, (name, found[name], value)

    def masked(model, batch):
        losses = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        return {"loss": (losses * batch["mask"]).sum() / batch["mask"].sum()}

    padded = fx.data.batches(everything, 4 * mesh.size, shuffle=False, drop_last="pad")
    found = fx.evaluate(state, fx.eval_step(masked, mesh=mesh), fx.distributed.rows(padded, mesh))
    expected = fx.evaluate(state, fx.eval_step(masked), padded)
    assert abs(found["loss"] - expected["loss"]) < 1e-12


def several_buckets(mesh):
    """Gradients of several dtypes, of which those of one dtype do not fit into one bucket."""
    size = 4 * 2**20
    params = {
        "first": torch.ones(size),
        "second": torch.ones(size),
        "complex": torch.ones(3, dtype=torch.complex64),
        "double": torch.ones(2, 2, dtype=torch.float64),
        "half": torch.ones(5, dtype=torch.bfloat16),
        "scalar": torch.ones(()),
    }

    def loss(model, batch):
        x = batch["x"].mean()
        parts = [model[name].abs().square().mean().double() for name in params]
        return sum(number * part for number, part in enumerate(parts, 1)) * x

    step = fx.gradients(loss, mesh=mesh)
    state, batch = fx.init(params), data(rows=ROWS + 1)
    found = fx.distributed.averaged(step(state, part(batch, mesh)), mesh)
    expected = fx.gradients(loss)(state, batch)
    assert_same_bits(mesh, found.grads)
    for name, grad in found.grads.items():
        torch.testing.assert_close(grad, expected.grads[name])


def hand_written_steps(mesh):
    def step_of(mesh):
        find, tx = fx.gradients(loss_fn, mesh=mesh), fx.optim.sgd(0.1)

        @fx.Step
        def step(state, batch):
            found = find(state, batch)
            found = found if mesh is None else fx.distributed.averaged(found, mesh)
            return fx.step.update(state, found, tx)

        return step, fx.init(network(nn.Dropout(0.2)), tx, seed=3)

    results = []
    for ranks in (mesh, None):
        step, state = step_of(ranks)
        for seed in range(3):
            state, output = step(state, part(data(rows=ROWS + 1, seed=seed), ranks))
        results.append((state, output.metrics))
    assert_same_bits(mesh, results[0])
    assert_close(*results, 1e-12)


def growing_metrics(mesh):
    class Growing(fx.metrics.Average):
        growing = ("total",)

    def measure(model, batch):
        return {"curve": Growing.from_model_output(batch["x"])}

    state = fx.init(network(), seed=3)
    with pytest.raises(TypeError, match="expected the metric 'curve' to have a fixed size on all ranks, got Growing"):
        fx.eval_step(measure, mesh=mesh)(state, part(data(), mesh))


def replicated_states(mesh):
    torch.manual_seed(mesh.rank)
    module = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    module.register_buffer("flags", torch.rand(5) > 0.5)
    given = fx.init(module, optimizer(), seed=mesh.rank)
    before = given.copy()
    state = fx.shard(given, mesh)
    assert_close(given, before, 0)
    assert_same_bits(mesh, state)
    assert int(state.seed) == 0
    pairs = zip(fx.tree.leaves(state), fx.tree.leaves(given), strict=True)
    assert not any(found.data_ptr() == old.data_ptr() for found, old in pairs)
    assert state.params["0.weight"].stride() == given.params["0.weight"].stride()
    other = fx.init(nn.Linear(2 + mesh.rank, 2))
    with pytest.raises(ValueError, match=r"expected states with the same leaves on all ranks, got others at .*weight"):
        fx.shard(other, mesh)


def precision_policies(mesh):
    """The loss scale finds an overflow of one rank on all, and half precision has the same bits on all."""
    module = network(nn.LayerNorm(16), dtype=torch.float32)
    batches = [data(torch.float32, seed=seed) for seed in range(6)]
    for precision in ("bf16", "fp16"):
        if precision == "fp16":
            batches[3]["x"][mesh.size - 1] = 1e30  # overflows on the last rank
        state, output = train(mesh, module, fx.optim.sgd(0.1), batches, precision=precision)
        alone, _ = train(None, module, fx.optim.sgd(0.1), batches, precision=precision)
        assert_close(state.params, alone.params, 0.02)
        assert_close(state.slots, alone.slots, 0)
        assert output.metrics["loss"].isfinite()


def host_facts(mesh):
    assert mesh.gather({"rank": mesh.rank}) == [{"rank": rank} for rank in range(mesh.size)]
    assert mesh.broadcast(("text", mesh.rank)) == ("text", 0)
    assert mesh.broadcast(mesh.rank, group=mesh.background) == 0
    given = torch.tensor([mesh.rank, -mesh.rank], device="cpu")
    assert mesh.maximum(given).tolist() == [mesh.size - 1, 0]
    assert given.tolist() == [mesh.rank, -mesh.rank]
    assert dataclasses.is_dataclass(mesh)
    assert (mesh.device, mesh.is_main) == (torch.get_default_device(), mesh.rank == 0)
