"""Steps: their contract, the events they fire, and the cases in which they keep the state unchanged."""

import functools

import numpy as np
import problem
import pytest
import torch
from torch import nn

import fxtrain as fx
from fxtrain import metrics, testing, tree
from fxtrain.core import TRACED


def linear(size=2):
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(size, 1)
    with torch.no_grad():
        module.weight.copy_(torch.randn(1, size, generator=generator))
        module.bias.zero_()
    return module


def squares(model, batch):
    return model(batch).square().mean()


def train(loss_fn=squares, tx=None, module=None, **options):
    """Returns a state and its step, with the slots attached."""
    tx = tx or fx.optim.sgd(0.1)
    step = fx.train_step(loss_fn, tx, **options)
    return fx.attach(fx.init(module or linear(), tx), step), step


BATCH = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5], [2.0, 0.0]])


class TestStep:
    def test_step_and_position_advance_by_one(self):
        @fx.Step
        def strange(state, batch):
            return state.replace(step=state.step - 7, position=state.position + 100), fx.StepOutput({"seen": batch})

        state = fx.init(linear())
        for expected in (1, 2):
            state, output = strange(state, torch.tensor(3.0))
            assert (int(state.step), int(state.position)) == (expected, expected)
        assert float(output.metrics["seen"]) == 3.0
        assert output.control == fx.Control()

    def test_wraps_any_callable_and_keeps_its_name(self):
        def twice(factor, state, batch):
            return state.replace(params=tree.map(lambda p: p * factor, state.params)), fx.StepOutput({})

        class Callable:
            def __call__(self, state, batch):
                return twice(2.0, state, batch)

        state = fx.init(torch.tensor(1.0))
        assert float(fx.Step(functools.partial(twice, 2.0))(state, None)[0].params) == 2.0
        assert repr(fx.Step(functools.partial(twice, 2.0))) == "<step twice, fires nothing>"
        assert float(fx.Step(Callable())(state, None)[0].params) == 2.0

        def doubled(state, batch):
            """Doubles."""
            return twice(2.0, state, batch)

        assert fx.Step(doubled).__doc__ == "Doubles."
        assert repr(fx.train_step(squares, fx.optim.sgd(0.1))) == (
            "<step train_step(squares), fires Microbatch, Gradients, Updated>"
        )

    def test_hand_written_steps_fold_traced_events(self):
        def count(state, event: fx.Gradients, memory):
            return memory + 1, fx.Control(stop=event.loss < 0, reason="below zero", log={"count": memory})

        counter = fx.stateful("counter", lambda state: torch.tensor(0), count)
        find, tx = fx.gradients(lambda model, batch: model(batch).mean()), fx.optim.sgd(10.0)

        def by_hand(state, batch):
            found = find(state, batch)
            event = fx.Gradients(step=state.step + 1, loss=found.loss, metrics=found.metrics, grads=found.grads)
            state, control = counter(state, event)
            state, _ = fx.step.apply_gradients(state, found.grads, tx)
            return state, fx.StepOutput(found.metrics, control)

        step = fx.Step(by_hand, callbacks=counter, fires=[fx.Gradients])
        result = fx.fit(fx.init(linear(), tx), step, [BATCH], steps=9, callbacks=counter)
        assert result.reason == "below zero"
        assert int(result.state.slots["counter"]) == int(result.state.step) == 2

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            (
                lambda state: state,
                r"expected by_hand to return \(state, fxtrain\.StepOutput\(metrics\)\), got a TrainState\.",
            ),
            (lambda state: None, "by_hand to return .*, got None"),
            (lambda state: (state, {"loss": 1.0}), r"a tuple of \(a TrainState, a dict with keys 'loss'\)"),
            (lambda state: (fx.StepOutput({}), state), "a tuple of"),
        ],
    )
    def test_wrong_return_values_are_refused(self, returned, message):
        def by_hand(state, batch):
            return returned(state)

        with pytest.raises(TypeError, match=message):
            fx.Step(by_hand)(fx.init(linear()), None)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda s: {"params": {**s.params, "bias": s.params["bias"].double()}},
                r"got a float64 tensor of shape \[1\] at state\.params\['bias'\], which was a float32 tensor",
            ),
            (
                lambda s: {"params": {**s.params, "weight": s.params["weight"][:, :1]}},
                r"got .*\[1, 1\] at state\.params\['weight'\], which was .*\[1, 2\]",
            ),
            (
                lambda s: {"params": {"weight": s.params["weight"]}},
                r"by_hand to keep .*, got one without state\.params\['bias'\]",
            ),
            (
                lambda s: {"params": {"bias_": s.params["bias"], "weight": s.params["weight"]}},
                r"by_hand to keep .*, got one without state\.params\['bias'\]",
            ),
            (
                lambda s: {"slots": {"new": torch.tensor(0)}},
                r"by_hand to keep .*, got one with state\.slots\['new'\].* Keep new values in a slot of a callback",
            ),
            (lambda s: {"opt_state": []}, "by_hand to keep .* types of all containers in its state"),
            (lambda s: {"model": None}, "by_hand to keep the model"),
        ],
    )
    def test_changed_structure_shape_or_dtype_is_refused_by_path(self, change, message):
        def by_hand(state, batch):
            return state.replace(**change(state)), fx.StepOutput({})

        with pytest.raises(ValueError, match=message):
            fx.Step(by_hand)(fx.init(linear()), None)

    def test_in_place_write_to_the_state_is_refused_by_path(self):
        def by_hand(state, batch):
            state.params["weight"].add_(1.0)
            return state, fx.StepOutput({})

        with pytest.raises(RuntimeError, match=r"by_hand .* got an in-place write to state\.params\['weight'\]"):
            fx.Step(by_hand)(fx.init(linear()), None)

    def test_untraced_events_in_fires_are_refused(self):
        with pytest.raises(ValueError, match=r"fires to contain only Microbatch, Gradients, Updated, got StepEnd"):
            fx.Step(lambda state, batch: None, fires=[fx.StepEnd])


