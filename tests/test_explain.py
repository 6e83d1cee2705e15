"""diagnostics.explain: FLOPs, bytes, times, compile route, graph breaks and constants. Leaves its inputs unchanged."""

import inspect
import random
import time
import warnings

import problem
import pytest
import torch
import torch.nn.functional as F

import fxtrain as fx
from fxtrain import testing, tree
from fxtrain.diagnostics import Break, explain

TX = fx.optim.sgd(0.1)


def start(module=None):
    return fx.init(torch.nn.Linear(4, 3) if module is None else module, TX)


def square(model, batch):
    return model(batch["x"]).square().mean()


def line(function, part):
    """Returns the line number at which ``part`` appears in a function."""
    lines, first = inspect.getsourcelines(function)
    return first + next(index for index, text in enumerate(lines) if part in text)


BATCH = {"x": torch.ones(8, 4)}


class TestCounts:
    def test_flops_of_linear_layer(self):
        found = explain(fx.train_step(square, TX), start(), BATCH, calls=0)
        # Forward: [8, 4] @ [4, 3]. Backward: the weight's gradient, [3, 8] @ [8, 4]. The input needs no gradient.
        assert found.flops == {"addmm": 2 * 8 * 4 * 3, "mm": 2 * 3 * 8 * 4}

    def test_flops_of_attention(self):
        def attend(model, batch):
            x = model(batch["x"]).reshape(1, 2, 8, 16)
            return F.scaled_dot_product_attention(x, x, x).square().mean()

        state, batch = start(torch.nn.Linear(16, 16)), {"x": torch.ones(16, 16)}
        found = explain(fx.train_step(attend, TX), state, batch, calls=0)
        attention = {name: count for name, count in found.flops.items() if "attention" in name or "bmm" in name}
        forward = 2 * 2 * (2 * 8 * 8 * 16)  # two matmuls for each of two heads
        assert sum(attention.values()) >= 3 * forward  # backward costs twice as much, or more with recomputation

    def test_state_bytes_add_up_over_parts(self):
        state = problem.start()
        found = explain(problem.step(), state, problem.data()[0], calls=0)
        assert sum(found.state_bytes.values()) == sum(leaf.nbytes for leaf in tree.leaves(state))
        assert found.state_bytes["params"] == sum(leaf.nbytes for leaf in tree.leaves(state.params))
        assert found.state_bytes["opt_state"] > 2 * found.state_bytes["params"]
        assert found.batch_bytes == 8 * 4 * 4 + 8 * 4

    def test_traffic_includes_reads_and_writes(self):
        @fx.Step
        def halve(state, batch):
            return state.replace(params=state.params * 0.5), fx.StepOutput({"loss": batch.mean()})

        state = fx.init(torch.ones(1000))
        found = explain(halve, state, torch.ones(500), calls=0)
        rest = 200  # flags, counters, the metric
        assert 4000 + 4000 + 2000 <= found.least_traffic <= 4000 + 4000 + 2000 + rest
        assert found.most_traffic > found.least_traffic

    def test_operations_grow_with_the_graph(self):
        few = explain(fx.train_step(square, TX), start(), BATCH, calls=0).operations
        more = explain(fx.train_step(square, TX, accumulate=2), start(), BATCH, calls=0).operations
        assert 0 < few < more

    def test_assumptions_list_every_leaf(self):
        state, step = start(), fx.train_step(square, TX)
        found = explain(step, state, BATCH, calls=0)
        assert found.assumed["batch['x']"] == "float32[8, 4] on cpu"
        assert len(found.assumed) == len(tree.leaves(state)) + 1
        assert found.varied == {}

    def test_varied_shapes_are_listed(self):
        state, step = start(), fx.compile(fx.train_step(square, TX), backend="eager", on_recompile="allow")
        step(state, {"x": torch.ones(5, 4)})
        found = explain(step, state, BATCH, calls=0)
        assert found.varied == {"batch['x']": ("float32[5, 4] on cpu", "float32[8, 4] on cpu")}
        assert "batch['x']: float32[5, 4] on cpu, float32[8, 4] on cpu" in repr(found)


