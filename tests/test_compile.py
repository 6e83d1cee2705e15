"""Compiled steps: one graph for a whole run, with the results of the uncompiled step."""

import gc

import problem
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fxtrain as fx
from fxtrain import testing, tree
from fxtrain._torch_internals.kernels import shared_libraries


@pytest.fixture(autouse=True)
def _fresh_caches():
    """Clears the cache shared by direct calls of ``torch.compile``, because it holds only 8 graphs."""
    torch._dynamo.reset()


def counting():
    return CompileCounterWithBackend("eager")


def inputs(counter):
    """Returns the shapes of the input tensors of the only graph."""
    (graph,) = counter.graphs
    return [tuple(node.meta["example_value"].shape) for node in graph.graph.nodes if node.op == "placeholder"]


def close(got, wanted):
    torch.testing.assert_close(tree.leaves(got), tree.leaves(wanted), rtol=1e-4, atol=1e-5)


def small():
    """Returns the kinds of layers of ``problem`` with fewer tensors, because each takes time to trace."""
    return nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 1))


def everything():
    """Returns a state and a step with accumulation, traced callbacks, metrics and a momentum optimizer."""

    def watch(state, event: fx.Microbatch | fx.Gradients | fx.Updated, memory):
        control = fx.Control(log={f"loss at {type(event).__name__}": event.loss})
        if isinstance(event, fx.Microbatch):
            return memory + event.loss, fx.Control(skip_update=event.loss.isnan(), reason="nan")
        return memory, control | fx.Control(stop=event.loss.isnan(), reason="nan")

    callbacks = [
        fx.stateful("watched", lambda state: torch.tensor(0.0), watch),
        fx.callbacks.nan_guard(),
        fx.callbacks.epoch_mean("loss", "mae"),
    ]
    rate = fx.schedules.cosine(1e-1, 100)
    tx = fx.optim.chain(fx.optim.clip_by_global_norm(1.0), fx.optim.sgd(rate, momentum=0.9))
    step = fx.train_step(problem.loss_fn, tx, accumulate=2, callbacks=callbacks)
    return fx.attach(fx.init(small(), tx), step), step


def compare_backends(graph, inputs):
    """A backend of ``torch.compile`` that compares Inductor with the traced operations, from one trace."""
    with shared_libraries():
        compiled = torch._inductor.compile(graph, inputs)

    def run(*given):
        found = compiled(*given)
        torch.testing.assert_close(found, graph(*given), rtol=1e-4, atol=1e-5)
        return found

    return run


class TestEqualsEager:
    @pytest.mark.slow
    def test_torch_compiles_step_once_as_full_graph(self):
        start, step = everything()
        wanted, state = [], start
        for batch in problem.data():
            state, output = step(state, batch)
            wanted.append((state, output))
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return compare_backends(graph, inputs)

        compiled, state = torch.compile(step, fullgraph=True, backend=backend), start
        for batch, (expected_state, expected) in zip(problem.data(), wanted, strict=True):
            state, output = compiled(state, batch)
            close(state, expected_state)
            close(dict(output.metrics), dict(expected.metrics))
            assert output.control.kinds == expected.control.kinds
            assert output.control.log.keys() == expected.control.log.keys()
        state = state.replace(due=state.due._replace(stop=torch.tensor(True)))
        testing.assert_equal(compiled(state, batch)[0], state, "a stopped state")
        step(start, batch)
        compiled(start, batch)
        assert len(graphs) == 1

    def test_hand_written_step(self):
        find, tx = fx.gradients(problem.loss_fn), fx.optim.sgd(0.1)

        def by_hand(state, batch):
            found = find(state, batch)
            updates, opt_state = tx.update(found.grads, state.opt_state, state.params)
            params = fx.optim.apply_updates(state.params, updates)
            new = state.replace(step=state.step + 1, params=params, opt_state=opt_state, buffers=found.buffers)
            return new, fx.StepOutput({**found.metrics, **fx.optim.learning_rates(tx, state)})

        state, batch = fx.init(small(), tx), problem.data()[0]
        wanted = fx.train_step(problem.loss_fn, tx)(state, batch)
        raw = torch.compile(by_hand, fullgraph=True, backend="aot_eager")(state, batch)
        close(raw[0].params, wanted[0].params)
        close(raw[0].buffers, wanted[0].buffers)
        close(fx.compile(by_hand, backend="aot_eager")(state, batch), wanted)

    def test_evaluation(self):
        state, batch = problem.start(), problem.data()[0]
        wanted = problem.eval_step(state, batch)
        output = fx.compile(problem.eval_step, backend="aot_eager")(state, batch)
        close(dict(output.metrics), dict(wanted.metrics))

    def test_frozen_and_tied_parameters_in_dict_of_modules(self):
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        second.weight = first.weight
        second.bias.requires_grad_(False)
        tx = fx.optim.sgd(1e-2, momentum=0.9)
        state = fx.init({"a": first, "b": second, "scale": torch.tensor(2.0)}, tx)

        def loss_fn(model, batch):
            return (model["b"](model["a"](batch["x"])) * model["scale"]).square().mean()

        step, batch = fx.train_step(loss_fn, tx), problem.data()[0]
        close(fx.compile(step, backend="eager")(state, batch), step(state, batch))

    @pytest.mark.slow
    def test_vmapped_runs(self):
        state, step = everything()
        states = tree.map(
            lambda *leaves: torch.stack(leaves), *[state.replace(seed=state.seed + index) for index in range(3)]
        )
        batch = problem.data()[0]
        wanted = torch.vmap(step, (0, None))(states, batch)
        batched = torch.compile(
            lambda s, b: torch.vmap(step, (0, None))(s, b), fullgraph=True, backend=compare_backends
        )
        close(batched(states, batch), wanted)
        for index in range(3):
            alone, _ = step(state.replace(seed=state.seed + index), batch)
            close(tree.map(lambda leaf, index=index: leaf[index], wanted[0]), alone)