class TestStopped:
    """A stopped state is a fixed point of the step."""

    def test_keeps_every_leaf_bitwise_and_requests_nothing(self):
        def asks(state, event: fx.Updated, memory):
            return memory + 1, fx.Control(stop=event.step >= 2, reason="two", log={"count": memory})

        callback = fx.stateful("asks", lambda state: torch.tensor(0), asks)
        step = problem.step(accumulate=2, callbacks=callback)
        state, batches, controls = fx.attach(problem.start(), callback), problem.data(), []
        for index in range(5):
            before = state
            state, output = step(state, batches[index % 3])
            controls.append(output.control)
            if index >= 2:
                testing.assert_equal(state, before, f"call {index} of a stopped state")
        assert (int(state.step), int(state.slots["asks"]), bool(state.due.stop)) == (2, 2, True)
        assert [control.reasons("stop") for control in controls] == [[], ["two"], [], [], []]
        assert [bool(control.log["count"].when) for control in controls] == [True, True, False, False, False]

    def test_hand_written_step_keeps_a_stopped_state(self):
        step = fx.Step(lambda state, batch: (state.replace(params=state.params / 0.0), fx.StepOutput({})))
        state = fx.init(torch.tensor(1.0))
        state = state.replace(due=state.due._replace(stop=torch.tensor(True)))
        testing.assert_equal(step(state, None)[0], state, "a stopped state")