@pytest.fixture(scope="module")
def by_dynamo():
    """The explanation of a step by torch.compile, with its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = explain(fx.compile(fx.train_step(square, TX), backend="eager"), start(), BATCH, calls=5)
    return found, [str(warning.message) for warning in caught]


class TestTime:
    def test_compiled_step_has_call_and_graph_times(self):
        found = explain(fx.train_step(square, TX), start(), BATCH, calls=5)
        assert set(found.seconds) == {"calling", "graph"}
        assert all(spent > 0 for spent in found.seconds.values())
        assert found.first_seconds > sum(found.seconds.values())
        assert 0 < found.kernels <= found.operations
        assert (found.graphs, found.breaks) == (1, ())

    def test_slow_graph_raises_graph_time(self, by_dynamo):
        def slow(graph, inputs):
            def run(*args):
                time.sleep(0.1)
                return graph.forward(*args)

            return run

        quick = by_dynamo[0].seconds
        found = explain(fx.compile(fx.train_step(square, TX), backend=slow), start(), BATCH, calls=5).seconds
        assert found["graph"] >= 0.1
        assert found["graph"] > quick["graph"]

    def test_zero_calls_compile_nothing(self):
        found = explain(fx.train_step(square, TX), start(), BATCH, calls=0)
        assert (found.seconds, found.first_seconds, found.kernels) == ({}, None, None)


def branches(model, batch):
    y = model(batch["x"])
    if y.sum() > 0:
        y = y * 2
    return y.square().mean()


def reads(model, batch):
    return square(model, batch) * batch["x"].sum().item()


def masks(model, batch):
    y = model(batch["x"])
    return y[y > -1e9].mean()


def checks(model, batch):
    assert (batch["x"] > 0).all()
    return square(model, batch)


def two(model, batch):
    y = model(batch["x"])
    scale = float(batch["x"].sum())
    return y[y > -1e9].mean() * scale


def by_numpy(model, batch):
    y = model(batch["x"])
    return y.square().mean() * float(y.detach().numpy().sum())


class TestRoute:
    @pytest.mark.parametrize(
        ("loss_fn", "part", "reason", "route"),
        [
            (branches, "if y.sum()", "Python reads the value of a tensor", "inductor, traced with checks"),
            (checks, "assert", "Python reads the value of a tensor", "inductor, traced with checks"),
            (reads, ".item()", "Python reads the value of a tensor", "inductor, traced"),
            (masks, "y[y >", "The shape of the result depends on values", "inductor, traced"),
        ],
    )
    def test_one_graph_route_lists_value_reads_at_user_lines(self, loss_fn, part, reason, route):
        step = fx.compile(fx.train_step(loss_fn, TX))
        found = explain(step, start(), BATCH, calls=0)
        (only,) = found.reads
        assert only.where == f"{__file__}:{line(loss_fn, part)} in {loss_fn.__name__}"
        assert part in only.code
        assert reason in only.reason
        assert (found.route, found.graphs, found.breaks) == (route, 1, ())
        assert f"\n  route       {route}: the step as one graph" in repr(found)
        assert ("which each call checks" in repr(found)) == ("checks" in route)
        assert str(only) in repr(found)
        assert len(step.possible_routes) > 1  # the step itself has chosen no route yet

    def test_regions_route_is_the_same_before_and_after_first_call(self, capfd):
        step = fx.compile(fx.train_step(branches, TX), backend="eager")
        before = explain(step, start(), BATCH, calls=0)
        with pytest.warns(UserWarning, match="cannot be traced as one graph"):  # explain has not suppressed the warning
            step(start(), BATCH)
        after = explain(step, start(), BATCH, calls=0)
        assert step.route == before.route == after.route == "eager, regions"
        assert before.cause == after.cause == f"{__file__}:{line(branches, 'if y.sum()')} in branches | if y.sum() > 0:"
        assert f"because of {before.cause}" in repr(before)
        assert capfd.readouterr().err == ""

    def test_route_is_none_if_fullgraph_fails(self):
        step = fx.train_step(by_numpy, TX, differentiate="autograd")
        found = explain(fx.compile(step, fullgraph=True), start(), BATCH, calls=0)
        assert found.route == "none"
        assert "fullgraph=True" in found.cause

    def test_route_found_by_first_call_causes_no_warning(self, by_dynamo):
        found, said = by_dynamo
        assert (found.route, found.outcome.split(",")[0]) == ("eager", "the step as one graph by torch.compile")
        assert not [text for text in said if "cannot be traced" in text]


class TestBreaks:
    def test_step_without_graphs_is_timed_uncompiled(self):
        found = explain(fx.train_step(by_numpy, TX, differentiate="autograd"), start(), BATCH, calls=2)
        (only,) = found.breaks
        assert only.where == f"{__file__}:{line(by_numpy, 'numpy()')} in by_numpy"
        assert found.graphs == 0
        assert set(found.seconds) == {"uncompiled"}
        assert (found.flops, found.operations, found.reads) == (None, None, ())
        assert str(only) in repr(found)

    def test_all_breaks_are_listed(self):
        found = explain(fx.train_step(two, TX), start(), BATCH, calls=0)
        scale, mask = (each.code for each in found.breaks or found.reads)
        assert scale.startswith("scale = float(")
        assert mask.startswith("return y[y > ")

    def test_value_read_in_callback_is_located(self):
        def look(state, event: fx.Gradients):
            return state, fx.Control(skip_update=bool(event.loss > 0), reason="positive")

        (only,) = explain(fx.train_step(square, TX, callbacks=look), start(), BATCH, calls=0).reads
        assert only.where.endswith("in look")

    def test_breaks_are_counted_for_dynamo_backends(self):
        found = explain(fx.compile(fx.train_step(square, TX), backend="eager"), start(), BATCH, calls=0)
        assert (found.graphs, found.breaks) == (1, ())
        found = explain(fx.compile(fx.train_step(branches, TX), backend="eager"), start(), BATCH, calls=0)
        (only,) = found.breaks
        assert only.where == f"{__file__}:{line(branches, 'if y.sum()')} in branches"
        assert "Python reads the value of a tensor here" in only.reason

    def test_error_in_loss_function_is_raised_unchanged(self):
        def wrong(model, batch):
            return model(batch["y"]).mean()

        with pytest.raises(KeyError, match="'y'"):
            explain(fx.train_step(wrong, TX), start(), BATCH)

    def test_break_without_user_code_shows_reason_only(self):
        assert str(Break("because")) == "because"


class TestPurity:
    @pytest.mark.parametrize("how", ["uncompiled", "compiled", "donated", "refused"])
    def test_explain_leaves_inputs_unchanged(self, how):
        batch, tx = problem.data()[0], fx.optim.sgd(0.1, momentum=0.9)
        state = fx.init(torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Dropout(), torch.nn.Linear(4, 1)), tx)
        step = fx.train_step(branches if how == "refused" else problem.loss_fn, tx)
        if how != "uncompiled":
            step = fx.compile(step, backend="eager", donate=how == "donated")
        leaves, copies = [*tree.leaves(state), *tree.leaves(batch)], [state.copy(), tree.clone(batch)]
        versions, generator = [leaf._version for leaf in leaves], torch.random.get_rng_state()
        explain(step, state, batch, calls=3 if how != "uncompiled" else 0)
        assert [leaf._version for leaf in leaves] == versions
        assert all(a is b for a, b in zip([*tree.leaves(state), *tree.leaves(batch)], leaves, strict=True))
        testing.assert_equal(state, copies[0], "the state")
        testing.assert_equal(batch, copies[1], "the batch")
        assert torch.equal(torch.random.get_rng_state(), generator)
        assert getattr(step, "graphs", 0) == 0

    def test_copied_step_compiles_separate_graphs(self):
        state, step = start(), fx.compile(fx.train_step(square, TX), backend="eager", on_recompile="error")
        step(state, BATCH)
        copied = step.fresh()
        for size in (2, len(BATCH["x"])):
            copied(state, {"x": torch.ones(size, 4)})  # recompiles without an error
        assert (step.graphs, copied.graphs) == (1, 2)
        testing.assert_equal(copied(state, BATCH)[0], step(state, BATCH)[0], "the state")
        assert (step.graphs, copied.graphs) == (1, 2)

    def test_missing_slots_are_attached(self):
        step = problem.step(callbacks=fx.callbacks.ema(0.9))
        found = explain(step, problem.start(), problem.data()[0], calls=0)
        assert found.state_bytes["slots"] > 0


class TestDisplay:
    def test_repr_and_html_list_all_fields(self):
        found = explain(fx.train_step(square, TX), start(), BATCH, calls=0)
        text = repr(found)
        assert text.startswith("Explanation of <step train_step(square), fires Microbatch, Gradients, Updated>\n")
        assert "\n  route       inductor, traced: the step as one graph\n  graphs      1, no breaks\n" in text
        assert "\n  FLOPs       384: addmm 192, mm 192\n" in text
        assert "\n              batch['x']: float32[8, 4] on cpu" in text
        assert "<b>Explanation of &lt;step train_step(square)" in found._repr_html_()
        assert "<td>384: addmm 192, mm 192</td>" in found._repr_html_()

    def test_explanation_is_frozen(self):
        found = explain(fx.train_step(square, TX), start(), BATCH, calls=0)
        with pytest.raises(AttributeError):
            found.graphs = 2

    def test_evaluation_step_is_explained(self):
        found = explain(problem.eval_step, problem.start(), problem.data()[0], calls=0)
        assert set(found.flops) == {"addmm"}
        assert not any("opt_state" in path for path in found.assumed)

    def test_negative_calls_are_rejected(self):
        with pytest.raises(ValueError, match="expected calls to be an int of at least 0, got -1"):
            explain(fx.train_step(square, TX), start(), BATCH, calls=-1)


SCALE = 2.0


class TestConstants:
    def test_constants_include_closures_globals_and_defaults(self):
        weight, teacher = torch.ones(3), torch.nn.Linear(4, 3)

        def scaled(y):
            return y * SCALE

        def loss_fn(model, batch, *, power=3):
            return ((scaled(model(batch["x"])) - teacher(batch["x"])) * weight).abs().pow(power).mean()

        step = fx.train_step(loss_fn, TX, accumulate=2)
        found = explain(step, start(), BATCH, calls=0)
        assert found.constants == {
            "SCALE": "2.0",
            "power": "3",
            "teacher": "a module of type Linear",
            "weight": "a float32 tensor of shape [3]",
        }
        assert "\n  constants   SCALE = 2.0\n" in repr(found)
        assert explain(fx.train_step(square, TX), start(), BATCH, calls=0).constants == {}

    def test_constants_of_custom_and_evaluation_steps_are_listed(self):
        factor = 0.5

        def by_hand(state, batch):
            found = fx.gradients(square)(state, batch)
            return state, fx.StepOutput({"loss": found.loss * factor})

        assert explain(by_hand, start(), BATCH, calls=0).constants == {"factor": "0.5"}
        evaluation = fx.eval_step(lambda model, batch: square(model, batch) * factor)
        assert explain(evaluation, start(), BATCH, calls=0).constants == {"factor": "0.5"}

    def test_clock_reads_and_random_samples_are_breaks(self):
        def clock(model, batch):
            return square(model, batch) * time.time()

        def draw(model, batch):
            return square(model, batch) * random.random()

        for loss_fn, said in ((clock, "a read of time.time()"), (draw, "samples from Python's random module")):
            found = explain(fx.train_step(loss_fn, TX), start(), BATCH, calls=0)
            assert said in found.breaks[0].reason