class TestOneGraph:
    def test_evaluations_saves_and_resumes_do_not_recompile(self, tmp_path):
        train, evaluation = counting(), counting()
        step = fx.compile(problem.step(), backend=train)
        options = {
            "eval_step": fx.compile(problem.eval_step, backend=evaluation),
            "eval_data": problem.data(2, seed=1),
            "eval_when": fx.every(4),
        }

        def slot(name, size):
            def update(state, event: fx.StepEnd, memory):
                return memory + 1, fx.Control()

            return fx.stateful(name, lambda state: torch.zeros(size), update)

        checkpoints = fx.checkpointer(tmp_path)
        saving = fx.when(fx.every(8), fx.callbacks.save())
        first = fx.fit(
            problem.start(), step, problem.data(), steps=32, callbacks=[saving], checkpointer=checkpoints, **options
        )
        resumed = fx.fit(
            problem.start(),
            step,
            problem.data(),
            steps=56,
            callbacks=[fx.callbacks.early_stopping("loss", patience=100), slot("b", 977)],
            checkpointer=checkpoints,
            resume=True,
            **options,
        )
        last = fx.fit(resumed.state, step, problem.data(), steps=80, callbacks=[slot("a", 983)], **options).state
        assert (int(first.state.step), int(resumed.state.step), int(last.step)) == (32, 56, 80)
        straight = fx.fit(problem.start(), problem.step(), problem.data(), steps=80).state
        for name in ("params", "buffers", "opt_state", "seed", "position"):
            testing.assert_equal(getattr(last, name), getattr(straight, name), f"{name} of the uncompiled run")
        assert train.frame_count == 1
        assert evaluation.frame_count == 1
        assert {"a", "b", "early_stopping", "loop/evaluated"} <= set(last.slots)
        assert not {(977,), (983,)} & set(inputs(train))
        leaves = tree.leaves((last.replace(slots={}), problem.data()[0]))
        assert len(inputs(train)) <= len(leaves)
        assert len(inputs(evaluation)) < len(tree.leaves((last.params, last.buffers))) + 6  # without optimizer state

    def test_only_slots_of_traced_callbacks_enter_graph(self):
        def keeps(state, event: fx.Updated, memory):
            return memory + 1, fx.Control()

        inside = fx.stateful("inside", lambda state: torch.zeros(977), keeps)
        counter = counting()
        step = fx.compile(fx.train_step(problem.loss_fn, fx.optim.sgd(0.1), callbacks=inside), backend=counter)
        state = fx.attach(fx.init(small(), fx.optim.sgd(0.1)), step)
        state = state.with_slot("outside", torch.zeros(983))
        outside = state.slots["outside"]
        state, _ = step(state, problem.data()[0])
        assert (977,) in inputs(counter)
        assert (983,) not in inputs(counter)
        assert float(state.slots["inside"][0]) == 1.0
        assert state.slots["outside"] is outside

    def test_changed_hyperparameters_do_not_recompile(self):
        counter = counting()
        tx = fx.optim.inject_hyperparams(fx.optim.sgd)(learning_rate=1.0)
        step = fx.compile(fx.train_step(problem.loss_fn, tx), backend=counter)
        state, sizes = fx.init(small(), tx), []
        for rate in (1.0, 0.1, 0.0):
            state = state.replace(opt_state=fx.optim.set_hyperparams(state.opt_state, learning_rate=rate))
            new, _ = step(state, problem.data()[0])
            sizes.append(float((new.params["2.weight"] - state.params["2.weight"]).norm()) / rate if rate else 0.0)
        assert counter.frame_count == 1
        assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)
        assert sizes[0] > sizes[2]

    @pytest.mark.parametrize(("dynamic", "graphs"), [(False, 2), (True, 1)])
    def test_new_size_recompiles_unless_dynamic(self, dynamic, graphs):
        counter, tx = counting(), fx.optim.sgd(0.1)
        step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
        state, compiled = fx.init(nn.Linear(2, 1), tx), fx.compile(step, backend=counter, dynamic=dynamic)
        for size in (8, 6, 8):
            close(compiled(state, torch.ones(size, 2)), step(state, torch.ones(size, 2)))
        assert counter.frame_count == graphs

    def test_steps_do_not_share_recompile_limit(self):
        def scaled(factor):
            return lambda state, batch: (state, fx.StepOutput({"sum": factor * batch.sum()}))

        state = fx.init(torch.tensor(1.0))
        with torch._dynamo.config.patch(recompile_limit=2):
            for factor in range(4):
                _, output = fx.compile(scaled(factor), backend="eager")(state, torch.ones(2))
                assert float(output.metrics["sum"]) == 2.0 * factor