class TestGradients:
    def test_wrt_differentiates_one_entry(self):
        state = fx.init({"a": torch.tensor(2.0), "b": torch.tensor(5.0)})
        product = fx.gradients(lambda model, batch: model["a"] * model["b"], wrt="a")
        assert float(product(state, None).grads) == 5.0

    @pytest.mark.parametrize(
        ("module", "message"),
        [
            ({"a": linear(), "b": linear()}, "a key of a dict of modules, got 'c'. The model has the keys 'a', 'b'"),
            (linear(), "a key of a dict of modules, got 'c'. The model is not a dict"),
        ],
    )
    def test_unknown_wrt_entry_is_refused(self, module, message):
        with pytest.raises(ValueError, match=message):
            fx.gradients(squares, wrt="c")(fx.init(module), BATCH)

    def test_state_without_a_model_is_refused(self):
        with pytest.raises(ValueError, match="expected a state with a model, got one without"):
            fx.gradients(squares)(fx.init(linear()).replace(model=None), BATCH)

    def test_works_under_no_grad_and_inference_mode(self):
        state = fx.init(linear())
        wanted = fx.gradients(squares)(state, BATCH)
        with torch.no_grad():
            testing.assert_equal(fx.gradients(squares)(state, BATCH), wanted, "under no_grad")
        with torch.inference_mode():
            testing.assert_equal(fx.gradients(squares)(state, BATCH), wanted, "under inference_mode")
            state, step = train()
            step(state, BATCH)

    @pytest.mark.parametrize(
        ("returned", "error", "message"),
        [
            (
                lambda y: y,
                TypeError,
                r"bad .* to return a 0-d .*, got a float32 tensor of shape \[4, 1\]\. .* \.mean\(\)",
            ),
            (lambda y: y.sum()[None], TypeError, r"got a float32 tensor of shape \[1\]\. .* \.mean\(\)"),
            (lambda y: None, TypeError, "got None. End the function with return loss"),
            (lambda y: 1.0, TypeError, r"got 1\.0\. Return the tensor itself, without \.item\(\)"),
            (lambda y: np.float64(1.0), TypeError, r"got .*1\.0.*\. .* without \.item\(\)"),
            (lambda y: y.sum().long(), TypeError, r"got an int64 tensor of shape \[\]\. .* floating dtype"),
            (
                lambda y: (y.sum(), y),
                TypeError,
                r"a tuple of \(a float32 tensor of .*\)\. .* return loss, \{'accuracy'",
            ),
            (lambda y: (y.sum(),), TypeError, r"a tuple of \(a float32 tensor of shape \[\]\)\. Return the loss"),
            (lambda y: [y.sum()], TypeError, r"got a list of length 1\. Return the loss"),
            (lambda y: {"mae": y.sum()}, TypeError, "got a dict with keys 'mae'. .* under the name 'loss'"),
            (lambda y: {"loss": y}, TypeError, r"got a dict whose loss is a float32 tensor of shape \[4, 1\]"),
            (lambda y: nn.MSELoss(), TypeError, r"got an MSELoss\. Call an instance .* MSELoss\(\)\("),
            (
                lambda y: (y.sum(), {"error": 1.0}),
                TypeError,
                r"the metric 'error' of bad .* to be a 0-d tensor .*, got 1\.0\. .* without \.item",
            ),
            (lambda y: {"loss": y.sum(), "y": y}, TypeError, r"'y' of bad .* \[4, 1\]\. Reduce it, or leave it out"),
            (lambda y: (y.sum(), {"name": "a"}), TypeError, "'name' of bad .*, got 'a'. Leave it out"),
            (
                lambda y: (y.sum(), {"loss": y.sum()}),
                ValueError,
                "metrics of bad .* got a metric named 'loss'. Rename it",
            ),
        ],
    )
    def test_invalid_losses_are_refused(self, returned, error, message):
        def bad(model, batch):
            return returned(model(batch))

        with pytest.raises(error, match=message):
            fx.gradients(bad)(fx.init(linear()), BATCH)


class TestApplyGradients:
    def test_updates_only_trainable_parameters_of_one_entry(self):
        tx = {"a": fx.optim.adam(0.1), "b": fx.optim.sgd(0.1)}
        modules = {"a": linear(), "b": linear()}
        modules["a"].bias.requires_grad_(False)
        state = fx.init(modules, tx)
        found = fx.gradients(lambda model, x: squares(model["a"], x) + squares(model["b"], x), wrt="a")(state, BATCH)
        new, updates = fx.step.apply_gradients(state, found.grads, tx["a"], wrt="a")
        testing.assert_equal(new.params["b"], state.params["b"], "the other entry")
        testing.assert_equal(new.opt_state["b"], state.opt_state["b"], "the other memory")
        assert torch.equal(new.params["a"]["bias"], state.params["a"]["bias"])
        assert torch.equal(new.params["a"]["weight"], state.params["a"]["weight"] + updates["weight"])


