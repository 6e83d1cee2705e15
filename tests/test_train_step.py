"""The step of supervised training: accumulation, the events it fires, and skipped updates."""

import problem
import pytest
import torch
from problem import SMALL_BATCH, linear, squares, train
from torch import nn

import fxtrain as fx
from fxtrain import metrics, testing, tree
from fxtrain.core import TRACED


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
            expected = {"loss": loss.detach(), "mae": measured["mae"].detach(), "learning_rate": torch.tensor(1e-2)}
            torch.testing.assert_close(output.metrics, expected)
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
        wanted, told = whole(state, SMALL_BATCH)[1].metrics, parts(state, SMALL_BATCH)[1].metrics
        torch.testing.assert_close(metrics.compute(told), metrics.compute(wanted))

    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            (torch.ones(5, 2), r"accumulate=2: expected tensors .* got a float32 tensor of shape \[5, 2\] at batch\."),
            ({"x": SMALL_BATCH, "y": torch.ones(2)}, r"got a float32 tensor of shape \[2\] at batch\['y'\]\. Choose"),
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
        batch = {
            "x": SMALL_BATCH,
            "scale": torch.tensor(2.0),
            "mask": torch.ones(1, 3),
            "name": "four",
            "nothing": None,
        }
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
        new, output = step(state, SMALL_BATCH)
        (first, _), (second, _), (gradients, before), (updated, after) = seen
        halves = [fx.gradients(squares)(state, half) for half in SMALL_BATCH.chunk(2)]
        assert [type(event) for event, _ in seen] == [fx.Microbatch, fx.Microbatch, fx.Gradients, fx.Updated]
        assert [int(event.step) for event, _ in seen] == [1, 1, 1, 1]
        for index, (event, half) in enumerate(zip((first, second), halves, strict=True)):
            assert event.index == index
            testing.assert_equal((event.loss, event.grads), (half.loss, half.grads), "a microbatch")
            assert set(event.metrics) == {"loss", "n"}
        mean = tree.map(lambda a, b: (a + b) / 2, halves[0].grads, halves[1].grads)
        for event in (gradients, updated):
            testing.assert_equal(event.grads, mean, "the averaged gradients")
            assert torch.equal(event.loss, event.metrics["loss"])
        testing.assert_equal(updated.metrics, dict(output.metrics), "the metrics")
        assert output.metrics.keys() - gradients.metrics.keys() == {"learning_rate"}
        testing.assert_equal(before.params, state.params, "the state at Gradients")
        testing.assert_equal(after.params, new.params, "the state at Updated")
        testing.assert_equal(updated.updates, tree.map(lambda g: -0.5 * g, mean), "the updates")
        assert not bool(updated.skipped)

    @pytest.mark.parametrize("at", TRACED)
    def test_log_reaches_the_output(self, at):
        callback = fx.on(at, lambda state, event: (state, fx.Control(log={"loss seen": event.loss})))
        state, step = train(callbacks=callback)
        _, output = step(state, SMALL_BATCH)
        assert torch.equal(output.control.log["loss seen"].value, output.metrics["loss"])

    def test_last_log_wins_and_name_conflicts_are_refused(self):
        def log(at):
            return fx.on(at, lambda state, event: (state, fx.Control(log={"x": event.loss, type(event).__name__: 1.0})))

        both = log(fx.Microbatch | fx.Updated)
        state, step = train(accumulate=2, callbacks=both)
        _, output = step(state, SMALL_BATCH)
        assert torch.equal(output.control.log["x"].value, output.metrics["loss"])
        assert set(output.control.log) == {"x", "Microbatch", "Updated"}

        def other(state, event: fx.Gradients):
            return state, fx.Control(log={"x": event.loss})

        state, step = train(callbacks=[both, other])
        with pytest.raises(ValueError, match="got 'x' from <lambda> and from other"):
            step(state, SMALL_BATCH)

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
            step(state, SMALL_BATCH)

    def test_callback_that_writes_outside_slots_is_refused(self):
        def writes(state, event: fx.Gradients):
            return state.replace(params=tree.map(torch.zeros_like, state.params)), fx.Control()

        state, step = train(callbacks=writes)
        with pytest.raises(
            ValueError, match=r"writes changed state\.params at Gradients: expected writes to slots only"
        ):
            step(state, SMALL_BATCH)

    @pytest.mark.parametrize("how", ["eager", "compiled", "donating", "by dynamo", "vmapped"])
    def test_missing_slot_is_attached_by_the_step(self, how):
        def counts(state, event: fx.Updated, memory):
            return memory + state.params["weight"].sum(), fx.Control()

        counter = fx.stateful("memory", lambda state: state.params["bias"], counts)
        attached, step = train(callbacks=counter)
        bare = attached.replace(slots={})
        wanted, _ = step(*(step(attached, SMALL_BATCH)[0], SMALL_BATCH))
        call = step
        if how == "vmapped":
            bare = tree.map(lambda leaf: leaf[None], bare)
            call = torch.vmap(step, (0, None))
        elif how == "by dynamo":
            call = torch.compile(step, fullgraph=True, backend="eager")
        elif how != "eager":
            call = fx.compile(step, backend="eager", donate=how == "donating", on_recompile="error")
        first, _ = call(bare, SMALL_BATCH)
        kept = first.copy()
        second, _ = call(first, SMALL_BATCH)
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
        step(state, SMALL_BATCH)
        assert len(calls) == 1  # the select for a stopped state


def _annotated(function, kind):
    function.__annotations__["event"] = kind
    return function
