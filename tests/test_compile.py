"""Compiled steps: one graph for a whole run, with the results of the uncompiled step."""

import gc
import re

import problem
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import fxtrain as fx
from fxtrain import testing, tree
from fxtrain._torch_internals.kernels import shared_libraries
from fxtrain.compiler.passes import _matmuls as matmul
from fxtrain.compiler.passes._scalars import hoist_scalars


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


def changed(change, function, given):
    """Traces the function and applies ``change`` to its graph."""
    graph = make_fx(function, tracing_mode="fake")(*given)
    change(graph.graph)
    graph.recompile()
    return graph


def operations(graph):
    return {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}


class TestMatmuls:
    """Large matmuls use oneDNN, with biases added separately."""

    @pytest.fixture(autouse=True)
    def _anywhere(self, monkeypatch):
        if not torch.backends.mkldnn.is_available():
            pytest.skip("torch was built without oneDNN")
        monkeypatch.setattr(matmul, "_pays", lambda: True)

    @pytest.mark.parametrize("rows", [4, 256])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("turned", [False, True])
    def test_large_matmuls_use_onednn_with_same_result(self, rows, bias, turned):
        def function(x, other, more):
            other = other.t() if turned else other
            return torch.addmm(more, x, other) if bias else x @ other

        given = torch.randn(rows, 96), torch.randn((112, 96) if turned else (96, 112)), torch.randn(112)
        graph = changed(matmul.speed_up_matmuls, function, given)
        assert ("fxtrain.linear.default" in operations(graph)) == (rows == 256)
        assert "aten.addmm.default" not in operations(graph)
        torch.testing.assert_close(graph(*given), function(*given), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("vendor", "family", "expected"),
        [("AuthenticAMD", 25, False), ("AuthenticAMD", 26, True), ("GenuineIntel", 26, False)],
    )
    def test_onednn_requires_full_width_amd_vectors(self, vendor, family, expected):
        processor = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 1\n"
        assert matmul._is_full_width(processor) == expected

    def test_unsupported_dtype_is_unchanged(self):
        given = torch.randn(256, 96, dtype=torch.float64), torch.randn(96, 112, dtype=torch.float64)
        graph = changed(matmul.speed_up_matmuls, torch.mm, given)
        assert operations(graph) == {"aten.mm.default"}

    def test_bfloat16_keeps_fused_bias(self):
        """A separate bias would be rounded twice."""
        given = [torch.randn(*shape, dtype=torch.bfloat16) for shape in ((112,), (4, 96), (96, 112))]
        graph = changed(matmul.speed_up_matmuls, torch.addmm, given)
        assert operations(graph) == {"aten.addmm.default"}

    @pytest.mark.slow
    def test_step_with_onednn_equals_eager(self):
        tx = fx.optim.sgd(0.1)
        step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
        module = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
        state, batch = fx.init(module, tx), torch.randn(256, 128)
        expected, output = step(state, batch)
        ahead = fx.compile(step, mode="ahead-of-time")
        ends = [compiled(state, batch) for compiled in (fx.compile(step), ahead)]
        for found, compiled in ends:
            torch.testing.assert_close(found.params, expected.params, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(compiled.metrics["loss"], output.metrics["loss"])
        assert all(map(torch.equal, *map(tree.leaves, ends)))
        assert "ahead-of-time" in ahead.route


class TestScalars:
    """Scalars that many elements read are computed once."""

    @pytest.mark.parametrize(
        ("function", "shapes", "expected"),
        [
            (lambda x, y: x * -torch.expm1(y), [(64,), ()], 1),
            (lambda x, y: x[:4] * torch.expm1(y), [(64,), ()], 0),  # no more elements than one vector
            (lambda x, y: x * (y + 1), [(64,), ()], 0),  # cheap to recompute
            (lambda x, y: (x * y).exp(), [(64,), ()], 0),  # differs per element
            (lambda x, y: (x * torch.cos(y), x - torch.cos(y)), [(64,), ()], 2),
            (lambda x, y: x * (1 - torch.exp(y))[:, None, None], [(3, 8, 8), (3,)], 1),  # several runs under vmap
            (lambda x, y: x * torch.cos(y).to(torch.float32), [(64,), ()], 1),
        ],
    )
    def test_expensive_scalars_are_computed_once(self, function, shapes, expected):
        given = [torch.randn(shape) for shape in shapes]
        graph = changed(hoist_scalars, function, given)
        kept = [node for node in graph.graph.nodes if str(node.target) == "fxtrain.once.default"]
        assert len(kept) == expected
        assert all(node.meta["val"].numel() <= 3 for node in kept)
        torch.testing.assert_close(graph(*given), function(*given), rtol=0, atol=0)

    @pytest.mark.parametrize("write", [lambda y, view: y.add_(1.0), lambda y, view: view.add_(1.0)])
    def test_in_place_writes_to_scalars_are_respected(self, write):
        def function(x, y):
            y = torch.log(y)
            view = y.view(())
            write(y, view)
            return x * view, x * y

        given = torch.randn(64), torch.rand(1)
        graph = changed(hoist_scalars, function, given)
        torch.testing.assert_close(graph(*given), function(*given), rtol=0, atol=0)

    @pytest.mark.slow
    def test_scalars_are_hoisted_out_of_parameter_loops(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        tx = fx.optim.adamw(fx.schedules.cosine(1e-1, 100))
        step = fx.train_step(lambda model, batch: model(batch).square().mean(), tx)
        state, batch = fx.init(nn.Linear(64, 64), tx), torch.randn(4, 64)
        (found, _), (code,) = run_and_get_code(fx.compile(step), state, batch)
        close(found, step(state, batch)[0])
        loops = re.findall(r"^( +)for\(.*\n((?:\1[ {].*\n)+)", code, re.MULTILINE)
        assert sum("sqrt(" in loop for _, loop in loops) >= 2  # for weight and bias
        # Bias corrections have their own loop over step counts, before the loops over elements. The bound of their
        # exponents identifies it.
        assert any("(-750.0)" in loop for _, loop in loops)
        assert not any("sqrt(" in loop and "(-750.0)" in loop for _, loop in loops)
        assert "cos(" in code
        assert not any(re.search(r"\bcos\(", loop) for _, loop in loops)


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