class TestTrainStep:
    def test_equals_the_plain_torch_loop(self):
        module, data = problem.module(), problem.data()
        for part in (module[1], module[3]):
            part.eval()
        tx = fx.optim.adamw(1e-2)
        state, step = fx.init(module, tx), fx.train_step(problem.loss_fn, tx)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=1e-4)
        for batch in data:
            state, output = step(state, batch)
            optimizer.zero_grad()
            loss, measured = problem.loss_fn(module, batch)
            loss.backward()
            optimizer.step()
            torch.testing.assert_close(output.metrics, {"loss": loss.detach(), "mae": measured["mae"].detach()})
        torch.testing.assert_close(state.params, {name: p.detach() for name, p in module.named_parameters()})

    @pytest.mark.parametrize("accumulate", [2, 4, 8])
    def test_accumulation_equals_one_big_batch(self, accumulate):
        module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        batch = tree.map(torch.Tensor.double, problem.data()[0])
        tx = fx.optim.adamw(1e-2)
        state = fx.init(module, tx)
        whole, told = fx.train_step(problem.loss_fn, tx)(state, batch)
        parts, told_of_parts = fx.train_step(problem.loss_fn, tx, accumulate=accumulate)(state, batch)
        torch.testing.assert_close(parts.params, whole.params, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(told_of_parts.metrics, told.metrics, rtol=1e-12, atol=1e-14)

    def test_accumulated_metrics_are_averaged_or_merged(self):
        def loss_fn(model, batch):
            error = model(batch).abs()
            return error.mean(), {"mae": error.mean(), "all": metrics.Std.from_model_output(error)}

        (state, whole), (_, parts) = train(loss_fn), train(loss_fn, accumulate=4)
        wanted, told = whole(state, BATCH)[1].metrics, parts(state, BATCH)[1].metrics
        torch.testing.assert_close(metrics.compute(told), metrics.compute(wanted))

    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            (torch.ones(5, 2), r"accumulate=2: expected tensors .* got a float32 tensor of shape \[5, 2\] at batch\."),
            ({"x": BATCH, "y": torch.ones(2)}, r"got a float32 tensor of shape \[2\] at batch\['y'\]\. Choose"),
            (torch.tensor(4.0), r"got a float32 tensor .* at batch\."),
        ],
    )
    def test_indivisible_batch_is_refused(self, batch, message):
        state, step = train(accumulate=2)
        with pytest.raises(ValueError, match=message):
            step(state, batch)

    def test_leaves_without_a_batch_dimension_are_shared(self):
        seen = []

        def loss_fn(model, batch):
            seen.append({**batch, "x": batch["x"].shape, "mask": batch["mask"].shape})
            assert repr(seen[-1].pop("name")) == "<batch['name']: not a tensor>"
            return model(batch["x"] * batch["scale"]).square().mean()

        state, step = train(loss_fn, accumulate=2)
        batch = {"x": BATCH, "scale": torch.tensor(2.0), "mask": torch.ones(1, 3), "name": "four", "nothing": None}
        step(state, batch)
        del batch["name"]
        assert seen == [{**batch, "x": torch.Size([2, 2]), "mask": torch.Size([1, 3])}] * 2

    def test_lists_are_split_like_the_tensors(self):
        texts, places = ["a", "b", "c", "d"], ({"at": 1}, None, {"at": 3}, {"at": 4})
        batch = {"x": torch.arange(4), "text": texts, "more": {"places": places}, "classes": ["dog", "cat"], "n": "all"}
        first, second = fx.step.microbatches(batch, 2)
        assert (first["text"], second["text"]) == (["a", "b"], ["c", "d"])
        assert (first["more"]["places"], second["more"]["places"]) == (places[:2], places[2:])
        assert first["classes"] == second["classes"] == ["dog", "cat"]
        assert first["n"] == second["n"] == "all"

    @pytest.mark.parametrize("accumulate", [0, -1, 1.5, True])
    def test_invalid_accumulate_is_refused(self, accumulate):
        with pytest.raises((TypeError, ValueError), match="expected accumulate to be a positive int"):
            fx.train_step(squares, fx.optim.sgd(0.1), accumulate=accumulate)

    @pytest.mark.parametrize("tx", [None, {"a": fx.optim.sgd(0.1)}, torch.optim.SGD])
    def test_invalid_transformation_is_refused(self, tx):
        with pytest.raises(TypeError, match="gradient transformation"):
            fx.train_step(squares, tx)