class TestErrors:
    def test_compiled_step_is_rejected(self):
        step = fx.compile(problem.step(), backend="eager")
        with pytest.raises(
            TypeError, match=r"expected a step that is not compiled, got <compiled <step train_step\(loss_fn\), .*>>"
        ):
            fx.compile(step)

    def test_compiled_step_exposes_attributes_of_step(self):
        guard = fx.callbacks.nan_guard()
        step = fx.compile(problem.step(callbacks=guard), backend="eager")
        assert step.fires == {fx.Microbatch, fx.Gradients, fx.Updated}
        assert step.callbacks.handlers == (guard,)
        assert step.__name__ == "train_step(loss_fn)"
        assert fx.compile(problem.eval_step, backend="eager").callbacks == ()

    def test_graph_break_is_reported_with_line(self):
        def branches(model, batch):
            loss, _ = problem.loss_fn(model, batch)
            if loss > 0:
                return loss
            return -loss

        step = fx.train_step(branches, problem.transform())
        with pytest.raises(fx.GraphBreakError, match=r"in branches: if loss > 0:\n.*reads the value of a tensor"):
            fx.compile(step, backend="eager", fullgraph=True)(problem.start(), problem.data()[0])

    @pytest.mark.parametrize(
        ("function", "error", "message"),
        [
            (lambda s, b: s, TypeError, r"to return \(state, fxtrain\.StepOutput\(metrics\)\)"),
            (
                lambda s, b: (s.replace(params=tree.map(torch.Tensor.double, s.params)), fx.StepOutput({})),
                ValueError,
                r"got a float64 .* at state\.params\['0\.bias'\], which was a float32",
            ),
            (
                lambda s, b: (s.replace(params={name + "_": p for name, p in s.params.items()}), fx.StepOutput({})),
                ValueError,
                r"got one without state\.params\['0\.bias'\]",
            ),
            (
                lambda s, b: (s.replace(params=dict.fromkeys(s.params, 1.0)), fx.StepOutput({})),
                TypeError,
                r"state\.params\['0\.bias'\] to be a tensor, got 1\.0",
            ),
        ],
        ids=["result", "dtype", "name", "number"],
    )
    def test_step_error_equals_uncompiled_error(self, function, error, message):
        with pytest.raises(error, match=message):
            fx.compile(function, backend="eager")(problem.start(), problem.data()[0])

    def test_loss_error_equals_uncompiled_error(self):
        step = fx.train_step(lambda model, batch: model(batch["x"]), problem.transform())
        with pytest.raises(TypeError, match=r"to return a 0-d floating tensor"):
            fx.compile(step, backend="eager")(problem.start(), problem.data()[0])


def test_garbage_is_collected_less_often_only_while_a_step_is_traced():
    before, seen = gc.get_threshold(), []

    def loss_fn(model, batch):
        seen.append(gc.get_threshold()[0])
        return model(batch).mean()

    tx = fx.optim.sgd(0.1)
    step, state = fx.train_step(loss_fn, tx), fx.init(nn.Linear(2, 1), tx)
    fx.compile(step, check=False)(state, torch.ones(4, 2))
    step(state, torch.ones(4, 2))
    traced, uncompiled = seen
    assert traced > before[0] == uncompiled
    assert gc.get_threshold() == before


@pytest.mark.slow
def test_ahead_of_time_package_equals_default_mode_bitwise_and_is_loaded_from_cache(monkeypatch, tmp_path):
    """The step donates here. ``TestMatmuls`` has one that does not."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tx = fx.optim.sgd(fx.schedules.cosine(1e-1, 100), momentum=0.9)
    step, batches = fx.train_step(problem.loss_fn, tx), problem.data()
    start = fx.init(small(), tx)

    def run(compiled):
        state, losses = start.copy(), []
        for batch in batches:
            state, output = compiled(state, batch)
            losses.append(float(output.metrics["loss"]))
        return tree.leaves(state), losses

    expected, losses = run(fx.compile(step))
    for _ in range(2):
        ahead = fx.compile(step, mode="ahead-of-time", donate=True)
        found, found_losses = run(ahead)
        assert found_losses == losses
        assert all(map(torch.equal, found, expected))
        assert "ahead-of-time" in ahead.route
        assert len(list(tmp_path.rglob("*.pt2"))) == 1
        monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", None)