class TestTracedEvents:
    def test_fields_match_the_step(self):
        seen = []

        def record(state, event: fx.Microbatch | fx.Gradients | fx.Updated):
            seen.append((event, state))
            return state, fx.Control()

        tx = fx.optim.sgd(0.5)
        step = fx.train_step(
            lambda model, batch: (squares(model, batch), {"n": batch.sum()}), tx, accumulate=2, callbacks=record
        )
        state = fx.init(linear(), tx)
        new, output = step(state, BATCH)
        (first, _), (second, _), (gradients, before), (updated, after) = seen
        halves = [fx.gradients(squares)(state, half) for half in BATCH.chunk(2)]
        assert [type(event) for event, _ in seen] == [fx.Microbatch, fx.Microbatch, fx.Gradients, fx.Updated]
        assert [int(event.step) for event, _ in seen] == [1, 1, 1, 1]
        for index, (event, half) in enumerate(zip((first, second), halves, strict=True)):
            assert event.index == index
            testing.assert_equal((event.loss, event.grads), (half.loss, half.grads), "a microbatch")
            assert set(event.metrics) == {"loss", "n"}
        mean = tree.map(lambda a, b: (a + b) / 2, halves[0].grads, halves[1].grads)
        for event in (gradients, updated):
            testing.assert_equal(event.grads, mean, "the averaged gradients")
            testing.assert_equal(event.metrics, dict(output.metrics), "the metrics")
            assert torch.equal(event.loss, event.metrics["loss"])
        testing.assert_equal(before.params, state.params, "the state at Gradients")
        testing.assert_equal(after.params, new.params, "the state at Updated")
        testing.assert_equal(updated.updates, tree.map(lambda g: -0.5 * g, mean), "the updates")
        assert not bool(updated.skipped)

    @pytest.mark.parametrize("at", TRACED)
    def test_log_reaches_the_output(self, at):
        callback = fx.on(at, lambda state, event: (state, fx.Control(log={"loss seen": event.loss})))
        state, step = train(callbacks=callback)
        _, output = step(state, BATCH)
        assert torch.equal(output.control.log["loss seen"].value, output.metrics["loss"])

    def test_last_log_wins_and_name_conflicts_are_refused(self):
        def log(at):
            return fx.on(at, lambda state, event: (state, fx.Control(log={"x": event.loss, type(event).__name__: 1.0})))

        both = log(fx.Microbatch | fx.Updated)
        state, step = train(accumulate=2, callbacks=both)
        _, output = step(state, BATCH)
        assert torch.equal(output.control.log["x"].value, output.metrics["loss"])
        assert set(output.control.log) == {"x", "Microbatch", "Updated"}

        def other(state, event: fx.Gradients):
            return state, fx.Control(log={"x": event.loss})

        state, step = train(callbacks=[both, other])
        with pytest.raises(ValueError, match="got 'x' from <lambda> and from other"):
            step(state, BATCH)

    @pytest.mark.parametrize(
        ("at", "control", "message"),
        [
            (fx.Gradients, {"evaluate": True}, "possible at Gradients, got evaluate. Request it at EpochBegin"),
            (
                fx.Updated,
                {"skip_update": True},
                "possible at Updated, got skip_update. Request it at Microbatch, Gradients",
            ),
            (fx.Microbatch, {"save": True}, "possible at Microbatch, got save"),
        ],
    )
    def test_unsupported_requests_are_refused(self, at, control, message):
        state, step = train(callbacks=fx.on(at, lambda state, event: (state, fx.Control(**control))))
        with pytest.raises(ValueError, match=message):
            step(state, BATCH)

    def test_callback_that_writes_outside_slots_is_refused(self):
        def writes(state, event: fx.Gradients):
            return state.replace(params=tree.map(torch.zeros_like, state.params)), fx.Control()

        state, step = train(callbacks=writes)
        with pytest.raises(
            ValueError, match=r"writes changed state\.params at Gradients: expected writes to slots only"
        ):
            step(state, BATCH)

    @pytest.mark.parametrize("how", ["eager", "compiled", "donating", "by dynamo", "vmapped"])
    def test_missing_slot_is_attached_by_the_step(self, how):
        def counts(state, event: fx.Updated, memory):
            return memory + state.params["weight"].sum(), fx.Control()

        counter = fx.stateful("memory", lambda state: state.params["bias"], counts)
        attached, step = train(callbacks=counter)
        bare = attached.replace(slots={})
        wanted, _ = step(*(step(attached, BATCH)[0], BATCH))
        call = step
        if how == "vmapped":
            bare = tree.map(lambda leaf: leaf[None], bare)
            call = torch.vmap(step, (0, None))
        elif how == "by dynamo":
            call = torch.compile(step, fullgraph=True, backend="eager")
        elif how != "eager":
            call = fx.compile(step, backend="eager", donate=how == "donating", on_recompile="error")
        first, _ = call(bare, BATCH)
        kept = first.copy()
        second, _ = call(first, BATCH)
        got = tree.map(lambda leaf: leaf[0], second) if how == "vmapped" else second
        testing.assert_equal(tree.structure(kept), tree.structure(second), "structure")
        torch.testing.assert_close(tree.leaves(got), tree.leaves(wanted))
        assert bare.slots == {}
        assert bool(tree.leaves(bare.params)[0].isfinite().all())  # its buffers were not donated


class TestSkippedUpdate:
    @pytest.mark.parametrize("at", [fx.Microbatch, fx.Gradients])
    def test_keeps_parameters_optimizer_state_and_buffers(self, at):
        def skip_the_second(state, event, memory):
            flag = (event.step == 2) & torch.tensor(getattr(event, "index", 0) == 0)
            return memory + 1, fx.Control(skip_update=flag, reason="the second")

        seen = []

        def watch(state, event: fx.Updated):
            seen.append(bool(event.skipped))
            return state, fx.Control()

        callback = fx.stateful("count", lambda state: torch.tensor(0), _annotated(skip_the_second, at))
        step = problem.step(accumulate=2, callbacks=[callback, watch])
        states = [fx.attach(problem.start(), step)]
        for batch in problem.data():
            states.append(step(states[-1], batch)[0])
        _, first, second, third = states
        for name in ("params", "opt_state", "buffers"):
            testing.assert_equal(getattr(second, name), getattr(first, name), name)
        assert not torch.equal(third.params["0.weight"], second.params["0.weight"])
        assert [int(state.step) for state in states] == [int(state.position) for state in states] == [0, 1, 2, 3]
        per_step = 2 if at is fx.Microbatch else 1
        assert int(third.slots["count"]) == 3 * per_step
        assert seen == [False, True, False]

    def test_adds_no_select_without_a_skipping_callback(self, monkeypatch):
        calls = []
        original = tree.where
        monkeypatch.setattr(tree, "where", lambda *args: calls.append(1) or original(*args))
        state, step = train()
        step(state, BATCH)
        assert len(calls) == 1  # the select for a stopped state


def _annotated(function, kind):
    function.__annotations__["event"] = kind
    return function


class TestEvalStep:
    def test_runs_in_eval_mode_without_changing_the_state(self):
        state, batch = problem.start(), problem.data()[0]
        before = state.copy()
        module = problem.module().eval()
        loss, measured = problem.loss_fn(module, batch)
        output = problem.eval_step(state, batch)
        torch.testing.assert_close(output.metrics, {"loss": loss.detach(), "mae": measured["mae"].detach()})
        testing.assert_equal(state, before, "the state measured")
        assert output.outputs is None
        assert repr(problem.eval_step) == "<eval_step(loss_fn)>"

    def test_returns_outputs(self):
        step = fx.eval_step(lambda model, batch: ({"size": model(batch).sum()}, {"y": model(batch)}), outputs=True)
        output = step(fx.init(linear()), BATCH)
        assert list(output.metrics) == ["size"]
        assert output.outputs["y"].shape == (4, 1)

    @pytest.mark.parametrize(
        ("measure", "outputs", "message"),
        [
            (lambda model, batch: model(batch), False, r"return a 0-d .*, got a float32 tensor of shape \[4, 1\]"),
            (lambda model, batch: {"y": model(batch)}, False, r"the metric 'y' of <lambda> .* got a float32 tensor"),
            (lambda model, batch: model(batch).sum(), True, r"to return a pair \(metrics, outputs\) .*, got a float32"),
        ],
    )
    def test_invalid_return_values_are_refused(self, measure, outputs, message):
        with pytest.raises(TypeError, match=message):
            fx.eval_step(measure, outputs=outputs)(fx.init(linear()), BATCH)
